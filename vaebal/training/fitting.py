"""Any loss to a trained tree of parameters: one loop, for networks of which one is trained.

`training` is this loop's elder sister for stacked members of a sweep; gamma's rule, the
optimiser and the scaling of gradients are its own. An epoch is one compiled call, and every batch
and draw a function of (seed, step), so that a resumed run repeats the uninterrupted one.

Shapes: B batch, N examples.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from vaebal.data import epoch_order
from vaebal.errors import Diverged
from vaebal.streams import stream
from vaebal.training.checkpoints import Checkpoints, Preempted
from vaebal.training.devices import LeaveNotice
from vaebal.training.engine import (
    Member,
    Optimisation,
    mesh_for,
    next_log_gamma,
    weights_optimiser,
    without_gamma,
)

# (params, batch, key, given) -> scalar, scalar metrics. A batch is rows of the data's tree;
# `given` is what does not change in training, as frozen parameters.
LossFunction = Callable[[Any, Any, Array, Any], tuple[Array, dict[str, Array]]]
Report = Callable[[int, dict[str, float]], None]  # epochs done, the last one's metrics


class State(NamedTuple):
    """All that training carries from step to step."""

    step: Array
    params: Any
    opt_state: Any  # of the weights


def fit_step(
    loss: LossFunction,
    settings: Optimisation,
    gamma_rate: float | Array,
    state: State,
    batch: Any,
    key: Array,
    given: Any,
) -> tuple[State, dict[str, Array]]:
    """One step of Adam on the weights; a parameter "log_gamma" follows its closed form.

    That is the metric "mean_square", approached by at most `gamma_rate` nats, and the weights
    then follow gamma times the gradient, as in `training.train_step`.
    """
    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(
        state.params, batch, key, given
    )
    weights, log_gamma = without_gamma(state.params), state.params.get("log_gamma")
    gradients = without_gamma(gradients)
    if log_gamma is not None:
        gradients = jax.tree.map(lambda gradient: jnp.exp(log_gamma) * gradient, gradients)
    updates, opt_state = weights_optimiser(settings).update(gradients, state.opt_state, weights)
    params = optax.apply_updates(weights, updates)
    metrics = {"loss": value, **metrics, "gradient_norm": optax.tree.norm(gradients)}
    if log_gamma is not None:
        rule = Member(seed=0, kappa=0, gamma_start=0.0, gamma_rate=gamma_rate)
        params["log_gamma"] = next_log_gamma(log_gamma, metrics["mean_square"], rule)
        metrics["gamma"] = jnp.exp(params["log_gamma"])
    return State(state.step + 1, params, opt_state), metrics


class Fitter:
    """The compiled program of one loss; seeds and data of the same shapes share it."""

    def __init__(
        self,
        name: str,
        init: Callable[[Array, Any], Any],
        loss: LossFunction,
        settings: Optimisation,
        batch_size: int,
        gamma_rate: float = 0.0,
    ):
        """Args:
        name: begins the names of its random streams.
        init: (key, given) -> params.
        settings: `gamma_rule` and what belongs to it are not read.
        gamma_rate: nats of log gamma a step at most, where gamma is a parameter.
        """
        mesh = mesh_for(1)
        self._replicated = NamedSharding(mesh, PartitionSpec())
        by_example = NamedSharding(mesh, PartitionSpec("data"))

        def start(seed, given) -> State:
            params = init(stream(seed, f"{name}/init"), given)
            opt_state = weights_optimiser(settings).init(without_gamma(params))
            return State(jnp.zeros((), jnp.int32), params, opt_state)

        def epoch(seed, state, rows, given):
            size = len(jax.tree.leaves(rows)[0])
            order = epoch_order(seed, state.step // (size // batch_size), size, batch_size)

            def step(state, indices):
                batch = jax.tree.map(lambda row: row[indices], rows)
                batch = jax.lax.with_sharding_constraint(batch, by_example)
                key = stream(seed, f"{name}/noise", state.step)
                return fit_step(loss, settings, gamma_rate, state, batch, key, given)

            first = state.step
            state, metrics = jax.lax.scan(step, state, order)
            bad = ~(jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"]))
            last = {key: metrics.pop(key)[-1] for key in ("gamma",) if key in metrics}
            means = jax.tree.map(lambda values: values.mean(0), metrics)
            bad_step = jnp.where(bad.any(), first + jnp.argmax(bad), -1)
            return state, means | last | {"first_bad_step": bad_step}

        self.batch_size = batch_size
        self._start = jax.jit(start, out_shardings=self._replicated)
        self._epoch = jax.jit(epoch, donate_argnums=1, out_shardings=self._replicated)
        self._shapes = lambda seed, given: jax.eval_shape(start, seed, given)

    def init(self, seed: int, given: Any) -> State:
        """The state before the first step."""
        return self._start(np.int32(seed), given)

    def shapes(self, seed: int, given: Any) -> State:
        """The state's tree of jax.ShapeDtypeStruct, to restore a checkpoint into."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._replicated),
            self._shapes(np.int32(seed), given),
        )

    def epoch(
        self, seed: int, state: State, rows: Any, given: Any
    ) -> tuple[State, dict[str, Array]]:
        """One epoch over rows, a tree of arrays [N, ...]; `state` is donated.

        The metrics are means over its steps, but "gamma", which is the last step's, and
        "first_bad_step", the first with a loss or gradient that is not finite (-1: none).

        Raises:
          ValueError: fewer rows than a batch.
        """
        size = len(jax.tree.leaves(rows)[0])
        if size < self.batch_size:
            raise ValueError(f"{size} rows make no batch of {self.batch_size}: lower batch_size.")
        return self._epoch(np.int32(seed), state, rows, given)


