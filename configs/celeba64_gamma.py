"""Table 2, Figure 1: learned against fixed gamma on CelebA at 64x64, its true dimension unknown.

Command: python main.py --config=configs/celeba64_gamma.py         (an accelerator)
         python main.py --config=configs/celeba64_gamma.py:quick   (a smoke test)
Cost: 12 runs of 50 epochs of 162,770 images; quick, 2 runs of 2 epochs. Neither has been run:
the time, and whether the rates suit these images, is not known.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.gamma import fields


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("celeba64_gamma", variant, ("", "quick"))
    return fields.celeba("celeba64_gamma", 64, 64, variant == "quick")
