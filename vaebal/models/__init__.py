"""Models: encoders and decoders as Flax modules, the Gaussian VAE, and its objective."""

from vaebal.models.vae import (
    GaussianVAE,
    Outputs,
    conv_vae,
    infogan_vae,
    init_params,
    latent_noise,
    mlp_vae,
    prior_samples,
    with_own_skips,
)

__all__ = [
    "GaussianVAE",
    "Outputs",
    "conv_vae",
    "infogan_vae",
    "init_params",
    "latent_noise",
    "mlp_vae",
    "prior_samples",
    "with_own_skips",
]
