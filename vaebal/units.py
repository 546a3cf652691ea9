"""The one place where units are converted.

Everything inside vaebal is in nats of negative ELBO per example, on pixels in
[0, 1], with the decoder variance gamma (a variance, not a standard deviation).
"""

import math

import jax.numpy as jnp
from jax import Array

LOG_2PI = math.log(2.0 * math.pi)


def to_unit_pixels(images: Array) -> Array:
    """Stored pixels -> [0, 1], in float32 (float64 where JAX has x64 enabled).

    uint8 is divided by 255; floats are in [0, 1] already.
    """
    pixels = images.astype(jnp.result_type(float))
    return pixels / 255 if images.dtype == jnp.uint8 else pixels


def negative_elbo_to_eq3(nats: Array, dim: int, kappa: int) -> Array:
    """-ELBO in nats per example -> the energy L of eq. 3, L = 2(-ELBO) - d log 2pi + kappa.

    Eq. 3 weighs the squared error by 1/gamma where -ELBO has 1/(2 gamma), drops
    d log 2pi, and does not subtract the 1 of each KL term.
    """
    return 2.0 * nats - dim * LOG_2PI + kappa


def eq3_to_negative_elbo(energy: Array, dim: int, kappa: int) -> Array:
    """The inverse of `negative_elbo_to_eq3`: eq. 3's energy -> -ELBO in nats."""
    return 0.5 * (energy + dim * LOG_2PI - kappa)
