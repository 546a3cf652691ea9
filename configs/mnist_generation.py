"""From balance to samples on MNIST.

Command: python main.py --config=configs/mnist_generation.py         (an accelerator)
         python main.py --config=configs/mnist_generation.py --config.data.name=fashion_mnist
         python main.py --config=configs/mnist_generation.py:quick   (two CPU cores)
         python main.py --config=configs/mnist_generation.py:codes   (VAEs on codes, as long each)
         python main.py --config=configs/mnist_generation.py:images  (VAEs on images, as long each)
Cost: three pipelines each, half an hour on two CPU cores (quick, codes) or two hours (images).
The first has not been run whole.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.generation import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("mnist_generation", variant, ("", "quick", "codes", "images"))
    config = fields.defaults("mnist_generation")
    config.data.name = "mnist"
    config.ae.codes = 32
    config.ae.epochs = 60
    config.vae.spaces = ("pixels", "codes", "images", "balanced codes", "balanced images")
    # As many steps as the balanced ones take, of larger batches.
    config.vae.epochs = config.wae.epochs = 115
    config.balanced.epochs, config.balanced.settled_epochs = 30, 15
    config.balanced.patience = 500
    config.vae_plus.epochs, config.flow.epochs = 64, 256
    config.vae_plus.width = config.flow.width = 512
    config.flow.batch_size, config.flow.learning_rate = 512, 2e-3
    config.train.epochs_per_checkpoint = 50
    config.eval.block = 1000
    if variant:
        config.name = f"mnist_generation_{variant}"
        config.train.epochs_per_checkpoint = 5
        config.ae.epochs = 6
        config.classifier.epochs = 3
        config.vae.epochs = config.wae.epochs = 8
        config.balanced.epochs, config.balanced.settled_epochs = 20, 10
        config.vae.spaces = ("pixels", "codes", "balanced codes", "balanced images")
        config.vae_plus.epochs, config.flow.epochs = 15, 0
        config.vae_plus.width = config.flow.width = 256
    if variant == "codes":
        config.vae.spaces = ("codes", "balanced codes")
        config.vae.epochs = 77  # as many steps as the balanced ones take, of larger batches
    if variant == "images":  # every VAE on batches of as many, and flow matching beside
        config.vae.spaces = ("images", "balanced images", "balanced codes")
        config.train.batch_size = config.balanced.batch_size
        config.vae.epochs = 24  # as many steps as the balanced ones take
        config.balanced.epochs, config.balanced.settled_epochs = 16, 8
        config.flow.epochs = 160
    return config
