"""One training step of one member, for any objective; vmapped over members by `program`.

A member is one training run. What is trained is an `Objective`, how gamma moves a
`homotopy.Homotopy`; this module brings them together. Shapes: B batch, D dimensions of the data.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from vaebal.homotopy import Homotopy, Seen, steady_rate
from vaebal.homotopy import State as HomotopyState
from vaebal.streams import stream
from vaebal.training.optimiser import Optimisation, weights_optimiser


class Member(NamedTuple):
    """What may differ between stacked members; scalars, or [M] when stacked."""

    seed: Array | int
    latents: Array | int = 0  # kappa
    gamma: Array | float = 1.0  # where the decoder variance starts
    learning_rate: Array | float = 1.0  # a factor on the settings' schedule
    residual: Array | float = 1.0  # 1 or 0: the decoder's skips, where the model leaves them open
    affine: Array | float = 1.0  # 1 or 0: eq. 5's skip, likewise
    rule: Any = ()  # numbers of the member's homotopy, as the program's `rule` takes them


class At(NamedTuple):
    """Where in training a loss is asked for."""

    member: Member
    step: Array  # []
    open: Array  # []: only the first so many latents are in the model
    given: Any  # what does not change in training: the data's mean, frozen parameters


class Told(NamedTuple):
    """What a loss tells beside its value."""

    statistics: dict[str, Array]  # of any shapes; an epoch's metrics are means of them
    mean_square: Array | float = jnp.nan  # E|x - x_hat|^2 / D, which a learned gamma follows
    mean: Array | None = None  # [B, K], the posterior means
    kept: Any = ()  # what `Objective.residual` needs of the loss's work


class Objective(NamedTuple):
    """What is trained: pure functions of parameters, which have "log_gamma" where a rule moves it.

    Attributes:
      init: (member, given) -> the weights, without log gamma.
      loss: (params, batch, at) -> (value [], `Told`).
      dim: D, the dimensions that gamma is the variance of.
      residual: (params, told) -> x - x_hat at the posterior mean, [b, D], of some of the batch;
        for a homotopy that reads it.
      summary: (params, means of the statistics, batch, at) -> the epoch's metrics.
    """

    init: Callable[[Member, Any], Any]
    loss: Callable[[Any, Any, At], tuple[Array, Told]]
    dim: int
    residual: Callable[[Any, Told], Array] | None = None
    summary: Callable[[Any, dict[str, Array], Any, At], dict[str, Array]] = (
        lambda params, means, batch, at: means
    )


# The numbers of a member -> its homotopy; None where the objective has no gamma.
Rule = Callable[[Member], Homotopy] | None


class State(NamedTuple):
    """All that training carries from step to step."""

    step: Array
    weights: Any
    opt_state: Any  # means nothing once stopped
    homotopy: HomotopyState | tuple  # () where the objective has no gamma
    stopped: Array  # -1, or the step whose loss, gradient or next gamma was not finite: never taken

    @property
    def params(self) -> Any:
        """The weights and, where a homotopy moves it, "log_gamma"."""
        if isinstance(self.homotopy, HomotopyState):
            return {**self.weights, "log_gamma": self.homotopy.log_gamma}
        return self.weights


def stack_members(members: Sequence[Member]) -> Member:
    """Members of Python numbers -> one `Member` of arrays [M], integers but the rule's as int32.

    Raises:
      ValueError: an integer of a rule is no float32.
    """

    def stacked(*values: Any) -> np.ndarray:
        return np.array(values, np.int32 if isinstance(values[0], int) else np.float32)

    for path, number in jax.tree_util.tree_leaves_with_path([member.rule for member in members]):
        if isinstance(number, int) and int(np.float32(number)) != number:
            where = jax.tree_util.keystr(path[1:])
            raise ValueError(f"Member.rule{where}={number} is no float32: give a smaller number.")
    floats = [
        member._replace(
            gamma=float(member.gamma),
            learning_rate=float(member.learning_rate),
            residual=float(member.residual),
            affine=float(member.affine),
            rule=jax.tree.map(float, member.rule),
        )
        for member in members
    ]
    return jax.tree.map(stacked, *floats)


def member_params(state: State, index: int) -> Any:
    """The parameters of one member of a stacked state."""
    return jax.tree.map(lambda leaf: leaf[index], state.params)


def init_state(
    objective: Objective, settings: Optimisation, rule: Rule, member: Member, given: Any
) -> State:
    """One member's state before its first step; pure in member.seed."""
    weights = objective.init(member, given)
    homotopy = ()
    if rule is not None:
        key = stream(member.seed, "residual")
        homotopy = rule(member).init(member.gamma, member.latents, key)
    return State(
        jnp.zeros((), jnp.int32),
        weights,
        weights_optimiser(settings).init(weights),
        homotopy,
        jnp.full((), -1, jnp.int32),
    )


