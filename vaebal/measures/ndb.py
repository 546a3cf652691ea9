"""Number of statistically different bins (Richardson & Weiss, 2018).

k-means cuts the training set into bins; a query set is right where it fills them in the same
proportions. Two samples of one distribution differ in about .05 of the bins, by construction.

Shapes: N training and M query examples, D dimensions, K bins.
"""

import warnings
from typing import NamedTuple

import jax
import numpy as np
from scipy import special
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import pairwise_distances_argmin

from vaebal.streams import stream

LEVEL = 0.05  # of the two-tailed test in each bin
MOST_DIMENSIONS = 1000  # above, distances are taken in a random sixth of them
SUBSPACE = 6
STARTS = 4096  # examples at most, among which the first centres are chosen


class Bins(NamedTuple):
    """A training set's bins, for any number of query sets."""

    centres: np.ndarray  # [K, D] the means of their examples, in the data's own units
    counts: np.ndarray  # [K] training examples in each
    mean: np.ndarray  # [D] and
    scale: np.ndarray  # [D]: distances are between (x - mean) / scale
    dimensions: np.ndarray  # [D'], those that distances are taken in

    def assign(self, examples: np.ndarray) -> np.ndarray:
        """The bin of each example, [M, D] -> [M]: that of the nearest centre."""
        about = self.mean, self.scale, self.dimensions
        return pairwise_distances_argmin(_points(examples, *about), _points(self.centres, *about))


def _points(
    examples: np.ndarray, mean: np.ndarray, scale: np.ndarray, dimensions: np.ndarray
) -> np.ndarray:
    """What distances are between, [M, D] -> [M, D']."""
    return (examples[:, dimensions] - mean[None, dimensions]) / scale[None, dimensions]


def _mean(examples: np.ndarray) -> np.ndarray:
    """[M, D] -> [D], added in float64: where all are equal it is what they are.

    Whitening divides by 1e-6 there, and float32's rounding would become the largest distance.
    """
    return examples.mean(0, np.float64).astype(examples.dtype)


class NDB(NamedTuple):
    """How a query set fills the bins of a training set."""

    ndb: float  # fraction of the bins that differ
    js: float  # Jensen-Shannon divergence of the proportions, in nats
    train: np.ndarray  # [K] proportion of the training set in each bin
    query: np.ndarray  # [K] proportion of the query set
    z: np.ndarray  # [K] two-proportion z-score of query - train
    different: np.ndarray  # [K] whether |z| is beyond the two-tailed .05
    centres: np.ndarray  # [K, D] of the bins


def _examples(name: str, examples: np.ndarray) -> np.ndarray:
    examples = np.asarray(examples)
    if examples.ndim != 2 or examples.size == 0:
        raise ValueError(f"{name} has shape {examples.shape}; give [examples, dimensions].")
    if examples.dtype not in (np.float32, np.float64):
        examples = examples.astype(np.float32)
    if not np.isfinite(examples).all():
        raise ValueError(f"{name} has values that are not finite; remove those examples.")
    return examples


def ndb_bins(train: np.ndarray, bins: int, seed: int, *, whiten: bool = False) -> Bins:
    """Cuts train [N, D] into K bins by k-means (one start, at most 100 iterations).

    The first centres are chosen by k-means++ among 4096 examples, or K if those are more.

    Above 1000 dimensions distances are taken in D // 6 random ones, of these examples and of those
    that are compared, as in the authors' own code; centres are means in all D.

    Args:
      bins: K.
      seed: of the starting centres and of the random dimensions.
      whiten: measure distances between (x - mean) / (standard deviation + 1e-6), per dimension.

    Raises:
      ValueError: not [N, D], not finite, K below 2, fewer examples, or fewer distinct
        examples, than K.
    """
    train = _examples("train", train)
    if bins < 2:
        raise ValueError(f"bins is {bins}; give at least 2.")
    if len(train) < bins:
        raise ValueError(f"train has {len(train)} examples for {bins} bins; give fewer bins.")
    size = train.shape[1]
    mean, scale = np.zeros(size, train.dtype), np.ones(size, train.dtype)
    if whiten:
        mean, scale = _mean(train), (train.std(0, np.float64) + 1e-6).astype(train.dtype)
    dimensions = np.arange(size)
    if size > MOST_DIMENSIONS:
        key = stream(seed, "ndb/dimensions")
        dimensions = np.asarray(jax.random.choice(key, size, (size // SUBSPACE,), replace=False))
    points = _points(train, mean, scale, dimensions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # refused below, in our words
        init = "k-means++"
        if len(points) > max(STARTS, bins):  # it reads all of them several times for every centre
            some = np.random.default_rng(seed).choice(len(points), max(STARTS, bins), replace=False)
            init = kmeans_plusplus(points[some], bins, random_state=seed)[0]
        model = KMeans(bins, init=init, n_init=1, max_iter=100, random_state=seed)
        labels = model.fit(points).labels_
    members = np.bincount(labels, minlength=bins)
    if (members == 0).any():
        raise ValueError(
            f"train has {(members > 0).sum()} distinct examples for {bins} bins; give fewer bins."
        )
    centres = np.stack([_mean(train[labels == label]) for label in range(bins)])
    return Bins(centres, members, mean, scale, dimensions)


def ndb_compare(bins: Bins, query: np.ndarray) -> NDB:
    """How query [M, D] fills `bins`; see `ndb`."""
    query = _examples("query", query)
    if query.shape[1] != len(bins.mean):
        raise ValueError(
            f"query has {query.shape[1]} dimensions where train has {len(bins.mean)}; "
            "give the same."
        )
    n, m = bins.counts.sum(), len(query)
    counts = np.bincount(bins.assign(query), minlength=len(bins.counts))
    p, q, pooled = bins.counts / n, counts / m, (bins.counts + counts) / (n + m)
    z = (q - p) / np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    different = np.abs(z) > -special.ndtri(LEVEL / 2)
    middle = (p + q) / 2
    js = (special.rel_entr(p, middle) + special.rel_entr(q, middle)).sum() / 2
    return NDB(
        ndb=float(different.mean()),
        js=float(js),
        train=p,
        query=q,
        z=z,
        different=different,
        centres=bins.centres,
    )


def ndb(train: np.ndarray, query: np.ndarray, bins: int, seed: int, *, whiten: bool = False) -> NDB:
    """NDB / K and the Jensen-Shannon divergence of query [M, D] from train [N, D].

    In each of K = `bins` bins of `ndb_bins`, a two-proportion z-test with pooled variance at
    the two-tailed .05. None is empty: each holds a training example.

    For two samples of one distribution `.ndb` is about .05 and `.js` (K - 1) / 8 (1 / N + 1 / M).
    But the centres were fitted to train: where noise fills many dimensions and bins hold few
    examples, a second sample may differ in more. So show a held-out set's values beside a model's.

    Raises:
      ValueError: as `ndb_bins`, or query not [M, D] or not finite.
    """
    return ndb_compare(ndb_bins(train, bins, seed, whiten=whiten), query)
