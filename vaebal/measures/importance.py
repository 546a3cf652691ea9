"""Sums of importance weights, added one by one. Shapes: any, one weight a place; logs in nats."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Sums(NamedTuple):
    """Of w_s / w_1, and what w_1 is: relative to it float32 tells log weights of any size apart."""

    first: Array  # log w_1
    log_sum: Array  # log sum_s w_s / w_1
    log_squares: Array  # log sum_s (w_s / w_1)^2


def empty(like: Array) -> Sums:
    """Before the first sample; of the shape and type of `like`."""
    nothing = jnp.full_like(like, -jnp.inf)
    return Sums(jnp.zeros_like(like), nothing, nothing)


def add(sums: Sums, log_w: Array, index: Array) -> Sums:
    """With sample `index` [], counted from 0 and in order, of log weights `log_w`."""
    start = jnp.where(jnp.isfinite(log_w), log_w, 0.0)
    first = jnp.where(index == 0, start, sums.first)
    relative = log_w - first
    return Sums(
        first,
        jnp.logaddexp(sums.log_sum, relative),
        jnp.logaddexp(sums.log_squares, 2 * relative),
    )


def bound(sums: Sums, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """-(logsumexp_s log w_s - log S) of S `samples` (Burda et al., 2016), in nats and float64.

    And beside it the effective sample size (sum w)^2 / sum w^2, between 1 and S.
    """
    first, log_sum, log_squares = (
        np.asarray(each, np.float64) for each in jax.device_get(tuple(sums))
    )
    return np.log(samples) - (first + log_sum), np.exp(2 * log_sum - log_squares)
