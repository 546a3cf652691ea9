"""Published claims against learned variances, by their own protocols.

Command: python main.py --config=configs/counterclaim.py           Koehler et al., sigmoid sets
         python main.py --config=configs/counterclaim.py:spheres   and spheres
         python main.py --config=configs/counterclaim.py:starts    Zheng et al., where γ starts
Cost: an hour each on two CPU cores.
"""

import ml_collections

from vaebal.experiments.counterclaim import fields
from vaebal.experiments.schema import check_variant


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    check_variant("counterclaim", variant, ("", "spheres", "starts"))
    config = fields.defaults("counterclaim")
    if variant:
        config.name = f"counterclaim_{variant}"
    if variant == "spheres":
        config.data.kind = "sphere"
        config.data.ranks = (3, 3, 5, 5, 7)
        config.data.zeros = (3, 13, 16, 5, 7)
        config.data.kappas = (6, 8, 16, 10, 13)
        config.model.hidden = (200, 200, 200)
    if variant == "starts":
        config.data.kind = "mixture"
        config.arms = ("theirs", "theirs, adaptive", "ours, adaptive")
        # The ends and the middle of theirs, which are r = 2, 4 ... 10 and seven starts.
        config.data.ranks = (2, 6, 10)
        config.data.zeros = (0,) * 3
        config.data.kappas = (20,) * 3
        config.data.seeds = (123,)
        config.data.starts = (-20.0, 0.0, 20.0)
        config.model.hidden = (16,)
        config.train.batch_size = 1000
        config.train.their_steps = 50_000
        config.train.their_rate = 5e-3
        config.train.their_gamma_speed = 1.0
    return config
