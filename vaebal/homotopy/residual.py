"""The residual's largest variance, followed from batch to batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Mode(NamedTuple):
    """A running estimate of the direction in which x - x_hat(mean) varies most."""

    direction: Array  # [D], unit length
    variance: Array  # [], along it


def start(key: Array, dim: int, variance: Array | float) -> Mode:
    """A random direction, and a variance to begin with."""
    direction = jax.random.normal(key, (dim,))
    return Mode(direction / jnp.linalg.norm(direction), jnp.asarray(variance, float))


def follow(mode: Mode, residual: Array, memory: int) -> Mode:
    """One step of Oja's rule (1982) on the residuals [B, D] of a batch.

    The variance is measured along the direction found before this batch, so that noise in
    the batch does not bias it upwards.

    Args:
      memory: steps; direction and variance move by its inverse.
    """
    along = residual @ mode.direction  # [B]
    pull = along @ residual / (len(residual) * jnp.maximum(mode.variance, 1e-30))
    direction = mode.direction + pull / memory
    variance = mode.variance + (jnp.square(along).mean() - mode.variance) / memory
    return Mode(direction / jnp.linalg.norm(direction), variance)
