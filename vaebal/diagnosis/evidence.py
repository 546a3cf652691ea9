"""What the outputs of a VAE say of its balance, in numbers with standard errors.

Shapes: N examples, D pixels, K latents.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vaebal.diagnosis.dimension import Dimension, data_dimension
from vaebal.diagnosis.implied import implied_gamma
from vaebal.diagnosis.inputs import Inputs
from vaebal.diagnosis.repeats import told_by_others
from vaebal.errors import InputError
from vaebal.measures.evaluation import Estimate, active_units, mean_estimate
from vaebal.measures.mmd import imq_mmd2_to_normal

ACTIVE = 0.01  # Burda et al.'s threshold on Var_x(E[z|x])
INFORMATIVE = 0.5  # of sigma^2: half the prior's
# An intermittent latent has sigma^2 below and above these in so many examples each, and most in
# one or the other: a union of manifolds, not a latent near the threshold.
LOW, HIGH, LEAST_SHARE, BETWEEN = 0.25, 0.75, 0.05, 0.2
# Neighbours and kernels look at so many examples at most.
MOST_NEIGHBOURS, MOST_KERNEL, MOST_SPECTRUM = 2000, 4000, 2000
# Of drawn noise: pixels, or samples where these are fewer.
MOST_DRAWN, MOST_DRAWN_SAMPLES = 200, 50


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Numbers on N examples of D pixels under K latents; nats, gamma in the squared unit of x.

    Attributes:
      kl: per latent [K], with standard errors.
      activity: Var_x(E[z_k|x]) [K].
      variance: sigma_k^2, mean over examples [K].
      active: number of latents with activity above .01.
      informative: number with mean sigma^2 below 1/2.
      doubtful: the latents that are one and not the other, but for active intermittent ones.
      informed_share: share of the examples in which sigma_k^2 is below 1/2, [K].
      informative_per_example: number of such latents in one example.
      intermittent: the latents that inform some examples and not others.
      mmd2, mmd2_active: of the aggregate posterior to N(0, I), over all latents, and over the
        active or informative ones (NaN if there is none).
      gamma: as given or implied; None if unknown.
      gamma_source: "given", "loss", "response" or "".
      gamma_response: E|x_hat(z) - x_hat(mean)|^2 / E sum_k (1 - sigma_k^2), gamma where sigma^2 is
        optimal (gamma / (|w_k|^2 + gamma), Theorem 1); None without x_hat_sampled.
      gamma_stationary: E|x - x_hat|^2 / D at a sampled z; None if it cannot be told.
      unexplained: E|x - x_hat|^2 at the posterior mean over the data's variance.
      unexplained_sampled: the same at a sampled z; None as gamma_stationary.
      structured: the part of `unexplained` in directions of the residual that stand out of white
        noise of the same size.
      lost: the part of `unexplained_sampled` beyond white noise as strong as the residual is in the
        middle of its spectrum; None as gamma_stationary.
      directions: residual directions with variance above gamma (noise's own spread allowed for);
        None if gamma is unknown.
      top_residual: largest variance of the residual along a direction.
      residual_spectrum, data_spectrum: variances along principal directions, descending.
      data: intrinsic dimension of x; codes: of the active posterior means (None if none).
      redundancy: dimension of those means with every latent shuffled by itself, over `codes`: 1
        where they fill as many dimensions as there are latents.
      repeated: per latent [K] the share of its means' variance that is told by the other active
        latents' means, `told_by_others`, with standard errors; NaN where idle or not looked at.
      missing: dimension of x over that of the codes.
    """

    samples: int
    pixels: int
    latents: int
    kl: np.ndarray
    kl_error: np.ndarray
    activity: np.ndarray
    variance: np.ndarray
    active: Estimate
    informative: Estimate
    doubtful: tuple[int, ...]
    informed_share: np.ndarray
    informative_per_example: Estimate
    intermittent: tuple[int, ...]
    mmd2: Estimate
    mmd2_active: Estimate
    gamma: float | None
    gamma_source: str
    gamma_response: Estimate | None
    gamma_stationary: Estimate | None
    unexplained: Estimate
    unexplained_sampled: Estimate | None
    structured: float
    lost: float | None
    directions: int | None
    top_residual: Estimate
    residual_spectrum: np.ndarray
    data_spectrum: np.ndarray
    data: Dimension
    codes: Dimension | None
    redundancy: Estimate | None
    missing: Estimate | None
    repeated: np.ndarray
    repeated_error: np.ndarray

    @property
    def gamma_ratio(self) -> float | None:
        """gamma over its stationary value; None if either is unknown."""
        if self.gamma is None or self.gamma_stationary is None:
            return None
        return self.gamma / self.gamma_stationary.value


