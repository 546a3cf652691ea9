"""Theorem 3: eq. 6 under every penalty h, with linear decoders and with deep ones.

Four parts, each with its rows, its table and its figure:
- linear: h x kappa x seeds on data of known rank, with and without the homotopy;
- counterexamples: solutions that a penalty prefers to the balanced one;
- power: the threshold p = 1/2 of u^p;
- digits: a deep autoencoder on scikit-learn's digits.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from vaebal import regularized_ae as rae
from vaebal import report
from vaebal.checkpoints import open_workdir, write_atomically
from vaebal.data import load
from vaebal.errors import Diverged, InputError
from vaebal.experiments import checks
from vaebal.nets import ACTIVATIONS
from vaebal.penalties import Penalty, named, power
from vaebal.regularized_ae import Statistics
from vaebal.report import Row
from vaebal.streams import stream
from vaebal.units import to_unit_pixels

PIXELS = 64  # of a digit

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
    if all(not named(formula).differentiable for formula in config.linear.penalties):
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
    parts: list[tuple[str, Callable[[], list[Row]]]] = [
        (f"linear {formula}", lambda formula=formula: linear_rows(config, named(formula)))
        for formula in config.linear.penalties
        if named(formula).differentiable
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
        rows += _finished(path, f"[{index}/{len(parts)}] ", name, make)
    rows += [
        row
        for formula in config.linear.penalties
        if not named(formula).differentiable
        for row in indicator_rows(config, named(formula), rows)
    ]
    write(config, path, rows)
    return rows


def _finished(path: Path, beat: str, name: str, make: Callable[[], list[Row]]) -> list[Row]:
    """A part's rows: read if it has been finished before, else made and kept."""
    file = path / "parts" / f"{re.sub(r'[^a-z0-9.-]+', '_', name)}.json"
    if file.exists():
        print(f"{beat}{name}: finished before, not done again", flush=True)
    else:
        start = time.perf_counter()
        rows = make()
        seconds = time.perf_counter() - start
        for row in rows:
            row["seconds"] = seconds / len(rows)
        write_atomically(file, json.dumps(rows, indent=1) + "\n")
        print(f"{beat}{name}: {seconds:.1f} s", flush=True)
    return json.loads(file.read_text())


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
    for kappa in settings.kappas:
        for seed in settings.seeds:
            pool = [
                row for row in rows
                if row["part"] == "linear" and (row["kappa"], row["seed"]) == (kappa, seed)
            ]  # fmt: skip
            with jax.enable_x64(True):
                energies = [
                    float(
                        rae.energy(
                            penalty,
                            Statistics(
                                jnp.asarray(row["error"]),
                                jnp.asarray(row["row_squares"]),
                                settings.dim,
                            ),
                        )
                    )
                    for row in pool
                ]
            best = int(np.argmin(energies))
            least = settings.rank / settings.dim  # zero error and r rows
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
                at = Statistics(jnp.asarray(error), row_squares, dim)
                at_zero = Statistics(jnp.zeros(()), jnp.zeros_like(row_squares), dim)
                return float(rae.energy(h, at) - rae.energy(h, at_zero))

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


# -------------------------------------------------------------------- report


def _of(rows: Sequence[Row], **fields: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def _distinct(rows: Sequence[Row], field: str) -> list[Any]:
    return list(dict.fromkeys(row[field] for row in rows))


def _best(rows: Sequence[Row]) -> list[Row]:
    """The linear rows that count: with the homotopy, or chosen from all for the indicator."""
    return [row for row in rows if row["homotopy"] is not False]


def _slope(row: Row) -> str:
    """ "1", "1e6" or "∞"."""
    slope = row["slope_at_zero"]
    return "∞" if slope == "inf" else _short(slope)


def _short(value: float, sign: str = "") -> str:
    """Two digits at most and a short exponent: 0.25, 1e−6."""
    small = 0 < abs(value) < 1e-3
    text = f"{value:{sign}.1e}".replace(".0e", "e") if small else f"{value:{sign}.2g}"
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), text).replace("-", "−")


def _errors(values: Sequence[float], digits: int, zero: float = 0.0) -> str:
    """Mean and spread over seeds; a bound where all are at most `zero`: zero but for rounding."""
    if max(values) <= zero:
        return f"≤ {_short(float(f'{max(values):.0e}'))}" if max(values) > 0 else "0"
    mean, spread = report.mean_and_spread(values)
    if mean >= 10.0 ** (1 - digits):
        return report.with_spread(values, digits)
    return _short(mean) + (f" ± {_short(spread)}" if spread is not None else "")


