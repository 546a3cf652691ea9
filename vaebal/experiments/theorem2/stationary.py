"""Theorem 2 at its stationary points: gradients that vanish, and the curvature of the way out."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import hadamard

from vaebal.experiments.report import Row
from vaebal.experiments.theorem2.problems import make_model, problem_of, total_collapse
from vaebal.models import GaussianVAE, init_params
from vaebal.models.nets import ACTIVATIONS, MLPEncoder, ResidualDecoder
from vaebal.streams import stream
from vaebal.theory import collapse
from vaebal.theory.hessian import dense_hessian

# For what runs a few times, compiling fast is what counts.
_few_calls = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def certificate_nets(config: Any) -> list[tuple[str, int, int]]:
    """(activation, depth, width): the first of each list, and each other one in its place."""
    lists = [config.certificate[n] for n in ("activations", "depths", "widths")]
    base = tuple(values[0] for values in lists)
    return [base] + [
        (*base[:i], value, *base[i + 1 :]) for i, values in enumerate(lists) for value in values[1:]
    ]


def certificate_rows(config: Any) -> list[Row]:
    """The largest gradient entries of latent 0's weights: every net, biases absent, zero, live."""
    return [
        {"part": "certificates", "activation": activation, "depth": depth, "width": width, **found}
        for activation, depth, width in certificate_nets(config)
        for head_bias in (False, True)
        for found in _certificates(config, activation, depth, width, head_bias)
    ]


def _certificates(
    config: Any, activation: str, depth: int, width: int, head_bias: bool
) -> list[Row]:
    """One net in float64, with all weights and biases random but latent 0's."""
    kappa, dim = config.certificate.kappa, config.data.dim
    act = ACTIVATIONS[activation]
    model = GaussianVAE(
        MLPEncoder(kappa, width, depth, act, head_bias=head_bias),
        ResidualDecoder(dim, width, depth, act, residual=True, branch_scale=1.0),
        latents=kappa, outputs=dim, affine_skip=True, gamma=config.certificate.gamma,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    # Not centred: an affine encoder's gradients vanish by themselves on centred data.
    x = 1 + rng.normal(size=(config.data.examples, dim))
    eps = rng.normal(size=(len(x), kappa))

    @_few_calls
    def gradients(params, x, eps, live):
        both = (collapse.collapse(params, 0, biases=off) for off in (False, True))
        params = jax.tree.map(functools.partial(jnp.where, live), *both)
        return [
            collapse.latent_gradients(model, params, x, eps, 0, antithetic=antithetic)
            for antithetic in (True, False)
        ]

    rows = []
    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, eps)["params"])
        params = jax.tree.map(lambda s: rng.normal(size=s.shape) / math.sqrt(s.shape[0]), shapes)
        for biases in ("zero", "live") if head_bias else ("absent",):
            pair, one_draw = gradients(params, x, eps, biases == "live")
            row = {"biases": biases}
            row |= {f"antithetic {name}": float(value) for name, value in pair.items()}
            row |= {f"one draw {name}": float(value) for name, value in one_draw.items()}
            rows.append(row)
    return rows


def features(model: GaussianVAE, params: Any, x: jax.Array) -> jax.Array:
    """[N, F], what the mean head reads, with a column of ones where it has a bias."""

    def first_mean(head: Any) -> jax.Array:
        moved = params | {"encoder": params["encoder"] | {"mean": head}}
        return model.apply({"params": moved}, x, method="encode")[0][:, 0]

    # The head is linear: its derivative by its own weights is what it reads.
    by_weight = jax.jacobian(first_mean)(params["encoder"]["mean"])
    columns = [by_weight["kernel"][:, :, 0]]
    if "bias" in by_weight:
        columns += [by_weight["bias"][:, :1]]
    return jnp.concatenate(columns, axis=1)


def exact_loss(model: GaussianVAE, params: Any, x: jax.Array) -> jax.Array:
    """Mean -ELBO in nats whose second derivatives at total collapse are the expectation's.

    To second order only the mean and covariance of eps count, and few signed draws have
    those of a standard normal: the rows of a Hadamard matrix, each with both signs.
    """
    size = 1 << (model.latents - 1).bit_length()
    draws = jnp.asarray(hadamard(size, dtype=float)[:, : model.latents])

    def at(draw: jax.Array) -> jax.Array:
        eps = jnp.broadcast_to(draw[None, :], (len(x), model.latents))
        return collapse.antithetic_loss(model, params, x, eps)

    return jax.vmap(at)(draws).mean()


def curvature_rows(config: Any) -> list[Row]:
    """Total collapse of the deepest nets, at every gamma: predicted beside measured."""
    blocks = max(config.model.blocks)
    return [
        {"part": "curvature", "skips": skips, "blocks": blocks, **found}
        for skips in config.model.skips
        for found in _curvatures(config, make_model(config, skips, blocks, config.curvature.kappa))
    ]


def _curvatures(config: Any, model: GaussianVAE) -> list[Row]:
    """One net at every gamma: by formula, and from the Hessian in the weights by that z enters.

    Those are the decoder's first kernel, W_x and the mean head; float64.
    """

    def loss(parts, params, x):
        decoder = params["decoder"] | {"first": params["decoder"]["first"] | parts["first"]}
        moved = params | {"decoder": decoder, "encoder": params["encoder"] | parts["encoder"]}
        return exact_loss(model, moved | parts["affine"], x)

    @_few_calls
    def at(gamma):
        x = problem_of(config, 0).x
        start = init_params(model, stream(0, "init"), x.mean(0))
        params = total_collapse(model, start, x, jnp.log(gamma))
        return x, params, collapse.escape_curvature(model, params, x, features(model, params, x))

    rows = []
    with jax.enable_x64(True):
        for gamma in config.curvature.gammas:
            x, params, (predicted, explained) = at(gamma)
            parts = {
                "first": {"kernel": params["decoder"]["first"]["kernel"]},
                "encoder": {"mean": params["encoder"]["mean"]},
                "affine": {"affine": params["affine"]} if "affine" in params else {},
            }
            hessian = np.asarray(dense_hessian(loss, parts, args=(params, x)))
            rows.append(
                {
                    "gamma": gamma,
                    "explained_over_gamma": float(explained),
                    "predicted": float(predicted),
                    "measured": float(np.linalg.eigvalsh((hessian + hessian.T) / 2)[0]),
                }
            )
    return rows