def _ratio(above: Estimate, below: Estimate) -> Estimate:
    """A ratio, its error by the delta method, the two taken as independent."""
    value = above.value / below.value
    relative = np.hypot(above.error / above.value, below.error / below.value)
    return Estimate(float(value), float(value * relative))


def _informative_units(log_var: np.ndarray) -> tuple[Estimate, np.ndarray]:
    """The number of latents with mean sigma^2 < 1/2, and the means [K]."""
    variance = np.exp(log_var)
    mean, error = variance.mean(0), variance.std(0, ddof=1) / np.sqrt(len(variance))
    near = np.abs(mean - INFORMATIVE) < 2 * error
    return Estimate(int((mean < INFORMATIVE).sum()), float(0.5 * np.sqrt(near.sum()))), mean


def _intermittent(log_var: np.ndarray) -> np.ndarray:
    """Which latents inform some examples and not others, [K]."""
    low, high = log_var < np.log(LOW), log_var > np.log(HIGH)
    mixed = np.minimum(low.mean(0), high.mean(0)) > LEAST_SHARE
    return mixed & ((~low & ~high).mean(0) < BETWEEN)


def _known_gamma(
    given: Inputs, gamma: float | None, loss: Mapping[str, Any] | None
) -> tuple[float | None, str]:
    if gamma is not None and loss is not None:
        raise InputError("gamma and loss both say what γ is; give one of them.")
    if loss is not None:
        if not isinstance(loss, Mapping):
            raise InputError(f"loss={loss!r} must be a dictionary, as in {{'kl_weight': 1e-3}}.")
        sizes = {"dim": given.x.shape[1], "latent_dim": given.mean.shape[1]}
        try:
            return implied_gamma(**(sizes | dict(loss))), "loss"
        except TypeError as error:
            raise InputError(f"loss={dict(loss)!r} is not understood: {error}.") from error
    if gamma is None:
        return None, ""
    try:
        known = float(gamma)
    except (TypeError, ValueError):  # complex, text, several
        known = np.nan
    if not 0 < known < np.inf:
        raise InputError(f"gamma={gamma!r} must be one positive, finite variance.")
    return known, "given"


def _gammas(given: Inputs, gamma: float | None, source: str) -> dict[str, Any]:
    """gamma, where it comes from, its response and its stationary value."""
    pixels = given.x.shape[1]
    told = (1 - np.exp(given.log_var)).sum(1)  # what a sampled z adds, in units of gamma
    response = None
    if given.x_hat_sampled is not None:
        moved = np.square(given.x_hat_sampled - given.x_hat).sum(1)
        if told.mean() > 0.01 and moved.mean() > 0:
            scale = Estimate(float(told.mean()), float(told.std(ddof=1) / np.sqrt(len(told))))
            response = _ratio(mean_estimate(moved), scale)
        stationary = mean_estimate(np.square(given.x - given.x_hat_sampled).sum(1) / pixels)
    if gamma is None and response is not None:
        gamma, source = response.value, "response"
    if given.x_hat_sampled is None:
        stationary = None
        if gamma is not None:
            error = np.square(given.x - given.x_hat).sum(1)
            stationary = mean_estimate((error + gamma * np.maximum(told, 0)) / pixels)
    return {
        "gamma": gamma,
        "gamma_source": source,
        "gamma_response": response,
        "gamma_stationary": stationary,
    }


