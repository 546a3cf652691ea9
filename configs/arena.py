"""Who finds the number of latents: ours, its rivals and estimators on the same data.

Command: python main.py --config=configs/arena.py
Cost: 28 runs to tune and 264 to show, of 20,000 steps of a small MLP: under two hours on two CPU
cores.

python main.py --config=configs/arena.py:hard    noise, few examples, sphere, union: an hour
python main.py --config=configs/arena.py:wide    scenes alone, layers of 256: an hour and a half
python main.py --config=configs/arena.py:quick   r = 2 and 4, short: ten minutes
"""

import ml_collections

from vaebal.experiments.arena import fields
from vaebal.experiments.schema import check_variant

# What did best in the full arena, with the number that its tuning has found, and the estimators.
BEST = (
    *("adaptive", "learned 5e-4", "learned 2e-3", "beta-VAE 1e-1", "IRMAE 8"),
    *("TwoNN", "maximum likelihood", "local PCA", "calibrated neighbours"),
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    check_variant("arena", variant, ("", "hard", "wide", "quick"))
    config = fields.defaults("arena")
    if variant == "hard":
        config.name = "arena_hard"
        config.methods = BEST
        config.data.kinds = ()
        config.data.seeds = (1, 2, 3)
        config.data.other_kinds = ("network",)
        config.data.other_ranks = (4,)
        config.data.noise = (0.05,)
        config.data.few = (500, 2_000)
        config.data.spheres = (2,)
        config.data.unions = True
    if variant == "wide":
        config.name = "arena_wide"
        config.data.kinds = ("rendered",)
        config.model.width = 256  # what `fit` takes for as many pixels
        config.methods = (
            *("adaptive", "learned 5e-4", "learned 2e-3", "beta-VAE 1e-1", "GECO 1e-2"),
            *("ARD-VAE 1e-2", "IRMAE 8"),
        )
    if variant == "quick":
        config.name = "arena_quick"
        config.data.kinds = ("network", "linear")
        config.data.ranks = (2, 4)
        config.data.seeds = (1,)
        config.data.size = 3_000
        config.data.tests = 1_000
        config.data.spheres = (1,)
        config.model.latents = 10
        config.train.steps = 4_000
        config.train.patience = 300
    return config
