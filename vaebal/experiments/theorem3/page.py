"""The report of Theorem 3's experiment: a table and a figure a part, protocols, one sentence."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from vaebal.data import load
from vaebal.experiments import report
from vaebal.experiments.report import (
    Figure,
    Row,
    Section,
    Table,
    column,
    distinct,
    rows_with,
    short,
)
from vaebal.experiments.theorem3.digits import PIXELS
from vaebal.theory.penalties import named

ERROR = "error  ‖X−X̂‖²/(dn)"


def _best(rows: Sequence[Row]) -> list[Row]:
    """The linear rows that count: with the homotopy, or chosen from all for the indicator."""
    return [row for row in rows if row["homotopy"] is not False]


def _slope(row: Row) -> str:
    """ "1", "1e6" or "∞"."""
    slope = row["slope_at_zero"]
    return "∞" if slope == "inf" else short(slope)


def _errors(values: Sequence[float], digits: int, zero: float = 0.0) -> str:
    """Mean and spread over seeds; a bound where all are at most `zero`: zero but for rounding."""
    if max(values) <= zero:
        return f"≤ {short(float(f'{max(values):.0e}'))}" if max(values) > 0 else "0"
    mean, spread = report.mean_and_spread(values)
    if mean >= 10.0 ** (1 - digits):
        return report.with_spread(values, digits)
    return short(mean) + (f" ± {short(spread)}" if spread is not None else "")


def _signed(values: Sequence[float]) -> str:
    """A mean difference with its sign; "0" where it is rounding."""
    mean = float(np.mean(values))
    return short(mean, sign="+") if abs(mean) > 1e-9 else "0"


def linear_table(rows: Sequence[Row]) -> Table:
    """Error and active rows of every penalty at every kappa, over seeds."""
    rows = _best(rows)
    kappas = distinct(rows, "kappa")
    header = ["h(u)", "h′(0)"]
    for kappa in kappas:
        header += [f"error, κ = {kappa}", "rows"]
    header += ["balanced"]
    body = []
    for penalty in distinct(rows, "penalty"):
        mine = rows_with(rows, penalty=penalty)
        line = [penalty, _slope(mine[0])]
        for kappa in kappas:
            seeds = rows_with(mine, kappa=kappa)
            zero = 1e-12 if all(column(seeds, "zero_error")) else 0.0
            line += [
                _errors(column(seeds, "error"), 3, zero),
                report.with_spread(column(seeds, "active"), 1),
            ]
        line += [f"{sum(column(mine, 'balanced'))} of {len(mine)}"]
        body.append(line)
    return header, body


def homotopy_table(rows: Sequence[Row]) -> Table:
    """With the homotopy and without, at the largest kappa: rows, energies, single starts."""
    rows = [row for row in rows if row["homotopy"] is not None]
    rows = rows_with(rows, kappa=max(distinct(rows, "kappa")))
    header = ["h(u)"]
    for name in ("homotopy", "from scratch"):
        header += [f"{name}: rows", "energy − SVD's", "balanced starts"]
    body = []
    for penalty in distinct(rows, "penalty"):
        line = [penalty]
        for homotopy in (True, False):
            seeds = rows_with(rows, penalty=penalty, homotopy=homotopy)
            line += [
                report.with_spread(column(seeds, "active"), 1),
                _signed(column(seeds, "energy_above_svd")),
                f"{sum(column(seeds, 'starts_balanced'))} of {sum(column(seeds, 'starts'))}",
            ]
        body.append(line)
    return header, body


def counterexample_table(rows: Sequence[Row]) -> Table:
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
                short(row["shrinkage"]),
                short(row["shrunk_error"]),
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


def power_table(rows: Sequence[Row]) -> Table:
    """Error and active rows by p."""
    header = ["p", "error", "exact error", "scaling argument", "rows"]
    body = []
    for p in sorted(distinct(rows, "p")):
        seeds = rows_with(rows, p=p)
        # What the search leaves of zero; the other two are zero exactly.
        rounding = {"error": 1e-12 if p <= 0.5 else 0.0, "exact_error": 0.0, "scaling_error": 0.0}
        line = [f"{p:g}", *(_errors(column(seeds, k), 3, zero) for k, zero in rounding.items())]
        body.append([*line, report.with_spread(column(seeds, "active"), 1)])
    return header, body


def digits_table(rows: Sequence[Row], kept: int) -> Table:
    """Deep autoencoders on one data set: error and active rows, with the homotopy or not."""
    header = ["h(u)", "homotopy", "error", "test error", "rows"]
    body = []
    for penalty in distinct(rows, "penalty"):
        for homotopy in (True, False):
            if seeds := rows_with(rows, kept=kept, penalty=penalty, homotopy=homotopy):
                body.append(
                    [
                        *(penalty, "yes" if homotopy else "no"),
                        *(_errors(column(seeds, name), 4) for name in ("error", "test_error")),
                        report.with_spread(column(seeds, "active"), 1),
                    ]
                )
    return header, body


def _digits_name(kept: int) -> str:
    return "as they are" if kept == PIXELS else f"rank {kept}"


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, in one sentence, from the rows alone."""
    linear = _best(rows_with(rows, part="linear"))
    kappa = max(row["kappa"] for row in linear)
    groups: dict[str, list[str]] = {"balanced": [], "redundant": [], "inexact": []}
    for penalty in distinct(linear, "penalty"):
        seeds = rows_with(linear, penalty=penalty, kappa=kappa)
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
    powers = rows_with(rows, part="power")
    exact = [
        p for p in distinct(powers, "p") if all(r["zero_error"] for r in rows_with(powers, p=p))
    ]
    tail = f"along u^p the error is zero up to p = {max(exact):g}" if exact else "no u^p reaches it"
    digits = rows_with(rows, part="digits", homotopy=True)
    kept = min(distinct(digits, "kept"))
    deep = []
    for penalty in distinct(digits, "penalty"):
        active = column(rows_with(digits, kept=kept, penalty=penalty), "active")
        deep.append(f"{np.mean(active):.2g} under {penalty}")
    return (
        f"With κ = {kappa} latents on data of rank {linear[0]['rank']}: {'; '.join(parts)}; "
        f"{tail}. A deep autoencoder with {digits[0]['kappa']} latents on the digits "
        f"({_digits_name(kept)}) keeps {', '.join(deep)}."
    )


