"""From balance to samples on drawn scenes, 64x64, whose six factors are known.

Command: python main.py --config=configs/rendered64_generation.py         (an accelerator)
         python main.py --config=configs/rendered64_generation.py:quick   (two CPU cores)
Cost: quick, some six minutes a pipeline on two CPU cores.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.generation import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("rendered64_generation", variant, ("", "quick"))
    config = fields.defaults("rendered64_generation")
    config.data.name = "rendered"
    config.data.rank = 6
    config.ae.network = "conv"
    config.ae.codes = 32
    config.ae.width = 64
    config.ae.blocks = 1
    config.vae.epochs = config.wae.epochs = 200
    config.vae_plus.epochs = 400
    config.classifier.width = 32
    config.eval.whiten = True  # as the paper of NDB on photographs
    config.eval.fid = True
    if variant == "quick":
        config.name = "rendered64_generation_quick"
        config.data.train_size = 4_000
        config.data.test_size = 1_000
        config.train.seeds = (0,)
        config.train.batch_size = 64
        config.train.epochs_per_checkpoint = 10
        config.ae.width = 16
        config.ae.epochs = 30
        config.classifier.width = 16
        config.classifier.epochs = 5
        config.vae.spaces = ("pixels", "balanced codes")
        config.vae.epochs = config.wae.epochs = 30
        config.vae_plus.epochs = 100
        config.balanced.epochs = 200  # 8,000 steps
        config.balanced.settled_epochs = 100
        config.balanced.patience = 300
        config.flow.epochs = 300
        config.eval.bins = (50, 100)
        config.eval.fid = False
    return config
