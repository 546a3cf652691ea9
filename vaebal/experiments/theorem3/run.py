"""Theorem 3: eq. 6 under every penalty h, with linear decoders and with deep ones.

Four parts, each with its rows (and tables and figures, by `theorem3_report`):
- linear: h x kappa x seeds on data of known rank, with and without the homotopy;
- counterexamples: solutions that a penalty prefers to the balanced one;
- power: the threshold p = 1/2 of u^p;
- digits: a deep autoencoder on scikit-learn's digits.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vaebal.data import load
from vaebal.errors import Diverged, InputError
from vaebal.experiments import checks
from vaebal.experiments.parts import finished
from vaebal.experiments.report import Row, rows_with
from vaebal.experiments.theorem3 import page as theorem3_report
from vaebal.experiments.theorem3.page import PIXELS
from vaebal.models.nets import ACTIVATIONS
from vaebal.streams import stream
from vaebal.theory import regularized_ae as rae
from vaebal.theory.penalties import Penalty, named, power
from vaebal.theory.regularized_ae import Statistics
from vaebal.training.checkpoints import open_workdir
from vaebal.units import to_unit_pixels

# ------------------------------------------------------------------- checks


def check(config: Any) -> None:
    """Raises InputError for the first field that cannot be meant."""
    for part in ("linear", "digits"):
        _check_penalties(config, f"{part}.penalties")
        for seed in checks.distinct(config, f"{part}.seeds"):
            if not isinstance(seed, int) or not 0 <= seed < 2**31:
                raise InputError(
                    f"{part}.seeds={config[part].seeds!r} must be integers in [0, 2^31)."
                )
        checks.positive_integers(config, f"{part}.steps")
        checks.positive_numbers(
            config, f"{part}.smoothing_start", f"{part}.smoothing_end", f"{part}.zero_error"
        )
        if config[part].smoothing_end > config[part].smoothing_start:
            raise InputError(
                f"{part}.smoothing_end={config[part].smoothing_end!r} must not exceed "
                f"{part}.smoothing_start={config[part].smoothing_start!r}: smoothing falls."
            )
        if not 0 < config[part].active_share < 1:
            raise InputError(
                f"{part}.active_share={config[part].active_share!r} must lie between 0 and 1."
            )
    if not any(named(formula).differentiable for formula in config.linear.penalties):
        raise InputError("linear.penalties needs one that can be minimised beside the indicator.")
    for formula in config.digits.penalties:
        if not named(formula).differentiable:
            raise InputError(f"digits.penalties: {formula!r} is evaluated, it cannot be minimised.")
    for formula in config.digits.without_homotopy:
        if formula not in config.digits.penalties:
            raise InputError(f"digits.without_homotopy: {formula!r} is not in digits.penalties.")
    checks.positive_integers(
        config,
        *("linear.starts", "linear.examples", "linear.dim", "linear.rank", "power.kappa"),
        *("digits.kappa", "digits.width", "digits.encoder_layers", "digits.decoder_layers"),
    )
    linear, rank = config.linear, config.linear.rank
    if linear.dim <= rank:
        raise InputError(f"linear.dim={linear.dim} must exceed linear.rank={rank}, as d > r.")
    if linear.examples < rank:
        raise InputError(
            f"linear.examples={linear.examples} cannot have linear.rank={rank}: raise it."
        )
    for field, kappas in (
        ("linear.kappas", checks.distinct(config, "linear.kappas")),
        ("power.kappa", (config.power.kappa,)),
    ):
        for kappa in kappas:
            if not isinstance(kappa, int) or kappa < rank:
                raise InputError(
                    f"{field}={kappa!r} must be an integer of at least linear.rank={rank}: with "
                    "fewer latents no error can vanish."
                )
    for p in checks.distinct(config, "power.exponents"):
        if not 0 < p <= 1:
            raise InputError(f"power.exponents={config.power.exponents!r} must lie in (0, 1].")
    for kept in checks.distinct(config, "digits.ranks"):
        if not isinstance(kept, int) or not 1 <= kept <= PIXELS:
            raise InputError(
                f"digits.ranks={config.digits.ranks!r} must be integers from 1 to {PIXELS}."
            )
    checks.positive_numbers(config, "counterexamples.variance", "digits.learning_rate")
    checks.one_of(config, "digits.activation", tuple(ACTIVATIONS))
    if not 0 < config.digits.smoothing_share <= 1:
        raise InputError(
            f"digits.smoothing_share={config.digits.smoothing_share!r} must lie in (0, 1]."
        )


def _check_penalties(config: Any, field: str) -> None:
    formulas = checks.distinct(config, field)
    try:
        names = [named(formula).name for formula in formulas]
    except ValueError as error:
        raise InputError(f"{field}: {error}") from error
    if len(set(names)) < len(names):
        raise InputError(f"{field}={tuple(formulas)!r} lists one penalty twice.")


# --------------------------------------------------------------------- parts


def run(config: Any, workdir: str) -> list[Row]:
    """Runs every part and reports; what `workdir` holds already is not done again."""
    check(config)
    path = open_workdir(workdir, config.to_dict())
    linear = {formula: named(formula) for formula in config.linear.penalties}
    parts: list[tuple[str, Callable[[], list[Row]]]] = [
        (f"linear {formula}", lambda h=h: linear_rows(config, h))
        for formula, h in linear.items()
        if h.differentiable
    ]
    parts += [
        ("counterexamples", lambda: counterexample_rows(config)),
        ("power", lambda: power_rows(config)),
    ]
    parts += [
        (f"digits {formula}", lambda formula=formula: digits_rows(config, named(formula)))
        for formula in config.digits.penalties
    ]
    print(f"{config.name}: {len(parts)} parts; workdir {path}", flush=True)
    rows: list[Row] = []
    for index, (name, make) in enumerate(parts, 1):
        rows += finished(path, f"[{index}/{len(parts)}] ", name, make)
    rows += [
        row
        for h in linear.values()
        if not h.differentiable
        for row in indicator_rows(config, h, rows)
    ]
    theorem3_report.write(config, path, rows)
    return rows


@functools.partial(jax.jit, static_argnames=("examples", "dim", "rank", "starts", "padded"))
def linear_problems(
    seeds: jax.Array,
    kappas: jax.Array,
    *,
    examples: int,
    dim: int,
    rank: int,
    starts: int,
    padded: int,
) -> tuple[jax.Array, jax.Array]:
    """Data and random decoders of P problems, each a function of its seed alone.

    Args:
      seeds: [P].
      kappas: [P], at most `padded`: decoders of a smaller kappa are a prefix of a larger one's.
      examples, dim, rank: n, d and r; r examples that stand for all n are kept.
      starts: S.

    Returns:
      x [P, r, D] and W_x [P, S, D, K].
    """

    def one(seed, kappa):
        x = rae.low_rank_data(stream(seed, "theorem3/data"), examples, dim, rank)
        keys = jax.vmap(lambda start: stream(seed, "theorem3/start", start))(jnp.arange(starts))
        columns = jax.vmap(lambda key: rae.random_columns(key, dim, kappa, padded))(keys)
        return rae.sufficient_examples(x, rank), columns

    return jax.vmap(one)(seeds, kappas)


def _problems(config: Any, cells: Sequence[tuple[int, int]]) -> tuple[jax.Array, jax.Array]:
    """`linear_problems` of (kappa, seed) cells with the linear part's settings."""
    settings = config.linear
    return linear_problems(
        jnp.array([seed for _, seed in cells]),
        jnp.array([kappa for kappa, _ in cells]),
        examples=settings.examples,
        dim=settings.dim,
        rank=settings.rank,
        starts=settings.starts,
        padded=max(kappa for kappa, _ in cells),
    )