def fit(
    fitter: Fitter,
    *,
    seed: int,
    rows: Any,
    given: Any,
    epochs: int,
    epochs_per_checkpoint: int,
    checkpoints: Checkpoints,
    report: Report,
) -> tuple[State, float]:
    """Trains to `epochs`, from the newest whole checkpoint if there is one.

    Metrics are fetched one epoch late, so that the device does not wait for the host, except
    at a checkpoint: only a state known to be finite is saved. On SIGTERM the epoch is finished
    and saved.

    Returns:
      The state, on the device, and the seconds that this call took.

    Raises:
      Diverged: a loss or gradient was not finite; nothing is saved after that.
      Preempted: stopped on notice; the next call goes on from there.
      CheckpointError: a checkpoint cannot be written, or none of those present be read.
    """
    begun = time.perf_counter()
    saved = checkpoints.restore_latest(fitter.shapes(seed, given))
    done, state = saved or (0, fitter.init(seed, given))
    waiting: tuple[int, dict[str, Array]] | None = None

    def settle() -> None:
        nonlocal waiting
        if waiting is None:
            return
        epoch, metrics = jax.device_get(waiting)
        waiting = None
        _require_finite(metrics, checkpoints)
        report(epoch, {name: float(value) for name, value in metrics.items()})

    with LeaveNotice() as notice:
        while done < epochs:
            state, metrics = fitter.epoch(seed, state, rows, given)
            done += 1
            settle()
            waiting = done, metrics
            leave = notice.given(range(done, done + 1))
            if leave or done % epochs_per_checkpoint == 0 or done == epochs:
                settle()
                checkpoints.save(done, state)
            if leave:
                raise Preempted(
                    f"Stopped on notice after epoch {done} of {epochs}, saved in "
                    f"{checkpoints.directory}: the same command goes on from there."
                )
    return state, time.perf_counter() - begun


def _require_finite(metrics: dict[str, np.ndarray], checkpoints: Checkpoints) -> None:
    step = int(metrics["first_bad_step"])
    if step >= 0:
        kept = checkpoints.latest
        where = checkpoints.path(kept) if kept is not None else "none yet"
        raise Diverged(
            f"Loss or gradient not finite at step {step} of {checkpoints.directory}; last good "
            f"checkpoint: {where}. Lower its learning_rate or gamma_rate, in a new --workdir."
        )
