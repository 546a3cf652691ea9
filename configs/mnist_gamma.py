"""Learned, fixed and adaptive gamma on MNIST: how many latents do digits need, at what error?

Command: python main.py --config=configs/mnist_gamma.py
         python main.py --config=configs/mnist_gamma.py --config.data.name=fashion_mnist
Cost: 12 runs of 30 epochs, each some 12 minutes or more on two CPU cores.
"""

import ml_collections

from vaebal.experiments.gamma import fields


def get_config() -> ml_collections.ConfigDict:
    config = fields.defaults("mnist_gamma")
    fields.one_by_one(config)
    config.data.name = "mnist"
    config.model.latents = 50
    config.model.width = 512
    config.model.blocks = 3
    config.train.seeds = (0, 1, 2)
    config.train.arms = (
        *("adaptive", "settled after adaptive"),
        *("fixed at adaptive", "learned 5e-3"),
    )
    config.train.epochs = 30
    config.train.weight_decay = 0.1
    config.train.epochs_per_checkpoint = 5
    config.eval.nll_samples = 50
    return config
