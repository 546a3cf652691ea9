"""Latent diffusion in miniature: one autoencoder regularised four ways, one prior over its latents.

Command: python main.py --config=configs/latent_diffusion.py          (an accelerator)
         python main.py --config=configs/latent_diffusion.py:quick    (digits; two CPU cores)
         python main.py --config=configs/latent_diffusion.py --config.data.name=fashion_mnist
         python main.py --config=configs/latent_diffusion.py:rendered64   (scenes of 8 factors)
         python main.py --config=configs/latent_diffusion.py:folder --config.data.folder=FOLDER
Cost: 27,000 steps of 15 autoencoders of 3.2 M parameters, 15,000 of 15 priors of 1.8 M, and 60 sets
of samples: eight minutes on an H100 that did as much besides; quick, with four second stages, some
eight on two CPU cores; rendered64 an hour and a quarter there, as folder with 7,200 images, three
arms and --config.data.resolution=32 (at 64 not run).
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.latent_diffusion import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("latent_diffusion", variant, ("", "quick", "rendered64", "folder"))
    config = fields.defaults("latent_diffusion")
    config.model.latents = 50
    config.model.width = 512
    config.model.blocks = 3
    config.model.products = "tensorfloat32"
    config.train.weight_decay = 0.1
    config.train.epochs = 45
    config.train.epochs_per_checkpoint = 30
    config.prior.epochs = (1, 4, 16, 64)
    config.classifier.epochs = 10
    config.classifier.final_learning_rate = 2e-6
    if variant == "rendered64":  # the autoencoder of rendered64_gamma:quick
        config.name = "latent_diffusion_rendered64"
        config.data.name = "rendered"
        config.data.rank = 8
        config.data.train_size = 10_000
        config.data.test_size = 2_000
        config.model.latents = 20
        config.model.pool = 4
        config.model.width = 256
        config.model.blocks = 4
        config.model.products = "float32"
        config.train.arms = ("kl 1e-6", "adaptive", "kl 1e-6 as adaptive")
        config.train.jitter = 0.02
        config.train.weight_decay = 0.0
        config.train.epochs = 140
        config.train.adaptive_epochs = 120
        config.train.patience = 1800
        config.train.release = (0.9, 0.98)
        config.train.epochs_per_checkpoint = 20
        config.prior.stages = ("flow 256",)
        config.prior.epochs = (3, 12, 48, 144)
        config.classifier.width = 16
        config.classifier.epochs = 5
    if variant == "folder":  # the autoencoder of folder_gamma, on photographs of one's own
        config.name = "latent_diffusion_folder"
        config.data.name = "folder"
        config.model.latents = 64
        config.model.pool = 2
        config.train.patience = 250
        config.train.epochs = 60
        config.train.adaptive_epochs = 40
        config.prior.stages = ("flow 256",)
        config.prior.epochs = (9, 36, 144)
        config.classifier.width = 16
    if variant == "quick":
        config.name = "latent_diffusion_quick"
        config.model.products = "float32"
        config.data.name = "digits"
        config.model.latents = 20
        config.model.width = 64
        config.model.blocks = 1
        config.train.epochs = 600
        config.train.adaptive_epochs = 400
        config.train.patience = 200
        config.train.fastest = 5e-3
        config.train.epochs_per_checkpoint = 200
        config.prior.stages = ("flow 64", "flow 32", "invertible 32", "vae 64")
        config.prior.blocks = 2
        config.prior.epochs = (12, 25, 50, 100, 200, 400)
        config.prior.batch_size = 128
        config.classifier.features = 32
        config.classifier.width = 128
        config.classifier.epochs = 40
        config.eval.bins = 20  # 1,438 training images fill no more
    return config