class Found(NamedTuple):
    """What one start came to."""

    at: Statistics
    energy: jax.Array
    energy_svd: jax.Array  # of zero error with r rows


def make_solver(penalty: Callable[[Any], Penalty]) -> Callable[..., Found]:
    """Every problem from every start, in one compiled program.

    Args:
      penalty: of one problem's parameter.

    Returns:
      (parameters [P], x [P, r, D], W_x [P, S, D, K], smoothing [T]) -> `Found`, each [P, S].
    """

    def one(parameter, x, start, smoothing):
        h = penalty(parameter)
        at = rae.linear_statistics(rae.minimise_linear(h, x, start, smoothing), x)
        svd = rae.balanced_statistics(x, start.shape[1], len(x))
        return Found(at, rae.energy(h, at), rae.energy(h, svd))

    over_starts = jax.vmap(one, (None, None, 0, None))
    return jax.jit(jax.vmap(over_starts, (0, 0, 0, None)))


def _smoothing(settings: Any, homotopy: bool) -> jax.Array:
    """[T]; without the homotopy it is where the homotopy ends, from the first step."""
    start = settings.smoothing_start if homotopy else settings.smoothing_end
    return rae.homotopy(
        start, settings.smoothing_end, settings.steps, settings.get("smoothing_share", 1.0)
    )


