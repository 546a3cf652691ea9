"""Without skip connections the paper's MNIST network keeps no latent: which network does?

Command: python main.py --config=configs/mnist_collapse.py
Cost: 28 runs of three epochs, some quarter of an hour on two CPU cores.
"""

import ml_collections

from vaebal.experiments.collapse import fields


def get_config() -> ml_collections.ConfigDict:
    config = fields.defaults("mnist_collapse")
    config.data.name = "mnist"
    config.model.kappas = (50,)
    config.model.skips = ("none", "residual+affine")
    # Where configs/mnist_kappa.py starts; a variant changes what it names.
    config.model.gamma = 0.067
    config.model.log_var_init = -3.0
    config.train.learning_rate = 1e-3
    config.train.epochs = 3
    config.train.epochs_per_checkpoint = 3
    config.eval.nll_samples = 1
    config.variants = (
        "",
        *("model.gamma=1.0", "model.log_var_init=0.0"),
        *("model.activation=relu", "model.activation=tanh"),
        *("model.weights=0.3", "model.weights=0.1"),
        *("model.encoder_layers=3 model.decoder_blocks=1",),
        *("model.encoder_layers=12 model.decoder_blocks=6",),
        *("model.encoder_layers=20 model.decoder_blocks=10",),
        *("model.gamma=1.0 model.log_var_init=0.0",),
        *("model.gamma=1.0 model.log_var_init=0.0 model.weights=0.3",),
        *("train.learning_rate=1e-4", "train.learning_rate=3e-3"),
    )
    return config
