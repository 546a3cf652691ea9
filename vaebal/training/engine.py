"""One training loop: whole epochs in one compiled call, members of a sweep stacked.

A member is one training run. Members that differ only in seed, kappa, skips, learning rate
or gamma's rate have states of equal shapes and are stacked on a leading axis M and vmapped;
a lone member is the case M = 1. Nothing that training does depends on how it is cut into
chunks, so a resumed run repeats the uninterrupted one.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vaebal.data import Decode, epoch_order, mean_image, steps_per_epoch
from vaebal.models import GaussianVAE, Outputs, init_params, latent_noise
from vaebal.models.gaussians import isotropic_nll, reparameterise
from vaebal.models.objectives import gaussian_vae_terms
from vaebal.streams import stream
from vaebal.training.checkpoints import Checkpoints, Preempted
from vaebal.training.devices import LeaveNotice, place
from vaebal.units import to_unit_pixels

# The residual is followed on this part of a batch: decoding at the posterior mean is extra work.
RESIDUAL_PART = 4
# Nats of log gamma a step, at most, once the guard goes: the learning rate is small by then.
RELEASED_RATE = 0.02
# A variance has fallen anew where the log of its running mean, over so many times the memory of the
# estimate itself, is so many nats lower.
PLATEAU_MEMORY, PLATEAU_FALL = 2, 0.1
# A latent is opened after `Member.patience` steps without such a fall; while all is moving fast,
# after this share of the steps so far, and so many at least.
EARLY_PATIENCE, LEAST_PATIENCE = 0.15, 300
# Leaves with fewer elements are never split: their gathering would cost more than their memory.
WHOLE_BELOW = 2**14


class Member(NamedTuple):
    """What may differ between stacked members; scalars, or [M] when stacked.

    gamma_end, gamma_guard: see `next_log_gamma`; patience: see `open_latents`.
    """

    seed: Array
    kappa: Array
    gamma_start: Array  # decoder variance at step 0
    gamma_rate: Array  # log gamma moves at most so many nats a step; "adam": its learning rate
    gamma_end: Array | float = 0.0  # 0: gamma is learned; else a value that it descends to
    gamma_guard: Array | float = 0.0  # 0: none; only the rule "adaptive" has one
    gamma_release: Array | float = 0.0  # 1: the guard goes towards the end; 0: it stays
    learning_rate: Array | float = 1.0  # a factor on the settings' schedule
    residual: Array | float = 1.0  # 1 or 0: the decoder's skips, where the model leaves them open
    affine: Array | float = 1.0  # 1 or 0: eq. 5's skip, likewise
    jitter: Array | float = 0.0  # 0: none; else see `steady_rate`
    patience: Array | float = 0.0  # steps; 0: all latents are open from the start


class ResidualMode(NamedTuple):
    """A running estimate of the direction in which the residual x - x_hat(mean) varies most."""

    direction: Array  # [D], unit length
    variance: Array  # [], along it


class Plateau(NamedTuple):
    """Since when a variance has not fallen."""

    level: Array  # [], running mean of its log
    lowest: Array  # [], where the level last fell anew
    since: Array  # [], the step of that


class Settling(NamedTuple):
    """What the rule "adaptive" remembers of how far the model has settled."""

    mode: ResidualMode
    plateau: Plateau


class TrainState(NamedTuple):
    """All that training carries from step to step."""

    step: Array
    params: Any
    opt_state: Any  # of the weights; means nothing once stopped
    gamma_state: Any  # Settling ("adaptive"), Adam's state ("adam"), or ()
    open: Array  # only the first so many latents are in the model
    stopped: Array  # -1, or the step whose loss or gradient was not finite: never taken


class EpochMetrics(NamedTuple):
    """Means over one epoch's steps, per member; NaN for one that has stopped."""

    loss: Array  # -ELBO, nats per example
    squared_error: Array  # ||x - x_hat||^2 at sampled z
    kl: Array  # summed over dimensions, nats
    gradient_norm: Array  # of the weights, times gamma
    gamma: Array  # after the last step
    latent_gradient: Array  # E|d(-ELBO)/dz|_2 on the first batch's images, after the last step
    residual_variance: Array  # the residual's largest, "adaptive" only; NaN else
    active: Array  # latents with Var_x(E[z|x]) > .01 over the epoch
    informative: Array  # latents with mean sigma^2 < 1/2 over the epoch
    open: Array  # latents in the model, after the last step
    stopped: Array  # see TrainState


