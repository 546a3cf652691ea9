"""Table 2, Figure 1: learned against fixed gamma on CelebA at 64x64, its true dimension unknown.

Command: python main.py --config=configs/celeba64_gamma.py         (an accelerator)
         python main.py --config=configs/celeba64_gamma.py:quick   (a smoke test)
Cost: 12 runs of 50 epochs of 162,770 images; quick, 2 runs of 2 epochs. Neither has been run:
the time, and whether the rates suit these images, is not known.
"""

import ml_collections

from vaebal.experiments import schema
from vaebal.experiments.gamma import fields

VARIANTS = ("", "quick")


def celeba(name: str, resolution: int, latents: int, quick: bool) -> ml_collections.ConfigDict:
    """The two-run protocol twice: gamma learned at a constant rate, and adaptively."""
    config = fields.defaults(name)
    config.data.name = "celeb_a"  # data.ranks and the sizes are not read: the splits are official
    config.data.resolution = resolution
    config.model.latents = latents
    config.train.arms = (
        *("learned 1e-2", "fixed at learned 1e-2"),
        *("adaptive", "fixed at adaptive"),
    )
    config.train.seeds = (0, 1, 2)
    config.train.epochs = 50
    config.train.epochs_per_checkpoint = 5
    config.eval.mmd_samples = 10_000
    if quick:
        config.name = f"{name}_quick"
        config.model.patch = 8
        config.model.width = 16
        config.train.arms = ("learned 1e-2", "fixed at learned 1e-2")
        config.train.seeds = (0,)
        config.train.epochs = 2
        config.train.epochs_per_checkpoint = 1
        config.eval.mmd_samples = 2_000
    return config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    schema.check_variant("celeba64_gamma", variant, VARIANTS)
    return celeba("celeba64_gamma", 64, 64, variant == "quick")
