"""The page of Theorem 1's experiment: the stationary points, and the landscape in four figures."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from vaebal.experiments import report
from vaebal.experiments.report import Figure, Row, Section, Table
from vaebal.theory import affine
from vaebal.training.workdir import write_atomically


def describe(row: Row) -> str:
    """Which directions, 1 the data's largest, lie on the nonzero columns: "1, 2+3 on 2 columns"."""
    if not row["groups"]:
        return "none: total collapse"
    return ", ".join(
        "+".join(map(str, group["directions"]))
        + (f" on {group['columns']} columns" if group["columns"] > 1 else "")
        for group in row["groups"]
    )


def table(rows: list[Row]) -> Table:
    """The stationary points, lowest first."""
    header = ["directions", "copies", "L − L*", "index", "index, measured", "least curvature"]
    header += ["largest gradient entry"]
    body = [
        [
            describe(row),
            str(row["copies"]),
            report.number(max(row["above_minimum"], 0.0), 4),
            str(row["index"]),
            str(row["measured_index"]),
            report.number(row["least_curvature"], 3),
            report.short(row["largest_gradient"], 1),
        ]
        for row in sorted(rows, key=lambda row: row["energy"])
    ]
    return header, body


def sentence(rows: list[Row], falls: np.ndarray, ways: dict[str, Any]) -> str:
    """What was seen, in one sentence, from the numbers alone."""
    agree = sum(row["index"] == row["measured_index"] for row in rows)
    reached = (falls[:, -1] < 1e-8).mean()
    minima = [row["copies"] for row in rows if row["index"] == 0]
    listed = f"only {len(minima)} is a minimum" if minima else "the list ends before the minimum"
    copies = f"{minima[0]} copies" if minima else "copies"
    return (
        f"Of {len(rows)} stationary points (up to order and sign of columns) {agree} have the "
        f"predicted index, and {listed}; "
        f"{reached:.0%} of {len(falls)} descents from near total collapse end there, and from one "
        f"of its {copies} to the next one climbs {max(ways['lowest']):.4f} (theory "
        f"{ways['saddle_theory']:.4f}) above it."
    )


def draw(
    config: Any, cov: np.ndarray, rows: list[Row], falls: np.ndarray, ways: dict[str, Any]
) -> plt.Figure:
    """Energies by index; descents past the saddles; three ways between two minima; gamma's path."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.3))
    blue, orange, *_ = report.COLOURS

    for aligned, marker, label in ((True, "o", "on the axes"), (False, "x", "shared directions")):
        shown = [row for row in rows if row["axis_aligned"] == aligned]
        axes[0].plot(
            [row["measured_index"] for row in shown],
            [row["above_minimum"] for row in shown],
            marker, color=blue if aligned else orange, markersize=5, label=label,
        )  # fmt: skip
    axes[0].set(xlabel="negative curvatures (dense Hessian)", ylabel="L − L*")
    axes[0].set_title("every stationary point")
    axes[0].legend()

    for row in rows:
        if row["index"]:
            axes[1].axhline(row["above_minimum"], color="0.85", linewidth=0.7, zorder=0)
    for fall in falls[:60]:
        steps = np.arange(1, len(fall) + 1)
        axes[1].plot(steps, np.maximum(fall, 1e-10), color=blue, alpha=0.2, linewidth=0.8)
    axes[1].set(xscale="log", yscale="log", xlabel="gradient step", ylabel="L − L*")
    axes[1].set_ylim(1e-9, 100)
    axes[1].set_title(f"{len(falls)} descents; grey: the saddles")

    for name, colour in (("straight", "0.5"), ("rotation", orange), ("lowest", blue)):
        axes[2].plot(ways["t"], ways[name], color=colour, label=name)
    axes[2].axhline(ways["saddle_theory"], color=blue, linestyle=":", label="saddle (theory)")
    axes[2].set(xlabel="from one minimum to another", ylabel="L − L*")
    axes[2].set_title("a ridge between minima: two columns exchanged")
    axes[2].set_ylim(top=2.2 * max(ways["rotation"]))
    axes[2].legend(loc="upper right")

    largest = float(np.linalg.eigvalsh(cov)[-1])
    path = affine.affine_gamma_path(cov, config.model.kappa, np.geomspace(2 * largest, 1e-4, 400))
    axes[3].step(path.gamma, path.active, color=blue, where="mid")
    axes[3].set(xscale="log", xlabel="γ, falling →", ylabel="active columns")
    axes[3].yaxis.label.set_color(blue)
    axes[3].invert_xaxis()
    axes[3].set_title("the path of minima")
    error = axes[3].twinx()
    error.plot(path.gamma, path.squared_error_mean, color=orange)
    error.set(ylim=(0, None), ylabel="E‖x−x̂‖² at the posterior mean")
    error.yaxis.label.set_color(orange)
    error.grid(visible=False)
    for axis in axes:
        axis.title.set_fontsize(9)
    figure.tight_layout()
    return figure


def write(
    config: Any,
    path: Path,
    cov: np.ndarray,
    rows: list[Row],
    falls: np.ndarray,
    ways: dict[str, Any],
) -> None:
    """Writes the page, its rows and the ways between minima into `path`, and prints the table."""
    write_atomically(path / "paths.json", json.dumps(ways, indent=1) + "\n")
    landscape = Figure("landscape", "the landscape", lambda: draw(config, cov, rows, falls, ways))
    how = report.protocol("theorem1", config)["landscape"]
    report.write_page(
        config,
        path,
        title="the affine VAE's stationary points",
        seen=sentence(rows, falls, ways),
        sections=[Section("", table(rows), [how], [landscape], grouped=False)],
        rows={"rows": rows},
    )
