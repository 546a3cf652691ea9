"""From balance to samples, stage by stage: an autoencoder, a VAE on its codes, a VAE on that
one's latents, and WAE-MMD in the same place.

x -> c -> z -> u and back: an unregularised autoencoder takes images to codes (prescription 3), a
first VAE codes to latents z, a second one (Dai & Wipf, 2019) z to latents u whose distribution
comes closer to N(0, I). Every network is a `models.GaussianVAE`; an autoencoder is one whose
posterior variance nobody uses, `mean_path`.

Shapes: B batch, N examples, D pixels, C code dimensions (d tilde), K latents, H x W images.
Losses return their value, in the units they state, and scalar metrics; "mean_square" is what a
learned gamma follows, E|target - output|^2 per dimension.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from vaebal.measures.mmd import imq_mmd2
from vaebal.models import GaussianVAE, latent_noise
from vaebal.models.gaussians import isotropic_nll, kl_to_standard_normal, reparameterise

Loss = tuple[Array, dict[str, Array]]
Decoder = Callable[[Array], Array]  # standardised codes [B, C] -> x_hat [B, D]


class Scale(NamedTuple):
    """What standardises an autoencoder's codes, per dimension."""

    mean: Array  # [C]
    std: Array  # [C]

    def standardise(self, codes: Array) -> Array:
        """[B, C] -> mean 0 and variance 1 over the set that the scale was taken from."""
        return (codes - self.mean[None, :]) / self.std[None, :]

    def restore(self, codes: Array) -> Array:
        """The inverse of `standardise`."""
        return codes * self.std[None, :] + self.mean[None, :]


def code_scale(codes: Array) -> Scale:
    """The scale of codes [N, C]; a dimension that does not vary keeps its unit."""
    std = codes.std(0)
    return Scale(codes.mean(0), jnp.where(std > 1e-6 * std.max(), std, 1.0))


def encode(model: GaussianVAE, params: Any, x: Array) -> tuple[Array, Array]:
    """x [B, D] -> posterior mean and log variance, [B, K] each.

    Raises:
      ValueError: x has another number of dimensions than the model.
    """
    _require_dimensions("encode", x, model.outputs)
    return model.apply({"params": params}, x, method="encode")


def decode(model: GaussianVAE, params: Any, z: Array) -> Array:
    """z [B, K] -> x_hat [B, D].

    Raises:
      ValueError: z has another number of dimensions than the model has latents.
    """
    _require_dimensions("decode", z, model.latents)
    return model.apply({"params": params}, z, method="decode")


def _require_dimensions(name: str, given: Array, expected: int) -> None:
    if given.ndim != 2 or given.shape[-1] != expected:
        raise ValueError(
            f"{name} was given shape {given.shape} where the model takes [B, {expected}]: "
            "give the codes of the stage that it was trained on."
        )


def mean_path(model: GaussianVAE, params: Any, x: Array) -> tuple[Array, Array]:
    """The autoencoder in a VAE: x [B, D] -> z [B, K], x_hat [B, D], without noise."""
    z, _ = encode(model, params, x)
    return z, decode(model, params, z)


def frozen_decoder(model: GaussianVAE, params: Any, scale: Scale) -> Decoder:
    """The autoencoder's way from standardised codes to pixels; its parameters get no gradient."""
    params, scale = jax.lax.stop_gradient((params, scale))
    return lambda codes: decode(model, params, scale.restore(codes))


def autoencoder_loss(model: GaussianVAE, params: Any, x: Array) -> Loss:
    """|x - x_hat|^2, summed over pixels, the batch's mean.

    Nothing regularises the codes: it is eq. 2 with its KL left out, at any fixed gamma. The gamma
    that this error implies is E|x - x_hat|^2 / D, "mean_square".
    """
    _, x_hat = mean_path(model, params, x)
    error = jnp.square(x - x_hat).sum(-1).mean()
    return error, {"squared_error": error, "mean_square": error / x.shape[-1]}


