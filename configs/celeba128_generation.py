"""Tables 3 and 4, Figure 2: CelebA at 128x128.

Command: python main.py --config=configs/celeba128_generation.py         (an accelerator)
         python main.py --config=configs/celeba128_generation.py:quick   (a smoke test)
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.generation import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("celeba128_generation", variant, ("", "quick"))
    config = fields.defaults("celeba128_generation")
    config.data.name = "celeb_a"
    config.data.resolution = 128
    config.train.batch_size = 128
    config.train.epochs_per_checkpoint = 5
    config.ae.network = "conv"
    config.ae.codes = 64  # as the paper
    config.ae.width = 64
    config.ae.blocks = 1
    config.ae.epochs = 50
    config.vae.epochs = config.wae.epochs = 20
    config.vae_plus.epochs = 100
    config.vae_plus.width = 1024
    config.balanced.epochs, config.balanced.settled_epochs = 20, 10
    config.balanced.patience = 3_000
    config.classifier.width = 32
    config.classifier.epochs = 5
    config.eval.reference_images = 50_000
    config.eval.samples = 10_000
    config.eval.whiten = True
    config.eval.fid = True
    if variant == "quick":
        config.name = "celeba128_generation_quick"
        config.train.seeds = (0,)
        config.ae.width = 16
        config.ae.epochs = 1
        config.vae.spaces = ("pixels",)
        config.vae.epochs = config.wae.epochs = 1
        config.vae_plus.epochs = 5
        config.vae_plus.width = 256
        config.classifier.width, config.classifier.epochs = 16, 1
        config.eval.reference_images = 5_000
        config.eval.samples = 1_000
        config.eval.bins = (100,)
        config.eval.fid = False
    return config
