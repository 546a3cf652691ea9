"""Learned against fixed gamma on drawn scenes whose true dimension r is known, at 64 px.

Command: python main.py --config=configs/rendered64_gamma.py         (an accelerator)
         python main.py --config=configs/rendered64_gamma.py:quick   (two CPU cores)
         python main.py --config=configs/rendered64_gamma.py:seeds   (the same, over r and seeds)
Cost: six to seven minutes a run on one CPU core; quick two runs, seeds twenty.
"""

import ml_collections

from configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    base.check_variant("rendered64_gamma", variant, ("", "quick", "seeds"))
    config = base.gamma("rendered64_gamma")
    # Weights shared by all places of an image, as a convolution's, move it further at a step of
    # Adam: with patches alike every latent was in use before the decoder bent.
    config.model.network = "mlp"
    config.model.pool = 4
    config.model.width = 512
    config.model.blocks = 4
    config.model.linear_variance = True  # one latent alone swings widely at first, some to overflow
    # The KL term shrinks hidden features that no open latent uses; x does not shrink.
    config.model.encoder_skip = True
    # Latents open one by one, where a curve's principal directions are too near each other for one
    # latent to bend around it before the next wakes up. The guard is low enough for an open latent
    # to carry the signal for that (sigma^2 ~ guard).
    config.train.patience = 0.15
    config.train.guard = 0.4
    config.train.guard_memory = 50
    config.train.slowest = 0.0
    config.train.jitter = 0.02
    config.train.fastest = 2e-3
    config.train.release = (0.9, 0.98)
    config.train.final_learning_rate = 2e-6
    config.train.beta2 = 0.99  # a spike of the loss is forgotten within a hundred steps
    if variant:
        config.name = f"rendered64_gamma_{variant}"
        config.data.train_size = 10_000
        config.model.width = 256
        config.train.epochs = 120
        config.train.epochs_per_chunk = 5
        config.train.epochs_per_checkpoint = 20
    if variant == "seeds":
        config.data.ranks = (1, 2, 4, 8)
        config.train.arms = ("adaptive",)
    if variant == "quick":
        config.data.ranks = (4,)
        config.train.arms = ("adaptive", "fixed at adaptive")
        config.train.seeds = (0,)
    return config