def vae_loss(
    model: GaussianVAE,
    params: Any,
    inputs: Array,
    eps: Array,
    *,
    target: Array,
    decoder: Decoder | None = None,
    mask: Array | None = None,
) -> Loss:
    """Mean -ELBO in nats of one draw of z, its log gamma term included (eq. 2).

    With `decoder` the reconstruction is measured behind it (prescription 3): the VAE reads codes,
    and its reconstruction term is |x - decoder(c_hat)|^2 / (2 gamma) + D/2 log 2 pi gamma, gamma
    the variance of a pixel. Without, it is that of the codes themselves.

    Args:
      inputs: [B, C].
      eps: [B, K] standard normal.
      target: what is to be reconstructed: `inputs`, or with `decoder` the images x [B, D].
      decoder: see `frozen_decoder`.
      mask: [D] of 1 and 0, the dimensions of the target that there are; None: all.

    Raises:
      ValueError: dimensions that do not fit.
    """
    _require_dimensions("vae_loss", inputs, model.outputs)
    outputs = model.apply({"params": params}, inputs, eps)
    x_hat = outputs.x_hat if decoder is None else decoder(outputs.x_hat)
    _require_dimensions("vae_loss", target, x_hat.shape[-1])
    squares, size = jnp.square(target - x_hat), target.shape[-1]
    if mask is not None:
        squares, size = squares * mask[None], jnp.maximum(mask.sum(), 1)
    error, kl = squares.sum(-1), kl_to_standard_normal(outputs.mean, outputs.log_var).sum(-1)
    value = (isotropic_nll(error, outputs.log_gamma, size) + kl).mean()
    error = error.mean()
    return value, {"squared_error": error, "mean_square": error / size, "kl": kl.mean()}


def draw_latents(mean: Array, log_var: Array, key: Array) -> Array:
    """One draw of z from every stored posterior, [B, K] each: the second stage's data.

    A new key for every batch: z that are drawn once would be a finite set, which a second stage
    can learn by heart.
    """
    return reparameterise(mean, log_var, latent_noise(key, *mean.shape))


def wae_loss(
    model: GaussianVAE,
    params: Any,
    codes: Array,
    prior: Array,
    *,
    target: Array,
    decoder: Decoder,
    weight: float,
) -> Loss:
    """WAE-MMD (Tolstikhin et al., 2018): E|x - x_hat|^2 + weight MMD^2, deterministic encoder.

    Args:
      codes: [B, C].
      prior: [B, K] standard normal draws.
      target: images x [B, D].
      decoder: see `frozen_decoder`.
      weight: lambda, on the scale of errors summed over pixels.

    Raises:
      ValueError: dimensions that do not fit.
    """
    z, codes_hat = mean_path(model, params, codes)
    error = jnp.square(target - decoder(codes_hat)).sum(-1).mean()
    mmd = imq_mmd2(z, prior)
    return error + weight * mmd, {
        "squared_error": error,
        "mean_square": error / target.shape[-1],
        "mmd": mmd,
    }


def sample_observed(model: GaussianVAE, params: Any, u: Array, eps: Array) -> Array:
    """A draw from p(z|u), decoder noise included: u [B, K], eps like z [B, D] -> z [B, D].

    The second stage models z, noise and all; its mean alone would fall between the points that
    the first decoder has seen.
    """
    log_gamma = model.apply({"params": params}, method="log_gamma")
    return decode(model, params, u) + jnp.exp(0.5 * log_gamma) * eps


def great_circle(start: Array, end: Array, points: int) -> Array:
    """From start to end [B, K] at a steady angle, norms changing linearly: [points, B, K].

    On straight lines between normal draws of many dimensions the middle is unlike any draw.
    """
    norms = [jnp.linalg.norm(end_point, axis=-1, keepdims=True) for end_point in (start, end)]
    a, b = start / norms[0], end / norms[1]
    angle = jnp.arccos(jnp.clip((a * b).sum(-1, keepdims=True), -1.0, 1.0))[None]
    t = jnp.linspace(0.0, 1.0, points)[:, None, None]
    # sinc, so that equal directions do not divide 0 by 0.
    share = lambda t: t * jnp.sinc(t * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)  # noqa: E731
    direction = share(1 - t) * a[None] + share(t) * b[None]
    return direction * ((1 - t) * norms[0][None] + t * norms[1][None])


def downsample(images: Array) -> Array:
    """Images [N, H, W, C] at half the resolution: means of 2 x 2 pixels, each repeated 2 x 2.

    Raises:
      ValueError: an odd side.
    """
    N, H, W, C = images.shape
    if H % 2 or W % 2:
        raise ValueError(f"images have {H} x {W} pixels; downsample needs even sides.")
    means = images.reshape(N, H // 2, 2, W // 2, 2, C).mean((2, 4))
    return means.repeat(2, axis=1).repeat(2, axis=2)
