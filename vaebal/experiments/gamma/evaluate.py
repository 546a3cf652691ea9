"""Every number of a run's row: errors, counts, distances to the prior, what the latents hold."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vaebal.data import Decode, ImageSet, mean_image, mean_over, some_indices
from vaebal.measures import evaluation, likelihood, mmd
from vaebal.measures.factors import factor_r2, factor_shares
from vaebal.models import GaussianVAE, prior_samples
from vaebal.streams import stream

ACTIVE_SHOWN, IDLE_SHOWN = 13, 3  # latents traversed, at most


def largest_variance(images: ImageSet, *, rows: int = 4096, steps: int = 50) -> float:
    """lambda_1 of `rows` training images, above which total collapse is a minimum."""
    used = jnp.asarray(images.train[some_indices(len(images.train), rows, "largest variance")])

    @jax.jit
    def power(used):
        mean = mean_image(used, images.decode)

        def product(v):
            along = lambda row: (lambda x: x * (x @ v))(images.decode(row[None])[0] - mean)  # noqa: E731
            return mean_over(along, used)

        start = jax.random.normal(stream(0, "largest variance"), mean.shape)
        return evaluation.largest_mode(product, start, steps)[1]

    return float(power(used))


def evaluate(
    config: Any, model: GaussianVAE, params: Any, seed: int, images: ImageSet
) -> dict[str, Any]:
    """Every number of one run's row; `x` with its standard error `x_se` over the test images."""
    options = {"seed": seed, "block": config.eval.block, "decode": images.decode}
    test = evaluation.posterior(model, params, jnp.asarray(images.test), **options)
    shown = some_indices(len(images.train), config.eval.train_images, "evaluation/train")
    train = evaluation.posterior(model, params, jnp.asarray(images.train[shown]), **options)
    gamma = float(jnp.exp(model.apply({"params": params}, method="log_gamma")))
    z = jnp.asarray(test.sample[: config.eval.mmd_samples])
    active = test.mean.var(0) > 0.01
    off = {
        split: evaluation.mean_estimate(gamma - of.squared_error_sampled / images.dim)
        for split, of in (("train", train), ("test", test))
    }
    whole = mmd.imq_mmd2_to_normal(z)
    used = mmd.imq_mmd2_to_normal(z[:, active]) if active.any() else (0.0, 0.0)
    estimates = {
        "error_mean": evaluation.mean_estimate(test.squared_error_mean),
        "error_sampled": evaluation.mean_estimate(test.squared_error_sampled),
        "error_train": evaluation.mean_estimate(train.squared_error_mean),
        "negative_elbo": evaluation.mean_estimate(test.negative_elbo),
        **{f"gamma_residual_{split}": each for split, each in off.items()},
        "active_0.01": evaluation.active_units(test.mean),
        "active_0.1": evaluation.active_units(test.mean, 0.1),
        "mmd": whole,
        "mmd_active": used,
    }
    about: dict[str, Any] = {}
    if config.eval.nll_samples:
        estimates["nll"], about = _nll(config, model, params, images, options)
    row: dict[str, Any] = {"gamma": gamma}
    for name, (value, error) in estimates.items():
        row[name], row[f"{name}_se"] = float(value), float(error)
    factors, shares = [], []
    if images.test_factors is not None:
        factors = factor_r2(
            train.mean[:, active], images.train_factors[shown],
            test.mean[:, active], images.test_factors,
        )  # fmt: skip
        shares = factor_shares(test.mean, images.test_factors).tolist()
    return (
        row
        | about
        | {
            "gamma_residual_relative": float(off["train"].value / gamma),
            "kl": float(test.kl.sum()),
            "active_latents": np.flatnonzero(active).tolist(),
            "informative": int((test.variance < 0.5).sum()),
            "residual_over_gamma": residual_variance(model, params, images, config.eval.block)
            / gamma,
            "factor_r2": factors,
            "factor_shares": shares,
            "kl_per_dimension": test.kl.tolist(),
            "variance_per_dimension": test.variance.tolist(),
        }
    )


