"""Intrinsic dimension from distances to nearest neighbours, and how many samples bias it.

Both estimators fall short of the truth as the dimension grows, because N points are then few.
`calibrated` undoes this: it asks which dimension of a uniform cube, drawn N times, gives the same
estimate. Observation noise fills all D dimensions below its own scale; thinning the points raises
the distances above it, so `data_dimension` goes to coarser scales while the estimate falls.

Shapes: N points, D coordinates.
"""

import functools
from typing import NamedTuple

import numpy as np
from sklearn.neighbors import NearestNeighbors

from vaebal.measures.evaluation import Estimate

# Facco et al. leave out the largest tenth of the ratios: there the density varies most.
DISCARDED = 0.1
# Levina & Bickel average over this range of neighbours.
NEIGHBOURS = (10, 20)
# Each point of these shares of the sample gives the distances of another scale.
THINNING = (1, 4, 16)
# A coarser scale is believed where its estimate is lower by this share.
FALL = 0.1
# Fewer points than this say little of any dimension.
LEAST_POINTS = 50


def _neighbour_distances(points: np.ndarray, neighbours: int) -> np.ndarray:
    """Distances [N, neighbours] to the nearest other points, equal points taken once.

    Raises:
      ValueError: not [N, D], not finite, or too few different points.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] < 1:
        raise ValueError(f"points has shape {points.shape}; give [N, D].")
    if not np.isfinite(points).all():
        raise ValueError("points has values that are not finite; remove them.")
    points = np.unique(points, axis=0)
    if len(points) < neighbours + 2:
        raise ValueError(
            f"points has {len(points)} different rows; give at least {neighbours + 2}."
        )
    # Brute force centres nothing: far from 0, a difference of large squares loses its digits.
    points = points - points.mean(0)[None, :]
    search = NearestNeighbors(n_neighbors=neighbours).fit(points)
    distances, _ = search.kneighbors()
    return distances


def two_nn(points: np.ndarray) -> Estimate:
    """TwoNN (Facco et al., 2017): from the ratio of the second to the first neighbour's distance.

    The ratio mu has P(mu > m) = m^-d where the density is constant across two neighbours, so
    -log(1 - F(log mu)) is a line of slope d through the origin, fitted here without the largest
    tenth. The standard error d / sqrt(N) takes points as independent.

    Args:
      points: [N, D]; rows that repeat are taken once.

    Raises:
      ValueError: not [N, D], not finite, or fewer than 4 different rows.
    """
    first, second = _neighbour_distances(points, 2).T
    log_ratio = np.sort(np.log(second / first))
    size = len(log_ratio)
    kept = max(int(size * (1 - DISCARDED)), 2)
    survival = -np.log1p(-np.arange(1, kept + 1) / (size + 1))
    log_ratio = log_ratio[:kept]
    slope = float(log_ratio @ survival / np.maximum(log_ratio @ log_ratio, 1e-300))
    return Estimate(slope, slope / np.sqrt(kept))


def maximum_likelihood(points: np.ndarray) -> Estimate:
    """Levina & Bickel (2004), averaged over points as inverses (MacKay & Ghahramani, 2005).

    With k neighbours at distances T_1 < ... < T_k, 1/d is the mean over points and j < k of
    log(T_k / T_j); the estimate is the mean of d over k = 10..20. The standard error is that of
    1/d over points, taken as independent.

    Args:
      points: [N, D]; rows that repeat are taken once.

    Raises:
      ValueError: not [N, D], not finite, or fewer than 22 different rows.
    """
    least, most = NEIGHBOURS
    logs = np.log(_neighbour_distances(points, most))
    inverses = np.stack(
        [(logs[:, k - 1, None] - logs[:, : k - 1]).sum(1) / (k - 1) for k in range(least, most + 1)],
        axis=1,
    )  # [N, k]
    dimensions = 1 / inverses.mean(0)
    value = float(dimensions.mean())
    # One point's part in 1/d, for every k at once.
    spread = (inverses * dimensions[None, :]).mean(1).std(ddof=1)
    return Estimate(value, float(value * spread / np.sqrt(len(inverses))))


ESTIMATORS = {"TwoNN": two_nn, "maximum likelihood": maximum_likelihood}


@functools.lru_cache(maxsize=4096)
def _reference(estimator: str, size: int, dimension: int) -> float:
    """The estimate for `size` points of a uniform cube, the mean over a few draws."""
    draws = max(1, 2000 // size)
    random = np.random.default_rng([size, dimension])
    values = [
        ESTIMATORS[estimator](random.random((size, dimension))).value
        for _ in range(draws)
    ]
    return float(np.mean(values))


def calibrated(estimate: Estimate, estimator: str, size: int, *, most: int = 40) -> Estimate:
    """The dimension d at which `size` points of a uniform cube give the same estimate.

    Linear between whole d. Estimates above that of `most` dimensions are continued at its slope.

    Args:
      estimator: "TwoNN" or "maximum likelihood".
      size: N, the number of points that gave the estimate.
      most: the largest d that is tried.
    """
    value = estimate.value
    if value <= _reference(estimator, size, 1):
        scale = 1 / _reference(estimator, size, 1)
        return Estimate(value * scale, estimate.error * scale)
    below = 1
    while below < most - 1 and _reference(estimator, size, below + 1) < value:
        below += 1
    low, high = (_reference(estimator, size, below + step) for step in (0, 1))
    slope = 1 / max(high - low, 0.1)
    return Estimate(below + (value - low) * slope, estimate.error * slope)


class Dimension(NamedTuple):
    """Intrinsic dimension at several scales.

    Attributes:
      value: calibrated, the mean of both estimators, at the scale that was chosen.
      two_nn, maximum_likelihood: of all points, as published, not calibrated.
      scales: (points in a part, calibrated estimate) for every thinning.
    """

    value: Estimate
    two_nn: Estimate
    maximum_likelihood: Estimate
    scales: tuple[tuple[int, Estimate], ...]


def _at_scale(points: np.ndarray, parts: int) -> tuple[int, Estimate]:
    """The calibrated estimate of points dealt to `parts` equal parts, averaged over the parts."""
    size = len(points) // parts
    found = []
    for name, estimator in ESTIMATORS.items():
        values = [estimator(points[part : size * parts : parts]) for part in range(parts)]
        mean = Estimate(
            float(np.mean([each.value for each in values])),
            float(np.sqrt(np.sum([each.error**2 for each in values])) / parts),
        )
        found.append(calibrated(mean, name, size))
    # The two see the same points: their errors do not average out.
    return size, Estimate(*(float(np.mean(pair)) for pair in zip(*found, strict=True)))


def data_dimension(points: np.ndarray) -> Dimension:
    """The intrinsic dimension of points [N, D] by two estimators, calibrated, over scales.

    Args:
      points: in random order; rows that repeat are taken once.

    Raises:
      ValueError: not [N, D], not finite, or fewer than 50 different rows.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2:
        raise ValueError(f"points has shape {points.shape}; give [N, D].")
    _, kept = np.unique(points, axis=0, return_index=True)
    if len(kept) < LEAST_POINTS:
        raise ValueError(
            f"points has {len(kept)} different rows; give at least {LEAST_POINTS}."
        )
    points = points[np.sort(kept)]
    scales = tuple(
        _at_scale(points, parts) for parts in THINNING if len(points) // parts >= LEAST_POINTS
    )
    chosen = scales[0][1]
    for _, coarser in scales[1:]:
        if coarser.value < (1 - FALL) * chosen.value:
            chosen = coarser
    return Dimension(chosen, two_nn(points), maximum_likelihood(points), scales)