def protocol(config: Any, rows: Sequence[Row]) -> dict[str, str]:
    """How the numbers of every table were made: protocol.md, filled in."""
    linear, digits = config.linear, config.digits
    indicator = "".join(
        f" {named(formula).name} is evaluated, not minimised: its line is the solution of least "
        "energy among those of all other penalties."
        for formula in linear.penalties
        if not named(formula).differentiable
    )
    kept = min(distinct(rows_with(rows, part="digits"), "kept"))
    return report.protocol(
        "theorem3",
        config,
        indicator=indicator,
        largest_kappa=max(linear.kappas),
        images=len(load("digits").train),
        digits_reduced=_digits_name(kept).capitalize(),
        linear_seeds=report.over_seeds(linear.seeds).capitalize(),
        digits_seeds=report.over_seeds(digits.seeds).capitalize(),
    )


def _draw_rank(axis: plt.Axes, rank: int, **place: Any) -> None:
    axis.axhline(rank, color="0.3", linewidth=1, linestyle="--", zorder=0)
    axis.text(s=f"r = {rank}", color="0.3", fontsize=8, **place)


def draw_linear(rows: Sequence[Row]) -> plt.Figure:
    """Error and active rows by penalty, a colour per kappa, every seed a point.

    The error is the homotopy's alone; the rows without it are hollow.
    """
    penalties, kappas = distinct(rows, "penalty"), distinct(rows, "kappa")
    rank, floor = rows[0]["rank"], 1e-15
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.4))
    jitter = np.linspace(-0.05, 0.05, len(distinct(rows, "seed")))
    for colour, kappa, offset in zip(
        report.COLOURS * 3, kappas, np.linspace(-0.25, 0.25, len(kappas)), strict=False
    ):
        for axis, field, homotopy in (
            (axes[0], "error", True), (axes[1], "active", False), (axes[1], "active", True),
        ):  # fmt: skip
            chosen = [row for row in rows if (row["homotopy"] is not False) == homotopy]
            places, values = [], []
            for place, penalty in enumerate(penalties):
                seeds = rows_with(chosen, penalty=penalty, kappa=kappa)
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
    axes[0].set_title(ERROR, fontsize=9)
    _draw_rank(axes[1], rank, x=len(penalties) - 0.35, y=rank, va="center")
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
    exponents, rank = sorted(distinct(rows, "p")), rows[0]["rank"]
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.0))
    floor = 1e-16

    above = [p for p in exponents if p > 0.5]
    for field, style, label in (
        ("exact_error", "-", "exact minimum"),
        ("scaling_error", "--", "scaling argument"),
    ):
        means = [max(np.mean(column(rows_with(rows, p=p), field)), floor) for p in above]
        axes[0].plot(above, means, style, color="0.35", linewidth=1.3, label=label)
    for axis, field, label in zip(axes, ("error", "active"), ("best start", None), strict=True):
        axis.plot(
            column(rows, "p"), np.maximum(column(rows, field), floor), "o",
            color=report.COLOURS[0], markersize=4, alpha=0.7, label=label,
        )  # fmt: skip
        axis.axvline(0.5, color=report.COLOURS[1], linewidth=1)
        axis.set_xlabel("p of h(u) = u^p")
    axes[0].set_yscale("log")
    axes[0].set_ylim(floor / 3, 3)
    axes[0].set_title(ERROR, fontsize=9)
    axes[0].legend(loc="lower right", fontsize=8)
    axes[0].text(0.49, 0.3, "p = ½", color=report.COLOURS[1], ha="right", fontsize=8)
    axes[1].set_ylim(0, rows[0]["kappa"] * 1.1)
    _draw_rank(axes[1], rank, x=1.0, y=rank + 0.12, ha="right")
    axes[1].set_title(f"active rows of κ = {rows[0]['kappa']}", fontsize=9)
    figure.tight_layout()
    return figure


