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
    features = np.asarray(features)
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float64)
    if features.ndim != 2 or features.size == 0:
        raise ValueError(f"{name} has shape {features.shape}; give [examples, features].")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} has values that are not finite; remove those examples.")
    return features


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """The distance of each from the k-th nearest of the others, [N]."""
    distances, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(features).kneighbors()
    # The k-th neighbour itself lies within, though its distance is rounded otherwise elsewhere.
    return distances[:, -1] * (1 + 1e-9)


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
            f"k is {k} for {len(real)} and {len(samples)} examples; give 1 or more, and more "
            "examples than that."
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


def nearest(train: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """The distance of each of the examples [M, F] from the nearest of train [N, F], [M].

    Raises:
      ValueError: other shapes, or not finite.
    """
    train, examples = _features("train", train), _features("examples", examples)
    if train.shape[1] != examples.shape[1]:
        raise ValueError(
            f"examples has {examples.shape[1]} features and train {train.shape[1]}; "
            "give equal numbers."
        )
    return pairwise_distances_argmin_min(examples, train)[1]


def copying(held_out: np.ndarray, samples: np.ndarray) -> Copying:
    """How near samples lie to the training set, beside held-out examples.

    `nearer` is Mann and Whitney's statistic, ties counted half. Blurred samples lie farther
    from everything: a low value is no proof of novelty.

    Args:
      held_out: the distances of held-out examples from it [L], see `nearest`. Of fewer than 99,
        `copied` of fresh draws is 1 / (L + 1) instead.
      samples: and of samples, [M].
    """
    return Copying(
        nearer=float(stats.mannwhitneyu(held_out, samples).statistic)
        / (len(held_out) * len(samples)),
        copied=float((samples < np.quantile(held_out, 0.01, method="weibull")).mean()),
        distance=float(np.mean(samples)),
        held_out=float(np.mean(held_out)),
    )
