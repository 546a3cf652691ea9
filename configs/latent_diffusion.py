"""Latent diffusion in miniature: one autoencoder regularised four ways, one prior over its latents.

Command: python main.py --config=configs/latent_diffusion.py          (an accelerator)
         python main.py --config=configs/latent_diffusion.py:quick    (digits; two CPU cores)
         python main.py --config=configs/latent_diffusion.py --config.data.name=fashion_mnist
         python main.py --config=configs/latent_diffusion.py:rendered64   (scenes of 8 factors)
Cost: 18,000 steps of 3 and 36,000 of 12 autoencoders of 3.2 M parameters, 15,000 of 15 priors of
0.15 and of 1.8 M, and 210 sets of samples; quick, some five minutes on two busy cores.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.latent_diffusion import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("latent_diffusion", variant, ("", "quick", "rendered64"))
    config = fields.defaults("latent_diffusion")
    config.model.latents = 50
    config.model.width = 512
    config.model.blocks = 3
    config.train.weight_decay = 0.1
    config.train.epochs_per_checkpoint = 30
    if variant == "rendered64":  # the autoencoder of rendered64_gamma
        config.name = "latent_diffusion_rendered64"
        config.data.name = "rendered"
        config.data.rank = 8
        config.model.latents = 20
        config.model.pool = 4
        config.model.blocks = 4
        config.train.jitter = 0.02
        config.train.weight_decay = 0.0
        config.train.epochs = 150
        config.train.adaptive_epochs = 100
        config.train.epochs_per_checkpoint = 50
        config.prior.epochs = (3, 6, 12, 24, 48, 96, 192)
        config.classifier.width = 32
        config.classifier.epochs = 20
    if variant == "quick":
        config.name = "latent_diffusion_quick"
        config.data.name = "digits"
        config.model.latents = 20
        config.model.width = 64
        config.model.blocks = 1
        config.train.epochs = 600
        config.train.adaptive_epochs = 400
        config.train.patience = 200
        config.train.fastest = 5e-3
        config.train.epochs_per_checkpoint = 200
        config.prior.widths = (32, 64)
        config.prior.blocks = 2
        config.prior.epochs = (12, 25, 50, 100, 200, 400)
        config.prior.batch_size = 128
        config.classifier.features = 32
        config.classifier.width = 128
        config.classifier.epochs = 40
    return config
