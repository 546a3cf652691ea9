"""Variants of one network: their fields, their meaning and their defaults."""

import ml_collections

from vaebal.experiments.kappa_sweep import fields

FREE = fields.FREE


def defaults(name: str) -> ml_collections.ConfigDict:
    """The kappa sweep's fields, and what is varied of them."""
    config = fields.defaults(name)
    config.experiment = "collapse"
    # One network each: what it changes of the fields above, as "model.gamma=1 train.epochs=3";
    # "" changes nothing.
    config.variants = ("",)
    return config
