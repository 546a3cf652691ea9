"""The report of the kappa sweep: Table 1 with the paper's column beside ours, and its figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from vaebal.data import ImageSet
from vaebal.experiments import report
from vaebal.experiments.report import Figure, Row, Section, Table, column, distinct, rows_with
from vaebal.experiments.table1 import PAPER, PAPER_DATA

SKIP_NAMES = {
    "residual+affine": "residual + affine skips",
    "residual": "residual skips only",
    "affine": "affine skip only",
    "none": "no skips",
}
# Columns: heading -> (field, decimals); after three of them stands the paper's.
COLUMNS = {
    "Rec. Err.": ("error_mean", 2),
    "Rec. Err. (sampled z)": ("error_sampled", 2),
    "NLL ≤": ("nll", 1),
    "active > .01": ("active_0.01", 1),
    "active > .1": ("active_0.1", 1),
    "σ² < ½": ("informative", 1),
}
PAPER_COLUMNS = {"Rec. Err.": (0, 2), "NLL ≤": (1, 0), "active > .01": (2, 0)}


def table(rows: Sequence[Row]) -> Table:
    """A line a skip variant and kappa, over seeds; the paper's columns only where its data is."""
    beside = PAPER_COLUMNS if rows[0]["data"] == PAPER_DATA else {}
    header = ["skips", "κ"]
    for name in COLUMNS:
        header += [name, "paper"] if name in beside else [name]
    body = []
    for skips, kappa in dict.fromkeys((row["skips"], row["kappa"]) for row in rows):
        seeds, line = rows_with(rows, skips=skips, kappa=kappa), [skips, str(kappa)]
        # The paper reports its network with skips; which of the two kinds is not said.
        theirs = PAPER.get(kappa) if skips.startswith("residual") else None
        for name, (field, digits) in COLUMNS.items():
            line.append(report.with_spread(column(seeds, field), digits))
            if name in beside:
                place, decimals = beside[name]
                line.append(report.number(theirs[place], decimals) if theirs else "–")
        gamma, off = (float(np.mean(column(seeds, name))) for name in ("gamma", "gamma_residual"))
        body.append([*line, report.short(gamma), report.short(off, sign="+")])
    return [*header, "γ", "γ − E‖x−x̂‖²/d"], body


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, in one sentence, from the rows alone."""
    largest = max(column(rows, "kappa"))
    wide = rows_with(rows, kappa=largest)  # of a skip variant none, where all have stopped
    parts = []
    for skips in distinct(wide, "skips"):
        seeds = rows_with(wide, skips=skips)
        informative, error = (np.mean(column(seeds, n)) for n in ("informative", "error_mean"))
        parts.append(
            f"with {SKIP_NAMES[skips]} {informative:.0f} of {largest} latents stay informative "
            f"(σ² < ½) at error {error:.2f}"
        )
    return f"At κ = {largest}, " + "; ".join(parts) + "."


def protocol(config: Any, rows: Sequence[Row], images: ImageSet) -> str:
    """How the numbers were made, for the foot of the table."""
    effective = [report.short(end(column(rows, "effective_sample_size"))) for end in (min, max)]
    how = report.protocol(
        "kappa_sweep",
        config,
        images=images,
        train_images=len(images.train),
        test_images=len(images.test),
        over_seeds=report.over_seeds(sorted(distinct(rows, "seed"))),
        steps=rows[0]["steps"],
        effective=" to ".join(dict.fromkeys(effective)),
        nll_se=max(column(rows, "nll_se")),
        error_se=max(column(rows, "error_mean_se")),
    )
    tighter = [report.laplace(rows)] if config.eval.laplace_images else []
    told = [how["data"], how[config.train.gamma_rule], how["columns"], *tighter]
    return " ".join([*told, report.training_took(rows)])


def draw_sweep(rows: Sequence[Row]) -> plt.Figure:
    """Error, NLL and active dimensions against kappa, a line per skip variant."""
    kappas = sorted(distinct(rows, "kappa"))
    panels = (
        ("error_mean", "reconstruction error  Σ(x−x̂)²", 0),
        ("nll", "NLL, at most (nats)", 1),
        ("informative", "informative dimensions (σ² < ½)", None),
        ("active_0.01", "active dimensions (A > .01)", 2),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 2.9))
    for axis, (name, label, paper) in zip(axes, panels, strict=True):
        for colour, skips in zip(report.COLOURS, distinct(rows, "skips"), strict=False):
            lines = rows_with(rows, skips=skips)
            own = sorted(distinct(lines, "kappa"))
            seeds = [column(rows_with(lines, kappa=kappa), name) for kappa in own]
            means, spreads = zip(*map(report.mean_and_spread, seeds), strict=True)
            axis.errorbar(
                own, means, [spread or 0.0 for spread in spreads], color=colour, marker="o",
                markersize=4, capsize=2, label=SKIP_NAMES[skips],
            )  # fmt: skip
        if paper is not None and rows[0]["data"] == PAPER_DATA:
            theirs = [(kappa, PAPER[kappa][paper]) for kappa in kappas if kappa in PAPER]
            axis.plot(*zip(*theirs, strict=True), "k--", marker="s", markersize=3, label="paper")
        if name in ("informative", "active_0.01"):
            axis.plot(kappas, kappas, color="0.7", linewidth=1, zorder=0, label="all κ")
            # Linear below the least kappa, so that zero can be seen, and logarithmic above.
            axis.set_yscale("symlog", linthresh=min(kappas), base=2)
            axis.set_yticks([0, *kappas], map(str, [0, *kappas]))
            axis.set_ylim(-0.15 * min(kappas), 1.2 * max(kappas))
        axis.set_xscale("log", base=2)
        axis.set_xticks(kappas, map(str, kappas))
        axis.minorticks_off()
        axis.set_xlabel("latent dimension κ")
        axis.set_title(label, fontsize=9)
    handles = {
        label: handle for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }  # fmt: skip
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncols=len(handles),
        bbox_to_anchor=(0.5, -0.1),
    )  # fmt: skip
    figure.tight_layout()
    return figure


def draw_pictures(pictures: Mapping[Any, dict], images: ImageSet) -> plt.Figure:
    """Test images, reconstructions of every skip variant and its samples, at the largest kappa."""
    kappa = max(cell.kappa for cell in pictures)
    shown: dict[str, dict] = {}
    for cell, content in pictures.items():
        if cell.kappa == kappa:
            shown.setdefault(SKIP_NAMES[cell.skips], content)  # the first seed
    rows = [("test images", next(iter(shown.values()))["images"])]
    for title, name in (("reconstructed", "reconstructions"), ("samples", "samples")):
        rows += [(f"{title},\n{skips}", each[name]) for skips, each in shown.items()]
    title = f"κ = {kappa}; uncurated: the first test images, the first samples"
    return report.image_grid(rows, images.image_shape, title)


def write(
    config: Any,
    path: Path,
    rows: Sequence[Row],
    stopped: str,
    pictures: Mapping[Any, dict],
    images: ImageSet,
) -> None:
    """Writes the page, rows and figures of finished members into `path`, and prints the table.

    Args:
      stopped: a sentence on the others, or "".
      pictures: by cell, "images", "reconstructions" and "samples", each [n, D].
    """
    figures = [
        Figure("sweep", "error, NLL and active dimensions against κ", lambda: draw_sweep(rows)),
        Figure("pictures", "reconstructions and samples", lambda: draw_pictures(pictures, images)),
    ]
    text = [stopped, protocol(config, rows, images)]
    hidden = ("Rec. Err. (sampled z)", "active > .1", "γ − E‖x−x̂‖²/d")
    report.write_page(
        config,
        path,
        title=f"κ sweep on {images.name}",
        seen=sentence(rows),
        sections=[Section("", table(rows), text, figures, without=hidden, said=True)],
        rows={"rows": rows},
    )
