"""Rules by which gamma moves. Shapes: B batch, D data dimensions, K latents; log gamma in nats."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from vaebal.homotopy.residual import follow, start

# Nats of log gamma a step, at most, once a guard goes: the learning rate is small by then.
RELEASED_RATE = 0.02
# What is left of a guard at the end of its release, before it is gone.
RELEASED_TO = 1e-4


class Seen(NamedTuple):
    """What a homotopy is shown of one training step, all of it from before the step."""

    step: Array  # [], steps taken so far
    mean_square: Array  # [], E|x - x_hat|^2 / D of the batch, at sampled z
    residual: Array | None = None  # [b, D], x - x_hat at the posterior mean, of some of the batch
    mean: Array | None = None  # [B, K], the posterior means; for `one_by_one`


class State(NamedTuple):
    """What a homotopy says, and what it remembers."""

    log_gamma: Array  # []
    open: Array  # [] int32: only the first so many latents are in the model
    residual_variance: Array  # [], the residual's largest along any direction; NaN: not followed
    released: Array  # [] bool: whether nothing guards gamma (any more)
    memory: Any  # the rule's own


class Homotopy(NamedTuple):
    """A rule, as a pair of pure functions.

    Attributes:
      init: (gamma [], latents, key) -> `State`. `gamma` is where it starts, `latents` how many
        there are, and the key draws what has to start somewhere at random.
      update: (`Seen`, `State`) -> `State`.
      reads_residual: whether it wants `Seen.residual`, which costs a decode, and what follows it.
    """

    init: Callable[[Array | float, Array | int, Array], State]
    update: Callable[[Seen, State], State]
    reads_residual: bool = False


def _started(gamma: Array | float, latents: Array | int, memory: Any = (), **known: Any) -> State:
    state = State(
        jnp.log(jnp.asarray(gamma, float)),
        jnp.asarray(latents, jnp.int32),
        jnp.full((), jnp.nan, float),
        jnp.ones((), bool),
        memory,
    )
    return state._replace(**known)


def _towards(log_gamma: Array, target: Array, rate: Array | float, mean_square: Array) -> Array:
    """A step from `log_gamma` towards `target` by at most `rate` nats."""
    step = jnp.clip(target - log_gamma, -rate, rate)
    # A non-finite error must stay non-finite: clip would hide it.
    return jnp.where(jnp.isfinite(mean_square), log_gamma + step, mean_square)


def fixed() -> Homotopy:
    """gamma stays where it starts."""

    def init(gamma, latents, key) -> State:
        return _started(gamma, latents)

    return Homotopy(init, lambda seen, state: state)


def held(gamma: Array | float) -> Homotopy:
    """gamma is `gamma` from the first step on, wherever others start."""

    def init(_, latents, key) -> State:
        return _started(gamma, latents)

    return Homotopy(init, lambda seen, state: state)


def closed_form(rate: Array | float) -> Homotopy:
    """Towards gamma's stationary value E|x - x_hat|^2 / D, by at most `rate` nats a step.

    That is where the gradient of -ELBO by log gamma vanishes, so that the rate, the speed of the
    homotopy, is the one thing to choose.
    """

    def init(gamma, latents, key) -> State:
        return _started(gamma, latents)

    def update(seen: Seen, state: State) -> State:
        target = jnp.log(seen.mean_square)
        return state._replace(log_gamma=_towards(state.log_gamma, target, rate, seen.mean_square))

    return Homotopy(init, update)


def prescribed(rate: Array | float, end: Array | float) -> Homotopy:
    """Down (or up) to `end` by `rate` nats a step, whatever the error."""

    def init(gamma, latents, key) -> State:
        return _started(gamma, latents)

    def update(seen: Seen, state: State) -> State:
        target = jnp.log(jnp.asarray(end, state.log_gamma.dtype))
        return state._replace(log_gamma=_towards(state.log_gamma, target, rate, seen.mean_square))

    return Homotopy(init, update)


class Moments(NamedTuple):
    """Adam's, of one number."""

    first: Array
    second: Array
    count: Array


def gradient(rate: Array | float, dim: int) -> Homotopy:
    """Adam on log gamma, the paper's own way: along D/2 (1 - E|x - x_hat|^2 / (D gamma)).

    That is the gradient of -ELBO by log gamma. Kingma & Ba's moments, .9 and .999; log gamma moves
    by about `rate` nats a step at most.
    """

    def init(gamma, latents, key) -> State:
        zero = jnp.zeros((), float)
        return _started(gamma, latents, Moments(zero, zero, jnp.zeros((), jnp.int32)))

    def update(seen: Seen, state: State) -> State:
        slope = 0.5 * dim * (1 - seen.mean_square * jnp.exp(-state.log_gamma))
        first = 0.9 * state.memory.first + 0.1 * slope
        second = 0.999 * state.memory.second + 0.001 * jnp.square(slope)
        count = state.memory.count + 1
        unbiased = first / (1 - 0.9**count)
        step = rate * unbiased / (jnp.sqrt(second / (1 - 0.999**count)) + 1e-8)
        return state._replace(
            log_gamma=state.log_gamma - step, memory=Moments(first, second, count)
        )

    return Homotopy(init, update)


def released_share(step: Array, release: tuple[float, float]) -> Array:
    """What is left of a guard: 1 at first, then falling in the log to 1e-4, and 0 after it."""
    first, last = release
    falling = jnp.exp(jnp.log(RELEASED_TO) * jnp.clip((step - first) / (last - first), 0.0, 1.0))
    return jnp.where(step < last, falling, 0.0)


def guarded(
    rate: Array | float,
    *,
    dim: int,
    guard: Array | float = 0.4,
    memory: int = 50,
    slowest: float = 0.0,
    release: tuple[float, float] | None = None,
) -> Homotopy:
    """`closed_form`, but not below `guard` times the residual's largest variance.

    An idle latent wakes up where the residual x - x_hat has a direction of variance above gamma
    that it could explain (Theorem 2). Guarded by that variance, gamma waits until the latents in
    use have bent to explain what they can, before a spare one does it for them.

    Args:
      rate: nats of log gamma a step, at most.
      dim: D.
      guard: gamma stays above so much of the variance. The guard holds gamma and never raises it,
        so of a noisy estimate the least value counts.
      memory: steps over which the variance and its direction are averaged (Oja's rule).
      slowest: nats a step at which gamma falls even so; above 0, what no training explains cannot
        hold it for ever.
      release: the steps between which the guard is let go, for gamma to become stationary; None:
        never. From then on gamma moves by at most `RELEASED_RATE`, or `rate` if that is more.
    """

    def init(gamma, latents, key) -> State:
        mode = start(key, dim, gamma)
        whole = jnp.zeros((), bool)
        return _started(gamma, latents, mode, residual_variance=mode.variance, released=whole)

    def update(seen: Seen, state: State) -> State:
        mode = follow(state.memory, seen.residual, memory)
        left, fastest = jnp.ones((), float), rate
        if release is not None:
            left = released_share(seen.step, release)
            fastest = jnp.where(left < 1, jnp.maximum(rate, RELEASED_RATE), rate)
        bound = jnp.log(left * guard * mode.variance)
        bound = jnp.minimum(bound, state.log_gamma - slowest)
        target = jnp.maximum(jnp.log(seen.mean_square), bound)
        log_gamma = _towards(state.log_gamma, target, fastest, seen.mean_square)
        return State(log_gamma, state.open, mode.variance, left < 1, mode)

    return Homotopy(init, update, reads_residual=True)
