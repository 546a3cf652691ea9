"""One training loop: whole epochs in one compiled call, members of a sweep stacked.

A member is one training run. Members that differ only in seed, kappa or gamma's rate
have states of equal shapes and are stacked on a leading axis M and vmapped; a lone
member is the case M = 1. Nothing that training does depends on how it is cut into
chunks, so a resumed run repeats the uninterrupted one.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vaebal.checkpoints import Checkpoints
from vaebal.data import epoch_order, steps_per_epoch
from vaebal.errors import Diverged
from vaebal.models import GaussianVAE, init_params, latent_noise
from vaebal.objectives import gaussian_vae_terms
from vaebal.streams import stream
from vaebal.units import to_unit_pixels

GAMMA_RULES = ("closed_form", "adam", "fixed")


class Member(NamedTuple):
    """What may differ between stacked members; scalars, or [M] when stacked."""

    seed: Array
    kappa: Array
    gamma_rate: Array  # see `gamma_transformation`


class TrainState(NamedTuple):
    """All that training carries from step to step."""

    step: Array
    params: Any
    opt_state: Any


class EpochMetrics(NamedTuple):
    """Means over one epoch's steps, per member."""

    loss: Array  # -ELBO, nats per example
    squared_error: Array  # ||x - x_hat||^2 at sampled z
    kl: Array  # summed over dimensions, nats
    gradient_norm: Array  # of the weights, times gamma
    gamma: Array  # after the last step
    active: Array  # latents with Var_x(E[z|x]) > .01 over the epoch
    informative: Array  # latents with mean sigma^2 < 1/2 over the epoch
    first_bad_step: Array  # first step with a non-finite loss or gradient; -1: none


class Optimisation(NamedTuple):
    """Optimiser settings, shared by all members.

    The weights follow Adam with linear warm-up and cosine decay. See
    `gamma_transformation` for gamma.
    """

    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    total_steps: int
    clip_norm: float  # of gamma times the gradient, see `make_optimiser`
    gamma_rule: str
    dim: int  # D, which the closed form of gamma needs


