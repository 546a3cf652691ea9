"""Tables 3 and 4, Figure 2 on photographs of your own, at 64x64.

Command: python main.py --config=configs/folder_generation.py --config.data.folder=FOLDER
         python main.py --config=configs/folder_generation.py:mlp --config.data.folder=FOLDER
         python main.py --config=configs/folder_generation.py:quick --config.data.folder=FOLDER
Cost: three pipelines of twelve stages (an accelerator; not run whole); mlp, feed-forward nets,
three of nine, where there are 7,200 images an hour on two CPU cores; quick, one of nine.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.generation import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("folder_generation", variant, ("", "mlp", "quick"))
    config = fields.defaults("folder_generation")
    config.data.name = "folder"
    config.data.resolution = 64
    config.train.batch_size = 64
    config.train.epochs_per_checkpoint = 50
    config.ae.network = "conv"
    config.ae.codes = 64  # as the paper
    config.ae.width = 32
    config.ae.blocks = 1
    config.ae.epochs = 100
    config.vae.spaces = ("pixels", "codes", "balanced codes")
    config.vae.epochs = config.wae.epochs = 100
    config.vae_plus.epochs, config.flow.epochs = 200, 400
    config.balanced.epochs, config.balanced.settled_epochs = 150, 75
    config.classifier.width = 32
    config.eval.whiten = True  # as the paper of NDB on photographs
    if variant == "mlp":
        config.name = "folder_generation_mlp"
        config.train.batch_size = 128
        config.ae.network = "mlp"
        config.ae.width = 256
        config.ae.blocks = 2
        config.ae.epochs = config.vae.epochs = config.wae.epochs = 60
        config.vae.spaces = ("pixels", "balanced codes")
        config.classifier.width = 16
        config.classifier.epochs = 10
    if variant == "quick":
        config.name = "folder_generation_quick"
        config.data.resolution = 32
        config.train.seeds = (0,)
        config.ae.codes = 32
        config.ae.width = 16
        config.ae.epochs = config.vae.epochs = config.wae.epochs = 10
        config.vae.spaces = ("pixels", "balanced codes")
        config.balanced.epochs, config.balanced.settled_epochs = 10, 5
        config.balanced.patience = 100
        config.vae_plus.epochs = config.flow.epochs = 20
        config.classifier.width, config.classifier.epochs = 16, 5
        config.eval.bins = (50, 100)
    return config
