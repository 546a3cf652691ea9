"""Evaluation of a Gaussian VAE: every example of a split once, every estimator with its error.

Shapes: N examples, D pixels, K latents, S importance samples.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import special

from vaebal.data import Decode
from vaebal.measures import importance
from vaebal.models import GaussianVAE, latent_noise
from vaebal.models.gaussians import isotropic_nll, reparameterise
from vaebal.models.objectives import gaussian_vae_terms
from vaebal.streams import stream
from vaebal.units import to_unit_pixels


class Estimate(NamedTuple):
    """A number and its standard error (NaN where one example leaves it undefined); scalars."""

    value: float | Array
    error: float | Array


def mean_estimate(samples: np.ndarray) -> Estimate:
    """The mean of i.i.d. samples [N] and its standard error, in float64."""
    samples = np.asarray(samples, np.float64)
    spread = samples.std(ddof=1) if len(samples) > 1 else np.nan
    return Estimate(float(samples.mean()), float(spread / np.sqrt(len(samples))))


def clustered_interval(
    successes: np.ndarray, trials: int, level: float = 0.95
) -> tuple[float, float, float]:
    """A fraction over dependent trials, and its interval with clusters as the independent unit.

    Trials of one cluster (runs of one seed: the same data and initialisation) are dependent, and
    an interval that counts each as independent is too narrow. Student's t on the clusters'
    fractions, K - 1 degrees of freedom, cut at 0 and 1. Where there is one trial a cluster, or
    every cluster has the same fraction and t no width, Wilson's score interval of K trials.

    Args:
      successes: [K], the number in each cluster.
      trials: in each cluster.

    Returns:
      The fraction, and the interval's ends.

    Raises:
      ValueError: fewer than 2 clusters, no trials, or a number outside 0 to `trials`.
    """
    successes = np.asarray(successes, np.float64)
    if successes.ndim != 1 or len(successes) < 2:
        raise ValueError(f"successes has shape {successes.shape}; give [K], K of at least 2.")
    if trials < 1 or not ((successes >= 0) & (successes <= trials)).all():
        raise ValueError(
            f"successes is {successes.tolist()} of {trials} trials; give 0 to {trials} of each, "
            "and at least one trial."
        )
    fractions, clusters = successes / trials, len(successes)
    mean, tail = float(fractions.mean()), (1 - level) / 2
    if trials == 1 or np.ptp(fractions) == 0:
        z2 = special.ndtri(tail) ** 2 / clusters
        middle = (mean + z2 / 2) / (1 + z2)
        width = math.sqrt(mean * (1 - mean) * z2 + z2**2 / 4) / (1 + z2)
    else:
        middle = mean
        width = -special.stdtrit(clusters - 1, tail) * fractions.std(ddof=1) / math.sqrt(clusters)
    return mean, float(max(middle - width, 0.0)), float(min(middle + width, 1.0))


class Posterior(NamedTuple):
    """What one pass over N examples yields, with one draw of z each; NumPy arrays."""

    squared_error_mean: np.ndarray  # [N] at the posterior mean
    squared_error_sampled: np.ndarray  # [N] at a sampled z
    negative_elbo: np.ndarray  # [N] nats
    kl: np.ndarray  # [K] mean over examples, nats
    mean: np.ndarray  # [N, K]
    sample: np.ndarray  # [N, K] the draws of z
    variance: np.ndarray  # [K] sigma^2, mean over examples


def _over_blocks(function: Callable[[Array, Array], Any], images: Array, block: int) -> Any:
    """function(index, `block` rows of images [N, ...]) of all blocks; its leaves as [N, ...].

    The last block is filled up with copies of image 0.
    """
    size = len(images)
    padding = jnp.broadcast_to(images[:1], (-size % block, *images.shape[1:]))
    blocks = jnp.concatenate([images, padding]).reshape(-1, block, *images.shape[1:])
    rows = jax.lax.map(lambda each: function(*each), (jnp.arange(len(blocks)), blocks))
    return jax.tree.map(lambda row: row.reshape(-1, *row.shape[2:])[:size], rows)


@functools.partial(jax.jit, static_argnames=("model", "block", "decode"))
def _posterior(model: GaussianVAE, params, kappa, images, seed, block: int, decode: Decode):
    mask = model.latent_mask(kappa)

    def one(index, stored):
        x = decode(stored)
        eps = latent_noise(stream(seed, "evaluation/posterior", index), block, model.latents)
        outputs = model.apply({"params": params}, x, eps, kappa)
        terms = gaussian_vae_terms(x, outputs)
        at_mean = model.apply({"params": params}, outputs.mean, method="decode")
        return (
            jnp.square(x - at_mean).sum(-1),
            terms.squared_error,
            terms.negative_elbo,
            terms.kl,
            outputs.mean,
            reparameterise(outputs.mean, outputs.log_var, jnp.where(mask, eps, 0.0)),
            jnp.exp(outputs.log_var),
        )

    rows = Posterior(*_over_blocks(one, images, block))
    return rows._replace(kl=rows.kl.mean(0), variance=rows.variance.mean(0))


def posterior(
    model: GaussianVAE,
    params: Any,
    images: Array,
    *,
    seed: int,
    block: int,
    kappa: int | None = None,
    decode: Decode = to_unit_pixels,
) -> Posterior:
    """One pass over `images` [N, ...] (stored rows of `decode`), in blocks of `block` examples."""
    kappa = model.latents if kappa is None else kappa
    block = min(block, len(images))
    return jax.device_get(_posterior(model, params, kappa, images, seed, block, decode))


@functools.partial(jax.jit, static_argnames=("model", "samples", "block", "decode"))
def _log_weights(
    model: GaussianVAE, params, kappa, images, seed, samples: int, block: int, decode: Decode
):
    variables = {"params": params}
    mask = model.latent_mask(kappa)

    def one_block(index, stored):
        x = decode(stored)
        mean, log_var = model.apply(variables, x, kappa, method="encode")
        log_gamma = model.apply(variables, method="log_gamma")

        def one_sample(sums, sample):
            key = stream(seed, "evaluation/nll", index, sample)
            eps = jnp.where(mask, latent_noise(key, block, model.latents), 0.0)
            z = reparameterise(mean, log_var, eps)
            squared_error = jnp.square(x - model.apply(variables, z, method="decode")).sum(-1)
            # log p(z) - log q(z|x): the 2 pi of the two densities cancel.
            log_ratio = 0.5 * (jnp.square(eps) + log_var - jnp.square(z)).sum(-1)
            log_w = log_ratio - isotropic_nll(squared_error, log_gamma, x.shape[-1])
            return importance.add(sums, log_w, sample), None

        start = importance.empty(jnp.zeros(block, x.dtype))
        return jax.lax.scan(one_sample, start, jnp.arange(samples))[0]

    return _over_blocks(one_block, images, block)


def importance_weighted_nll(
    model: GaussianVAE,
    params: Any,
    images: Array,
    *,
    samples: int,
    seed: int,
    block: int,
    kappa: int | None = None,
    decode: Decode = to_unit_pixels,
) -> tuple[np.ndarray, np.ndarray]:
    """An upper bound on -log p(x) by S importance samples from q(z|x) (Burda et al., 2016).

    Its expectation lies above -log p(x), by less the larger the effective sample size; near 1,
    one sample has all the weight and the bound is hardly better than -ELBO.
    `likelihood.laplace_nll` is tighter. Samples are streamed: memory does not grow with S.

    Args:
      images: [N, ...], stored rows of `decode`.
      samples: S.
      block: examples decoded at a time; part of the draw's name, so it belongs to the number.

    Returns:
      -(logsumexp_s log w_s - log S) [N] in nats, and the effective sample size
      (sum w)^2 / sum w^2 [N], between 1 and S.
    """
    kappa = model.latents if kappa is None else kappa
    block = min(block, len(images))
    sums = _log_weights(model, params, kappa, images, seed, samples, block, decode)
    return importance.bound(sums, samples)


def active_units(mean: np.ndarray, threshold: float = 0.01) -> Estimate:
    """Number of latents with A_k = Var_x(E[z_k|x]) > threshold (Burda et al., 2016).

    The error is that of the count over draws of the N examples: A_k is close to normal
    with variance (m4 - A_k^2) / N, so latent k is counted with probability p_k, and the
    count's variance is the sum of p_k (1 - p_k), latents taken as independent.

    Args:
      mean: posterior means [N, K], N of at least 2.

    Raises:
      ValueError: another shape, fewer than 2 examples, or values that are not finite.
    """
    mean = np.asarray(mean, np.float64)
    if mean.ndim != 2 or len(mean) < 2 or mean.shape[1] < 1:
        raise ValueError(
            f"mean has shape {mean.shape}; give the posterior means [N, K] of at least 2 examples "
            "and 1 latent."
        )
    if not np.isfinite(mean).all():
        latent = int(np.argmin(np.isfinite(mean).all(0)))
        raise ValueError(
            f"mean has values that are not finite (latent {latent}): a model that has diverged has "
            "no active units to count; leave it out."
        )
    centred = mean - mean.mean(0, keepdims=True)
    activity = np.square(centred).mean(0)
    error = np.sqrt(np.maximum((centred**4).mean(0) - np.square(activity), 0.0) / len(mean))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = special.ndtr((activity - threshold) / error)
    p = np.where(error > 0, p, activity > threshold)  # never moving, it is counted or not
    return Estimate(int((activity > threshold).sum()), float(np.sqrt((p * (1 - p)).sum())))


def largest_mode(
    product: Callable[[Array], Array], start: Array, steps: int
) -> tuple[Array, Array]:
    """The eigenvector of largest eigenvalue of a positive semidefinite matrix, and that eigenvalue.

    By power iteration.

    For instance a covariance's, of whose rows only products are formed; can be jitted.

    Args:
      product: v [D] -> the matrix times v.
      start: [D], a random draw: it must not be orthogonal to the eigenvector.
      steps: after n the error is about (lambda_2 / lambda_1)^(2n), from below.

    Returns:
      A unit vector [D], and a scalar; zeros for the zero matrix.
    """

    def step(_, carry):
        image = product(carry[0])
        size = jnp.linalg.norm(image)
        return image / jnp.where(size > 0, size, 1.0), size

    first = start / jnp.linalg.norm(start), jnp.zeros((), start.dtype)
    return jax.lax.fori_loop(0, steps, step, first)
