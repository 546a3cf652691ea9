"""Table 1: the kappa sweep on MNIST.

Command: python main.py --config=configs/mnist_kappa.py         (an accelerator)
         python main.py --config=configs/mnist_kappa.py:quick   (two CPU cores)
Cost: 45 runs of 400 epochs (not run whole); 15 of 100 epochs, fourteen minutes of an H100 that did
as much besides, or 12 to 20 minutes each on two CPU cores; quick, 15 of 10 epochs, under 25
minutes.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.kappa_sweep import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("mnist_kappa", variant, ("", "quick"))
    config = fields.defaults("mnist_kappa")
    config.data.name = "mnist"
    config.model.kappas = (50, 100, 200, 400, 784)
    # gamma starts at the data's variance per pixel, the value total collapse would leave
    # it at, and the posterior at a variance of exp(-3): all latents start informative,
    # and are pruned as gamma falls. From gamma = 1 and sigma^2 = 1 the net with residual
    # skips alone collapses to 0 of 50 latents: results/earlier/mnist_from_gamma_1.
    config.model.gamma = 0.067
    config.model.log_var_init = -3.0
    # Of kappa = 400 and 784 four of fifteen runs stopped at a rate of 3e-3, after 27 to 38 epochs,
    # and with sigma^2 kept from overflowing one fell into total collapse instead, after 25.
    config.model.linear_variance = True
    config.train.learning_rate = 1e-3
    config.train.seeds = (0, 1, 2)
    config.train.epochs = 400
    config.eval.laplace_images = 200
    if variant == "quick":
        config.name = "mnist_kappa_quick"
        config.model.linear_variance = False  # so few epochs go well without, and at 3e-3
        config.train.learning_rate = 3e-3
        config.train.seeds = (0,)
        config.train.epochs = 10
        config.train.epochs_per_checkpoint = 5
        config.eval.nll_samples = 50
    return config
