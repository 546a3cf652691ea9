"""Who finds the number of latents: ours, its rivals and estimators on the same data.

Command: python main.py --config=configs/arena.py
Cost: 32 runs to tune and 928 to show, of 20,000 steps of a small MLP: made for a GPU, where the
stacks take minutes.

python main.py --config=configs/arena.py:quick takes ten minutes on two CPU cores.
"""

import ml_collections

from vaebal.experiments.arena import fields
from vaebal.experiments.schema import check_variant


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    check_variant("arena", variant, ("", "quick"))
    config = fields.defaults("arena")
    if variant == "quick":
        config.name = "arena_quick"
        config.data.kinds = ("network", "linear")
        config.data.ranks = (2, 4)
        config.data.seeds = (1,)
        config.data.size = 3_000
        config.data.tests = 1_000
        config.data.noise = ()
        config.data.few = ()
        config.data.spheres = (1,)
        config.data.unions = False
        config.model.latents = 10
        config.train.steps = 4_000
        config.train.patience = 300
    return config
