"""The decoder variance that a loss implies.

A loss a * |x - x_hat|^2 + b * KL is 2 a gamma = b away from -ELBO: divided by b it is
|x - x_hat|^2 / (2 gamma) + KL, eq. 2 without the terms that do not move the networks, with
gamma = b / (2 a). Sums, means, factors and the KL weight beta only enter a and b.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vaebal.errors import InputError

REDUCTIONS = ("sum", "mean")
REFUSED = {
    "bernoulli": (
        "a Bernoulli likelihood (binary cross-entropy) has no decoder variance, and on pixels "
        "that are not 0 or 1 it is no density either"
    ),
    "l1": (
        "an absolute error is a Laplace likelihood, whose scale is no Gaussian variance: its "
        "optimum is a median, and Theorem 1 does not hold for it"
    ),
    "perceptual": "a perceptual error is measured in a network's features, not in pixels",
}
SYNONYMS = {
    "squared": "squared", "mse": "squared", "l2": "squared", "gaussian": "squared",
    "bernoulli": "bernoulli", "bce": "bernoulli", "l1": "l1", "mae": "l1", "laplace": "l1",
    "perceptual": "perceptual", "lpips": "perceptual",
}  # fmt: skip


def _positive(name: str, value: float | None, why: str = "") -> float:
    if value is None:
        raise InputError(f"{name} is missing: {why}.")
    number = float(value)
    if not 0 < number < float("inf"):
        raise InputError(f"{name}={value!r} must be a positive, finite number.")
    return number


def _reduction(name: str, value: str) -> bool:
    if value not in REDUCTIONS:
        raise InputError(f"{name}={value!r} must be 'sum' or 'mean'.")
    return value == "mean"


def _last_weight(kl_weight: float | Sequence[float]) -> float:
    weights = np.atleast_1d(np.asarray(kl_weight, np.float64))
    if weights.ndim != 1 or not weights.size:
        raise InputError("kl_weight must be a number, or a schedule's values in order of time.")
    if weights[-1] == 0:
        raise InputError(
            "kl_weight ends at 0: that is a plain autoencoder (γ = 0) whose posterior variance "
            "nothing holds; give the weight that training ended with."
        )
    return _positive("kl_weight", float(weights[-1]))


def implied_gamma(
    kl_weight: float | Sequence[float] = 1.0,
    *,
    error: str = "squared",
    factor: float = 1.0,
    pixels: str = "sum",
    latents: str = "sum",
    dim: int | None = None,
    latent_dim: int | None = None,
    batch_error: str = "mean",
    batch_kl: str = "mean",
    batch_size: int | None = None,
) -> float:
    """The gamma at which -ELBO (eq. 2) has the gradient of a loss, up to a factor.

    The loss is factor * reduce(|x - x_hat|^2) + kl_weight * reduce(KL), z sampled once.

    Args:
      kl_weight: beta; of an annealed one the schedule's values in order, of which the last counts.
      error: "squared"; "bce" and "l1" are refused with the reason.
      factor: before the error, often 1 or 1/2.
      pixels: "sum" or "mean" over the D pixels (`torch.nn.functional.mse_loss` takes the mean
        over all elements: "mean").
      latents: "sum" or "mean" of the KL over the K latents.
      dim: D, needed where pixels="mean".
      latent_dim: K, needed where latents="mean".
      batch_error, batch_kl: "sum" or "mean" over the batch; matters only where they differ.
      batch_size: B, needed where they differ.

    Returns:
      gamma, a variance in the squared unit of x.

    Raises:
      ValueError: a likelihood that is not Gaussian, a weight that is not positive, a size that is
        needed and missing.
    """
    kind = SYNONYMS.get(error.lower()) if isinstance(error, str) else None
    if kind is None:
        raise InputError(f"error={error!r} must be 'squared' (or 'bce', 'l1', which are refused).")
    if kind in REFUSED:
        raise InputError(
            f"error={error!r} implies no γ: {REFUSED[kind]}; train with a squared error, or "
            "diagnose without γ from x_hat_sampled."
        )
    beta, error_weight, kl_weight = _last_weight(kl_weight), _positive("factor", factor), 1.0
    if _reduction("pixels", pixels):
        error_weight /= _positive("dim", dim, "a mean over pixels needs their number D")
    if _reduction("latents", latents):
        kl_weight /= _positive("latent_dim", latent_dim, "a mean over latents needs their number K")
    means = _reduction("batch_error", batch_error), _reduction("batch_kl", batch_kl)
    if means[0] != means[1]:
        size = _positive("batch_size", batch_size, "sum and mean over the batch differ by it")
        error_weight, kl_weight = (
            error_weight if means[0] else error_weight * size,
            kl_weight if means[1] else kl_weight * size,
        )
    return beta * (kl_weight / (2 * error_weight))


def implied_beta(gamma: float, **loss: Any) -> float:
    """The KL weight that gives a loss this gamma: the inverse of `implied_gamma`.

    Args:
      gamma: decoder variance, in the squared unit of x.
      loss: `implied_gamma`'s keywords but `kl_weight`.

    Raises:
      ValueError: as there, or a gamma that is not positive.
    """
    return _positive("gamma", gamma) / implied_gamma(1.0, **loss)
