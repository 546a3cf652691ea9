"""Learned against fixed gamma on drawn scenes whose true dimension r is known, at 64 px.

Command: python main.py --config=configs/rendered64_gamma.py         (an accelerator)
         python main.py --config=configs/rendered64_gamma.py:quick   (two CPU cores)
"""

import ml_collections

from configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    base.check_variant("rendered64_gamma", variant, ("", "quick"))
    config = base.gamma("rendered64_gamma")
    # Variances grow with the number of pixels, and a step of Adam moves an image by more: at the
    # speed that suits small images gamma outruns the decoder.
    config.train.fastest = 5e-4
    config.train.slowest = 2e-5
    config.train.release = (0.85, 0.95)
    if variant == "quick":
        config.name = "rendered64_gamma_quick"
        config.data.ranks = (4, 8)
        config.data.train_size = 10_000
        config.model.network = "patch"  # on a CPU five times as fast as the convolutional net
        config.model.patch = 8
        config.model.width = 256
        config.model.blocks = 2
        config.train.arms = ("adaptive", "fixed at adaptive")
        config.train.seeds = (0,)
        config.train.epochs = 100
        config.train.batch_size = 50
        config.train.epochs_per_chunk = 5
        config.train.epochs_per_checkpoint = 25
    return config
