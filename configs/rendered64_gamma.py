"""Learned against fixed gamma on drawn scenes whose true dimension r is known, at 64 px.

Command: python main.py --config=configs/rendered64_gamma.py         (an accelerator)
         python main.py --config=configs/rendered64_gamma.py:quick   (two CPU cores)
"""

import ml_collections

from configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    base.check_variant("rendered64_gamma", variant, ("", "quick"))
    config = base.gamma("rendered64_gamma")
    if variant == "quick":
        config.name = "rendered64_gamma_quick"
        config.data.ranks = (2, 4)
        config.data.train_size = 4_000
        config.data.test_size = 1_000
        config.model.network = "mlp"  # on a CPU three times as fast as the convolutional net
        config.model.width = 256
        config.model.blocks = 2
        config.train.arms = ("adaptive", "fixed at adaptive", "learned 1e-1")
        config.train.seeds = (0,)
        config.train.epochs = 80
        config.train.batch_size = 50
        config.train.epochs_per_chunk = 5
        config.train.epochs_per_checkpoint = 20
    return config
