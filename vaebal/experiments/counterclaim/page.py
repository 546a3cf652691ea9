"""The counter-claims' page: how many latents each arm keeps, beside r."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from vaebal.experiments import report
from vaebal.experiments.report import (
    COLOURS,
    Figure,
    Row,
    Section,
    Table,
    column,
    distinct,
    rows_with,
    scaled,
)


def expected(row: Row) -> tuple[int, int]:
    """Counts that are right: r, and of a sphere in r coordinates r - 1 (with a cut) or r."""
    return (row["rank"] - (row["kind"] == "sphere"), row["rank"])


def right(rows: Sequence[Row]) -> int:
    """In how many runs the count is right by both criteria, means that vary and sigma^2 < 1/2."""
    return sum(
        row["active"] in expected(row) and row["informative"] in expected(row) for row in rows
    )


def superset(rows: Sequence[Row]) -> int:
    """In how many more latents than r are in use, by either criterion."""
    return sum(max(row["active"], row["informative"]) > row["rank"] for row in rows)


def table(rows: Sequence[Row]) -> Table:
    """A line a setting and arm, over data seeds and starts of gamma."""
    header = ["r, zeros, κ", "arm", "active, each run", "σ² < ½, each run", "‖x−x̂‖²", "γ"]
    body = []
    for setting in dict.fromkeys((r["rank"], r["padding"], r["kappa"]) for r in rows):
        names = ("rank", "padding", "kappa")
        own = rows_with(rows, **dict(zip(names, setting, strict=True)))
        for arm in distinct(own, "arm"):
            runs = rows_with(own, arm=arm)
            counts = [
                ", ".join(f"{row[name]:.0f}" for row in runs) for name in ("active", "informative")
            ]
            body.append(
                [
                    *(", ".join(map(str, setting)), arm, *counts),
                    *(scaled(column(runs, "error")), scaled(column(runs, "gamma"))),
                ]
            )
    return header, body


def starts_table(rows: Sequence[Row]) -> Table:
    """Counts by where log gamma starts, over settings and seeds."""
    starts = sorted({row["start"] for row in rows})
    body = []
    for arm in distinct(rows, "arm"):
        line = [arm]
        for start in starts:
            runs = rows_with(rows, arm=arm, start=start)
            off = np.mean([row["active"] - row["rank"] for row in runs])
            line.append(f"{right(runs)} of {len(runs)} ({off:+.1f})".replace("-", "−"))
        body.append(line)
    return ["arm", *(f"log γ₀ = {start:g}".replace("-", "−") for start in starts)], body


def sentence(rows: Sequence[Row]) -> str:
    """What was seen."""
    said = []
    for arm in distinct(rows, "arm"):
        runs = rows_with(rows, arm=arm)
        low, high = stats.binomtest(right(runs), len(runs)).proportion_ci(method="wilson")
        said.append(
            f"{arm}: right in {right(runs)} of {len(runs)} [{low:.2f}, {high:.2f}], more latents "
            f"than r in {superset(runs)}"
        )
    return "; ".join(said) + "."


def draw(rows: Sequence[Row]) -> plt.Figure:
    """Active latents against r, an arm a colour."""
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    arms = distinct(rows, "arm")
    ranks = sorted(set(column(rows, "rank")))
    for index, arm in enumerate(arms):
        runs = rows_with(rows, arm=arm)
        shift = 0.22 * (index - (len(arms) - 1) / 2)
        axis.plot(
            [row["rank"] + shift for row in runs], column(runs, "active"), "o",
            color=COLOURS[index % len(COLOURS)], alpha=0.5, markersize=4, label=arm,
        )  # fmt: skip
    for rank in ranks:
        axis.plot([rank - 0.6, rank + 0.6], [rank, rank], color="0.4", linewidth=1)
    axis.set(xticks=ranks, xlabel="r", ylabel="active latents")
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def write(config: Any, path: Path, rows: Sequence[Row], stopped: str) -> None:
    """Writes the page, rows and figure into `path`, and prints the tables.

    Args:
      rows: one a finished run.
      stopped: a sentence on the others, or "".
    """
    how = report.protocol("counterclaim", config)
    text = [stopped, how[config.data.kind], how["arms"], report.training_took(rows)]
    figure = Figure("latents", "active latents against r", lambda: draw(rows))
    sections = [Section("", table(rows), text, [figure])]
    if len(config.data.starts) > 1:
        first = Section("By where γ starts", starts_table(rows), [how["starts"]], grouped=False)
        sections.insert(0, first)
    report.write_page(
        config, path, title=f"{config.data.kind} sets", seen=sentence(rows), sections=sections,
        rows={"rows": rows},
    )  # fmt: skip