def train_step(
    objective: Objective,
    settings: Optimisation,
    rule: Rule,
    member: Member,
    state: State,
    batch: Any,
    given: Any,
) -> tuple[State, dict[str, Array]]:
    """One step of one member on a batch.

    A step whose loss, gradient or next gamma is not finite is the member's end: weights, gamma and
    step stay as they were before it, for good.

    Returns:
      The state, and the step's statistics: the loss's, "loss", "gradient_norm" (of the weights,
      times gamma) and, where gamma has a rule that follows it, "residual_variance".
    """
    number = member.latents if rule is None else state.homotopy.open
    at = At(member, state.step, jnp.asarray(number), given)
    log_gamma = {} if rule is None else {"log_gamma": state.homotopy.log_gamma}
    # The weights follow gamma times the gradient: that of ||x - x_hat||^2 / 2 + gamma KL, which
    # keeps its scale while gamma falls by orders of magnitude. On the plain gradient Adam's second
    # moment lags behind 1 / gamma^2, and its steps are several times too long.
    gamma = 1.0 if rule is None else jnp.exp(state.homotopy.log_gamma)

    def scaled(weights: Any) -> tuple[Array, tuple[Array, Told]]:
        loss, told = objective.loss({**weights, **log_gamma}, batch, at)
        return gamma * loss, (loss, told)

    gradients, (loss, told) = jax.grad(scaled, has_aux=True)(state.weights)
    longest = jnp.inf
    if rule is not None and settings.jitter > 0:
        longest = steady_rate(gamma, objective.dim, settings.jitter) / member.learning_rate
        # Of a gamma that is no number: such a step would be none either at rate 0.
        longest = jnp.where(jnp.isnan(longest), 0.0, longest)
    gradient_norm = optax.tree.norm(gradients)
    taken = (state.stopped < 0) & jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    if rule is not None:
        moved = _moved(objective, rule(member), state, told)
        # Asked for here so that what reads the weights comes before what writes them: XLA would
        # keep a copy of them for it.
        taken &= jnp.isfinite(moved.log_gamma)
    # A step not taken is Adam's step on no gradient at rate 0. Choosing between all of the state
    # before and after would need both at once: a sixth of a step's time on a CPU.
    optimiser = weights_optimiser(settings, taken, longest)
    updates, opt_state = optimiser.update(gradients, state.opt_state, state.weights)
    # Adam's step is linear in its rate.
    rate = jnp.where(taken, member.learning_rate, 0.0)
    weights = optax.apply_updates(
        state.weights, jax.tree.map(lambda update: rate * update, updates)
    )
    statistics = {"loss": loss, **told.statistics, "gradient_norm": gradient_norm}
    homotopy = state.homotopy
    if rule is not None:
        homotopy = jax.tree.map(lambda new, old: jnp.where(taken, new, old), moved, homotopy)
        statistics["residual_variance"] = homotopy.residual_variance
    step = jnp.where(taken, state.step + 1, state.step)
    stopped = jnp.where(taken | (state.stopped >= 0), state.stopped, state.step)
    return State(step, weights, opt_state, homotopy, stopped), statistics


def _moved(objective: Objective, homotopy: Homotopy, state: State, told: Told) -> HomotopyState:
    """The homotopy's state after a step."""
    seen = Seen(state.step, told.mean_square)
    if homotopy.reads_residual:
        residual = objective.residual(state.params, told)
        seen = Seen(state.step, told.mean_square, residual, told.mean)
    return homotopy.update(seen, state.homotopy)