def _field(rows: Sequence[Row], name: str) -> list[Any]:
    return [row[name] for row in rows]


def _signed(values: Sequence[float]) -> str:
    """A mean difference with its sign; "0" where it is rounding."""
    mean = float(np.mean(values))
    return _short(mean, "+") if abs(mean) > 1e-9 else "0"


def _share(count: int, of: int) -> str:
    return f"{count} of {of}"


def linear_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Error and active rows of every penalty at every kappa, over seeds."""
    rows = _best(rows)
    kappas = _distinct(rows, "kappa")
    header = ["h(u)", "h′(0)"]
    for kappa in kappas:
        header += [f"error, κ = {kappa}", "rows"]
    header += ["balanced"]
    body = []
    for penalty in _distinct(rows, "penalty"):
        mine = _of(rows, penalty=penalty)
        line = [penalty, _slope(mine[0])]
        for kappa in kappas:
            seeds = _of(mine, kappa=kappa)
            zero = 1e-12 if all(_field(seeds, "zero_error")) else 0.0
            line += [
                _errors(_field(seeds, "error"), 3, zero),
                report.with_spread(_field(seeds, "active"), 1),
            ]
        line += [_share(sum(row["balanced"] for row in mine), len(mine))]
        body.append(line)
    return header, body


def homotopy_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """With the homotopy and without, at the largest kappa: rows, energies, single starts."""
    rows = [row for row in rows if row["homotopy"] is not None]
    rows = _of(rows, kappa=max(_distinct(rows, "kappa")))
    header = ["h(u)"]
    for name in ("homotopy", "from scratch"):
        header += [f"{name}: rows", "energy − SVD's", "balanced starts"]
    body = []
    for penalty in _distinct(rows, "penalty"):
        line = [penalty]
        for homotopy in (True, False):
            seeds = _of(rows, penalty=penalty, homotopy=homotopy)
            line += [
                report.with_spread([row["active"] for row in seeds], 1),
                _signed([row["energy_above_svd"] for row in seeds]),
                _share(
                    sum(row["starts_balanced"] for row in seeds),
                    sum(row["starts"] for row in seeds),
                ),
            ]
        body.append(line)
    return header, body


def counterexample_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The balanced solution's energy beside those of solutions that may undercut it."""
    header = [
        *("h(u)", "h′(0)", "balanced: energy", "shrunk by t", "its error"),
        *("energy − balanced's", "split: rows", "energy − balanced's"),
    ]
    body = []
    for row in rows:
        shrunk = ["none pays", "", ""]
        if row["shrinking_pays"]:
            shrunk = [
                f"{_short(row['shrinkage'])}",
                _short(row["shrunk_error"]),
                _signed([row["energy_shrunk"] - row["energy_balanced"]]),
            ]
        split = _signed([row["energy_split"] - row["energy_balanced"]])
        body.append(
            [
                *(row["penalty"], _slope(row), report.number(row["energy_balanced"], 3), *shrunk),
                *(f"{row['split_rows']:,}", split if split != "0" else "0 (a tie)"),
            ]
        )
    return header, body


