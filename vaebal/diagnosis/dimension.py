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

from vaebal.errors import InputError
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


def _neighbour_distances(points: np.ndarray) -> np.ndarray:
    """Distances [N, 20] to the nearest other points, equal points taken once.

    Raises:
      ValueError: not [N, D], not finite, or too few different points.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] < 1:
        raise InputError(f"points has shape {points.shape}; give [N, D].")
    if not np.isfinite(points).all():
        raise InputError("points has values that are not finite; remove them.")
    points, neighbours = np.unique(points, axis=0), NEIGHBOURS[1]
    if len(points) < neighbours + 2:
        raise InputError(
            f"points has {len(points)} different rows; give at least {neighbours + 2}."
        )
    # Brute force centres nothing: far from 0, a difference of large squares loses its digits.
    points = points - points.mean(0)[None, :]
    search = NearestNeighbors(n_neighbors=neighbours).fit(points)
    distances, _ = search.kneighbors()
    return distances


def _two_nn(distances: np.ndarray) -> Estimate:
    log_ratio = np.sort(np.log(distances[:, 1] / distances[:, 0]))
    size = len(log_ratio)
    kept = max(int(size * (1 - DISCARDED)), 2)
    survival = -np.log1p(-np.arange(1, kept + 1) / (size + 1))
    log_ratio = log_ratio[:kept]
    slope = float(log_ratio @ survival / (log_ratio @ log_ratio))
    return Estimate(slope, slope / np.sqrt(kept))


def two_nn(points: np.ndarray) -> Estimate:
    """TwoNN (Facco et al., 2017): from the ratio of the second to the first neighbour's distance.

    The ratio mu has P(mu > m) = m^-d where the density is constant across two neighbours, so
    -log(1 - F(mu)) against log mu is a line of slope d through the origin, fitted here without
    the largest tenth. The standard error, d over the root of the ratios fitted, takes points as
    independent, but neighbours share neighbours: uniform cubes of 2 to 15 dimensions, drawn again,
    spread 1.1 to 1.4 times as much (300 to 3000 points).

    Args:
      points: [N, D]; rows that repeat are taken once.

    Raises:
      ValueError: not [N, D], not finite, or fewer than 22 different rows.
    """
    return _two_nn(_neighbour_distances(points))


def _maximum_likelihood(distances: np.ndarray) -> Estimate:
    least, most = NEIGHBOURS
    logs = np.log(distances)
    inverses = np.stack(
        [
            (logs[:, k - 1, None] - logs[:, : k - 1]).sum(1) / (k - 1)
            for k in range(least, most + 1)
        ],
        axis=1,
    )  # [N, k]
    dimensions = 1 / inverses.mean(0)
    value = float(dimensions.mean())
    # One point's part in 1/d, for every k at once.
    spread = (inverses * dimensions[None, :]).mean(1).std(ddof=1)
    return Estimate(value, float(value * spread / np.sqrt(len(inverses))))


def maximum_likelihood(points: np.ndarray) -> Estimate:
    """Levina & Bickel (2004), averaged over points as inverses (MacKay & Ghahramani, 2005).

    With k neighbours at distances T_1 < ... < T_k, 1/d is the mean over points and j < k of
    log(T_k / T_j); the estimate is the mean of d over k = 10..20. The standard error is that of
    1/d over points, taken as independent: as with `two_nn`, an estimate spreads 1.2 to 1.5 times
    as much.

    Args:
      points: [N, D]; rows that repeat are taken once.

    Raises:
      ValueError: not [N, D], not finite, or fewer than 22 different rows.
    """
    return _maximum_likelihood(_neighbour_distances(points))


# Both see the same distances, which are what costs time.
_ESTIMATORS = {"TwoNN": _two_nn, "maximum likelihood": _maximum_likelihood}


def _estimates(points: np.ndarray) -> dict[str, Estimate]:
    distances = _neighbour_distances(points)
    return {name: estimator(distances) for name, estimator in _ESTIMATORS.items()}


@functools.lru_cache(maxsize=4096)
def _reference(size: int, dimension: int) -> dict[str, float]:
    """The estimates for `size` points of a uniform cube, the mean over a few draws."""
    random = np.random.default_rng([size, dimension])
    draws = [_estimates(random.random((size, dimension))) for _ in range(max(1, 2000 // size))]
    return {name: float(np.mean([draw[name].value for draw in draws])) for name in _ESTIMATORS}


def calibrated(estimate: Estimate, estimator: str, size: int, *, most: int = 40) -> Estimate:
    """The dimension d at which `size` points of a uniform cube give the same estimate.

    Linear between whole d. Estimates above that of `most` dimensions are continued at its slope.

    Args:
      estimator: "TwoNN" or "maximum likelihood".
      size: N, the number of points that gave the estimate.
      most: the largest d that is tried.
    """
    value, first = estimate.value, _reference(size, 1)[estimator]
    if value <= first:
        return Estimate(value / first, estimate.error / first)
    below = 1
    while below < most - 1 and _reference(size, below + 1)[estimator] < value:
        below += 1
    low, high = (_reference(size, below + step)[estimator] for step in (0, 1))
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


def _over_parts(drawn: list[dict[str, Estimate]], size: int) -> Estimate:
    """The calibrated estimate from those of equal parts of `size` points."""
    parts = len(drawn)
    found = []
    for name in _ESTIMATORS:
        mean = Estimate(
            float(np.mean([each[name].value for each in drawn])),
            float(np.sqrt(np.sum([each[name].error ** 2 for each in drawn])) / parts),
        )
        found.append(calibrated(mean, name, size))
    # The two see the same points: their errors do not average out.
    return Estimate(*(float(np.mean(pair)) for pair in zip(*found, strict=True)))


def data_dimension(points: np.ndarray, *, name: str = "points") -> Dimension:
    """The intrinsic dimension of points [N, D] by two estimators, calibrated, over scales.

    Args:
      points: in random order; rows that repeat are taken once.
      name: what they are called where they cannot be used.

    Raises:
      ValueError: not [N, D], not finite, or fewer than 50 different rows.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2:
        raise InputError(f"{name} has shape {points.shape}; give [N, D].")
    _, kept = np.unique(points, axis=0, return_index=True)
    if len(kept) < LEAST_POINTS:
        raise InputError(f"{name} has {len(kept)} different rows; give at least {LEAST_POINTS}.")
    points = points[np.sort(kept)]
    drawn = {
        parts: [_estimates(points[start : len(points) // parts * parts : parts])
                for start in range(parts)]
        for parts in THINNING
        if len(points) // parts >= LEAST_POINTS
    }  # fmt: skip
    sizes = {parts: len(points) // parts for parts in drawn}
    scales = tuple((sizes[parts], _over_parts(drawn[parts], sizes[parts])) for parts in drawn)
    chosen = scales[0][1]
    for _, coarser in scales[1:]:
        if coarser.value < (1 - FALL) * chosen.value:
            chosen = coarser
    published = drawn[1][0]
    return Dimension(chosen, published["TwoNN"], published["maximum likelihood"], scales)