class Optimisation(NamedTuple):
    """Optimiser settings, shared by all members.

    The weights follow Adam with linear warm-up and cosine decay. See `next_log_gamma` for
    gamma.
    """

    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    total_steps: int
    clip_norm: float  # of gamma times the gradient, see `train_step`
    gamma_rule: str  # "closed_form", "adaptive", "adam" or "fixed"
    release: tuple[float, float] = (0.6, 0.8)  # "adaptive": when the guard goes, shares of steps
    slowest: float = 0.0  # "adaptive": nats of log gamma a step that it falls even when guarded
    guard_memory: int = 10  # "adaptive": steps over which the guarding variance is averaged
    beta2: float = 0.999  # Adam's, of the weights: near 1 it lags behind a gradient that grows


def weights_optimiser(
    settings: Optimisation, taken: Array | bool = True, highest_rate: Array | float = jnp.inf
) -> optax.GradientTransformation:
    """Clipped Adam with warm-up and cosine decay, at no rate above `highest_rate`.

    A step not `taken` follows no gradient.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        settings.warmup_steps,
        max(settings.total_steps, settings.warmup_steps + 1),
        settings.final_learning_rate,
    )
    # After the clipping, so that its norm and the one in the statistics are computed once.
    gate = optax.stateless_with_tree_map(lambda update, _: jnp.where(taken, update, 0.0))
    adam = optax.adam(lambda step: jnp.minimum(schedule(step), highest_rate), b2=settings.beta2)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), gate, adam)


def steady_rate(member: Member, gamma: Array, dim: int) -> Array:
    """Adam's highest rate at which its noise stays below gamma: sqrt(jitter gamma / D).

    Adam moves every weight by about its rate, whatever the gradient, so noise alone gives a
    decoder column w a length |w|^2 of the order D rate^2. Where that is not far below gamma, it is
    what keeps the residual from falling, and an idle latent's posterior variance,
    1 / (1 + |w|^2 / gamma) (Theorem 1), says that it is in use.
    """
    return jnp.where(member.jitter > 0, jnp.sqrt(member.jitter * gamma / dim), jnp.inf)


def without_gamma(params: dict[str, Any]) -> dict[str, Any]:
    """The weights: all parameters but log gamma."""
    return {name: leaf for name, leaf in params.items() if name != "log_gamma"}


def next_log_gamma(
    log_gamma: Array,
    mean_square: Array,
    member: Member,
    guarded_variance: float | Array = 0.0,
    slowest: float = 0.0,
) -> Array:
    """Where log gamma goes in one step: towards its target, by at most `member.gamma_rate` nats.

    The target of a learned gamma is its stationary value E|x - x_hat|^2 / d (closed form), so
    that the rate, the speed of the homotopy, is the one thing to choose; a member with
    gamma_end > 0 descends to that value instead, and rate 0 holds gamma where it starts. A
    guarded gamma falls below `guarded_variance` only at the speed `slowest`.

    Args:
      log_gamma: [].
      mean_square: E|x - x_hat|^2 / d of the batch, at sampled z.
      guarded_variance: a variance; the guard holds gamma and never raises it, so of a noisy
        estimate the least value counts.
      slowest: nats a step; above 0, what no training explains cannot hold gamma for ever.
    """
    target = jnp.where(member.gamma_end > 0, jnp.log(member.gamma_end), jnp.log(mean_square))
    guard = jnp.minimum(jnp.log(guarded_variance), log_gamma - slowest)
    # A non-finite error must stay non-finite: clip would hide it.
    step = jnp.clip(jnp.maximum(target, guard) - log_gamma, -member.gamma_rate, member.gamma_rate)
    return jnp.where(jnp.isfinite(mean_square), log_gamma + step, mean_square)


def follow_residual(mode: ResidualMode, residual: Array, memory: int) -> ResidualMode:
    """One step of Oja's rule on the residuals [B, D] of a batch.

    The variance is measured along the direction found before this batch, so that noise in
    the batch does not bias it upwards.

    Args:
      memory: steps; direction and variance move by its inverse.
    """
    along = residual @ mode.direction  # [B]
    pull = along @ residual / (len(residual) * jnp.maximum(mode.variance, 1e-30))
    direction = mode.direction + pull / memory
    variance = mode.variance + (jnp.square(along).mean() - mode.variance) / memory
    return ResidualMode(direction / jnp.linalg.norm(direction), variance)


def follow_plateau(plateau: Plateau, variance: Array, step: Array, memory: int) -> Plateau:
    """A step more of `variance` []; its level is a mean over about `memory` steps."""
    level = plateau.level + (jnp.log(variance) - plateau.level) / memory
    fell = level < plateau.lowest - PLATEAU_FALL
    lowest = jnp.where(fell, level, plateau.lowest)
    return Plateau(level, lowest, jnp.where(fell, step, plateau.since))


def open_latents(
    member: Member, state: TrainState, plateau: Plateau, mean: Array, released: Array
) -> tuple[Array, Plateau]:
    """How many latents are open after a step: one more where those open have done what they can.

    That is where all of them are in use and the residual's largest variance has not fallen for
    `member.patience` steps, or early in training for a share of the steps so far. Were all open
    from the start, a curve whose principal directions have variances near each other would wake a
    latent for each of them: none carries enough, at a gamma so near these variances, for the
    decoder to bend around it. One alone carries more and more while gamma falls. A closed latent
    is the prior's, as after Theorem 2's collapse.

    Once the guard goes none is opened, and the last one opened is closed again if it is idle, its
    means' variance at most .1: what the data had no use for while gamma was guarded would wake up
    to explain what is left.

    Args:
      plateau: of the residual's largest variance.
      mean: [B, K], the posterior means of a batch.
      released: [], whether the guard goes.

    Returns:
      Their number, and the plateau, which begins anew where that has grown.
    """
    waited = state.step - plateau.since
    early = jnp.maximum(EARLY_PATIENCE * state.step, LEAST_PATIENCE)
    wait = jnp.minimum(member.patience, early)
    # Of the posterior means, as jitter alone can make an idle latent's posterior variance small.
    used = mean.var(0) > 0.1
    latent = jnp.arange(mean.shape[1])
    all_used = (used | (latent >= state.open)).all()
    last_used = (used & (latent == state.open - 1)).any()
    grows = ~released & (waited > wait) & all_used & (state.open < member.kappa)
    shrinks = released & (member.patience > 0) & ~last_used & (state.open > 1)
    since = jnp.where(grows, state.step, plateau.since)
    lowest = jnp.where(grows, plateau.level, plateau.lowest)
    return state.open + grows - shrinks, Plateau(plateau.level, lowest, since)


def release(settings: Optimisation, step: Array) -> Array:
    """A released guard's factor: 1 at first, then falling in the log to 1e-4, and 0 after it."""
    start, end = (share * settings.total_steps for share in settings.release)
    falling = jnp.exp(jnp.log(1e-4) * jnp.clip((step - start) / (end - start), 0.0, 1.0))
    return jnp.where(step < end, falling, 0.0)


