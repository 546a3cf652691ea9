"""Learned against fixed gamma on drawn scenes of known dimension r, small enough for a laptop.

Command: python main.py --config=configs/rendered16_gamma.py
"""

import ml_collections

from vaebal.experiments.gamma import fields


def get_config() -> ml_collections.ConfigDict:
    config = fields.defaults("rendered16_gamma")
    fields.one_by_one(config)
    config.data.resolution = 16
    config.data.ranks = (2, 4)
    config.data.train_size = 10_000
    config.data.test_size = 2_000
    config.model.width = 256
    config.model.blocks = 2
    config.train.seeds = (0, 1)
    config.train.arms = ("adaptive", "fixed at adaptive", "learned 2e-3")
    config.train.epochs_per_chunk = 5
    config.train.epochs_per_checkpoint = 50
    return config
