"""Theorem 1: the affine VAE's landscape, every stationary point, and the ridge between minima.

Command: python main.py --config=configs/theorem1.py
Cost: well under a minute on two CPU cores.
Expected: 8 stationary points on the axes with indices 9 4 5 6 1 2 3 0, and those with shared
directions; every measured index equal to the predicted one. See results/theorem1/.
"""

import ml_collections

from vaebal.experiments.theorem1 import fields


def get_config() -> ml_collections.ConfigDict:
    return fields.defaults("theorem1")
