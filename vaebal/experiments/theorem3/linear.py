"""Theorem 3 with linear decoders: the penalties on data of known rank, against exact minima."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vaebal.experiments.report import Row, rows_with
from vaebal.streams import stream
from vaebal.theory import regularized_ae as rae
from vaebal.theory.penalties import Penalty, indicator, named, power
from vaebal.theory.regularized_ae import Statistics


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


def smoothing_of(settings: Any, homotopy: bool) -> jax.Array:
    """[T]; without the homotopy it is where the homotopy ends, from the first step."""
    start = settings.smoothing_start if homotopy else settings.smoothing_end
    return rae.homotopy(
        start, settings.smoothing_end, settings.steps, settings.get("smoothing_share", 1.0)
    )


def outcome_of(
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


def meant(penalty: Penalty) -> Penalty:
    """The count I[u>0] for an indicator: its tolerance is for rows that were found, not exact."""
    return penalty if penalty.differentiable else indicator()


def facts_of(penalty: Penalty) -> Row:
    """What every row says of its penalty."""
    h = meant(penalty)
    return {
        "penalty": penalty.name,
        "slope_at_zero": h.slope_at_zero if h.bounded else "inf",
        "norm_curvature": h.norm_curvature,
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
            homotopy: jax.device_get(solve(unused, x, starts, smoothing_of(settings, homotopy)))
            for homotopy in (True, False)
        }
        at_zero = float(penalty.value(jnp.zeros(())))
        x = np.asarray(x)
    mean_squares = np.square(x).mean((1, 2))
    for homotopy, (at, energies, svd_energies) in found.items():
        for index, (kappa, seed) in enumerate(cells):
            outcomes = [
                outcome_of(
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
                    **facts_of(penalty),
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
                    **facts_of(penalty),
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
            penalty = meant(named(formula))

            def energy(error: float, row_squares: jax.Array, h: Penalty = penalty) -> float:
                at_zero = _energy(h, 0.0, jnp.zeros_like(row_squares), dim)
                return _energy(h, error, row_squares, dim) - at_zero

            t = rae.best_shrinkage(penalty, balanced, mean_square)
            parts = rae.splitting_pays_from(penalty, variance)
            shown = parts or 2
            rows.append(
                {
                    "part": "counterexamples",
                    **facts_of(named(formula)),
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
        found = make_solver(power)(exponents, x, starts, smoothing_of(settings, True))
        at, energies, _ = jax.device_get(found)
        x = np.asarray(x)
    rows = []
    for index, (p, seed) in enumerate(cells):
        best = int(np.argmin(energies[index]))
        exact = rae.linear_global_minimum(power(p), x[index], kappa)
        outcome = outcome_of(
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
