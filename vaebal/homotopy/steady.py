"""A bound on the learning rate, so that an optimiser's noise stays below gamma."""

import jax.numpy as jnp
from jax import Array


def steady_rate(gamma: Array | float, dim: int, jitter: Array | float) -> Array:
    """The longest step of a weight whose noise stays below gamma: sqrt(jitter gamma / D).

    Adam moves every weight by about its rate, whatever the gradient, so noise alone gives a
    decoder column w a length |w|^2 of the order D rate^2. Where that is not far below gamma, it is
    what keeps the residual from falling, and an idle latent's posterior variance,
    1 / (1 + |w|^2 / gamma) (Theorem 1), says that it is in use.

    Just after a latent opens the premise fails: its weights' moments are zero while Adam's
    correction for that has long gone, so that they move by up to 2.1 times the rate at beta2 = .99
    and 6.6 times at .999. Bound both, the rate and each weight's step.
    """
    return jnp.sqrt(jitter * gamma / dim)