def _nll(
    config: Any, model: GaussianVAE, params: Any, images: ImageSet, options: dict[str, Any]
) -> tuple[evaluation.Estimate, dict[str, Any]]:
    """The importance-weighted bound on test images, and what tells how tight it is."""
    samples, most, test = config.eval.nll_samples, config.eval.laplace_images, images.test
    nll, effective = evaluation.importance_weighted_nll(
        model, params, jnp.asarray(test), samples=samples, **options
    )
    about: dict[str, Any] = {"effective_sample_size": float(np.median(effective))}
    if most:
        about |= likelihood.laplace_beside(
            nll[:most], model, params, jnp.asarray(test[:most]), seed=options["seed"],
            samples=samples, decode=images.decode,
        )  # fmt: skip
    return evaluation.mean_estimate(nll), about


def residual_variance(
    model: GaussianVAE, params: Any, images: ImageSet, block: int, *, steps: int = 30
) -> float:
    """The largest variance of x - x_hat(mean) along any direction, over test images.

    Of 4,096 at most, as their residuals are held together. The direction is found on one half of
    them and the variance along it measured on the other, both ways, and the mean taken: along a
    direction found on the same images even white noise varies by (1 + sqrt(D / N))^2.
    """
    drawn = images.test[some_indices(len(images.test), 4096, "residual variance")]
    return float(_residual_variance(model, params, drawn, images.decode, block, steps))


@functools.partial(jax.jit, static_argnames=("model", "decode", "block", "steps"))
def _residual_variance(model: GaussianVAE, params, stored, decode: Decode, block: int, steps: int):
    apply = functools.partial(model.apply, {"params": params})

    def residual(row):
        x = decode(row[None])
        return (x - apply(apply(x, method="encode")[0], method="decode"))[0]

    residuals = jax.lax.map(residual, stored, batch_size=block)
    residuals = residuals - residuals.mean(0)[None, :]
    start = jax.random.normal(stream(0, "evaluation/residual"), (model.outputs,))

    def along(found: Array, measured: Array) -> Array:
        product = lambda v: (found @ v) @ found / len(found)  # noqa: E731
        direction = evaluation.largest_mode(product, start, steps)[0]
        return jnp.square(measured @ direction).mean()

    halves = residuals[::2], residuals[1::2]
    return (along(*halves) + along(*halves[::-1])) / 2


def draw_pictures(
    config: Any, model: GaussianVAE, params: Any, seed: int, images: ImageSet, row: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The first test images, their reconstructions, samples from the prior, and traversals.

    Args:
      row: what `evaluate` gave.
    """
    x = images.decode(jnp.asarray(images.test[: config.eval.pictures]))
    mean, _ = model.apply({"params": params}, x, method="encode")
    z = prior_samples(stream(seed, "evaluation/pictures"), len(x), model.latents)
    decode: Callable = lambda z: model.apply({"params": params}, z, method="decode")  # noqa: E731
    pictures = {"images": x, "reconstructions": decode(mean), "samples": decode(z)}
    order = np.argsort(-np.array(row["kl_per_dimension"]), kind="stable").tolist()
    active = [latent for latent in order if latent in row["active_latents"]]
    idle = [latent for latent in order if latent not in row["active_latents"]]
    pictures |= traverse(decode, mean[0], active[:ACTIVE_SHOWN] + idle[-IDLE_SHOWN:])
    return jax.tree.map(np.asarray, pictures)


def traverse(decode: Callable, z: Array, latents: Sequence[int]) -> dict[str, Any]:
    """Images on the lines through z [K] along `latents`, one after the other.

    Args:
      decode: [B, K] -> [B, D].

    Returns:
      "traversals" [len(latents), values, D], "latents", and "values" [values] of the latent.
    """
    values, latents = jnp.linspace(-2.0, 2.0, 9), np.array(latents, int)
    along = jax.vmap(lambda k: jax.vmap(lambda value: z.at[k].set(value))(values))(latents)
    traversals = decode(along.reshape(-1, len(z))).reshape(len(latents), len(values), -1)
    return {"traversals": traversals, "latents": latents, "values": values}
