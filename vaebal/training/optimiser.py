"""Adam for the weights: warm-up, cosine and weight decay, clipping, a bound that follows gamma."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class Optimisation(NamedTuple):
    """Optimiser settings, shared by all members of a program."""

    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    total_steps: int  # at whose end the cosine decay ends
    clip_norm: float  # of gamma times the gradient, see `step.train_step`
    beta2: float = 0.999  # near 1 it lags behind a gradient that grows
    jitter: float = 0.0  # 0: none; else no step is longer than `homotopy.steady_rate`
    weight_decay: float = 0.0  # AdamW's, of all matrices but the affine skips
    average: float = 0.0  # decay of a running mean of the weights, see `averaged`; 0: none is kept


def _decays(weights: Any) -> Any:
    """Matrices do, but not the affine skips': what a linear map can say is said by it alone."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and "affine" not in jax.tree_util.keystr(path), weights
    )


class Average(NamedTuple):
    """A running mean of the weights."""

    average: Any  # as the weights
    count: Array  # [], steps


def _averaging(decay: float) -> optax.GradientTransformation:
    """Keeps a mean of the weights before each step, over about 1 / (1 - decay) of them.

    At first over a growing share of all steps so far, so that the start is forgotten.
    """

    def init(weights) -> Average:
        return Average(jax.tree.map(jnp.zeros_like, weights), jnp.zeros((), jnp.int32))

    def update(updates, state, weights):
        kept = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        mean = jax.tree.map(lambda old, new: old + (1 - kept) * (new - old), state.average, weights)
        return updates, Average(mean, state.count + 1)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any, weights: Any) -> Any:
    """The mean of the weights that an optimiser has kept, or where it keeps none `weights`."""
    kept = optax.tree_utils.tree_get(opt_state, "average", None)
    return weights if kept is None else kept


def _clipping(norm: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm, by one factor for all weights.

    optax's quotient, one a weight, would be written down for each of Adam's moments to read.
    """

    def update(gradients, _):
        factor = jnp.minimum(1.0, norm / optax.tree.norm(gradients))
        return jax.tree.map(lambda leaf: factor * leaf, gradients)

    return optax.stateless(update)


def weights_optimiser(
    settings: Optimisation, taken: Array | bool = True, longest: Array | float = jnp.inf
) -> optax.GradientTransformation:
    """Clipped Adam with warm-up and cosine decay.

    Args:
      taken: a step that is not follows no gradient.
      longest: bounds the rate and, where settings.jitter is above 0, each weight's step: Adam's
        steps are longer than its rate where the moments lag behind, as of a latent just opened.
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
    rate = lambda step: jnp.minimum(schedule(step), longest)  # noqa: E731
    if settings.weight_decay > 0:
        decay = settings.weight_decay
        adam = optax.adamw(rate, b2=settings.beta2, weight_decay=decay, mask=_decays)
    else:
        adam = optax.adam(rate, b2=settings.beta2)
    parts = [_clipping(settings.clip_norm), gate, adam]
    if settings.jitter > 0:
        parts.append(
            optax.stateless_with_tree_map(lambda update, _: jnp.clip(update, -longest, longest))
        )
    if settings.average > 0:
        parts.append(_averaging(settings.average))
    return optax.chain(*parts)
