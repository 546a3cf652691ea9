"""The speed of gamma's descent on random-network manifolds of known dimension r, on a laptop.

Command: python main.py --config=configs/network_gamma.py
Cost: 75 runs of 20,000 steps of a small MLP, about half an hour on two CPU cores.
"""

import ml_collections

from vaebal.experiments.gamma import fields


def get_config() -> ml_collections.ConfigDict:
    config = fields.defaults("network_gamma")
    fields.one_by_one(config)
    config.data.name = "network"
    config.data.resolution = 8
    config.data.ranks = (1, 2, 4, 8, 12)
    config.data.train_size = 10_000
    config.data.test_size = 2_000
    config.model.width = 128
    config.model.blocks = 2
    config.train.seeds = (0, 1, 2)
    config.train.arms = (
        *("adaptive", "fixed at adaptive"),
        *("learned 5e-4", "learned 2e-3", "learned 1e-1"),
    )
    config.train.epochs_per_chunk = 5
    config.train.epochs_per_checkpoint = 100
    return config
