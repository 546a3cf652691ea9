"""Theorem 2: collapsed latents are stationary, and total collapse is a saddle; the ways out.

Command: python main.py --config=configs/theorem2.py
Cost: two to three minutes on two CPU cores.
Expected: gradients of exactly 0 where the theorem says so, and not with one draw of the noise or
live biases; the curvature of the way out as predicted, to rounding; no run leaves total collapse
while gamma is held above every variance; below it .93 of the runs with residual and affine skips
recover, .61 with residual skips, .21 without any (decoders of three blocks). See
results/theorem2/.
"""

import ml_collections

from vaebal.experiments.theorem2 import fields


def get_config() -> ml_collections.ConfigDict:
    return fields.defaults("theorem2")