def init_state(
    model: GaussianVAE, settings: Optimisation, member: Member, data_mean: Array
) -> TrainState:
    """One member's state before its first step; pure in member.seed."""
    params = init_params(
        model, stream(member.seed, "init"), data_mean, member.kappa,
        residual=member.residual, affine=member.affine,
    )  # fmt: skip
    gamma_state = ()
    if settings.gamma_rule != "fixed":
        log_gamma = jnp.log(jnp.asarray(member.gamma_start, params["log_gamma"].dtype))
        params["log_gamma"] = log_gamma
        if settings.gamma_rule == "adam":
            gamma_state = optax.adam(member.gamma_rate).init(log_gamma)
        elif settings.gamma_rule == "adaptive":
            direction = jax.random.normal(stream(member.seed, "residual"), (model.outputs,))
            variance = jnp.asarray(member.gamma_start, float)
            gamma_state = Settling(
                ResidualMode(direction / jnp.linalg.norm(direction), variance),
                Plateau(jnp.log(variance), jnp.log(variance), jnp.zeros((), jnp.int32)),
            )
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        weights_optimiser(settings).init(without_gamma(params)),
        gamma_state,
        jnp.where(member.patience > 0, 1, member.kappa).astype(jnp.int32),
        jnp.full((), -1, jnp.int32),
    )


