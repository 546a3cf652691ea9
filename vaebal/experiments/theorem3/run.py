"""Theorem 3: eq. 6 under every penalty h, with linear decoders and with deep ones.

Four parts, each with its rows:
- linear: h x kappa x seeds on data of known rank, with and without the homotopy;
- counterexamples: solutions that a penalty prefers to the balanced one;
- power: the threshold p = 1/2 of u^p;
- digits: a deep autoencoder on scikit-learn's digits.
"""

from collections.abc import Callable
from typing import Any

from vaebal.errors import InputError
from vaebal.experiments import checks
from vaebal.experiments.parts import finished
from vaebal.experiments.report import Row
from vaebal.experiments.theorem3 import digits, linear, page
from vaebal.experiments.theorem3.digits import PIXELS
from vaebal.models.nets import ACTIVATIONS
from vaebal.theory.penalties import named
from vaebal.training.workdir import open_workdir


def check(config: Any) -> None:
    """Raises InputError for the first field that cannot be meant."""
    for part in ("linear", "digits"):
        _check_part(config, part)
    if not any(named(formula).differentiable for formula in config.linear.penalties):
        raise InputError("linear.penalties needs one that can be minimised beside the indicator.")
    checks.positive_integers(
        config,
        *("linear.starts", "linear.examples", "linear.dim", "linear.rank", "power.kappa"),
        *("digits.kappa", "digits.width", "digits.encoder_layers", "digits.decoder_layers"),
    )
    _check_ranks(config)
    for p in checks.distinct(config, "power.exponents"):
        if not 0 < p <= 1:
            raise InputError(f"power.exponents={config.power.exponents!r} must lie in (0, 1].")
    checks.positive_numbers(config, "counterexamples.variance", "digits.learning_rate")
    _check_digits(config)


def _check_part(config: Any, part: str) -> None:
    """What the linear part and the digits have in common."""
    _check_penalties(config, f"{part}.penalties")
    for seed in checks.distinct(config, f"{part}.seeds"):
        if not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise InputError(f"{part}.seeds={config[part].seeds!r} must be integers in [0, 2^31).")
    checks.positive_integers(config, f"{part}.steps")
    checks.positive_numbers(
        config, f"{part}.smoothing_start", f"{part}.smoothing_end", f"{part}.zero_error"
    )
    if config[part].smoothing_end > config[part].smoothing_start:
        raise InputError(
            f"{part}.smoothing_end={config[part].smoothing_end!r} must not exceed "
            f"{part}.smoothing_start={config[part].smoothing_start!r}: smoothing falls."
        )
    checks.fractions(config, f"{part}.active_share")


def _check_ranks(config: Any) -> None:
    """The linear part's data can have the rank, and the latents can hold it."""
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


def _check_digits(config: Any) -> None:
    for formula in config.digits.penalties:
        if not named(formula).differentiable:
            raise InputError(f"digits.penalties: {formula!r} is evaluated, it cannot be minimised.")
    for formula in config.digits.without_homotopy:
        if formula not in config.digits.penalties:
            raise InputError(f"digits.without_homotopy: {formula!r} is not in digits.penalties.")
    for kept in checks.distinct(config, "digits.ranks"):
        if not isinstance(kept, int) or not 1 <= kept <= PIXELS:
            raise InputError(
                f"digits.ranks={config.digits.ranks!r} must be integers from 1 to {PIXELS}."
            )
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


def run(config: Any, workdir: str) -> list[Row]:
    """Runs every part and reports; what `workdir` holds already is not done again."""
    check(config)
    path = open_workdir(workdir, config.to_dict())
    penalties = {formula: named(formula) for formula in config.linear.penalties}
    parts: list[tuple[str, Callable[[], list[Row]]]] = [
        (f"linear {formula}", lambda h=h: linear.linear_rows(config, h))
        for formula, h in penalties.items()
        if h.differentiable
    ]
    parts += [
        ("counterexamples", lambda: linear.counterexample_rows(config)),
        ("power", lambda: linear.power_rows(config)),
    ]
    parts += [
        (f"digits {formula}", lambda formula=formula: digits.digits_rows(config, named(formula)))
        for formula in config.digits.penalties
    ]
    print(f"{config.name}: {len(parts)} parts; workdir {path}", flush=True)
    rows: list[Row] = []
    for index, (name, make) in enumerate(parts, 1):
        rows += finished(path, f"[{index}/{len(parts)}] ", name, make)
    rows += [
        row
        for h in penalties.values()
        if not h.differentiable
        for row in linear.indicator_rows(config, h, rows)
    ]
    page.write(config, path, rows)
    return rows