def power_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Error and active rows by p."""
    header = ["p", "error", "exact error", "scaling argument", "rows"]
    body = []
    for p in sorted(_distinct(rows, "p")):
        seeds = _of(rows, p=p)
        zero = 1e-12 if p <= 0.5 else 0.0
        body.append(
            [
                f"{p:g}",
                _errors(_field(seeds, "error"), 3, zero),
                _errors(_field(seeds, "exact_error"), 3),
                _errors(_field(seeds, "scaling_error"), 3),
                report.with_spread(_field(seeds, "active"), 1),
            ]
        )
    return header, body


def digits_table(rows: Sequence[Row], kept: int) -> tuple[list[str], list[list[str]]]:
    """Deep autoencoders on one data set: error and active rows, with the homotopy or not."""
    header = ["h(u)", "homotopy", "error", "test error", "rows"]
    body = []
    for penalty in _distinct(rows, "penalty"):
        for homotopy in (True, False):
            if seeds := _of(rows, kept=kept, penalty=penalty, homotopy=homotopy):
                body.append(
                    [
                        *(penalty, "yes" if homotopy else "no"),
                        *(_errors(_field(seeds, name), 4) for name in ("error", "test_error")),
                        report.with_spread(_field(seeds, "active"), 1),
                    ]
                )
    return header, body


def _digits_name(kept: int) -> str:
    return "as they are" if kept == PIXELS else f"rank {kept}"


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, in one sentence, from the rows alone."""
    linear = _best(_of(rows, part="linear"))
    kappa = max(row["kappa"] for row in linear)
    groups: dict[str, list[str]] = {"balanced": [], "redundant": [], "inexact": []}
    for penalty in _distinct(linear, "penalty"):
        seeds = _of(linear, penalty=penalty, kappa=kappa)
        if all(row["balanced"] for row in seeds):
            groups["balanced"].append(penalty)
        elif all(row["zero_error"] for row in seeds):
            groups["redundant"].append(penalty)
        else:
            groups["inexact"].append(penalty)
    said = {
        "balanced": f"zero error with exactly {linear[0]['rank']} rows under",
        "redundant": "zero error with more rows than that under",
        "inexact": "an error left under",
    }
    parts = [f"{said[name]} {', '.join(group)}" for name, group in groups.items() if group]
    powers = _of(rows, part="power")
    exact = [p for p in _distinct(powers, "p") if all(r["zero_error"] for r in _of(powers, p=p))]
    tail = f"along u^p the error is zero up to p = {max(exact):g}" if exact else "no u^p reaches it"
    digits = _of(rows, part="digits", homotopy=True)
    kept = min(_distinct(digits, "kept"))
    deep = [
        f"{np.mean(_field(_of(digits, kept=kept, penalty=penalty), 'active')):.2g} under {penalty}"
        for penalty in _distinct(digits, "penalty")
    ]
    return (
        f"With κ = {kappa} latents on data of rank {linear[0]['rank']}: {'; '.join(parts)}; "
        f"{tail}. A deep autoencoder with {digits[0]['kappa']} latents on the digits "
        f"({_digits_name(kept)}) keeps {', '.join(deep)}."
    )


def protocol(config: Any, rows: Sequence[Row]) -> dict[str, str]:
    """How the numbers of every table were made, in full sentences."""
    linear, digits = config.linear, config.digits

    def over(seeds: Sequence[int]) -> str:
        if len(seeds) == 1:
            return f"One seed ({seeds[0]}), so no spread."
        return (
            f"Mean ± standard deviation over the {len(seeds)} seeds {', '.join(map(str, seeds))}."
        )

    indicator = "".join(
        f" {named(formula).name} is evaluated, not minimised: its line is the solution of least "
        "energy among those of all other penalties."
        for formula in linear.penalties
        if not named(formula).differentiable
    )
    kept = min(_distinct(_of(rows, part="digits"), "kept"))
    return {
        "linear": (
            f"Data: rank {linear.rank} exactly, d = {linear.dim}, n = {linear.examples}, normal "
            "codes times normal loadings. x̂ = W_x z, columns of W_x of norm one, codes free (a "
            f"linear encoder does as well). Reweighted ridge steps, {linear.steps} of them, in "
            f"float64; best of {linear.starts} random decoders by h's own energy; the smoothing "
            f"of h(u+ε) falls from {_short(linear.smoothing_start)} to "
            f"{_short(linear.smoothing_end)} of the data's mean square norm (the homotopy). "
            f"{over(linear.seeds)} Error is ‖X−X̂‖²/(dn). A row is active above "
            f"{_short(linear.active_share)} of the data's mean square norm. Balanced: an error "
            f"below {_short(linear.zero_error)} of the data's mean square with {linear.rank} "
            f"rows, counted over κ and seeds.{indicator}"
        ),
        "homotopy": (
            f"κ = {max(linear.kappas)}. From scratch: the smoothing is "
            f"{_short(linear.smoothing_end)} from the first step. SVD's is the energy of zero "
            f"error with {linear.rank} rows: below it, h prefers another solution; 0 or nearly, a "
            "tie or convergence to it; well above it, a local minimum. Balanced starts are "
            "counted over seeds and single starts."
        ),
        "counterexamples": (
            f"Data: {linear.rank} orthogonal directions of variance "
            f"{_short(config.counterexamples.variance)}, d = {linear.dim}; no zero-error solution "
            f"with {linear.rank} rows has less energy than the balanced one shown. Shrunk: "
            "Z → (1−t)Z at its best t. Split: every row in the least number of equal parts that "
            "pays, or in two where none ever does. Energies with h(0) = 0. A negative difference "
            "is a solution that h prefers to balance: a bounded slope always has both kinds."
        ),
        "power": (
            f"κ = {config.power.kappa}, the data and starts of the first table. Exact: the global "
            "minimum, by search over one threshold of the singular values. Scaling argument: "
            "where Z → (1−t)Z stops, to first order, starting from the SVD."
        ),
        "digits": (
            f"Full batch of {len(load('digits').train)} images; errors are per pixel. MLPs of "
            f"width {digits.width}, {digits.encoder_layers} layers for the encoder and "
            f"{digits.decoder_layers} for the decoder, {digits.activation}; the decoder's weights "
            f"that leave a unit have norm one; κ = {digits.kappa}. Adam at "
            f"{_short(digits.learning_rate)}, {digits.steps} steps; smoothing from "
            f"{_short(digits.smoothing_start)} to {_short(digits.smoothing_end)} over the first "
            f"{digits.smoothing_share:.0%} of them (the homotopy), or at its end throughout. "
            f"{_digits_name(kept).capitalize()}: the digits' first principal components, so that "
            f"the rows needed are known. A row is active above {_short(digits.active_share)} of "
            f"the images' variance. {over(digits.seeds)}"
        ),
    }


