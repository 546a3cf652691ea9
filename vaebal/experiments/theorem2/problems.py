"""Theorem 2's data and nets, and the points near total collapse from which runs start."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp

from vaebal.models import GaussianVAE, mlp_vae
from vaebal.models.nets import ACTIVATIONS
from vaebal.streams import stream
from vaebal.theory import collapse


class Problem(NamedTuple):
    """Data of known variances; centred, so that x_bar = 0."""

    x: jax.Array  # [N, D]
    directions: jax.Array  # [D, R], orthonormal


def make_problem(
    seed: int | jax.Array, examples: int, dim: int, variances: Sequence[float]
) -> Problem:
    """Data whose covariance (divided by N) has exactly `variances` along random directions."""
    rank = len(variances)
    codes = jax.random.normal(stream(seed, "theorem2/codes"), (examples, rank))
    codes, _ = jnp.linalg.qr(codes - codes.mean(0)[None, :])
    normal = jax.random.normal(stream(seed, "theorem2/directions"), (dim, rank))
    directions, _ = jnp.linalg.qr(normal)
    scales = jnp.sqrt(examples * jnp.asarray(variances))
    return Problem((codes * scales[None, :]) @ directions.T, directions)


def problem_of(config: Any, seed: int | jax.Array) -> Problem:
    """The config's problem of one seed."""
    return make_problem(seed, config.data.examples, config.data.dim, config.data.variances)


def make_model(config: Any, skips: str, blocks: int, latents: int) -> GaussianVAE:
    """The escape experiment's net, with log gamma among its parameters."""
    return mlp_vae(
        outputs=config.data.dim,
        latents=latents,
        width=config.model.width,
        encoder_layers=config.model.encoder_layers,
        decoder_blocks=blocks,
        activation=ACTIVATIONS[config.model.activation],
        residual=skips.startswith("residual"),
        affine_skip=skips.endswith("affine"),
    )


def total_collapse(model: GaussianVAE, params: Any, x: jax.Array, log_gamma: jax.Array) -> Any:
    """All latents off and the decoder's output bias where x_hat = x_bar: a stationary point.

    Stationary in every weight; in log gamma only for gamma = E||x - x_bar||^2 / d.
    """
    params = collapse.collapse(params) | {"log_gamma": log_gamma}
    x_hat = model.apply({"params": params}, jnp.zeros((1, model.latents)), method="decode")[0]
    decoder = params["decoder"]
    out = decoder["out"] | {"bias": decoder["out"]["bias"] + x.mean(0) - x_hat}
    return params | {"decoder": decoder | {"out": out}}


def perturb(params: Any, key: jax.Array, delta: float) -> Any:
    """Adds delta times a normal draw to every weight that `collapse` zeroes."""
    kept = collapse.collapse(jax.tree.map(jnp.ones_like, params))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    noise = unravel(delta * jax.random.normal(key, flat.shape, flat.dtype))
    return jax.tree.map(lambda leaf, k, n: leaf + (1 - k) * n, params, kept, noise)
