"""Latent diffusion in miniature: one autoencoder regularised four ways, one prior over its latents.

Command: python main.py --config=configs/latent_diffusion.py          (an accelerator)
         python main.py --config=configs/latent_diffusion.py:quick    (digits; two CPU cores)
         python main.py --config=configs/latent_diffusion.py --config.data.name=fashion_mnist
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.latent_diffusion import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("latent_diffusion", variant, ("", "quick"))
    config = fields.defaults("latent_diffusion")
    config.model.latents = 50
    config.model.width = 512
    config.model.blocks = 3
    config.train.weight_decay = 0.1
    config.train.epochs_per_checkpoint = 30
    if variant == "quick":
        config.name = "latent_diffusion_quick"
        config.data.name = "digits"
        config.model.latents = 20
        config.model.width = 64
        config.model.blocks = 1
        config.train.epochs = 400
        config.train.adaptive_epochs = 200
        config.train.epochs_per_checkpoint = 200
        config.prior.widths = (32, 64)
        config.prior.blocks = 2
        config.prior.epochs = (25, 100, 400)
        config.prior.batch_size = 128
        config.classifier.features = 32
        config.classifier.width = 128
        config.classifier.epochs = 40
    return config
