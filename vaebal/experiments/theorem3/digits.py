"""Theorem 3 with deep autoencoders, on scikit-learn's digits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaebal.data import load
from vaebal.errors import Diverged
from vaebal.experiments.report import Row
from vaebal.experiments.theorem3.linear import facts_of, outcome_of, smoothing_of
from vaebal.models.nets import ACTIVATIONS
from vaebal.streams import stream
from vaebal.theory import regularized_ae as rae
from vaebal.theory.penalties import Penalty, named
from vaebal.units import to_unit_pixels

PIXELS = 64  # of a digit


def digits_data(kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and test digits [N, 64], reduced to the first `kept` principal components.

    With all 64 they are as they are. The components are those of the training images.
    """
    images = load("digits")
    train, test = (np.asarray(to_unit_pixels(split)) for split in (images.train, images.test))
    if kept == PIXELS:
        return train, test
    mean = train.mean(0, keepdims=True)
    _, _, directions = np.linalg.svd((train - mean).astype(np.float64), full_matrices=False)
    reduce = (directions[:kept].T @ directions[:kept]).astype(np.float32)
    return (train - mean) @ reduce + mean, (test - mean) @ reduce + mean


def digits_rows(config: Any, penalty: Penalty) -> list[Row]:
    """One penalty's deep autoencoders, on the digits reduced to every rank, for every seed."""
    settings = config.digits
    model = rae.DeepAE(
        latents=settings.kappa,
        outputs=PIXELS,
        width=settings.width,
        encoder_layers=settings.encoder_layers,
        decoder_layers=settings.decoder_layers,
        activation=ACTIVATIONS[settings.activation],
    )
    keys = jnp.stack([stream(seed, "theorem3/digits") for seed in settings.seeds])

    @jax.jit
    def fit(keys, train, test, smoothing):
        def one(key):
            params, energies = rae.fit_deep(
                penalty, model, key, train, smoothing, settings.learning_rate
            )
            at = rae.deep_statistics(model, params, train)
            return at, rae.deep_statistics(model, params, test).error, energies

        return jax.vmap(one)(keys)

    rows = []
    for kept in settings.ranks:
        train, test = digits_data(kept)
        mean_square = float(np.square(train - train.mean(0, keepdims=True)).mean())
        scratch = penalty.name in [named(formula).name for formula in settings.without_homotopy]
        for homotopy in (True, False) if scratch else (True,):
            at, test_error, energies = jax.device_get(
                fit(keys, train, test, smoothing_of(settings, homotopy))
            )
            for index, seed in enumerate(settings.seeds):
                finite = np.isfinite(energies[index])
                if not finite.all():
                    raise Diverged(
                        f"Energy not finite at step {int(np.argmin(finite))} of the digits under "
                        f"{penalty.name} (seed={seed}). Lower digits.learning_rate or raise "
                        "digits.smoothing_end, in a new --workdir."
                    )
                rows.append(
                    {
                        "part": "digits",
                        **facts_of(penalty),
                        "kept": kept,
                        "homotopy": homotopy,
                        "kappa": settings.kappa,
                        "seed": seed,
                        **outcome_of(
                            settings, at.error[index], at.rows[index], mean_square, PIXELS, kept
                        ),
                        "test_error": float(test_error[index]),
                        "energy": float(energies[index, -1]),
                    }
                )
    return rows
