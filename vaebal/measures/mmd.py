"""Maximum mean discrepancy with the seven-scale inverse multiquadric (IMQ) kernel of WAE-MMD
(Tolstikhin et al., 2018), on latents whose prior is N(0, I).

k(a, b) = sum_s C_s / (C_s + |a - b|^2) with C_s = 2 K s. As C / (C + d) is the integral of
C exp(-C t) exp(-t d) over t > 0, k is a mixture of Gaussian kernels, so its expectations over
Gaussians are one-dimensional integrals.

Shapes: N and M points, K latents, S scales, Q quadrature nodes.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vaebal.measures.evaluation import Estimate

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def _points(name: str, points: Array, least: int) -> Array:
    """`points` as a float array, or a ValueError; values are only seen outside of tracing."""
    points = jnp.asarray(points)
    if points.ndim != 2 or points.shape[1] < 1:
        raise ValueError(f"{name} has shape {points.shape}; give [points, latents].")
    if len(points) < least:
        raise ValueError(f"{name} has {len(points)} points; give at least {least}.")
    if not isinstance(points, jax.core.Tracer) and not jnp.isfinite(points).all():
        raise ValueError(f"{name} has values that are not finite; remove them.")
    return points.astype(jnp.promote_types(points.dtype, jnp.float32))


def _kernel(squared_distance: Array, latents: int) -> Array:
    return sum(2 * latents * s / (2 * latents * s + squared_distance) for s in SCALES)


def _blocks(points: Array, block: int) -> tuple[Array, Array]:
    """[N, K] -> nearly equal blocks [n, <= block, K], filled up with zeros, and indices [n, .]."""
    number = -(-len(points) // block)
    size = -(-len(points) // number)
    filled = jnp.pad(points, ((0, number * size - len(points)), (0, 0)))
    return filled.reshape(number, size, -1), jnp.arange(number * size).reshape(number, size)


def _row_sums(x: Array, y: Array, level: Array, block: int, *, same: bool) -> tuple[Array, Array]:
    """Sums over j of k(x_i, y_j) - level and of its square, both [N]; `same` leaves out j = i."""

    # Recomputed by the backward pass, which would otherwise keep all N M values ...
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def sums_over(columns, rows):
        (a, i), (b, j) = rows, columns
        cross = jnp.matmul(a, b.T, precision="highest")
        squared_norms = jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1)[None, :]
        # Rounding makes the expanded square negative where points coincide.
        values = _kernel(jnp.maximum(squared_norms - 2 * cross, 0.0), x.shape[1]) - level
        keep = (j < len(y))[None, :]
        if same:
            keep = keep & (i[:, None] != j[None, :])
        values = jnp.where(keep, values, 0.0)
        return values.sum(1), jnp.square(values).sum(1)

    # ... and a copy of y for every block of x.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_block(rows):
        def add(sums, columns):
            return jax.tree.map(jnp.add, sums, sums_over(columns, rows)), None

        zeros = jnp.zeros(rows[0].shape[0], x.dtype)
        return jax.lax.scan(add, (zeros, zeros), _blocks(y, block))[0]

    sums, squares = jax.lax.map(one_block, _blocks(x, block))
    return sums.reshape(-1)[: len(x)], squares.reshape(-1)[: len(x)]


def _centre(x: Array, *others: Array) -> tuple[Array, ...]:
    """All point sets minus x's mean: squared distances stay, and lose fewer digits."""
    mean = jax.lax.stop_gradient(x.mean(0))[None, :]
    return tuple(points - mean for points in (x, *others))


def _level(x: Array, y: Array) -> Array:
    """The kernel at a typical distance of centred points.

    A constant taken from the kernel changes neither MMD^2 nor its variance, but what is
    left to be summed is small, and float32 keeps more of its digits.
    """
    typical = jnp.square(x).sum(1).mean() + jnp.square(y).sum(1).mean()
    return jax.lax.stop_gradient(_kernel(typical, x.shape[1]))


@functools.partial(jax.jit, static_argnames="block")
def _mmd2(x: Array, y: Array, block: int) -> Array:
    x, y = _centre(x, y)
    n, m, level = float(len(x)), float(len(y)), _level(x, y)
    within_x, _ = _row_sums(x, x, level, block, same=True)
    within_y, _ = _row_sums(y, y, level, block, same=True)
    between, _ = _row_sums(x, y, level, block, same=False)
    return (within_x / (n - 1) - 2 * between / m).mean() + within_y.mean() / (m - 1)


