"""The Gaussian VAE as an `Objective`: -ELBO of a batch, and what an epoch tells of its latents."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vaebal.data import Decode
from vaebal.models import GaussianVAE, init_params, latent_noise
from vaebal.models.gaussians import isotropic_nll, reparameterise
from vaebal.models.objectives import gaussian_vae_terms
from vaebal.streams import stream
from vaebal.training.step import At, Member, Objective, Told
from vaebal.units import to_unit_pixels

# The residual is followed on this part of a batch: decoding at the posterior mean is extra work.
RESIDUAL_PART = 4


def loss_and_terms(
    model: GaussianVAE,
    params: Any,
    x: Array,
    eps: Array,
    kappa: Array | None = None,
    variational: Array | None = None,
):
    """Mean -ELBO of a batch in nats (the one place that reduces), with (outputs, terms).

    Where `variational` is 0 it is that of a plain autoencoder: without noise, without KL.
    """
    eps = eps if variational is None else variational * eps
    outputs = model.apply({"params": params}, x, eps, kappa)
    terms = gaussian_vae_terms(x, outputs)
    if variational is not None:
        terms = terms._replace(kl=variational * terms.kl)
    return terms.negative_elbo.mean(), (outputs, terms)


def gaussian_vae(
    model: GaussianVAE,
    decode: Decode = to_unit_pixels,
    variational: Callable[[Member], Array] | None = None,
) -> Objective:
    """-ELBO of `model` on stored rows [B, ...] that `decode` turns into x [B, D].

    Args:
      variational: a member -> 1, or 0 for a plain autoencoder: no noise on z and no KL.

    `given` is the data's mean x_bar [D]. An epoch's metrics are

      loss: -ELBO, nats per example;
      squared_error: ||x - x_hat||^2 at sampled z;
      kl: summed over dimensions, nats;
      gradient_norm, residual_variance: see `train_step`;
      latent_gradient: E|d(-ELBO)/dz|_2 on the first batch's images, after the last step;
      active: latents with Var_x(E[z|x]) > .01 over the epoch;
      informative: latents with mean sigma^2 < 1/2 over the epoch.
    """

    def init(member: Member, data_mean: Array) -> Any:
        params = init_params(
            model, stream(member.seed, "init"), data_mean, member.latents,
            residual=member.residual, affine=member.affine,
        )  # fmt: skip
        return {name: leaf for name, leaf in params.items() if name != "log_gamma"}

    def loss(params: Any, rows: Array, at: At) -> tuple[Array, Told]:
        x = decode(rows)
        eps = latent_noise(stream(at.member.seed, "noise", at.step), len(x), model.latents)
        share = None if variational is None else variational(at.member)
        value, (outputs, terms) = loss_and_terms(model, params, x, eps, at.open, share)
        statistics = {
            "squared_error": terms.squared_error.mean(),
            "kl": terms.kl.sum(-1).mean(),
            "mean": outputs.mean.mean(0),
            "mean_squared": jnp.square(outputs.mean).mean(0),
            "variance": jnp.exp(outputs.log_var).mean(0),
        }
        mean_square = jnp.square(x - outputs.x_hat).mean()
        return value, Told(statistics, mean_square, outputs.mean, kept=x)

    def residual(params: Any, told: Told) -> Array:
        part = max(len(told.mean) // RESIDUAL_PART, 1)
        at_mean = model.apply({"params": params}, told.mean[:part], method="decode")
        return told.kept[:part] - at_mean

    def summary(params: Any, means: dict[str, Array], rows: Array, at: At) -> dict[str, Array]:
        means = dict(means)
        activity = means.pop("mean_squared") - jnp.square(means.pop("mean"))
        variance = means.pop("variance")
        gradient = latent_gradient_norm(model, params, decode(rows), at.open, at.member.seed)
        return means | {
            "latent_gradient": gradient,
            "active": (activity > 0.01).sum(),
            "informative": (variance < 0.5).sum(),
        }

    return Objective(init, loss, model.outputs, residual, summary)


def latent_gradient_norm(
    model: GaussianVAE, params: Any, x: Array, kappa: Array, seed: Array
) -> Array:
    """The mean over x [B, D] of |d(-ELBO)/dz|_2 at one sampled z each, in nats (Figure 1).

    The draws of z are the same whenever this is asked.
    """
    eps = latent_noise(stream(seed, "probe"), len(x), model.latents)
    mean, log_var = model.apply({"params": params}, x, kappa, method="encode")
    mask = model.latent_mask(kappa)
    eps = jnp.where(mask, eps, 0.0)

    def reconstruction(z):
        x_hat = model.apply({"params": params}, z, method="decode")
        log_gamma = model.apply({"params": params}, method="log_gamma")
        return isotropic_nll(jnp.square(x - x_hat).sum(-1), log_gamma, x.shape[-1]).sum()

    gradient = jax.grad(reconstruction)(reparameterise(mean, log_var, eps))
    gradient = jnp.where(mask, gradient, 0.0)  # padding, which the decoder is never given
    return jnp.linalg.norm(gradient, axis=-1).mean()
