"""Adaptive and plain VAEs on MNIST: the front of error over active latents.

Command: python main.py --config=configs/mnist_gamma.py         (an accelerator)
         python main.py --config=configs/mnist_gamma.py:quick   (two CPU cores)
         python main.py --config=configs/mnist_gamma.py --config.data.name=fashion_mnist
Cost: 45 runs of 30 epochs, the plain ones of 60: eight minutes on an H100 that did as much besides;
quick, 3 runs of 15 epochs and one of 30.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.gamma import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("mnist_gamma", variant, ("", "quick"))
    config = fields.defaults("mnist_gamma")
    fields.one_by_one(config)
    config.data.name = "mnist"
    config.model.latents = 60
    config.model.width = 512
    config.model.blocks = 3
    config.model.products = "tensorfloat32"
    config.train.seeds = (0, 1, 2)
    adaptive = ("adaptive 375", "adaptive", "adaptive 1500", "adaptive 3000")
    config.train.arms = (
        *adaptive,
        *(f"settled after {arm}" for arm in adaptive),
        *(f"plain 5e-3 after {arm}" for arm in adaptive),
        *(f"plain 5e-3 of {latents}" for latents in (5, 10, 15)),
    )
    config.train.epochs = 30
    config.train.weight_decay = 0.1
    config.train.settled_learning_rate = 3e-3
    config.train.epochs_per_chunk = 5
    config.train.epochs_per_checkpoint = 15
    config.eval.nll_samples = 50
    config.eval.laplace_images = 200
    if variant == "quick":
        config.name = "mnist_gamma_quick"
        config.train.seeds = (0,)
        config.train.arms = (
            *("adaptive", "settled after adaptive", "plain 5e-3 after adaptive"),
            "fixed at adaptive",
        )
        config.train.epochs = 15
        config.train.epochs_per_chunk = 1
        config.train.epochs_per_checkpoint = 5
    return config
