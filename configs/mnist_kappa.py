"""Table 1: the kappa sweep on MNIST."""

import ml_collections

from configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    base.check_variant("mnist_kappa", variant, ("", "quick"))
    config = base.kappa_sweep("mnist_kappa")
    config.data.name = "mnist"
    config.model.kappas = (50, 100, 200, 400, 784)
    return config
