"""The report of Theorem 3's experiment: a table and a figure a part, protocols, one sentence."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from vaebal.data import load
from vaebal.experiments import report
from vaebal.experiments.report import Row, distinct, rows_with
from vaebal.theory.penalties import named
from vaebal.training.checkpoints import write_atomically

PIXELS = 64  # of a digit
ERROR = "error  ‖X−X̂‖²/(dn)"


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


def linear_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
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
            zero = 1e-12 if all(_field(seeds, "zero_error")) else 0.0
            line += [
                _errors(_field(seeds, "error"), 3, zero),
                report.with_spread(_field(seeds, "active"), 1),
            ]
        line += [f"{sum(_field(mine, 'balanced'))} of {len(mine)}"]
        body.append(line)
    return header, body


def homotopy_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
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
                report.with_spread(_field(seeds, "active"), 1),
                _signed(_field(seeds, "energy_above_svd")),
                f"{sum(_field(seeds, 'starts_balanced'))} of {sum(_field(seeds, 'starts'))}",
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
                _short(row["shrinkage"]),
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
    for p in sorted(distinct(rows, "p")):
        seeds = rows_with(rows, p=p)
        # What the search leaves of zero; the other two are zero exactly.
        rounding = {"error": 1e-12 if p <= 0.5 else 0.0, "exact_error": 0.0, "scaling_error": 0.0}
        line = [f"{p:g}", *(_errors(_field(seeds, k), 3, zero) for k, zero in rounding.items())]
        body.append([*line, report.with_spread(_field(seeds, "active"), 1)])
    return header, body


def digits_table(rows: Sequence[Row], kept: int) -> tuple[list[str], list[list[str]]]:
    """Deep autoencoders on one data set: error and active rows, with the homotopy or not."""
    header = ["h(u)", "homotopy", "error", "test error", "rows"]
    body = []
    for penalty in distinct(rows, "penalty"):
        for homotopy in (True, False):
            if seeds := rows_with(rows, kept=kept, penalty=penalty, homotopy=homotopy):
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
        active = _field(rows_with(digits, kept=kept, penalty=penalty), "active")
        deep.append(f"{np.mean(active):.2g} under {penalty}")
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
    kept = min(distinct(rows_with(rows, part="digits"), "kept"))
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
        means = [max(np.mean(_field(rows_with(rows, p=p), field)), floor) for p in above]
        axes[0].plot(above, means, style, color="0.35", linewidth=1.3, label=label)
    for axis, field, label in zip(axes, ("error", "active"), ("best start", None), strict=True):
        axis.plot(
            _field(rows, "p"), np.maximum(_field(rows, field), floor), "o",
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
    """Writes rows, tables and figures into `path`, and prints the tables."""
    parts = {
        part: rows_with(rows, part=part)
        for part in ("linear", "counterexamples", "power", "digits")
    }
    for part, content in parts.items():
        report.write_rows(content, path, part)
    for part, draw in (("linear", draw_linear), ("power", draw_power), ("digits", draw_digits)):
        report.save_figure(lambda draw=draw, part=part: draw(parts[part]), path / f"{part}.png")
    how = protocol(config, rows)
    sections = []
    counterexamples = counterexample_table(parts["counterexamples"])
    for title, table, key, figure in (
        ("Linear decoders", linear_table(parts["linear"]), "linear", "linear.png"),
        ("The homotopy", homotopy_table(parts["linear"]), "homotopy", ""),
        ("Counter-examples", counterexamples, "counterexamples", ""),
        ("The threshold of u^p", power_table(parts["power"]), "power", "power.png"),
        *(
            (f"Deep: the digits, {_digits_name(kept)}", digits_table(parts["digits"], kept), "", "")
            for kept in distinct(parts["digits"], "kept")
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
