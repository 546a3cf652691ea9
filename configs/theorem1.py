"""Theorem 1: the affine VAE's landscape, every stationary point, and the ridge between minima.

Command: python main.py --config=configs/theorem1.py
Cost: well under a minute on two CPU cores.
Expected: 8 stationary points on the axes with indices 9 4 5 6 1 2 3 0, and those with shared
directions; every measured index equal to the predicted one. See results/theorem1/.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.experiment = "theorem1"
    config.name = "theorem1"

    config.data = ml_collections.ConfigDict()
    config.data.eigenvalues = (4.0, 2.0, 0.5, 0.1, 0.05)  # of the data's covariance
    config.data.seed = 0  # of its orientation

    config.model = ml_collections.ConfigDict()
    config.model.kappa = 3
    config.model.gamma = 0.2  # decoder variance

    config.train = ml_collections.ConfigDict()
    config.train.seed = 0
    config.train.starts = 200  # descents, from near total collapse
    config.train.steps = 15000
    config.train.learning_rate = 0.02

    config.eval = ml_collections.ConfigDict()
    config.eval.points = 1000  # stationary points listed at most
    config.eval.path = 101  # points along each way between two minima
    return config
