"""Theorem 2: collapsed latents are stationary points, total collapse is a saddle; the ways out.

Four parts, each with its rows:
- certificates: the gradients that vanish, over nets, head biases, and kinds of expectation;
- curvature: the least eigenvalue at total collapse, predicted and measured;
- training: from near total collapse, Adam with gamma held where it starts, then learned:
  which of the data's directions wake up, with and without skips;
- descent: plain gradient descent, whose steps to escape the predicted curvature tells.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from scipy.linalg import hadamard

from vaebal.errors import Diverged, InputError
from vaebal.experiments import checks
from vaebal.experiments.parts import finished
from vaebal.experiments.report import Row
from vaebal.experiments.theorem2 import page as theorem2_report
from vaebal.models import GaussianVAE, init_params, latent_noise, mlp_vae
from vaebal.models.nets import ACTIVATIONS, MLPEncoder, ResidualDecoder
from vaebal.streams import stream
from vaebal.theory import collapse
from vaebal.theory.probing import dense_hessian
from vaebal.training.checkpoints import open_workdir
from vaebal.training.engine import (
    Member,
    Optimisation,
    TrainState,
    init_state,
    stack_members,
    train_step,
)

SKIPS = ("residual+affine", "residual", "affine", "none")
ACTIVE = 0.01  # Var_x(E[z|x]) above which a latent is active (Burda et al., 2016)

# ------------------------------------------------------------------- checks


def check(config: Any) -> None:
    """Raises InputError for the first field that cannot be meant."""
    checks.positive_integers(
        config,
        *("data.dim", "data.examples", "model.width", "model.encoder_layers"),
        *("certificate.kappa", "curvature.kappa", "descent.kappa"),
        *("train.steps", "descent.steps"),
    )
    checks.positive_numbers(
        config,
        *("certificate.gamma", "train.delta", "train.learning_rate", "train.clip_norm"),
        *("train.gamma_rate", "descent.learning_rate"),
    )
    for field in ("model.blocks", "model.kappas", "certificate.depths", "certificate.widths"):
        group, name = field.split(".")
        for value in checks.distinct(config, field):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{field}={config[group][name]!r} must be integers of at least 1.")
    for field in ("data.variances", "curvature.gammas", "train.gammas", "descent.gammas"):
        group, name = field.split(".")
        for value in checks.distinct(config, field):
            if not math.isfinite(value) or value <= 0:
                raise InputError(f"{field}={config[group][name]!r} must be finite numbers above 0.")
    for field, choices in (
        ("model.skips", SKIPS),
        ("certificate.activations", tuple(ACTIVATIONS)),
    ):
        group, name = field.split(".")
        for value in checks.distinct(config, field):
            if value not in choices:
                raise InputError(
                    f"{field}={config[group][name]!r} must be among {', '.join(choices)}."
                )
    checks.one_of(config, "model.activation", tuple(ACTIVATIONS))
    checks.seeds(config)
    rank = len(config.data.variances)
    if list(config.data.variances) != sorted(config.data.variances, reverse=True):
        raise InputError(f"data.variances={config.data.variances!r} must fall.")
    if rank > config.data.dim or rank >= config.data.examples:
        raise InputError(
            f"data.variances={config.data.variances!r} are {rank} directions: data.dim must be "
            f"at least {rank} and data.examples above it."
        )


# ------------------------------------------------------------------ problems


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


def _problem(config: Any, seed: int | jax.Array) -> Problem:
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


# For what runs a few times, compiling fast is what counts.
_few_calls = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# --------------------------------------------------------------- certificates


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


# ------------------------------------------------------------------ curvature


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
        x = _problem(config, 0).x
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


# ------------------------------------------------------------------- training


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
        gamma_rule="closed_form",
    )  # fmt: skip
    cells = list(itertools.product(config.model.kappas, train.gammas, train.seeds))

    def members(rate: float) -> Member:
        return stack_members([Member(seed, kappa, gamma, rate) for kappa, gamma, seed in cells])

    @jax.jit
    @jax.vmap
    def start(member: Member) -> TrainState:
        x = _problem(config, member.seed).x
        state = init_state(model, settings, member, x.mean(0))
        params = total_collapse(model, state.params, x, jnp.log(member.gamma_start))
        key = stream(member.seed, "theorem2/perturbation")
        return state._replace(params=perturb(params, key, train.delta))

    @jax.jit
    @jax.vmap
    def phase(member: Member, state: TrainState) -> tuple[TrainState, Row]:
        problem = _problem(config, member.seed)

        def step(state, _):
            return train_step(model, settings, member, state, problem.x)[0], None

        state, _ = jax.lax.scan(step, state, length=train.steps)
        return state, _measure(model, state.params, member.kappa, problem)

    state, held = phase(members(0.0), start(members(0.0)))
    _, learned = phase(members(train.gamma_rate), state)
    held, learned = jax.device_get((held, learned))
    _require_finite(np.stack([held["shares"], learned["shares"]]), "train.learning_rate")

    rows = []
    for index, (kappa, gamma, seed) in enumerate(cells):
        row = {
            "part": "training", "skips": skips, "blocks": blocks, "kappa": kappa,
            "gamma_start": gamma, "seed": seed, "above_gamma": int((variances > gamma).sum()),
        }  # fmt: skip
        wanted = {
            "held": min(kappa, max(1, row["above_gamma"])),
            "learned": min(kappa, len(variances)),
        }
        for name, found in (("held", held), ("learned", learned)):
            directions = awake(found["shares"][index], variances, found["gamma"][index])
            row |= {
                f"{name}_gamma": float(found["gamma"][index]),
                f"{name}_informative": int(found["informative"][index]),
                f"{name}_awake": int(directions.sum()),
                f"{name}_share": float(found["shares"][index] @ variances / variances.sum()),
                f"{name}_recovered": bool(directions.sum() >= wanted[name]),
                f"{name}_shares": found["shares"][index].tolist(),
            }
        rows.append(row)
    return rows


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
        x = _problem(config, seed).x
        params = init_params(model, stream(seed, "init"), x.mean(0))
        return x, total_collapse(model, params, x, jnp.log(gamma))

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
        params = jax.vmap(lambda p, key: perturb(p, key, delta))(params, keys)
        carry = (jnp.int32(0), params, jnp.full(len(x), -1))
        _, params, escaped = jax.lax.while_loop(any_left, onwards, carry)
        sums = jax.vmap(lambda p: jax.flatten_util.ravel_pytree(p)[0].sum())(params)
        return escaped, sums

    x, collapsed = start(jnp.asarray(seeds), jnp.asarray(gammas, jnp.float32))
    escaped, sums = jax.device_get(run(jnp.asarray(seeds), x, collapsed))
    _require_finite(sums, "descent.learning_rate")
    x, collapsed = jax.device_get((x, collapsed))

    with jax.enable_x64(True):

        @jax.jit
        @jax.vmap
        def predict(x, params):
            return collapse.escape_curvature(model, params, x, features(model, params, x))[0]

        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (x, collapsed))
        curvatures = np.asarray(predict(*wide))
    rows = []
    for index, (gamma, seed) in enumerate(cells):
        rate = math.log1p(descent.learning_rate * gamma * max(-float(curvatures[index]), 0.0))
        rows.append(
            {
                "part": "descent", "skips": skips, "blocks": blocks, "kappa": descent.kappa,
                "gamma": gamma, "seed": seed, "curvature": float(curvatures[index]),
                "predicted_steps": math.log(1 / delta) / rate if rate > 1e-9 else None,
                "escape_step": int(escaped[index]),
            }
        )  # fmt: skip
    return rows


def _require_finite(values: np.ndarray, field: str) -> None:
    if not np.isfinite(values).all():
        raise Diverged(f"A run's weights are not finite. Lower {field}, in a new --workdir.")


# ------------------------------------------------------------------------ run


def run(config: Any, workdir: str) -> list[Row]:
    """Runs every part and reports; what `workdir` holds already is not done again."""
    check(config)
    path = open_workdir(workdir, config.to_dict())
    parts: list[tuple[str, Callable[[], list[Row]]]] = [
        ("certificates", lambda: certificate_rows(config)),
        ("curvature", lambda: curvature_rows(config)),
    ]
    parts += [
        (f"training {skips} {blocks}", functools.partial(training_rows, config, skips, blocks))
        for blocks in config.model.blocks
        for skips in config.model.skips
    ]
    parts += [
        (f"descent {skips}", functools.partial(descent_rows, config, skips))
        for skips in config.model.skips
    ]
    print(f"{config.name}: {len(parts)} parts; workdir {path}", flush=True)
    rows: list[Row] = []
    for index, (name, make) in enumerate(parts, 1):
        rows += finished(path, f"[{index}/{len(parts)}] ", name, make)
    theorem2_report.write(config, path, rows)
    return rows
