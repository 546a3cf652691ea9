"""Batches as a pure function of (seed, step): none depends on how training was cut or resumed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vaebal.streams import stream


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Whole batches in an epoch; the size % batch_size examples left over differ every epoch."""
    return size // batch_size


def epoch_order(seed: int | Array, epoch: int | Array, size: int, batch_size: int) -> Array:
    """Indices of every batch of an epoch, [steps, B]: a fresh permutation of the data."""
    steps = steps_per_epoch(size, batch_size)
    order = jax.random.permutation(stream(seed, "order", epoch), size)
    return order[: steps * batch_size].reshape(steps, batch_size)


@functools.partial(jax.jit, static_argnames=("size", "batch_size"))
def batch_indices(seed: int | Array, step: int | Array, size: int, batch_size: int) -> Array:
    """Indices [B] of the batch that training sees at `step` under `seed`, for any step."""
    epoch, position = jnp.divmod(step, steps_per_epoch(size, batch_size))
    return epoch_order(seed, epoch, size, batch_size)[position]


def some_indices(size: int, count: int, name: str, seed: int = 0) -> np.ndarray:
    """`count` of `size` rows, drawn at random, in order; all of them where there are not more.

    Sets are often sorted, by class or by folder: the first rows say little of the rest.

    Args:
      name: of the draw, see `streams.stream`.
    """
    if count >= size:
        return np.arange(size)
    order = jax.random.permutation(stream(seed, name), size)
    return np.sort(np.asarray(order)[:count])
