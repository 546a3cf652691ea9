"""Samples beside real examples by neighbours: precision, recall, density, coverage, copying.

Kynkäänniemi et al., 2019 (precision and recall); Naeem et al., 2020 (density and coverage);
Meehan, Chaudhuri & Dasgupta, 2020 (copying). Shapes: N real examples, M samples, F features.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import pairwise_distances_argmin_min, pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors


class Manifolds(NamedTuple):
    """How two sets fill each other's balls, each to its centre's k-th nearest neighbour."""

    precision: float  # share of samples within any real example's ball
    recall: float  # share of real examples within any sample's ball
    density: float  # real balls that hold a sample, over k, on average; 1 of equal sets
    coverage: float  # share of real balls that hold any sample


def _features(name: str, features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.size == 0:
        raise ValueError(f"{name} has shape {features.shape}; give [examples, features].")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} has values that are not finite; remove those examples.")
    return features


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """The distance of each from the k-th nearest of the others, [N]."""
    distances, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(features).kneighbors()
    return distances[:, -1]


def manifolds(real: np.ndarray, samples: np.ndarray, k: int = 5) -> Manifolds:
    """Precision, recall, density and coverage of samples [M, F] beside real [N, F].

    Recall and coverage depend on how many there are of each: compare equal numbers.

    Args:
      k: neighbours; 5 where density and coverage were defined, 3 where precision and recall were.

    Raises:
      ValueError: other shapes, not finite, or a set of not more than k.
    """
    real, samples = _features("real", real), _features("samples", samples)
    if real.shape[1] != samples.shape[1]:
        raise ValueError(
            f"samples has {samples.shape[1]} features and real {real.shape[1]}; give equal numbers."
        )
    if k < 1 or min(len(real), len(samples)) <= k:
        raise ValueError(
            f"k is {k} for {len(real)} and {len(samples)} examples; give 1 or more, and more of each."
        )
    of_real, of_samples = _radii(real, k), _radii(samples, k)
    within = np.zeros(len(samples), int)  # real balls that each sample lies in
    recalled, covered, start = 0, 0, 0
    for block in pairwise_distances_chunked(real, samples):
        in_ball = block <= of_real[start : start + len(block), None]
        within += in_ball.sum(0)
        covered += in_ball.any(1).sum()
        recalled += (block <= of_samples[None]).any(1).sum()
        start += len(block)
    return Manifolds(
        precision=float((within > 0).mean()),
        recall=float(recalled / len(real)),
        density=float(within.mean() / k),
        coverage=float(covered / len(real)),
    )


class Copying(NamedTuple):
    """Whether samples lie nearer to the training set than held-out examples do."""

    nearer: float  # probability that a sample does; .5 of fresh draws, above it: copied
    copied: float  # share of samples nearer than 99 % of the held-out are; .01 of fresh draws
    distance: float  # mean distance of a sample from the training set
    held_out: float  # and of a held-out example


def copying(train: np.ndarray, held_out: np.ndarray, samples: np.ndarray) -> Copying:
    """Nearest training examples of samples [M, F] against those of held-out examples [L, F].

    `nearer` is Mann and Whitney's statistic on the distances, ties counted half. Blurred or noisy
    samples lie farther from everything: a low value is no proof of novelty.

    Args:
      train: [N, F].

    Raises:
      ValueError: other shapes, or not finite.
    """
    sets = {"train": train, "held_out": held_out, "samples": samples}
    train, held_out, samples = (_features(*item) for item in sets.items())
    if not train.shape[1] == held_out.shape[1] == samples.shape[1]:
        raise ValueError("train, held_out and samples differ in their numbers of features.")
    theirs, ours = (pairwise_distances_argmin_min(x, train)[1] for x in (held_out, samples))
    smaller = stats.mannwhitneyu(theirs, ours).statistic / (len(theirs) * len(ours))
    return Copying(
        nearer=float(smaller),
        copied=float((ours < np.quantile(theirs, 0.01)).mean()),
        distance=float(ours.mean()),
        held_out=float(theirs.mean()),
    )
