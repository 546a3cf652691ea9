"""The kappa sweep on scikit-learn's handwritten digits (8x8, real, no download).

Command: python main.py
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.kappa_sweep("digits_kappa")
    config.train.seeds = (0, 1, 2)
    config.model.width = 64
    config.train.epochs = 200
    config.train.batch_size = 128
    config.train.epochs_per_chunk = 10
    config.train.epochs_per_checkpoint = 100
    return config