def closed_form_gamma(dim: int, rate: float | Array) -> optax.GradientTransformation:
    """Moves log gamma to the batch's E||x - x_hat||^2 / d, by at most `rate` a step.

    d(-ELBO)/d log gamma = (d/2)(1 - E||x - x_hat||^2 / (d gamma)), so the gradient alone
    tells how far the stationary value is: log(1 - 2 g / d) away. Under `rate` this is
    the closed form; beyond it, a descent at exactly `rate` nats of log gamma a step:
    the speed of the homotopy is the one thing it sets.
    """

    def update(gradients, state, params=None):
        del params

        def move(gradient):
            distance = jnp.log(jnp.maximum(1 - 2 * gradient / dim, jnp.finfo(jnp.float32).tiny))
            # A non-finite gradient must stay non-finite: clip would hide it.
            return jnp.clip(distance, -rate, rate)

        return jax.tree.map(move, gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def gamma_transformation(rule: str, dim: int, rate: float | Array) -> optax.GradientTransformation:
    """How a learned log gamma moves: "closed_form" or "adam", both at most ~`rate` a step."""
    if rule == "closed_form":
        return closed_form_gamma(dim, rate)
    if rule == "adam":
        return optax.adam(rate)
    raise ValueError(f"gamma rule {rule!r}: a learned gamma moves by 'closed_form' or 'adam'.")


def make_optimiser(settings: Optimisation, gamma_rate: Array) -> optax.GradientTransformation:
    """Clipped Adam for the weights, gamma's own rule for log gamma."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        settings.warmup_steps,
        max(settings.total_steps, settings.warmup_steps + 1),
        settings.final_learning_rate,
    )
    weights = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adam(schedule),
    )
    if settings.gamma_rule == "fixed":
        return weights
    return optax.partition(
        {
            "weights": weights,
            "gamma": gamma_transformation(settings.gamma_rule, settings.dim, gamma_rate),
        },
        lambda params: {k: "gamma" if k == "log_gamma" else "weights" for k in params},
    )


def init_state(
    model: GaussianVAE, settings: Optimisation, member: Member, data_mean: Array
) -> TrainState:
    """One member's state before its first step; pure in member.seed."""
    params = init_params(model, stream(member.seed, "init"), data_mean, member.kappa)
    optimiser = make_optimiser(settings, member.gamma_rate)
    return TrainState(jnp.zeros((), jnp.int32), params, optimiser.init(params))


def loss_and_terms(
    model: GaussianVAE, params: Any, x: Array, eps: Array, kappa: Array | None = None
):
    """Mean -ELBO of a batch in nats (the one place that reduces), with (outputs, terms)."""
    outputs = model.apply({"params": params}, x, eps, kappa)
    terms = gaussian_vae_terms(x, outputs)
    return terms.negative_elbo.mean(), (outputs, terms)


def train_step(
    model: GaussianVAE,
    settings: Optimisation,
    member: Member,
    state: TrainState,
    x: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of one member on the batch x [B, D] in [0, 1]."""
    eps = latent_noise(stream(member.seed, "noise", state.step), len(x), model.latents)
    (loss, (outputs, terms)), gradients = jax.value_and_grad(
        lambda params: loss_and_terms(model, params, x, eps, member.kappa), has_aux=True
    )(state.params)
    gamma = jnp.exp(outputs.log_gamma)
    # The weights follow gamma times the gradient: that of ||x - x_hat||^2 / 2 + gamma KL,
    # which keeps its scale while gamma falls by orders of magnitude. On the plain gradient
    # Adam's second moment lags behind 1 / gamma^2, and its steps are several times too long.
    scaled = {
        name: gradient if name == "log_gamma" else jax.tree.map(lambda g: gamma * g, gradient)
        for name, gradient in gradients.items()
    }
    weights_norm = optax.tree.norm({k: v for k, v in scaled.items() if k != "log_gamma"})
    updates, opt_state = make_optimiser(settings, member.gamma_rate).update(
        scaled, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    statistics = {
        "loss": loss,
        "squared_error": terms.squared_error.mean(),
        "kl": terms.kl.sum(-1).mean(),
        "gradient_norm": weights_norm,
        "mean": outputs.mean.mean(0),
        "mean_squared": jnp.square(outputs.mean).mean(0),
        "variance": jnp.exp(outputs.log_var).mean(0),
    }
    return TrainState(state.step + 1, params, opt_state), statistics


def member_params(state: TrainState, index: int) -> Any:
    """The parameters of one member of a stacked state."""
    return jax.tree.map(lambda leaf: leaf[index], state.params)


def data_mesh() -> Mesh:
    """One axis, "data", over every device."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def train_epochs(
    model: GaussianVAE,
    settings: Optimisation,
    batch_size: int,
    mesh: Mesh,
    member: Member,
    state: TrainState,
    images: Array,
    epochs: Array,
) -> tuple[TrainState, EpochMetrics]:
    """`epochs` (traced: chunks of any length share one program) epochs of one member.

    Args:
      images: the training split [N, D], as stored.

    Returns:
      The state, and the metrics of the last epoch.
    """
    size, steps = len(images), steps_per_epoch(len(images), batch_size)
    by_example = NamedSharding(mesh, PartitionSpec("data"))

    def step(carry, indices):
        state, sums, bad = carry
        x = jax.lax.with_sharding_constraint(to_unit_pixels(images[indices]), by_example)
        state, statistics = train_step(model, settings, member, state, x)
        finite = jnp.isfinite(statistics["loss"]) & jnp.isfinite(statistics["gradient_norm"])
        bad = jnp.where((bad < 0) & ~finite, state.step - 1, bad)
        return (state, jax.tree.map(jnp.add, sums, statistics), bad), None

    def epoch(_, carry):
        state, _, bad = carry
        order = epoch_order(member.seed, state.step // steps, size, batch_size)
        (state, sums, bad), _ = jax.lax.scan(step, (state, zeros, bad), order)
        return state, sums, bad

    per_latent = ("mean", "mean_squared", "variance")
    zeros = {
        name: jnp.zeros((model.latents,) if name in per_latent else ())
        for name in ("loss", "squared_error", "kl", "gradient_norm", *per_latent)
    }
    carry = (state, zeros, jnp.full((), -1, jnp.int32))
    state, sums, bad = jax.lax.fori_loop(0, epochs, epoch, carry)
    means = jax.tree.map(lambda total: total / steps, sums)
    activity = means["mean_squared"] - jnp.square(means["mean"])
    log_gamma = model.apply({"params": state.params}, method="log_gamma")
    return state, EpochMetrics(
        loss=means["loss"],
        squared_error=means["squared_error"],
        kl=means["kl"],
        gradient_norm=means["gradient_norm"],
        gamma=jnp.exp(log_gamma),
        active=(activity > 0.01).sum(),
        informative=(means["variance"] < 0.5).sum(),
        first_bad_step=bad,
    )


class Trainer:
    """The compiled program of a stack of members: `init`, then `run` any number of epochs.

    `run` is compiled ahead of time, so it cannot retrace: other shapes are an error.

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
    ):
        mesh = data_mesh()
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self.images = jax.device_put(images, self._replicated)
        self.members = jax.device_put(members, self._replicated)
        data_mean = to_unit_pixels(jnp.asarray(images)).mean(0)

        def init(members, data_mean):
            return jax.vmap(lambda member: init_state(model, settings, member, data_mean))(members)

        def run(members, state, images, epochs):
            return jax.vmap(
                lambda member, state: train_epochs(
                    model, settings, batch_size, mesh, member, state, images, epochs
                )
            )(members, state)

        start = time.perf_counter()
        self._init = (
            jax.jit(init, out_shardings=self._replicated).lower(self.members, data_mean).compile()
        )
        self._data_mean = data_mean
        shapes = jax.eval_shape(init, self.members, data_mean)
        self.state_shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._replicated),
            shapes,
        )
        self._run = (
            jax.jit(run, donate_argnums=1, out_shardings=self._replicated)
            .lower(self.members, self.state_shapes, self.images, self._count(1))
            .compile()
        )
        self.compile_seconds = time.perf_counter() - start

    def _count(self, epochs: int) -> Array:
        return jax.device_put(np.int32(epochs), self._replicated)

    def init(self) -> TrainState:
        """Every member's state at step 0, stacked [M, ...]."""
        return self._init(self.members, self._data_mean)

    def run(self, state: TrainState, epochs: int) -> tuple[TrainState, EpochMetrics]:
        """`epochs` epochs; `state` is donated. Metrics [M] are those of the last epoch."""
        with jax.transfer_guard("disallow"):
            return self._run(self.members, state, self.images, self._count(epochs))


def fit(
    trainer: Trainer,
    *,
    epochs: int,
    epochs_per_chunk: int,
    epochs_per_checkpoint: int,
    checkpoints: Checkpoints,
    report: Callable[[int, int, EpochMetrics, float], None],
) -> TrainState:
    """Trains to `epochs`, from the newest checkpoint if there is one.

    Metrics are fetched one chunk late, so that the device never waits for the host,
    except at a checkpoint: only a state known to be finite is saved.

    Args:
      report: called after every chunk with (epochs done, epochs in the chunk, metrics as
        NumPy arrays [M], seconds).

    Returns:
      The state, on the device.

    Raises:
      Diverged: a loss or gradient was not finite; nothing is saved after that.
    """
    done = checkpoints.latest or 0
    state = checkpoints.restore(done, trainer.state_shapes) if done else trainer.init()
    waiting: tuple[int, int, EpochMetrics] | None = None
    last = time.perf_counter()

    def settle() -> None:
        nonlocal waiting, last
        if waiting is None:
            return
        *epochs, metrics = jax.device_get(waiting)
        waiting = None
        _require_finite(trainer, metrics, checkpoints)
        now = time.perf_counter()
        report(*epochs, metrics, now - last)
        last = now

    while done < epochs:
        until_checkpoint = epochs_per_checkpoint - done % epochs_per_checkpoint
        count = min(epochs_per_chunk, epochs - done, until_checkpoint)
        state, metrics = trainer.run(state, count)
        done += count
        settle()
        waiting = (done, count, metrics)
        if count == until_checkpoint or done == epochs:
            settle()
            checkpoints.save(done, state)
    return state


def _require_finite(trainer: Trainer, metrics: EpochMetrics, checkpoints: Checkpoints) -> None:
    steps = np.asarray(metrics.first_bad_step)
    if (steps < 0).all():
        return
    index = int(np.argmax(steps >= 0))
    member = jax.tree.map(lambda leaf: leaf[index].item(), jax.device_get(trainer.members))
    kept = checkpoints.latest
    where = checkpoints.path(kept) if kept is not None else "none yet"
    raise Diverged(
        f"Loss or gradient not finite at step {steps[index]} (kappa={member.kappa}, "
        f"seed={member.seed}); last good checkpoint: {where}. Lower train.learning_rate or "
        "train.gamma_rate, or start from a larger model.gamma, in a new --workdir."
    )
