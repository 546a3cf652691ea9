"""From balance to samples on scikit-learn's digits (8x8, no download): the pipeline in small.

Command: python main.py --config=configs/digits_generation.py
         python main.py --config=configs/digits_generation.py:quick
Cost: quick, some minutes on two CPU cores, for three whole pipelines.
Expected: quick, FD (classifier) of samples about 5 for VAE+, 12 for VAE, 5 for WAE-MMD, 6 for VAEs
on codes, 4 for VAE+ over balanced images, 3 for flow matching; held-out images 2.9.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.generation import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("digits_generation", variant, ("", "quick"))
    config = fields.defaults("digits_generation")
    config.train.batch_size = config.flow.batch_size = 128
    config.ae.codes = 16
    config.ae.width = 128
    config.ae.layers = 3
    for section in (config.vae, config.vae_plus, config.wae):
        section.width = 64
        section.epochs = 600
        section.learning_rate = 3e-3
    config.flow.width, config.flow.epochs = 64, 600
    config.train.epochs_per_checkpoint = 300
    config.ae.epochs = 300
    config.ae.learning_rate = 3e-3
    config.balanced.epochs, config.balanced.settled_epochs = 1_000, 500
    config.classifier.features = 32
    config.classifier.width = 128
    config.classifier.epochs = 40
    config.eval.bins = (20, 50)  # 1,438 training images fill no more
    if variant == "quick":
        config.name = "digits_generation_quick"
        config.ae.epochs = 150
        config.vae.epochs = config.wae.epochs = 760  # as many steps as the balanced ones take
        config.balanced.epochs, config.balanced.settled_epochs = 400, 200
        config.balanced.patience = 200
        config.balanced.fastest = 5e-3
    return config
