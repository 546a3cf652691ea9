"""A run's row: what a trained method says of its test examples.

Errors are shares of the data's variance; -ELBO is in nats at the gamma that is best for the test
examples, so that methods which end with another gamma, or have none, are compared by what they
learned. Shapes: M test examples, D features, K latents.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaebal.experiments.arena import methods, objectives
from vaebal.experiments.arena.sources import Rows
from vaebal.experiments.report import Row
from vaebal.measures import evaluation, mmd
from vaebal.models import GaussianVAE

IN_USE = 0.5  # a latent holds something of an example where its posterior variance is below


def bound(square: float, kl: float, dim: int) -> float:
    """-ELBO, nats, of E|x - x_hat|^2 / D and KL, at gamma's best value."""
    return 0.5 * dim * (np.log(2 * np.pi * max(square, 1e-12)) + 1) + kl


def vae(config: Any, model: GaussianVAE, params: Any, number: int, method: str, rows: Rows) -> Row:
    """Of a VAE with its first `number` latents in the model."""
    found = evaluation.posterior(
        model, params, jnp.asarray(rows.test), seed=0, block=config.eval.block, kappa=number
    )
    dim, count = rows.test.shape[1], methods.active(found.mean)
    kl, z = float(found.kl.sum()), np.array(found.sample)
    # Latents that are not open are the prior's, which the model, told of `number`, leaves at 0.
    z[:, number:] = np.random.default_rng(0).normal(size=(len(z), z.shape[1] - number))
    if method == "ARD-VAE":
        fitted = evaluation.posterior(
            model, params, jnp.asarray(rows.train), seed=1, block=config.eval.block, kappa=number
        ).sample
        count = methods.relevant(model, params, np.array(fitted))
        # KL to N(0, s^2) for KL to N(0, 1), s^2 the mean square of training examples' z.
        prior = np.square(fitted).mean(0)
        square = np.square(found.mean).mean(0) + found.variance
        kl += float(0.5 * (np.log(prior) + square / prior - square).sum())
        z = z / np.sqrt(prior)
    distance = mmd.imq_mmd2_to_normal(jnp.asarray(z[: config.eval.mmd_samples]))
    error = found.squared_error_sampled.mean() / dim
    return {
        "count": float(count),
        "used_per_example": float(_used(model, params, jnp.asarray(rows.test), number)),
        "error": float(found.squared_error_mean.mean() / dim / rows.test_variance),
        "negative_elbo": bound(float(error), kl, dim),
        "kl": kl,
        "mmd": float(distance.value),
        "gamma": float(np.exp(params["log_gamma"])),
    }


@functools.partial(jax.jit, static_argnames="model")
def _used(model: GaussianVAE, params: Any, x: Any, number: Any):
    """How many latents hold something of an example, on average."""
    _, log_var = model.apply({"params": params}, x, number, method="encode")
    return (jnp.exp(log_var) < IN_USE).sum(1).mean()


@functools.partial(jax.jit, static_argnames="model")
def _coded(model: GaussianVAE, params: Any, x: Any, numbers: Any):
    return objectives.codes(model, params, x, numbers)


@functools.partial(jax.jit, static_argnames="model")
def _decoded(model: GaussianVAE, params: Any, z: Any, numbers: Any):
    return objectives.decoded(model, params, z, numbers)


def autoencoder(
    model: GaussianVAE, params: Any, numbers: dict[str, float], method: str, rows: Rows
) -> Row:
    """Of an autoencoder, which has neither prior nor bound."""
    z = np.asarray(_coded(model, params, jnp.asarray(rows.test), numbers))
    decode = lambda z: np.asarray(_decoded(model, params, jnp.asarray(z), numbers))  # noqa: E731
    count = {
        "IRMAE": lambda: methods.singular(z),
        "Least Volume": lambda: methods.explaining(decode, rows.test, z),
        "log autoencoder": lambda: methods.in_use(z),
    }[method]()
    error = np.square(rows.test - decode(z)).mean() / rows.test_variance
    return {"count": float(count), "error": float(error)} | nothing("error")


def nothing(*but: str) -> Row:
    """The fields that a method may not have, for its row; of `but` it does."""
    names = ("used_per_example", "error", "negative_elbo", "kl", "mmd", "gamma")
    return {name: None for name in names if name not in but}
