"""Diagonal Gaussians: KL, the likelihood, reparameterised draws. Nats throughout."""

import jax.numpy as jnp
from jax import Array

from vaebal.units import LOG_2PI


def reparameterise(mean: Array, log_var: Array, eps: Array) -> Array:
    """mean + sigma * eps. All three [..., K]; `eps` is the noise, an argument so that
    expectations can be taken exactly, antithetically or by Monte Carlo."""
    return mean + jnp.exp(0.5 * log_var) * eps


def kl_to_standard_normal(mean: Array, log_var: Array) -> Array:
    """KL[N(mean, exp(log_var)) || N(0, 1)] per dimension, [..., K] -> [..., K], in nats.

    expm1 keeps the value of a dimension close to the prior: exp(v) - v - 1 loses
    every digit in float32 once |v| < 1e-4.
    """
    return 0.5 * (jnp.square(mean) + (jnp.expm1(log_var) - log_var))


def isotropic_nll(squared_error: Array, log_gamma: Array, dim: int) -> Array:
    """-log N(x; x_hat, gamma I_d) from ||x - x_hat||^2, in nats (eq. 2's first term).

    Args:
      squared_error: ||x - x_hat||^2 summed over the d dimensions, any shape.
      log_gamma: log of the decoder variance, broadcast against it.
      dim: d.
    """
    return 0.5 * (squared_error * jnp.exp(-log_gamma) + dim * (LOG_2PI + log_gamma))
