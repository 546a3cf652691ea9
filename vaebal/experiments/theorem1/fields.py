"""Theorem 1's experiment: its fields, their meaning and their defaults."""

import ml_collections


def defaults(name: str) -> ml_collections.ConfigDict:
    """Every field, as configs/theorem1.py has it."""
    config = ml_collections.ConfigDict()
    config.experiment = "theorem1"
    config.name = name

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
