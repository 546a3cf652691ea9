"""The report of Theorem 2's experiment: certificates, curvatures, the phase diagram of escape."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from vaebal.experiments import report
from vaebal.experiments.kappa_sweep.page import SKIP_NAMES
from vaebal.experiments.report import Figure, Row, Section, Table, distinct, rows_with, short
from vaebal.measures.evaluation import clustered_interval

PHASES = {
    "held": "γ held: all directions above γ awake",
    "learned": "γ then learned: all directions awake",
}
WEIGHTS = {
    "decoder/first/kernel": "decoder",
    "affine/kernel": "W_x",
    "encoder/mean/kernel": "mean head",
    "encoder/log_var/kernel": "log σ² head",
}


def recovered(rows: Sequence[Row], phase: str) -> tuple[float, float, float]:
    """Fraction of runs that recovered, and its 95% interval over seeds.

    The runs of one seed share data and initialisation: seeds, not runs, are independent.
    """
    seeds = [rows_with(rows, seed=seed) for seed in distinct(rows, "seed")]
    hits = [sum(row[f"{phase}_recovered"] for row in runs) for runs in seeds]
    if len(seeds) == 1:  # nothing is known of the others
        return hits[0] / len(rows), 0.0, 1.0
    return clustered_interval(np.array(hits), len(seeds[0]))


def _share(value: float) -> str:
    """ ".72"; "1" and "0" bare."""
    return f"{value:.2f}".removeprefix("0") if 0.005 <= value < 0.995 else f"{value:.0f}"


def _with_interval(rows: Sequence[Row], phase: str) -> str:
    """ ".90 [.60, .98]"."""
    fraction, low, high = recovered(rows, phase)
    return f"{_share(fraction)} [{_share(low)}, {_share(high)}]"


# --------------------------------------------------------------------- tables


def certificate_table(rows: Sequence[Row]) -> Table:
    """Largest gradient entries of the collapsed latent's weights."""
    header = ["activation", "depth", "width", "head biases"]
    header += [f"±ε: {name}" for name in WEIGHTS.values()]
    header += [f"one ε: {name}" for name in WEIGHTS.values()]
    body = [
        [row["activation"], str(row["depth"]), str(row["width"]), row["biases"]]
        + [short(row[f"{kind} {weight}"]) for kind in ("antithetic", "one draw")
           for weight in WEIGHTS]
        for row in rows
    ]  # fmt: skip
    return header, body


def curvature_table(rows: Sequence[Row]) -> Table:
    """The least eigenvalue at total collapse: formula and Hessian."""
    header = ["skips", "γ", "explained / γ", "least curvature, predicted", "measured", "difference"]
    body = [
        [
            *(row["skips"], f"{row['gamma']:g}", f"{row['explained_over_gamma']:.4f}"),
            *(f"{row[name]:.8g}".replace("-", "−") if abs(row[name]) > 1e-12 else "0"
              for name in ("predicted", "measured")),
            short(abs(row["predicted"] - row["measured"]), 1),
        ]
        for row in rows
    ]  # fmt: skip
    return header, body


def phase_table(rows: Sequence[Row], phase: str) -> Table:
    """Fraction of runs that recovered, with its interval, by net and the gamma of the start."""
    gammas = distinct(rows, "gamma_start")
    header = ["skips", "blocks", "κ", *(f"γ = {gamma:g}" for gamma in gammas)]
    body = [
        [
            *(skips, str(blocks), str(kappa)),
            *(
                _with_interval(
                    rows_with(rows, skips=skips, blocks=blocks, kappa=kappa, gamma_start=gamma),
                    phase,
                )
                for gamma in gammas
            ),
        ]
        for skips in distinct(rows, "skips")
        for blocks in distinct(rows, "blocks")
        for kappa in distinct(rows, "kappa")
    ]
    return header, body


def median_steps(rows: Sequence[Row]) -> float:
    """The median number of steps to escape; infinite where half of the runs did not."""
    return float(np.median([row["escape_step"] if row["escape_step"] > 0 else math.inf
                            for row in rows]))  # fmt: skip