def draw_digits(rows: Sequence[Row]) -> plt.Figure:
    """Every latent's mean square, largest first, under every penalty, for every data set."""
    kepts, penalties = distinct(rows, "kept"), distinct(rows, "penalty")
    figure, axes = plt.subplots(
        1, len(kepts), figsize=(4.2 * len(kepts), 3.1), sharey=True, squeeze=False
    )
    for axis, kept in zip(axes[0], kepts, strict=True):
        for colour, penalty in zip(report.COLOURS * 3, penalties, strict=False):
            seeds = rows_with(rows, kept=kept, penalty=penalty, homotopy=True)
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
    """Writes the page, its rows and figures into `path`, and prints the tables."""
    parts = {
        part: rows_with(rows, part=part)
        for part in ("linear", "counterexamples", "power", "digits")
    }
    linear, powers, digits = parts["linear"], parts["power"], parts["digits"]
    figures = {
        "linear": Figure("linear", "Linear decoders", lambda: draw_linear(linear)),
        "power": Figure("power", "The threshold of u^p", lambda: draw_power(powers)),
        "digits": Figure("digits", "Deep: every latent's mean square", lambda: draw_digits(digits)),
    }
    how = protocol(config, rows)

    def section(title: str, table: Table | None, key: str = "", *, drawn: bool = False) -> Section:
        text = [how[key]] if key else []
        return Section(title, table, text, [figures[key]] if drawn else [], grouped=False)

    report.write_page(
        config,
        path,
        title="which h make eq. 6 balanced",
        seen=sentence(rows),
        sections=[
            section("Linear decoders", linear_table(linear), "linear", drawn=True),
            section("The homotopy", homotopy_table(linear), "homotopy"),
            section(
                "Counter-examples",
                counterexample_table(parts["counterexamples"]),
                "counterexamples",
            ),
            section("The threshold of u^p", power_table(powers), "power", drawn=True),
            *(
                section(f"Deep: the digits, {_digits_name(kept)}", digits_table(digits, kept))
                for kept in distinct(digits, "kept")
            ),
            section("Deep: how it was made", None, "digits", drawn=True),
        ],
        rows=parts,
    )
