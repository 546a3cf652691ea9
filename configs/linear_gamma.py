"""The speed of gamma's descent on flat cubes of known dimension r, as configs/network_gamma.

Command: python main.py --config=configs/linear_gamma.py
Cost: 45 runs of 20,000 steps of a small MLP, a quarter of an hour on two CPU cores.
"""

import ml_collections

from vaebal.configs import network_gamma


def get_config() -> ml_collections.ConfigDict:
    config = network_gamma.get_config()
    config.name = "linear_gamma"
    config.data.name = "linear"
    config.data.ranks = (4, 8, 12)
    return config
