"""Table 2, Figure 1: learned against fixed gamma on CelebA at 128x128, as configs/celeba64_gamma.

Command: python main.py --config=configs/celeba128_gamma.py         (an accelerator)
         python main.py --config=configs/celeba128_gamma.py:quick   (a smoke test)
Cost: 12 runs of 50 epochs of 162,770 images (8 GB as stored); quick, 2 runs of 2 epochs. Neither
has been run: the time, and whether the rates suit these images, is not known.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.gamma import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("celeba128_gamma", variant, ("", "quick"))
    return fields.celeba("celeba128_gamma", 128, 128, variant == "quick")
