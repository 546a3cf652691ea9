"""Theorem 2 from near total collapse: which runs leave it under Adam, and when under descent."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from vaebal import homotopy
from vaebal.errors import Diverged
from vaebal.experiments.report import Row
from vaebal.experiments.theorem2.problems import (
    Problem,
    make_model,
    perturb,
    problem_of,
    total_collapse,
)
from vaebal.experiments.theorem2.stationary import features
from vaebal.models import GaussianVAE, init_params, latent_noise
from vaebal.streams import stream
from vaebal.theory import collapse
from vaebal.training import Member, Optimisation, State, gaussian_vae, stack_members
from vaebal.training.step import init_state, train_step

ACTIVE = 0.01  # Var_x(E[z|x]) above which a latent is active (Burda et al., 2016)


def awake(shares: np.ndarray, variances: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """Which of the data's directions the posterior mean restores, [..., R] of bool.

    At least half of what probabilistic PCA restores at this gamma, 1 - (gamma / lambda)^2;
    half of the variance along directions that it leaves alone, lambda <= gamma.

    Args:
      shares: [..., R], 1 - (error along the direction) / lambda.
      variances: [R], lambda.
      gamma: [...].
    """
    best = 1 - np.square(gamma[..., None] / variances)
    return shares >= 0.5 * np.where(best > 0, best, 1.0)


def _measure(model: GaussianVAE, params: Any, kappa: jax.Array, problem: Problem) -> Row:
    """Share of the variance restored [R], informative latents, gamma."""
    mean, log_var = model.apply({"params": params}, problem.x, kappa, method="encode")
    x_hat = model.apply({"params": params}, mean, method="decode")
    along = problem.directions
    error = jnp.square((problem.x - x_hat) @ along).sum(0)
    return {
        "shares": 1 - error / jnp.square(problem.x @ along).sum(0),
        "informative": (jnp.exp(log_var).mean(0) < 0.5).sum(),
        "gamma": jnp.exp(params["log_gamma"]),
    }


def training_rows(config: Any, skips: str, blocks: int) -> list[Row]:
    """Every (kappa, gamma, seed) of one net in one program: gamma held, then learned.

    Both phases are that program: held is a rate of 0 for log gamma.
    """
    train, variances = config.train, np.asarray(config.data.variances)
    model = make_model(config, skips, blocks, max(config.model.kappas))
    settings = Optimisation(
        learning_rate=train.learning_rate, final_learning_rate=train.learning_rate,
        warmup_steps=0, total_steps=train.steps, clip_norm=train.clip_norm,
    )  # fmt: skip
    setup = gaussian_vae(model), settings, lambda member: homotopy.closed_form(member.rule["rate"])
    cells = list(itertools.product(config.model.kappas, train.gammas, train.seeds))

    def members(rate: float) -> Member:
        rule = {"rate": rate}
        return stack_members([Member(s, kappa, gamma, rule=rule) for kappa, gamma, s in cells])

    @jax.jit
    @jax.vmap
    def start(member: Member) -> State:
        x = problem_of(config, member.seed).x
        state = init_state(*setup, member, x.mean(0))
        params = total_collapse(model, state.params, x, jnp.log(member.gamma))
        params = perturb(params, stream(member.seed, "theorem2/perturbation"), train.delta)
        params.pop("log_gamma")  # which is the homotopy's
        return state._replace(weights=params)

    @jax.jit
    @jax.vmap
    def phase(member: Member, state: State) -> tuple[State, Row]:
        problem = problem_of(config, member.seed)
        mean = problem.x.mean(0)

        def step(state, _):
            return train_step(*setup, member, state, problem.x, mean)[0], None

        state, _ = jax.lax.scan(step, state, length=train.steps)
        return state, _measure(model, state.params, member.latents, problem)

    state, held = phase(members(0.0), start(members(0.0)))
    _, learned = phase(members(train.gamma_rate), state)
    held, learned = jax.device_get((held, learned))
    _require_finite(np.stack([held["shares"], learned["shares"]]), "train.learning_rate")

    return [
        {"part": "training", "skips": skips, "blocks": blocks}
        | _training_row(
            cell, variances, *({k: v[i] for k, v in f.items()} for f in (held, learned))
        )
        for i, cell in enumerate(cells)
    ]


def _training_row(
    cell: tuple[int, float, int], variances: np.ndarray, held: Row, learned: Row
) -> Row:
    """What `_measure` found of one (kappa, gamma, seed) after each phase, and whether it recovered.

    Wanted awake: as many as probabilistic PCA would keep, at the held gamma (any one where it keeps
    none), and at all.
    """
    kappa, gamma, seed = cell
    above = int((variances > gamma).sum())
    row = {"kappa": kappa, "gamma_start": gamma, "seed": seed, "above_gamma": above}
    for name, found, wanted in (
        ("held", held, max(1, above)),
        ("learned", learned, len(variances)),
    ):
        directions = awake(found["shares"], variances, found["gamma"])
        row |= {
            f"{name}_gamma": float(found["gamma"]),
            f"{name}_informative": int(found["informative"]),
            f"{name}_awake": int(directions.sum()),
            f"{name}_share": float(found["shares"] @ variances / variances.sum()),
            f"{name}_recovered": bool(directions.sum() >= min(kappa, wanted)),
            f"{name}_shares": found["shares"].tolist(),
        }
    return row


def _descend(config: Any, model: GaussianVAE, seeds: jax.Array, x: jax.Array, params: Any):
    """Gradient descent of S runs at once, until all have escaped or the steps are done.

    Args:
      seeds: [S].
      x: [S, N, D].
      params: at total collapse, every leaf with a leading [S].

    Returns:
      The step at which a latent became active [S]; -1 where none did.

    Raises:
      Diverged: weights that are not finite.
    """
    descent = config.descent

    @jax.vmap
    def step(seed, x, index, params, escaped):
        eps = latent_noise(stream(seed, "noise", index), len(x), model.latents)
        gradients = jax.grad(lambda p: collapse.antithetic_loss(model, p, x, eps))(params)
        rate = descent.learning_rate * jnp.exp(params["log_gamma"])
        scaled = jax.tree.map(lambda g: rate * g, gradients) | {"log_gamma": jnp.zeros(())}
        moved = jax.tree.map(jnp.subtract, params, scaled)
        mean, _ = model.apply({"params": moved}, x, method="encode")
        now = (escaped < 0) & (mean.var(0).max() > ACTIVE)
        # What comes after the escape is not asked here, and the rate not made for it.
        params = jax.tree.map(functools.partial(jnp.where, escaped < 0), moved, params)
        return params, jnp.where(now, index + 1, escaped)

    @jax.jit
    def run(seeds: jax.Array, x: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        def onwards(carry):
            index, params, escaped = carry
            return index + 1, *step(seeds, x, jnp.full(len(x), index), params, escaped)

        def any_left(carry):
            index, _, escaped = carry
            return (index < descent.steps) & (escaped < 0).any()

        keys = jax.vmap(lambda seed: stream(seed, "theorem2/perturbation"))(seeds)
        params = jax.vmap(lambda p, key: perturb(p, key, config.train.delta))(params, keys)
        carry = (jnp.int32(0), params, jnp.full(len(x), -1))
        _, params, escaped = jax.lax.while_loop(any_left, onwards, carry)
        sums = jax.vmap(lambda p: jax.flatten_util.ravel_pytree(p)[0].sum())(params)
        return escaped, sums

    escaped, sums = jax.device_get(run(seeds, x, params))
    _require_finite(sums, "descent.learning_rate")
    return escaped


def descent_rows(config: Any, skips: str) -> list[Row]:
    """Gradient descent of the deepest net on gamma times -ELBO, beside its linear theory.

    A weight in the direction of the least curvature c grows by 1 + rate gamma |c| a step,
    from about delta to about 1 in log(1/delta) / log(1 + rate gamma |c|) steps.
    """
    descent, delta, blocks = config.descent, config.train.delta, max(config.model.blocks)
    model = make_model(config, skips, blocks, descent.kappa)
    cells = list(itertools.product(descent.gammas, config.train.seeds))
    gammas, seeds = (np.array(column) for column in zip(*cells, strict=True))

    @jax.jit
    @jax.vmap
    def start(seed: jax.Array, gamma: jax.Array) -> tuple[jax.Array, Any]:
        x = problem_of(config, seed).x
        params = init_params(model, stream(seed, "init"), x.mean(0))
        return x, total_collapse(model, params, x, jnp.log(gamma))

    x, collapsed = start(jnp.asarray(seeds), jnp.asarray(gammas, jnp.float32))
    escaped = _descend(config, model, jnp.asarray(seeds), x, collapsed)
    x, collapsed = jax.device_get((x, collapsed))
    with jax.enable_x64(True):

        @jax.jit
        @jax.vmap
        def predict(x, params):
            return collapse.escape_curvature(model, params, x, features(model, params, x))[0]

        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (x, collapsed))
        curvatures = np.asarray(predict(*wide))
    rows = []
    for (gamma, seed), curvature, step in zip(cells, curvatures, escaped, strict=True):
        rate = math.log1p(descent.learning_rate * gamma * max(-float(curvature), 0.0))
        rows.append(
            {
                "part": "descent", "skips": skips, "blocks": blocks, "kappa": descent.kappa,
                "gamma": gamma, "seed": seed, "curvature": float(curvature),
                "predicted_steps": math.log(1 / delta) / rate if rate > 1e-9 else None,
                "escape_step": int(step),
            }
        )  # fmt: skip
    return rows


def _require_finite(values: np.ndarray, field: str) -> None:
    if not np.isfinite(values).all():
        raise Diverged(f"A run's weights are not finite. Lower {field}, in a new --workdir.")
