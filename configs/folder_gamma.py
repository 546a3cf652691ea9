"""Table 2, Figure 1 on photographs of your own: learned against fixed gamma, at 64x64.

Command: python main.py --config=configs/folder_gamma.py --config.data.folder=FOLDER
         python main.py --config=configs/folder_gamma.py:quick --config.data.folder=FOLDER
Cost: 9 runs of 60 epochs; where there are 7,200 images to train on, at 128 pixels four minutes on
an H100 that did as much besides, and at 32 half an hour on two CPU cores; quick, a minute.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.gamma import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("folder_gamma", variant, ("", "quick"))
    config = fields.defaults("folder_gamma")
    fields.one_by_one(config)
    config.data.name = "folder"
    config.data.resolution = 64
    config.model.latents = 64
    config.model.pool = 2
    config.model.width = 512
    config.model.blocks = 3
    config.model.products = "tensorfloat32"
    config.train.weight_decay = 0.1
    config.train.arms = ("adaptive", "fixed at adaptive", "learned 5e-3")
    config.train.seeds = (0, 1, 2)
    config.train.patience = 250
    config.train.epochs = 60
    config.train.epochs_per_chunk = 5
    config.train.epochs_per_checkpoint = 30
    if variant == "quick":
        config.name = "folder_gamma_quick"
        config.data.resolution = 32
        config.model.latents = 32
        config.model.width = 128
        config.model.products = "float32"
        config.train.arms = ("adaptive", "fixed at adaptive")
        config.train.seeds = (0,)
        config.train.epochs = 20
        config.train.patience = 200
        config.train.epochs_per_checkpoint = 10
    return config
