"""Learned against fixed gamma on drawn scenes whose true dimension r is known.

Command: python main.py --config=configs/rendered64_gamma.py         (an accelerator)
         python main.py --config=configs/rendered64_gamma.py:quick   (two CPU cores)
"""

import ml_collections

from configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    base.check_variant("rendered64_gamma", variant, ("", "quick"))
    config = base.gamma("rendered64_gamma")
    return config
