"""The Fréchet distance between Gaussians fitted to features (Heusel et al., 2017), in float64.

With the features of the 2015 Inception network it is called FID; with any others it is not.

Shapes: N and M examples, B a block of them, F features.
"""

from typing import NamedTuple

import jax
import numpy as np

from vaebal.streams import stream


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1^1/2 cov2 cov1^1/2)^1/2).

    The squared 2-Wasserstein distance between two normal distributions (Dowson & Landau,
    1982). Rank-deficient covariances are welcome.

    Args:
      mean1, mean2: [F].
      cov1, cov2: [F, F].

    Raises:
      ValueError: other shapes, not finite, not symmetric, or an eigenvalue below 0.
    """
    moments = {"mean1": mean1, "cov1": cov1, "mean2": mean2, "cov2": cov2}
    moments = {name: np.asarray(moment, np.float64) for name, moment in moments.items()}
    features = moments["mean1"].size
    for name, moment in moments.items():
        expected = (features,) if name.startswith("mean") else (features, features)
        if features == 0 or moment.shape != expected:
            raise ValueError(f"{name} has shape {moment.shape}; give {expected}, as mean1 has it.")
        if not np.isfinite(moment).all():
            raise ValueError(f"{name} has values that are not finite; remove them.")
        if name.startswith("cov") and np.abs(moment - moment.T).max() > 1e-6 * np.abs(moment).max():
            raise ValueError(f"{name} is not symmetric; give a covariance.")
    mean1, cov1, mean2, cov2 = moments.values()
    # With cov = root root^T, tr (cov1^1/2 cov2 cov1^1/2)^1/2 is the sum of root1^T root2's singular
    # values. Roots of the product's eigenvalues would have half the digits.
    root1, root2 = _root("cov1", cov1), _root("cov2", cov2)
    trace_of_root = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()
    distance = np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root
    return float(max(distance, 0.0))


def _root(name: str, cov: np.ndarray) -> np.ndarray:
    """R [F, F] with R R^T = cov [F, F], without the eigenvalues that rounding left below 0."""
    values, vectors = np.linalg.eigh(cov)
    if values[0] < -1e-6 * np.abs(values).max():
        raise ValueError(f"{name} has an eigenvalue below 0; give a covariance.")
    return vectors * np.sqrt(np.maximum(values, 0.0))[None, :]


class Moments(NamedTuple):
    """Count, mean and scatter of a stream of features, in float64 (Chan et al., 1983)."""

    count: int
    mean: np.ndarray  # [F]
    scatter: np.ndarray  # [F, F] sum of (x - mean) (x - mean)^T

    @classmethod
    def empty(cls, features: int) -> "Moments":
        """Of no examples yet, of F features."""
        return cls(0, np.zeros(features), np.zeros((features, features)))

    def update(self, features: np.ndarray) -> "Moments":
        """With a block of features [B, F] added, B of at least 1.

        Raises:
          ValueError: another number of features, no example, or values that are not finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or len(features) == 0 or features.shape[1] != len(self.mean):
            raise ValueError(
                f"features has shape {features.shape}; give [B, {len(self.mean)}], B at least 1."
            )
        if not np.isfinite(features).all():
            raise ValueError("features has values that are not finite; remove those examples.")
        mean = features.mean(0)
        centred = features - mean[None, :]
        return self.merge(Moments(len(features), mean, centred.T @ centred))

    def merge(self, other: "Moments") -> "Moments":
        """Of both streams together."""
        if len(self.mean) != len(other.mean):
            raise ValueError(
                f"other has {len(other.mean)} features where these have {len(self.mean)}; "
                "give moments of the same features."
            )
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(
            count, self.mean + delta * (other.count / count), self.scatter + other.scatter + between
        )

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, [F, F]. ValueError for fewer than 2 examples."""
        if self.count < 2:
            raise ValueError(f"count is {self.count}; a covariance needs at least 2 examples.")
        return self.scatter / (self.count - 1)


class FrechetEstimate(NamedTuple):
    """A Fréchet distance at N and M examples, and what it tends to with many."""

    value: float  # of all examples; biased upwards by about a constant / N
    extrapolated: float  # to infinitely many examples on both sides
    error: float  # standard error of `extrapolated` (and of `value`)
    counts: np.ndarray  # [parts] examples per subset of `features`: N, N / 2, ...
    values: np.ndarray  # [parts] distance at these counts, the mean over disjoint subsets
    subsets: np.ndarray  # [parts] distances of the smallest subsets, one by one
    warning: str  # the bias in words, where a covariance is singular; else empty


def _check_features(features: np.ndarray, reference: np.ndarray, parts: int) -> None:
    for name, given in (("features", features), ("reference", reference)):
        if given.ndim != 2 or given.shape[1] != reference.shape[-1]:
            raise ValueError(f"{name} has shape {given.shape}; give [N, F], F as in the other set.")
        if not np.isfinite(given).all():
            raise ValueError(f"{name} has values that are not finite; remove those examples.")
    if parts < 2:
        raise ValueError(f"parts is {parts}; a line needs at least 2.")
    fewest = min(len(features), len(reference))
    if fewest < 2 * parts:
        raise ValueError(
            f"{fewest} examples make {parts} subsets of fewer than 2; "
            "give more examples or fewer parts."
        )


def frechet_estimate(
    features: np.ndarray, reference: np.ndarray, *, seed: int, parts: int = 5
) -> FrechetEstimate:
    """The Fréchet distance of features [N, F] from a reference [M, F], without its bias.

    A finite sample's distance exceeds the true one by about constant / N, and the constant
    differs between models. As in FID_infinity (Chong & Forsyth, 2020) it is evaluated at several
    counts and its line in 1 / N followed to 0. Here both sides are cut at random into
    g = 1 ... `parts` disjoint subsets, so that every example counts at every g and the reference's
    bias goes too. The error is the standard deviation over the smallest subsets / sqrt(parts):
    right where the distributions differ, up to twice too large where they are equal.

    Args:
      seed: of the cuts.
      parts: most subsets; they take parts (parts + 1) / 2 distances.

    Raises:
      ValueError: not [N, F] and [M, F], not finite, or subsets of fewer than 2 examples.
    """
    features, reference = np.asarray(features), np.asarray(reference)
    _check_features(features, reference, parts)
    fewest, size = min(len(features), len(reference)), features.shape[1]

    def subsets(name: str, given: np.ndarray, number: int) -> list[Moments]:
        order = np.asarray(
            jax.random.permutation(stream(seed, f"frechet/{name}", number), len(given))
        )
        return [Moments.empty(size).update(given[p]) for p in np.array_split(order, number)]

    levels = [
        [
            frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
            for ours, theirs in zip(
                subsets("features", features, number),
                subsets("reference", reference, number),
                strict=True,
            )
        ]
        for number in range(1, parts + 1)
    ]
    numbers, values = np.arange(1, parts + 1), np.array([np.mean(level) for level in levels])
    extrapolated = np.polynomial.Polynomial.fit(numbers, values, 1)(0.0)
    warning = ""
    if fewest <= size:
        warning = f"{fewest} examples of {size} features: covariance is singular, value is biased"
    elif fewest // parts <= size:
        warning = (
            f"subsets of {fewest // parts} examples of {size} features: "
            "their covariance is singular, extrapolated is biased"
        )
    smallest = np.array(levels[-1])
    return FrechetEstimate(
        value=float(values[0]),
        extrapolated=float(extrapolated),
        error=float(smallest.std(ddof=1) / np.sqrt(parts)),
        counts=len(features) / numbers,
        values=values,
        subsets=smallest,
        warning=warning,
    )