def _outcome(
    settings: Any, error: float, rows: np.ndarray, mean_square: float, dim: int, rank: int
) -> Row:
    """What becomes of a solution: error, active rows, balanced or not.

    Args:
      mean_square: of the data, per pixel: the unit of the thresholds.
    """
    active = int(rae.active_rows(rows, settings.active_share * mean_square * dim))
    zero = error <= settings.zero_error * mean_square
    return {
        "error": float(error),
        "relative_error": float(error / mean_square),
        "active": active,
        "zero_error": bool(zero),
        "balanced": bool(zero and active <= rank),
        "row_squares": sorted(rows.tolist(), reverse=True),
    }


def _energy(penalty: Penalty, error: float, row_squares: Any, dim: int) -> float:
    """Eq. 6 of plain numbers, in float64."""
    with jax.enable_x64(True):
        at = Statistics(jnp.asarray(error), jnp.asarray(row_squares), dim)
        return float(rae.energy(penalty, at))


def _facts(penalty: Penalty) -> Row:
    return {
        "penalty": penalty.name,
        "slope_at_zero": penalty.slope_at_zero if penalty.bounded else "inf",
        "norm_curvature": penalty.norm_curvature,
    }


def linear_rows(config: Any, penalty: Penalty) -> list[Row]:
    """One penalty on every kappa and seed, with the homotopy and without; the best start each."""
    settings = config.linear
    padded = max(settings.kappas)
    cells = [(kappa, seed) for kappa in settings.kappas for seed in settings.seeds]
    rows = []
    with jax.enable_x64(True):
        x, starts = _problems(config, cells)
        solve = make_solver(lambda _: penalty)
        unused = jnp.zeros(len(cells))
        found = {
            homotopy: jax.device_get(solve(unused, x, starts, _smoothing(settings, homotopy)))
            for homotopy in (True, False)
        }
        at_zero = float(penalty.value(jnp.zeros(())))
        x = np.asarray(x)
    mean_squares = np.square(x).mean((1, 2))
    for homotopy, (at, energies, svd_energies) in found.items():
        for index, (kappa, seed) in enumerate(cells):
            outcomes = [
                _outcome(
                    settings, error, row_squares[:kappa], mean_squares[index],
                    settings.dim, settings.rank,
                )
                for error, row_squares in zip(at.error[index], at.rows[index], strict=True)
            ]  # fmt: skip
            best = int(np.argmin(energies[index]))
            above = float(energies[index, best] - svd_energies[index, best])
            # Latents beyond kappa do not exist: their h(0) is no part of the energy.
            energy = float(energies[index, best]) - (padded - kappa) * at_zero / settings.dim
            rows.append(
                {
                    "part": "linear",
                    **_facts(penalty),
                    "homotopy": homotopy,
                    "kappa": kappa,
                    "seed": seed,
                    **outcomes[best],
                    "energy": energy,
                    "energy_above_svd": above,
                    **_exact(penalty, x[index], kappa),
                    "starts": settings.starts,
                    "starts_balanced": sum(outcome["balanced"] for outcome in outcomes),
                    "rank": settings.rank,
                }
            )
    return rows


def _exact(penalty: Penalty, x: np.ndarray, kappa: int) -> Row:
    """The global minimum, where its closed form is known."""
    if penalty.norm_curvature == "mixed":
        return {"exact_energy": None, "exact_error": None}
    exact = rae.linear_global_minimum(penalty, x, kappa)
    return {"exact_energy": exact.energy, "exact_error": exact.error}


def indicator_rows(config: Any, penalty: Penalty, rows: Sequence[Row]) -> list[Row]:
    """The indicator's best among all other penalties' solutions, with the homotopy and without."""
    settings, made = config.linear, []
    least = settings.rank / settings.dim  # zero error and r rows
    for kappa in settings.kappas:
        for seed in settings.seeds:
            pool = rows_with(rows, part="linear", kappa=kappa, seed=seed)
            energies = [
                _energy(penalty, row["error"], row["row_squares"], settings.dim) for row in pool
            ]
            best = int(np.argmin(energies))
            made.append(
                {
                    **pool[best],
                    **_facts(penalty),
                    "homotopy": None,  # of others, chosen from
                    "chosen_from": pool[best]["penalty"],
                    "energy": energies[best],
                    "energy_above_svd": energies[best] - least,
                    "exact_energy": least,
                    "exact_error": 0.0,
                    "starts_balanced": None,
                    "seconds": 0.0,
                }
            )
    return made


