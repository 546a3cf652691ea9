"""Learned against fixed gamma on drawn scenes whose true dimension r is known, at 64 px.

Command: python main.py --config=configs/rendered64_gamma.py         (an accelerator)
         python main.py --config=configs/rendered64_gamma.py:quick   (two CPU cores)
         python main.py --config=configs/rendered64_gamma.py:seeds   (the same, over r and seeds)
Cost: six to seven minutes a run on one CPU core; quick two runs, seeds twenty.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.gamma import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("rendered64_gamma", variant, ("", "quick", "seeds"))
    config = fields.defaults("rendered64_gamma")
    # The MLP that this chooses shares no weights among the places of an image: shared, as a
    # convolution's, they move the image further at a step of Adam, and with patches alike every
    # latent was in use before the decoder bent.
    fields.one_by_one(config)
    config.model.pool = 4
    config.model.width = 512
    config.model.blocks = 4
    config.train.jitter = 0.02  # at 0, .005 and .1 r = 8 was found to be nine, on one seed each
    if variant:
        config.name = f"rendered64_gamma_{variant}"
        config.data.train_size = 10_000
        config.model.width = 256
        config.train.epochs = 120
        config.train.epochs_per_chunk = 5
        config.train.epochs_per_checkpoint = 20
        config.train.patience = 1800  # in 12,000 steps, 15 % of those so far all along
        config.train.release = (0.9, 0.98)
    if variant == "seeds":
        config.data.ranks = (1, 2, 4, 8)
        config.train.arms = ("adaptive",)
    if variant == "quick":
        config.data.ranks = (4,)
        config.train.arms = ("adaptive", "fixed at adaptive")
        config.train.seeds = (0,)
    return config
