"""Theorem 3: which penalties h make eq. 6 balanced. Linear decoders, then the digits.

Command: python main.py --config=configs/theorem3.py
Cost: under two minutes on two CPU cores, half of it the digits.
Expected: with 12 latents on data of rank 3, zero error and exactly 3 rows for u^0.25,
log(u+1e-6) and I[u>1e-8]; 12 rows, and an error for all but sqrt(u), for u, log(1+u),
u/(u+1) and u^0.75, whose infinite slope is not steep enough; zero error along u^p up to
p = 1/2 and not above. On the digits reduced to rank 5, a deep autoencoder with 16 latents
uses 5 under u^0.25 and log(u+1e-6), 16 under u and log(1+u).
"""

import ml_collections

from vaebal.experiments.theorem3 import fields


def get_config() -> ml_collections.ConfigDict:
    return fields.defaults("theorem3")