def counterexample_rows(config: Any) -> list[Row]:
    """For every penalty: the balanced solution of isotropic data, and what undercuts it.

    Energies are with h(0) = 0, which is a translation of h. From statistics alone, as a
    decoder may have to be split into more columns than there is memory for.
    """
    settings, rows = config.linear, []
    variance, dim, rank = config.counterexamples.variance, settings.dim, settings.rank
    mean_square = rank * variance / dim
    with jax.enable_x64(True):
        balanced = rae.balanced_statistics(rae.isotropic_data(dim, rank, variance), rank, rank)
        for formula in settings.penalties:
            penalty = named(formula)

            def energy(error: float, row_squares: jax.Array, h: Penalty = penalty) -> float:
                at_zero = _energy(h, 0.0, jnp.zeros_like(row_squares), dim)
                return _energy(h, error, row_squares, dim) - at_zero

            t = rae.best_shrinkage(penalty, balanced, mean_square)
            parts = rae.splitting_pays_from(penalty, variance)
            shown = parts or 2
            rows.append(
                {
                    "part": "counterexamples",
                    **_facts(penalty),
                    "rank": rank,
                    "dim": dim,
                    "energy_balanced": energy(0.0, balanced.rows),
                    "shrinking_pays": t > 0,
                    "shrinkage": t,
                    "shrunk_error": t**2 * mean_square,
                    "energy_shrunk": energy(t**2 * mean_square, (1 - t) ** 2 * balanced.rows),
                    "splitting_pays": parts is not None,
                    "split_rows": rank * shown,
                    "energy_split": energy(0.0, jnp.repeat(balanced.rows / shown**2, shown)),
                }
            )
    return rows


def power_rows(config: Any) -> list[Row]:
    """u^p over p: the best error found, the exact one, and the scaling argument's."""
    settings, kappa = config.linear, config.power.kappa
    cells = [(p, seed) for p in config.power.exponents for seed in settings.seeds]
    with jax.enable_x64(True):
        x, starts = _problems(config, [(kappa, seed) for _, seed in cells])
        exponents = jnp.array([p for p, _ in cells])
        found = make_solver(power)(exponents, x, starts, _smoothing(settings, True))
        at, energies, _ = jax.device_get(found)
        x = np.asarray(x)
    rows = []
    for index, (p, seed) in enumerate(cells):
        best = int(np.argmin(energies[index]))
        exact = rae.linear_global_minimum(power(p), x[index], kappa)
        outcome = _outcome(
            settings, at.error[index, best], at.rows[index, best], np.square(x[index]).mean(),
            settings.dim, settings.rank,
        )  # fmt: skip
        rows.append(
            {
                "part": "power",
                "p": p,
                "kappa": kappa,
                "seed": seed,
                **outcome,
                "energy": float(energies[index, best]),
                "exact_energy": exact.energy,
                "exact_error": exact.error,
                "scaling_error": scaling_error(p, x[index], settings.rank),
                "rank": settings.rank,
            }
        )
    return rows


def scaling_error(p: float, x: np.ndarray, rank: int) -> float:
    """The error at which the scaling argument stops, started at the SVD's zero error.

    Z -> (1-t) Z costs (t^2 E_0)^p and gains 2 p t P, P the balanced penalty, to first
    order in t. For p > 1/2 the difference is least at t = (P / E_0^p)^(1 / (2p-1)), and
    P < E_0^p wherever r < d, so that t < 1; for p <= 1/2 no small t pays.
    """
    if p <= 0.5:
        return 0.0
    with jax.enable_x64(True):
        rows = np.asarray(rae.balanced_statistics(jnp.asarray(x), rank, rank).rows)
    mean_square = float(np.square(x).mean())
    t = (np.sum(rows**p) / x.shape[1] / mean_square**p) ** (1 / (2 * p - 1))
    return float(t**2 * mean_square)


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
                fit(keys, train, test, _smoothing(settings, homotopy))
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
                        **_facts(penalty),
                        "kept": kept,
                        "homotopy": homotopy,
                        "kappa": settings.kappa,
                        "seed": seed,
                        **_outcome(
                            settings, at.error[index], at.rows[index], mean_square, PIXELS, kept
                        ),
                        "test_error": float(test_error[index]),
                        "energy": float(energies[index, -1]),
                    }
                )
    return rows