def descent_table(rows: Sequence[Row], steps: int) -> Table:
    """Steps to escape under gradient descent, predicted and measured."""
    header = ["skips", "γ", "least curvature", "predicted steps", "measured steps", "escaped"]
    body = []
    for skips in distinct(rows, "skips"):
        for gamma in distinct(rows, "gamma"):
            runs = rows_with(rows, skips=skips, gamma=gamma)
            curvature = float(np.median([row["curvature"] for row in runs]))
            predicted = float(np.median([row["predicted_steps"] or math.inf for row in runs]))
            measured = median_steps(runs)
            escaped = sum(row["escape_step"] > 0 for row in runs)
            body.append(
                [
                    *(skips, f"{gamma:g}"),
                    short(curvature) if abs(curvature) > 1e-12 else "0",
                    f"{predicted:,.0f}" if predicted < 1e6 else "over 10^6",
                    f"{measured:,.0f}" if measured < math.inf else f"over {steps:,}",
                    f"{escaped} of {len(runs)}",
                ]
            )
    return header, body


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, in one sentence, from the rows alone."""
    certificates = rows_with(rows, part="certificates")
    stationary = [row for row in certificates if row["biases"] != "live"]
    worst = max(row[f"antithetic {weight}"] for row in stationary for weight in WEIGHTS)
    curvature = rows_with(rows, part="curvature")
    gap = max(abs(row["predicted"] - row["measured"]) for row in curvature)
    training, descent = rows_with(rows, part="training"), rows_with(rows, part="descent")
    above = [row for row in training if row["above_gamma"] == 0]
    below = [row for row in training if row["above_gamma"] > 0]
    blocks = max(distinct(training, "blocks"))
    said = [
        f"{_with_interval(rows_with(below, skips=skips, blocks=blocks), 'held')} of the runs with "
        f"{SKIP_NAMES[skips]}"
        for skips in distinct(training, "skips")
    ]
    gamma = min(row["gamma"] for row in descent)
    steps = []
    for skips in distinct(descent, "skips"):
        median = median_steps(rows_with(descent, skips=skips, gamma=gamma))
        steps.append(f"{median:.0f}" if median < math.inf else "more than were run")
    escape = (
        f"with γ held above every variance {sum(row['held_awake'] > 0 for row in above)} of "
        f"{len(above)} runs leave it; "
        if above
        else ""
    )
    return (
        "Latents collapsed as the theorem says have gradients of "
        f"{'at most ' if worst else 'exactly '}{short(worst, 1)} over ±ε, and the predicted "
        f"curvature of the way out is the Hessian's to {short(gap, 1)}; from "
        f"near total collapse {escape}with γ held below some, all directions above γ wake up in "
        f"{', '.join(said)} (decoders of {blocks} blocks; 95% intervals over seeds), and gradient "
        f"descent at γ = {gamma:g} takes a median of {', '.join(steps)} steps to escape, in the "
        "same order."
    )


# -------------------------------------------------------------------- figures


def draw_phase(rows: Sequence[Row], variances: Sequence[float]) -> plt.Figure:
    """Fraction of runs that recovered against the gamma of the start; gamma falls to the right."""
    gammas = distinct(rows, "gamma_start")
    cells = [(b, k) for b in distinct(rows, "blocks") for k in distinct(rows, "kappa")]
    figure, axes = plt.subplots(
        len(PHASES), len(cells), figsize=(0.8 + 2.9 * len(cells), 5.6), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    left, right = max(*gammas, *variances) * 1.35, min(*gammas, *variances) / 1.35
    skips_seen = distinct(rows, "skips")
    for (phase, title), line in zip(PHASES.items(), axes, strict=True):
        for axis, (blocks, kappa) in zip(line, cells, strict=True):
            axis.axvspan(left, max(variances), color="0.93", zorder=0)
            edges = [left, *variances, right]
            for count, (low, high) in enumerate(itertools.pairwise(edges)):
                if count:
                    axis.axvline(low, color="0.45", linewidth=0.9, linestyle="--", zorder=1)
                if phase == "held":
                    middle = math.sqrt(low * high)
                    axis.text(middle, 1.07, str(count), ha="center", fontsize=8, color="0.35")
            for place, skips in enumerate(skips_seen):
                chosen = rows_with(rows, skips=skips, blocks=blocks, kappa=kappa)
                found = np.array(
                    [recovered(rows_with(chosen, gamma_start=g), phase) for g in gammas]
                )
                bars = np.abs(found[:, 1:] - found[:, :1]).T
                # Side by side, so that no interval hides another.
                offset = 1.045 ** ((len(skips_seen) - 1) / 2 - place)
                axis.errorbar(
                    np.array(gammas) * offset, found[:, 0], bars, color=report.COLOURS[place],
                    marker="os^D"[place], markersize=4, linewidth=1.2, elinewidth=0.9,
                    capsize=1.5, label=SKIP_NAMES[skips],
                )  # fmt: skip
            if phase == "held":
                axis.set_title(f"{blocks} decoder block{'s'[: blocks > 1]}, κ = {kappa}\n",
                               fontsize=9.5)  # fmt: skip
            else:
                axis.set_xlabel("γ at the start, falling →")
        line[0].set_ylabel(f"fraction of runs\n{title}", fontsize=8.5)
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xlim(left, right)
    axes[0, 0].set_ylim(-0.04, 1.16)
    axes[0, 0].set_yticks([0, 0.5, 1])
    ticks = sorted(variances)
    axes[0, 0].set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes[0, 0].minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels),
                  bbox_to_anchor=(0.5, -0.03))  # fmt: skip
    figure.text(
        0.5, -0.055, "Dashed: the data's variances; numbers on top: how many lie above γ. Grey: γ "
        "above all, where nothing can wake up while γ is held. Bars: Wilson's 95% intervals.",
        ha="center", fontsize=8.5, color="0.3",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.01, 1, 1))
    return figure


def draw_descent(rows: Sequence[Row], steps: int) -> plt.Figure:
    """Steps to escape under gradient descent: measured against the linear theory's."""
    figure, axis = plt.subplots(figsize=(4.6, 3.6))
    most = 30.0 * steps
    for place, skips in enumerate(distinct(rows, "skips")):
        runs = [row for row in rows_with(rows, skips=skips) if row["predicted_steps"]]
        for escaped in (True, False):
            shown = [row for row in runs if (row["escape_step"] > 0) == escaped]
            axis.plot(
                [min(row["predicted_steps"], most) for row in shown],
                [row["escape_step"] if escaped else steps for row in shown],
                "os^D"[place], color=report.COLOURS[place], markersize=4, linestyle="none",
                markerfacecolor=report.COLOURS[place] if escaped else "none", alpha=0.8,
                label=SKIP_NAMES[skips] if escaped else None,
            )  # fmt: skip
    line = [10, steps]
    axis.set(xscale="log", yscale="log", ylabel="steps to escape", ylim=(0.7 * line[0], 2 * steps))
    axis.plot(line, line, color="0.4", linewidth=1, zorder=0)
    axis.text(
        line[0], 1.3 * line[0], "measured = predicted", fontsize=8, color="0.4", rotation=45,
        rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip
    axis.axhline(steps, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    axis.text(1.2 * most, 1.2 * steps, "hollow: still there at the end", fontsize=8, color="0.4",
              ha="right", va="bottom")  # fmt: skip
    axis.set_xlabel("log(1/δ) / growth a step, from the curvature at collapse")
    axis.legend(loc="lower right")
    figure.tight_layout()
    return figure


def write(config: Any, path: Path, rows: Sequence[Row]) -> None:
    """Writes the page, its rows and figures into `path`, and prints the tables."""
    parts = {part: rows_with(rows, part=part) for part in distinct(rows, "part")}
    training, descent, variances = parts["training"], parts["descent"], config.data.variances
    phase = Figure("phase", "Escape, γ held", lambda: draw_phase(training, variances))
    steps = Figure(
        "descent", "Steps to escape", lambda: draw_descent(descent, config.descent.steps)
    )
    how = report.protocol(
        "theorem2",
        config,
        blocks=max(config.model.blocks),
        rank=len(variances),
        seeds=len(config.train.seeds),
        mean_variance=sum(variances) / config.data.dim,
    )
    report.write_page(
        config,
        path,
        title="total collapse, and the ways out",
        seen=sentence(rows),
        sections=[
            Section("Escape, γ held", phase_table(training, "held"), [how["held"]], [phase]),
            Section("Escape, γ then learned", phase_table(training, "learned"), [how["learned"]]),
            Section(
                "Steps to escape",
                *(descent_table(descent, config.descent.steps), [how["descent"]], [steps]),
            ),
            Section(
                "Curvature", curvature_table(parts["curvature"]), [how["curvature"]], grouped=False
            ),
            Section(
                "Certificates",
                *(certificate_table(parts["certificates"]), [how["certificates"]]),
                shown=False,
            ),
        ],
        rows=parts,
    )