def draw_linear(rows: Sequence[Row]) -> plt.Figure:
    """Error and active rows by penalty, a colour per kappa, every seed a point.

    The error is the homotopy's alone; the rows without it are hollow.
    """
    penalties, kappas = _distinct(rows, "penalty"), _distinct(rows, "kappa")
    rank, floor = rows[0]["rank"], 1e-15
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.4))
    jitter = np.linspace(-0.05, 0.05, len(_distinct(rows, "seed")))
    for colour, kappa, offset in zip(
        report.COLOURS * 3, kappas, np.linspace(-0.25, 0.25, len(kappas)), strict=False
    ):
        for axis, field, homotopy in (
            (axes[0], "error", True), (axes[1], "active", False), (axes[1], "active", True),
        ):  # fmt: skip
            chosen = [row for row in rows if (row["homotopy"] is not False) == homotopy]
            places, values = [], []
            for place, penalty in enumerate(penalties):
                seeds = _of(chosen, penalty=penalty, kappa=kappa)
                places += [place + offset + step for step in jitter[: len(seeds)]]
                values += [max(row[field], floor) for row in seeds]
            axis.plot(
                places, values, "o", color=colour, markersize=3.5 if homotopy else 6,
                markerfacecolor=colour if homotopy else "none", markeredgewidth=0.7,
                linestyle="none", label=f"κ = {kappa}" if homotopy else None,
            )  # fmt: skip
    axes[1].plot([], [], "o", color="0.3", markersize=6, markerfacecolor="none",
                 linestyle="none", label="without the homotopy")  # fmt: skip
    axes[0].set_yscale("log")
    axes[0].axhspan(floor / 5, 1e-10, color="0.93", zorder=0)
    axes[0].text(-0.5, 2e-11, "zero, but for smoothing and rounding", fontsize=7.5, va="top")
    axes[0].set_ylim(floor / 5, 5)
    axes[0].set_title("error  ‖X−X̂‖²/(dn)", fontsize=9)
    axes[1].axhline(rank, color="0.3", linewidth=1, linestyle="--", zorder=0)
    axes[1].text(len(penalties) - 0.35, rank, f"r = {rank}", color="0.3", fontsize=8, va="center")
    axes[1].set_yticks(sorted({0, rank, *kappas}))
    axes[1].set_ylim(0, max(kappas) * 1.08)
    axes[1].set_title("active rows", fontsize=9)
    for axis in axes:
        axis.set_xlim(-0.6, len(penalties) - 0.4)
        axis.set_xticks(
            range(len(penalties)), penalties, rotation=35, ha="right", rotation_mode="anchor"
        )
        axis.grid(axis="x", visible=False)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(handles),
                  bbox_to_anchor=(0.5, -0.07))  # fmt: skip
    figure.tight_layout()
    return figure


