"""Learned against fixed gamma on drawn scenes whose true dimension r is known, at 64 px.

Command: python main.py --config=configs/rendered64_gamma.py         (an accelerator)
         python main.py --config=configs/rendered64_gamma.py:quick   (two CPU cores)
         python main.py --config=configs/rendered64_gamma.py:seeds   (the same, over r and seeds)
Cost: on two CPU cores, quick ten minutes, seeds an hour and a half.
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
    # Latents that can wake up at any time need a gamma above all that is left unexplained: what
    # leaks through the guard is then a direction that no bending of the decoder has explained.
    config.model.encoder_skip = True
    config.train.guard = 1.2
    config.train.guard_memory = 50
    config.train.fastest = 2e-3
    config.train.slowest = 2e-4
    # Adam's jitter in an idle latent's decoder column, |w|^2 ~ D rate^2, must stay below gamma, and
    # far below it when gamma arrives at its end: or the latent's posterior variance says that it
    # is in use.
    config.train.jitter = 0.1
    config.train.release = (0.9, 0.98)
    config.train.final_learning_rate = 2e-6
    # With .999 a spike of log sigma^2 overflowed in two of three runs of this depth.
    config.train.beta2 = 0.99
    if variant:
        config.name = f"rendered64_gamma_{variant}"
        config.data.train_size = 10_000
        config.model.width = 256
        config.train.epochs = 80
        config.train.epochs_per_chunk = 5
        config.train.epochs_per_checkpoint = 20
    if variant == "seeds":
        config.data.ranks = (1, 2, 4, 6)
        config.train.arms = ("adaptive",)
    if variant == "quick":
        config.data.ranks = (4,)
        config.train.arms = ("adaptive", "fixed at adaptive")
        config.train.seeds = (0,)
    return config