def imq_mmd2(x: Array, y: Array, *, block: int = 1024) -> Array:
    """Unbiased estimate of MMD^2 between the distributions of x [N, K] and y [M, K].

    The U-statistic sum_{i != j} k(x_i, x_j) / (N (N - 1)), the same for y, minus twice the
    mean of k(x_i, y_j); it can be negative. Differentiable in both, jit-able, in x's and y's
    precision. Time grows as (N + M)^2, memory as block^2, with gradients as without.

    Raises:
      ValueError: fewer than 2 points, different K, an array that is not 2-D, or (outside of
        tracing) values that are not finite.
    """
    x, y = _points("x", x, least=2), _points("y", y, least=2)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"y has {y.shape[1]} latents where x has {x.shape[1]}; give the same number."
        )
    return _mmd2(x, y, block=block)


def _pairs_variance(sums: Array, squares: Array) -> Array:
    """Unbiased variance of k's second Hoeffding component over pairs of one sample.

    From the sums over j != i of k(x_i, x_j) and of its square, [N] (the U-centred sum of
    squares of Székely & Rizzo, 2014).
    """
    n = float(len(sums))
    spread = jnp.square(sums - sums.mean()).sum()
    total = squares.sum() - jnp.square(sums.sum()) / (n * (n - 1)) - 2 * spread / (n - 2)
    return total / (n * (n - 3))


def _standard_error(first_order: Array, second_order: Array) -> Array:
    """The first-order part, estimated without bias, can fall below its least value 0."""
    return jnp.sqrt(jnp.maximum(jnp.maximum(first_order, 0.0) + second_order, 0.0))


def _nodes(latents: int, scales: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """t and w [Q] with sum_s C_s / (C_s + d) = sum_q w_q exp(-t_q d), for any d >= 0.

    The trapezoid rule in log t. Its error is below exp(-pi^2 / step) = 2e-11 relative to
    the kernel at 0: in log t, C t exp(-t (C + d)) and its means over Gaussians are bounded on
    the strip of half-width pi/2.
    """
    scale = 2.0 * latents * np.asarray(scales)
    log_t = np.arange(-30 - math.log(scale.max()), 4 - math.log(scale.min()), 0.4)
    t = np.exp(log_t)
    return t, 0.4 * t * (scale[None, :] * np.exp(-t[:, None] * scale[None, :])).sum(1)


def expected_imq(
    mean: np.ndarray, variance: np.ndarray, scales: tuple[float, ...] = SCALES
) -> float:
    """E k(a, b) where a - b ~ N(mean, diag variance), both [K], summed over `scales`.

    By quadrature in float64, to 1e-9 of the number of scales.
    """
    mean, variance = np.broadcast_arrays(np.atleast_1d(mean), np.atleast_1d(variance))
    t, weights = _nodes(len(mean), scales)
    spread = 1 + 2 * t[:, None] * variance[None, :]
    exponent = 0.5 * np.log(spread) + t[:, None] * np.square(mean)[None, :] / spread
    return float(weights @ np.exp(-exponent.sum(1)))


@functools.partial(jax.jit, static_argnames="block")
def _mmd2_to_normal(x: Array, block: int) -> Estimate:
    n, latents = float(len(x)), x.shape[1]
    t, weights = _nodes(latents, SCALES)
    decay = jnp.asarray(t / (1 + 2 * t), x.dtype)
    weights = jnp.asarray(weights * (1 + 2 * t) ** (-latents / 2), x.dtype)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def to_prior(point):
        return weights @ jnp.exp(-decay * jnp.square(point).sum())

    between = jax.lax.map(to_prior, x, batch_size=min(block, len(x)))
    prior = expected_imq(np.zeros(latents), np.full(latents, 2.0))
    (centred,) = _centre(x)
    level = _level(centred, centred)
    within, squares = _row_sums(centred, centred, level, block, same=True)
    value = (within / (n - 1) - 2 * (between - level)).mean() + (prior - level)

    pairs = _pairs_variance(within, squares)
    point = jnp.var(within / (n - 2) - between, ddof=1) - pairs / (n - 2)
    return Estimate(value, _standard_error(4 * point / n, 2 * pairs / (n * (n - 1))))


def imq_mmd2_to_normal(x: Array, *, block: int = 1024) -> Estimate:
    """Unbiased MMD^2 between the distribution of x [N, K] and N(0, I), with its standard error.

    As `imq_mmd2` with infinitely many y: what involves the prior is integrated, not sampled.
    The error is the root of the U-statistic's finite-sample variance by Hoeffding's
    decomposition, 4 z / N + 2 e / (N (N-1)), each part estimated without bias: z is the variance
    of a point's mean kernel value against the sample less that against the prior, e that of what
    a pair adds beyond its two points. z vanishes where the distributions are equal and e carries
    the error; elsewhere z dominates. Assumes independent, identically distributed points. Between
    equal distributions the estimate is not normal but a centred sum of chi-squares, skewed to the
    right: the error is still its standard deviation.

    Raises:
      ValueError: fewer than 4 points, an array that is not 2-D, or (outside of tracing) values
        that are not finite.
    """
    return _mmd2_to_normal(_points("x", x, least=4), block=block)