def _spectrum(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances of rows [n, D] along principal directions, descending, and the first scores [n]."""
    size, pixels = rows.shape
    centred = rows - rows.mean(0)[None, :]
    if pixels <= size:
        values, vectors = np.linalg.eigh(centred.T @ centred / size)
        first = centred @ vectors[:, -1]
    else:
        values, vectors = np.linalg.eigh(centred @ centred.T / size)
        first = vectors[:, -1] * np.sqrt(max(values[-1], 0.0) * size)
    return np.maximum(values[::-1], 0.0), first


def _noise(spectrum: np.ndarray, samples: int, pixels: int, random) -> float:
    """The variance of white noise whose spectrum has the same middle.

    By noise drawn with as many samples a pixel, on which alone the middle depends. Where samples
    are fewer than pixels, one variance is 0 by the centring and left out of both.
    """
    if samples > pixels:
        drawn = min(pixels, MOST_DRAWN)
        size = round(drawn * samples / pixels)
    else:
        size = min(samples, MOST_DRAWN_SAMPLES)
        drawn = round(size * pixels / samples)
        spectrum = spectrum[: samples - 1]
    white = _spectrum(random.standard_normal((size, drawn)))[0][: size - 1]
    return float(np.median(spectrum) / np.median(white))


def _residual(
    given: Inputs, rows: np.ndarray, total: float, gamma: float | None, sampled: Estimate | None,
    random,
) -> dict[str, Any]:  # fmt: skip
    """The spectrum of x - x_hat(mean), and how it stands to white noise and to gamma."""
    spectrum, along = _spectrum(given.x[rows] - given.x_hat[rows])
    pixels = given.x.shape[1]
    noise = _noise(spectrum, len(rows), pixels, random) * pixels / total
    # Noise of variance s spreads its n samples' eigenvalues up to this many s (Marchenko-Pastur).
    edge = (1 + np.sqrt(pixels / len(rows))) ** 2
    floor = edge * spectrum.sum() / pixels
    return {
        "structured": float(np.maximum(spectrum - floor, 0.0).sum() / total),
        "lost": None if sampled is None else float(sampled.value - noise),
        "directions": None if gamma is None else int((spectrum > edge * gamma).sum()),
        "top_residual": mean_estimate(np.square(along)),
        "residual_spectrum": spectrum,
        "data_spectrum": _spectrum(given.x[rows])[0],
    }


def _dimensions(given: Inputs, used: np.ndarray, order: np.ndarray, random) -> dict[str, Any]:
    """Intrinsic dimension of the data, of the codes and of these shuffled; what they repeat."""
    rows = order[:MOST_NEIGHBOURS]
    data = data_dimension(given.x[rows], name="x")
    repeated, errors = np.full((2, len(used)), np.nan)
    told = {"repeated": repeated, "repeated_error": errors}
    if not used.any():
        return {"data": data, "codes": None, "redundancy": None, "missing": None, **told}
    codes = given.mean[rows][:, used]
    repeated[used], errors[used] = told_by_others(codes)
    found = data_dimension(codes, name="mean")
    shuffled = data_dimension(random.permuted(codes, axis=0))
    return {
        "data": data,
        "codes": found,
        "redundancy": _ratio(shuffled.value, found.value),
        "missing": _ratio(data.value, found.value),
        **told,
    }


def _mmd2(sample: np.ndarray) -> Estimate:
    return Estimate(*map(float, imq_mmd2_to_normal(sample.astype(np.float32))))


def collect(
    given: Inputs, gamma: float | None, loss: Mapping[str, Any] | None, seed: int
) -> Evidence:
    """All evidence on checked inputs.

    Raises:
      ValueError: gamma or loss that cannot be meant, or too few different rows of x.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(given.x))
    kl = 0.5 * (np.square(given.mean) + np.expm1(given.log_var) - given.log_var)
    informative, variance = _informative_units(given.log_var)
    activity = given.mean.var(0)
    active, informs = activity > ACTIVE, variance < INFORMATIVE
    informed = np.exp(given.log_var) < INFORMATIVE
    sometimes = _intermittent(given.log_var)
    z = given.mean + np.exp(0.5 * given.log_var) * random.standard_normal(given.mean.shape)
    z = z[order[:MOST_KERNEL]]
    used = active | informs
    gammas = _gammas(given, *_known_gamma(given, gamma, loss))
    total = float(given.x.var(0).sum())
    errors = {"unexplained": given.x_hat, "unexplained_sampled": given.x_hat_sampled}
    shares = {
        name: None if x_hat is None else mean_estimate(np.square(given.x - x_hat).sum(1) / total)
        for name, x_hat in errors.items()
    }
    if shares["unexplained_sampled"] is None and gammas["gamma_stationary"] is not None:
        scale = given.x.shape[1] / total
        shares["unexplained_sampled"] = Estimate(*(scale * v for v in gammas["gamma_stationary"]))
    residual = _residual(
        given, order[:MOST_SPECTRUM], total, gammas["gamma"], shares["unexplained_sampled"], random
    )
    return Evidence(
        samples=len(given.x),
        pixels=given.x.shape[1],
        latents=given.mean.shape[1],
        kl=kl.mean(0),
        kl_error=kl.std(0, ddof=1) / np.sqrt(len(kl)),
        activity=activity,
        variance=variance,
        active=active_units(given.mean, ACTIVE),
        informative=informative,
        doubtful=tuple(np.flatnonzero((active != informs) & ~(active & sometimes)).tolist()),
        informed_share=informed.mean(0),
        informative_per_example=mean_estimate(informed.sum(1)),
        intermittent=tuple(np.flatnonzero(sometimes).tolist()),
        mmd2=_mmd2(z),
        mmd2_active=_mmd2(z[:, used]) if used.any() else Estimate(np.nan, np.nan),
        **gammas,
        **shares,
        **residual,
        **_dimensions(given, active, order, random),
    )
