"""Objectives: model outputs in, per-example terms out. Reduction is the caller's, in one place."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from vaebal.models.gaussians import isotropic_nll, kl_to_standard_normal
from vaebal.models.vae import Outputs


class Terms(NamedTuple):
    """Per-example terms of eq. 2. -ELBO is reconstruction + kl summed over K, in nats."""

    squared_error: Array  # [B] ||x - x_hat||^2, summed over pixels
    reconstruction: Array  # [B] -log p(x|z), nats
    kl: Array  # [B, K] KL per latent dimension, nats

    @property
    def negative_elbo(self) -> Array:
        """[B], nats."""
        return self.reconstruction + self.kl.sum(-1)


def gaussian_vae_terms(x: Array, outputs: Outputs) -> Terms:
    """Eq. 2 for one batch and one draw of z.

    Args:
      x: [B, D] pixels in [0, 1].
      outputs: the model's, for the same x; `x_hat` must be [B, D] too.

    Raises:
      ValueError: shapes that would only match by broadcasting.
    """
    if x.shape != outputs.x_hat.shape:
        raise ValueError(f"x has shape {x.shape} but x_hat has shape {outputs.x_hat.shape}.")
    squared_error = jnp.square(x - outputs.x_hat).sum(-1)
    return Terms(
        squared_error,
        isotropic_nll(squared_error, outputs.log_gamma, x.shape[-1]),
        kl_to_standard_normal(outputs.mean, outputs.log_var),
    )