def loss_and_terms(
    model: GaussianVAE, params: Any, x: Array, eps: Array, kappa: Array | None = None
):
    """Mean -ELBO of a batch in nats (the one place that reduces), with (outputs, terms)."""
    outputs = model.apply({"params": params}, x, eps, kappa)
    terms = gaussian_vae_terms(x, outputs)
    return terms.negative_elbo.mean(), (outputs, terms)


def gamma_step(
    model: GaussianVAE,
    settings: Optimisation,
    member: Member,
    state: TrainState,
    x: Array,
    outputs: Outputs,
    gradient: Array | None,
) -> tuple[Array, Any, Array]:
    """Where gamma goes in one step on x [B, D], and which latents are open after it.

    Args:
      outputs: the model's on x, before the step.
      gradient: of the loss by log gamma, [], which only the rule "adam" follows; None where gamma
        is no parameter.

    Returns:
      log gamma [], the rule's state and the number of open latents, as in `TrainState`.
    """
    if settings.gamma_rule == "fixed":
        return outputs.log_gamma, state.gamma_state, state.open
    if settings.gamma_rule == "adam":
        update, gamma_state = optax.adam(member.gamma_rate).update(gradient, state.gamma_state)
        return outputs.log_gamma + update, gamma_state, state.open
    mean_square = jnp.square(x - outputs.x_hat).mean()
    if settings.gamma_rule == "closed_form":
        log_gamma = next_log_gamma(outputs.log_gamma, mean_square, member)
        return log_gamma, state.gamma_state, state.open
    part = max(len(x) // RESIDUAL_PART, 1)
    at_mean = model.apply({"params": state.params}, outputs.mean[:part], method="decode")
    memory = settings.guard_memory
    mode = follow_residual(state.gamma_state.mode, x[:part] - at_mean, memory)
    held = jnp.where(member.gamma_release > 0, release(settings, state.step), 1.0)
    released_rate = jnp.maximum(member.gamma_rate, RELEASED_RATE)
    log_gamma = next_log_gamma(
        outputs.log_gamma,
        mean_square,
        member._replace(gamma_rate=jnp.where(held < 1, released_rate, member.gamma_rate)),
        held * member.gamma_guard * mode.variance,
        settings.slowest,
    )
    plateau = follow_plateau(
        state.gamma_state.plateau, mode.variance, state.step, PLATEAU_MEMORY * memory
    )
    number, plateau = open_latents(member, state, plateau, outputs.mean, held < 1)
    return log_gamma, Settling(mode, plateau), number


def train_step(
    model: GaussianVAE,
    settings: Optimisation,
    member: Member,
    state: TrainState,
    x: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of one member on the batch x [B, D] in [0, 1].

    A step whose loss or gradient is not finite is the member's end: parameters, gamma and step
    stay as they were before it, for good.
    """
    eps = latent_noise(stream(member.seed, "noise", state.step), len(x), model.latents)
    (loss, (outputs, terms)), gradients = jax.value_and_grad(
        lambda params: loss_and_terms(model, params, x, eps, state.open), has_aux=True
    )(state.params)
    gamma = jnp.exp(outputs.log_gamma)
    # The weights follow gamma times the gradient: that of ||x - x_hat||^2 / 2 + gamma KL,
    # which keeps its scale while gamma falls by orders of magnitude. On the plain gradient
    # Adam's second moment lags behind 1 / gamma^2, and its steps are several times too long.
    scaled = jax.tree.map(lambda gradient: gamma * gradient, without_gamma(gradients))
    gradient_norm = optax.tree.norm(scaled)
    taken = (state.stopped < 0) & jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    # A step not taken is Adam's step on no gradient at rate 0. Choosing between all of the state
    # before and after would need both at once: a sixth of a step's time on a CPU.
    weights = without_gamma(state.params)
    highest_rate = steady_rate(member, gamma, x.shape[-1]) / member.learning_rate
    optimiser = weights_optimiser(settings, taken, highest_rate)
    updates, opt_state = optimiser.update(scaled, state.opt_state, weights)
    # Adam's step is linear in its rate.
    rate = jnp.where(taken, member.learning_rate, 0.0)
    params = optax.apply_updates(weights, jax.tree.map(lambda update: rate * update, updates))
    log_gamma, gamma_state, number = jax.tree.map(
        lambda new, old: jnp.where(taken, new, old),
        gamma_step(model, settings, member, state, x, outputs, gradients.get("log_gamma")),
        (outputs.log_gamma, state.gamma_state, state.open),
    )
    residual_variance = jnp.full((), jnp.nan, loss.dtype)
    if settings.gamma_rule == "adaptive":
        residual_variance = gamma_state.mode.variance
    if settings.gamma_rule != "fixed":
        params["log_gamma"] = log_gamma
    statistics = {
        "loss": loss,
        "squared_error": terms.squared_error.mean(),
        "kl": terms.kl.sum(-1).mean(),
        "gradient_norm": gradient_norm,
        "residual_variance": residual_variance,
        "mean": outputs.mean.mean(0),
        "mean_squared": jnp.square(outputs.mean).mean(0),
        "variance": jnp.exp(outputs.log_var).mean(0),
    }
    step = jnp.where(taken, state.step + 1, state.step)
    stopped = jnp.where(taken | (state.stopped >= 0), state.stopped, state.step)
    return TrainState(step, params, opt_state, gamma_state, number, stopped), statistics


def latent_gradient_norm(
    model: GaussianVAE, params: Any, x: Array, kappa: Array, seed: Array
) -> Array:
    """The mean over x [B, D] of |d(-ELBO)/dz|_2 at one sampled z each, in nats (Figure 1).

    The draws of z are the same whenever this is asked.
    """
    eps = latent_noise(stream(seed, "probe"), len(x), model.latents)
    mean, log_var = model.apply({"params": params}, x, kappa, method="encode")
    mask = model.latent_mask(kappa)
    eps = jnp.where(mask, eps, 0.0)

    def reconstruction(z):
        x_hat = model.apply({"params": params}, z, method="decode")
        log_gamma = model.apply({"params": params}, method="log_gamma")
        return isotropic_nll(jnp.square(x - x_hat).sum(-1), log_gamma, x.shape[-1]).sum()

    gradient = jax.grad(reconstruction)(reparameterise(mean, log_var, eps))
    gradient = jnp.where(mask, gradient, 0.0)  # padding, which the decoder is never given
    return jnp.linalg.norm(gradient, axis=-1).mean()


def stack_members(members: Sequence[Member]) -> Member:
    """Members of Python numbers -> one `Member` of arrays [M]."""
    integers = ("seed", "kappa")
    return Member(
        *(
            np.array(values, np.int32 if name in integers else np.float32)
            for name, values in zip(Member._fields, zip(*members, strict=True), strict=True)
        )
    )


def member_params(state: TrainState, index: int) -> Any:
    """The parameters of one member of a stacked state."""
    return jax.tree.map(lambda leaf: leaf[index], state.params)


def mesh_for(members: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Axes "member" and "data" over `devices`: all of every process unless told otherwise.

    Members need no word from each other, so they come first: a stack is spread over the greatest
    common divisor of its size and the devices' number, and the devices that this leaves to every
    part of it share each batch.
    """
    devices = jax.devices() if devices is None else devices
    spread = math.gcd(members, len(devices))
    return jax.make_mesh(
        (spread, len(devices) // spread), ("member", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto), devices=devices,
    )  # fmt: skip


def placed(shapes: Any, mesh: Mesh, split: bool) -> Any:
    """Stacked states' shapes [M, ...], with where they lie on a mesh of `mesh_for`.

    Each device holds its own members. If `split`, it holds only a part of their larger leaves,
    cut along the longest axis that the data axis divides (fully sharded data parallelism).

    Args:
      shapes: a tree of arrays or jax.ShapeDtypeStruct.

    Returns:
      The tree of jax.ShapeDtypeStruct with shardings.
    """
    parts = mesh.shape["data"]

    def one(leaf) -> jax.ShapeDtypeStruct:
        axes: list[str | None] = ["member", *(None for _ in leaf.shape[1:])]
        cuts = [axis for axis in range(1, leaf.ndim) if leaf.shape[axis] % parts == 0]
        if split and cuts and math.prod(leaf.shape[1:]) >= WHOLE_BELOW:
            axes[max(cuts, key=lambda axis: leaf.shape[axis])] = "data"
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, shapes)


# A state and the sums of its steps' statistics.
Tallied = tuple[TrainState, dict[str, Array]]


def no_statistics(model: GaussianVAE) -> dict[str, Array]:
    """The sums of `train_step`'s statistics over no step."""
    scalars = ("loss", "squared_error", "kl", "gradient_norm", "residual_variance")
    per_latent = ("mean", "mean_squared", "variance")
    return {
        name: jnp.zeros((model.latents,) if name in per_latent else ())
        for name in (*scalars, *per_latent)
    }


def tallied_step(
    model: GaussianVAE, settings: Optimisation, member: Member, tallied: Tallied, x: Array
) -> Tallied:
    """`train_step`, with its statistics added."""
    state, sums = tallied
    state, statistics = train_step(model, settings, member, state, x)
    return state, jax.tree.map(jnp.add, sums, statistics)


def epoch_metrics(
    model: GaussianVAE, member: Member, tallied: Tallied, steps: int, x: Array
) -> EpochMetrics:
    """The metrics of an epoch of `steps` steps; the latent gradient is probed on x [B, D]."""
    state, sums = tallied
    means = jax.tree.map(lambda total: total / steps, sums)
    activity = means["mean_squared"] - jnp.square(means["mean"])
    log_gamma = model.apply({"params": state.params}, method="log_gamma")
    metrics = EpochMetrics(
        loss=means["loss"],
        squared_error=means["squared_error"],
        kl=means["kl"],
        gradient_norm=means["gradient_norm"],
        gamma=jnp.exp(log_gamma),
        latent_gradient=latent_gradient_norm(model, state.params, x, state.open, member.seed),
        residual_variance=means["residual_variance"],
        active=(activity > 0.01).sum(),
        informative=(means["variance"] < 0.5).sum(),
        open=state.open,
        stopped=state.stopped,
    )
    running = jax.tree.map(lambda value: jnp.where(state.stopped < 0, value, jnp.nan), metrics)
    return running._replace(stopped=state.stopped)


def train_epochs(
    model: GaussianVAE,
    settings: Optimisation,
    batch_size: int,
    mesh: Mesh,
    member: Member,
    state: TrainState,
    decode: Decode,
    images: Array,
    epochs: Array,
) -> tuple[TrainState, EpochMetrics]:
    """`epochs` (traced: chunks of any length share one program) epochs of one member.

    Args:
      decode: stored rows -> x [B, D] in [0, 1].
      images: the training split [N, ...], as stored.

    Returns:
      The state, and the metrics of the last epoch.
    """
    size, steps = len(images), steps_per_epoch(len(images), batch_size)
    by_example = NamedSharding(mesh, PartitionSpec("data"))

    def step(carry, indices):
        x = jax.lax.with_sharding_constraint(decode(images[indices]), by_example)
        return tallied_step(model, settings, member, carry, x), None

    def epoch(_, carry):
        state, _ = carry
        order = epoch_order(member.seed, state.step // steps, size, batch_size)
        tallied, _ = jax.lax.scan(step, (state, no_statistics(model)), order)
        return tallied

    tallied = jax.lax.fori_loop(0, epochs, epoch, (state, no_statistics(model)))
    x = decode(images[:batch_size])
    return tallied[0], epoch_metrics(model, member, tallied, steps, x)


class Trainer:
    """The compiled program of a stack of members: `init`, then `run` any number of epochs.

    `run` is compiled ahead of time, so it cannot retrace: other shapes are an error. In several
    processes every call is made by all of them, with the same members and images.

    Attributes:
      compile_seconds: what compiling took.
    """

    def __init__(
        self,
        model: GaussianVAE,
        settings: Optimisation,
        members: Member,
        images: np.ndarray,
        batch_size: int,
        decode: Decode = to_unit_pixels,
        mesh: Mesh | None = None,
        shard_parameters: bool = False,
    ):
        """Compiles for the devices of `mesh` (default: `mesh_for` of all devices).

        Args:
          shard_parameters: whether the devices that share a batch also share the parameters and
            the optimiser's moments, see `placed`, instead of holding copies.
        """
        mesh = mesh_for(len(members.seed)) if mesh is None else mesh
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._by_member = NamedSharding(mesh, PartitionSpec("member"))
        self._mean = jax.jit(lambda images: mean_image(images, decode))
        self._place(members, images)

        def init(members, data_mean):
            return jax.vmap(lambda member: init_state(model, settings, member, data_mean))(members)

        def run(members, state, images, epochs):
            return jax.vmap(
                lambda member, state: train_epochs(
                    model, settings, batch_size, mesh, member, state, decode, images, epochs
                ),
                spmd_axis_name="member",
            )(members, state)

        start = time.perf_counter()
        shapes = jax.eval_shape(init, self.members, self._data_mean)
        self.state_shapes = placed(shapes, mesh, split=shard_parameters)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_shapes)
        self._init = (
            jax.jit(init, out_shardings=shardings).lower(self.members, self._data_mean).compile()
        )
        self._run = (
            jax.jit(run, donate_argnums=1, out_shardings=(shardings, self._replicated))
            .lower(self.members, self.state_shapes, self.images, self._count(1))
            .compile()
        )
        self.compile_seconds = time.perf_counter() - start

    def on(self, members: Member, images: np.ndarray) -> "Trainer":
        """The same compiled program for other members and images of the same shapes."""
        other = copy.copy(self)
        other._place(members, images)
        return other

    def _place(self, members: Member, images: np.ndarray) -> None:
        self.members = place(members, self._by_member)
        self.images = place(images, self._replicated)
        self._data_mean = self._mean(self.images)

    def _count(self, epochs: int) -> Array:
        # Not device_put: between processes it compares, and so waits for the chunk before.
        return jax.make_array_from_process_local_data(self._replicated, np.int32(epochs), ())

    def init(self) -> TrainState:
        """Every member's state at step 0, stacked [M, ...]."""
        return self._init(self.members, self._data_mean)

    def run(self, state: TrainState, epochs: int) -> tuple[TrainState, EpochMetrics]:
        """`epochs` epochs; `state` is donated. Metrics [M] are those of the last epoch."""
        count = self._count(epochs)
        with jax.transfer_guard("disallow"):
            return self._run(self.members, state, self.images, count)

    def memory(self) -> int:
        """Bytes that `run` takes on a device: images, states, and scratch."""
        used = self._run.memory_analysis()
        kept = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
        return kept + used.temp_size_in_bytes


def fit(
    trainer: Trainer,
    *,
    epochs: int,
    epochs_per_chunk: int,
    epochs_per_checkpoint: int,
    checkpoints: Checkpoints,
    report: Callable[[int, int, EpochMetrics, float], None],
) -> TrainState:
    """Trains to `epochs`, from the newest whole checkpoint if there is one.

    A member whose loss or gradient is not finite stops before that step, and its state stays as
    it was; the others go on. When none is left training ends.

    Metrics are fetched one chunk late, so that the device never waits for the host,
    except at a checkpoint: what is saved has been reported. On SIGTERM, or on JAX's
    preemption notice where it runs in several processes, the chunk is finished and saved.

    Args:
      report: called after every chunk with (epochs done, epochs in the chunk, metrics as
        NumPy arrays [M], seconds).

    Returns:
      The state, on the device; `stopped` says which members' is not of the last epoch.

    Raises:
      Preempted: stopped on notice; the next call goes on from there.
      CheckpointError: a checkpoint cannot be written, or none of those present be read.
    """
    done, state = checkpoints.restore_latest(trainer.state_shapes) or (0, trainer.init())
    waiting: tuple[int, int, EpochMetrics] | None = None
    last, running = time.perf_counter(), True

    def settle() -> None:
        nonlocal waiting, last, running
        if waiting is None:
            return
        *epochs, metrics = jax.device_get(waiting)
        waiting = None
        running = (metrics.stopped < 0).any()
        now = time.perf_counter()
        report(*epochs, metrics, now - last)
        last = now

    with LeaveNotice() as notice:
        while done < epochs and running:
            until_checkpoint = epochs_per_checkpoint - done % epochs_per_checkpoint
            count = min(epochs_per_chunk, epochs - done, until_checkpoint)
            state, metrics = trainer.run(state, count)
            done += count
            settle()
            waiting = (done, count, metrics)
            leave = notice.given(range(done - count + 1, done + 1))
            if leave or count == until_checkpoint or done == epochs or not running:
                settle()
                checkpoints.save(done, state)
            if leave:
                raise Preempted(
                    f"Stopped on notice after epoch {done} of {epochs}, saved in "
                    f"{checkpoints.directory}: the same command goes on from there."
                )
    return state