def draw_power(rows: Sequence[Row]) -> plt.Figure:
    """Error and active rows against p: found, exact, and by the scaling argument."""
    exponents, rank = sorted(_distinct(rows, "p")), rows[0]["rank"]
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.0))
    floor = 1e-16

    def mean(field: str) -> list[float]:
        return [float(np.mean([row[field] for row in _of(rows, p=p)])) for p in exponents]

    above = [index for index, p in enumerate(exponents) if p > 0.5]
    for field, style, label in (
        ("exact_error", "-", "exact minimum"),
        ("scaling_error", "--", "scaling argument"),
    ):
        axes[0].plot(
            [exponents[i] for i in above], [max(mean(field)[i], floor) for i in above], style,
            color="0.35", linewidth=1.3, label=label,
        )  # fmt: skip
    for axis, field, label in zip(axes, ("error", "active"), ("best start", None), strict=True):
        axis.plot(
            [row["p"] for row in rows], [max(row[field], floor) for row in rows], "o",
            color=report.COLOURS[0], markersize=4, alpha=0.7, label=label,
        )  # fmt: skip
        axis.axvline(0.5, color=report.COLOURS[1], linewidth=1)
        axis.set_xlabel("p of h(u) = u^p")
    axes[0].set_yscale("log")
    axes[0].set_ylim(floor / 3, 3)
    axes[0].set_title("error  ‖X−X̂‖²/(dn)", fontsize=9)
    axes[0].legend(loc="lower right", fontsize=8)
    axes[0].text(0.49, 0.3, "p = ½", color=report.COLOURS[1], ha="right", fontsize=8)
    axes[1].set_ylim(0, rows[0]["kappa"] * 1.1)
    axes[1].axhline(rank, color="0.3", linewidth=1, linestyle="--", zorder=0)
    axes[1].text(1.0, rank + 0.12, f"r = {rank}", color="0.3", fontsize=8, ha="right")
    axes[1].set_title(f"active rows of κ = {rows[0]['kappa']}", fontsize=9)
    figure.tight_layout()
    return figure


def draw_digits(rows: Sequence[Row]) -> plt.Figure:
    """Every latent's mean square, largest first, under every penalty, for every data set."""
    kepts, penalties = _distinct(rows, "kept"), _distinct(rows, "penalty")
    figure, axes = plt.subplots(
        1, len(kepts), figsize=(4.2 * len(kepts), 3.1), sharey=True, squeeze=False
    )
    for axis, kept in zip(axes[0], kepts, strict=True):
        for colour, penalty in zip(report.COLOURS * 3, penalties, strict=False):
            seeds = _of(rows, kept=kept, penalty=penalty, homotopy=True)
            for index, row in enumerate(seeds):
                axis.plot(
                    range(1, row["kappa"] + 1), row["row_squares"], "o-", color=colour,
                    markersize=2.5, linewidth=1, alpha=0.8, label=None if index else penalty,
                )  # fmt: skip
        if kept < rows[0]["kappa"]:
            axis.axvline(kept + 0.5, color="0.3", linewidth=1, linestyle="--", zorder=0)
        axis.set_yscale("log")
        axis.set_xticks([1, *range(4, rows[0]["kappa"] + 1, 4)])
        axis.set_xlabel("latent, largest first")
        axis.set_title(f"digits, {_digits_name(kept)}", fontsize=9)
    axes[0, 0].set_ylabel("mean square  ‖z_k‖²/n")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="h(u)")
    figure.tight_layout()
    return figure


def write(config: Any, path: Path, rows: Sequence[Row]) -> None:
    """Writes rows, tables and figures into `path`, and prints the tables."""
    parts = {
        part: _of(rows, part=part) for part in ("linear", "counterexamples", "power", "digits")
    }
    for part, content in parts.items():
        report.write_rows(content, path, part)
    for part, draw in (("linear", draw_linear), ("power", draw_power), ("digits", draw_digits)):
        report.save_figure(lambda draw=draw, part=part: draw(parts[part]), path / f"{part}.png")
    how = protocol(config, rows)
    sections = []
    for title, table, key, figure in (
        ("Linear decoders", linear_table(parts["linear"]), "linear", "linear.png"),
        ("The homotopy", homotopy_table(parts["linear"]), "homotopy", ""),
        (
            "Counter-examples",
            counterexample_table(parts["counterexamples"]),
            "counterexamples",
            "",
        ),
        ("The threshold of u^p", power_table(parts["power"]), "power", "power.png"),
        *(
            (f"Deep: the digits, {_digits_name(kept)}", digits_table(parts["digits"], kept), "", "")
            for kept in _distinct(parts["digits"], "kept")
        ),
        ("Deep: how it was made", None, "digits", "digits.png"),
    ):
        text = [report.markdown_table(*table)] if table else []
        text += [how[key]] if key else []
        text += [f"![{title}]({figure})"] if figure else []
        sections.append("\n\n".join([f"## {title}", *text]))
        if table:
            print(f"\n{title}\n{report.markdown_table(*table)}")
    write_atomically(
        path / "table.md",
        f"# {config.name}: which h make eq. 6 balanced\n\n{sentence(rows)}\n\n"
        + "\n\n".join(sections)
        + f"\n\n```json\n{json.dumps(config.to_dict(), indent=1)}\n```\n",
    )
    print(f"\ntables {path / 'table.md'}")
    print("figures", *(path / f"{part}.png" for part in ("linear", "power", "digits")))
    print(f"\n{sentence(rows)}")
