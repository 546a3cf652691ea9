"""The report of the kappa sweep: Table 1 with the paper's column beside ours, and its figure."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from vaebal.data import ImageSet
from vaebal.experiments import report
from vaebal.experiments.report import Row
from vaebal.training.workdir import write_atomically

# Table 1 of the paper (MNIST): kappa -> (Rec. Err., NLL in nats, active dimensions).
PAPER = {
    50: (4.98, -315, 10),
    100: (3.42, -580, 15),
    200: (2.74, -718, 20),
    400: (2.57, -743, 22),
    784: (2.78, -806, 22),
}
SKIP_NAMES = {
    "residual+affine": "residual + affine skips",
    "residual": "residual skips only",
    "affine": "affine skip only",
    "none": "no skips",
}


def _cells(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by (skips, kappa), each a list over seeds, in the order they came."""
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["skips"], row["kappa"]), []).append(row)
    return cells


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and body; the paper's columns only where its data and kappa are ours."""
    beside_paper = rows[0]["data"] == "mnist"
    header = ["skips", "κ", "Rec. Err."]
    header += ["paper"] if beside_paper else []
    header += ["Rec. Err. (sampled z)", "NLL"]
    header += ["paper"] if beside_paper else []
    header += ["active > .01"]
    header += ["paper"] if beside_paper else []
    header += ["active > .1", "σ² < ½", "γ", "γ − E‖x−x̂‖²/d"]
    body = []
    for (skips, kappa), seeds in _cells(rows).items():

        def ours(name: str, digits: int, seeds=seeds) -> str:
            return report.with_spread([row[name] for row in seeds], digits)

        # The paper reports its network with skips; which of the two kinds is not said.
        theirs = PAPER.get(kappa) if skips.startswith("residual") else None
        paper = [[report.number(value, d)] if theirs else ["–"]
                 for value, d in zip(theirs or (0, 0, 0), (2, 0, 0), strict=True)]  # fmt: skip
        paper = paper if beside_paper else [[], [], []]
        gamma = float(np.mean([row["gamma"] for row in seeds]))
        residual = float(np.mean([row["gamma_residual"] for row in seeds]))
        body.append(
            [
                *(skips, str(kappa), ours("error_mean", 2), *paper[0]),
                *(ours("error_sampled", 2), ours("nll", 1), *paper[1]),
                *(ours("active_0.01", 1), *paper[2]),
                *(ours("active_0.1", 1), ours("informative", 1)),
                *(f"{gamma:.2g}", f"{residual:+.1e}".replace("-", "−")),
            ]
        )
    return header, body


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, in one sentence, from the rows alone."""
    cells = _cells(rows)
    largest = max(row["kappa"] for row in rows)
    parts = []
    for skips in dict.fromkeys(row["skips"] for row in rows):
        seeds = cells.get((skips, largest))
        if not seeds:
            continue  # all of them have stopped
        informative = np.mean([row["informative"] for row in seeds])
        error = np.mean([row["error_mean"] for row in seeds])
        parts.append(
            f"with {SKIP_NAMES[skips]} {informative:.0f} of {largest} latents stay informative "
            f"(σ² < ½) at error {error:.2f}"
        )
    return f"At κ = {largest}, " + "; ".join(parts) + "."


def protocol(config: Any, rows: Sequence[Row], images: ImageSet) -> str:
    """How the numbers were made, in full sentences, for the foot of the table."""
    seeds = sorted({row["seed"] for row in rows})
    spread = (
        f"mean ± standard deviation over the {len(seeds)} seeds {', '.join(map(str, seeds))}"
        if len(seeds) > 1
        else f"one seed ({seeds[0]}), so no spread"
    )
    gamma = {
        "fixed": f"γ is fixed at {config.model.gamma:g}",
        "closed_form": f"log γ starts at log {config.model.gamma:g} and moves towards the batch's "
        f"log E‖x−x̂‖²/d by at most {config.train.gamma_rate:g} a step",
        "adam": f"log γ starts at log {config.model.gamma:g} and follows Adam at the constant "
        f"rate {config.train.gamma_rate:g}",
    }[config.train.gamma_rule]
    errors = max(row["nll_se"] for row in rows), max(row["error_mean_se"] for row in rows)
    return (
        f"Data: {images.name}, {len(images.train)} training images, all {len(images.test)} test "
        f"images, pixels in [0, 1], d = {images.dim}. Numbers are on the test images: {spread}. "
        f"Training: {rows[0]['epochs']} epochs ({rows[0]['steps']} steps of batch size "
        f"{config.train.batch_size}), width {config.model.width}, {config.model.activation}, Adam "
        f"at {config.train.learning_rate:g} with cosine decay to "
        f"{config.train.final_learning_rate:g}, matrix products in {config.model.products}; "
        f"{gamma}. Rec. Err. is Σ_pixels (x−x̂)² at the "
        "posterior mean (sampled z: at one draw). NLL is in nats, importance-weighted with "
        f"S = {config.eval.nll_samples} samples per image. Active counts latents with "
        "Var_x(E[z|x]) above the threshold; σ² < ½ counts those whose mean posterior variance is "
        "below ½. γ − E‖x−x̂‖²/d is zero where γ is stationary (here on test images, where the "
        "error is larger than in training). Standard errors over test images, at most: NLL "
        f"{errors[0]:.2g}, Rec. Err. {errors[1]:.2g}."
    )


def draw_sweep(rows: Sequence[Row]) -> plt.Figure:
    """Error, NLL and active dimensions against kappa, a line per skip variant."""
    cells = _cells(rows)
    kappas = sorted({row["kappa"] for row in rows})
    panels = (
        ("error_mean", "reconstruction error  Σ(x−x̂)²", 0),
        ("nll", "NLL (nats)", 1),
        ("informative", "informative dimensions (σ² < ½)", None),
        ("active_0.01", "active dimensions (A > .01)", 2),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 2.9))
    for axis, (name, label, paper) in zip(axes, panels, strict=True):
        for colour, skips in zip(
            report.COLOURS, dict.fromkeys(r["skips"] for r in rows), strict=False
        ):
            own = [kappa for kappa in kappas if (skips, kappa) in cells]
            seeds = [[row[name] for row in cells[skips, kappa]] for kappa in own]
            means = [np.mean(values) for values in seeds]
            spreads = [report.mean_and_spread(values)[1] or 0.0 for values in seeds]
            axis.errorbar(
                own, means, spreads, color=colour, marker="o", markersize=4, capsize=2,
                label=SKIP_NAMES[skips],
            )  # fmt: skip
        if paper is not None and rows[0]["data"] == "mnist":
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


def draw_pictures(pictures: dict, images: ImageSet) -> plt.Figure:
    """Test images, reconstructions of every skip variant and its samples, at the largest kappa."""
    kappa = max(cell.kappa for cell in pictures)
    shown = {}
    for cell, content in pictures.items():
        if cell.kappa == kappa:
            shown.setdefault(cell.skips, content)  # the first seed
    rows = [("test images", next(iter(shown.values()))["images"])]
    rows += [(f"reconstructed,\n{SKIP_NAMES[s]}", p["reconstructions"]) for s, p in shown.items()]
    rows += [(f"samples,\n{SKIP_NAMES[s]}", p["samples"]) for s, p in shown.items()]
    figure = report.image_grid(rows, images.image_shape)
    figure.suptitle(f"κ = {kappa}; uncurated: the first test images, the first samples", y=0.94)
    return figure


def write(
    config: Any, path: Path, rows: Sequence[Row], stopped: str, pictures: dict, images: ImageSet
) -> None:
    """Writes table, rows and figures of finished members into `path` and prints the table.

    Args:
      stopped: a sentence on the others, or "".
    """
    header, body = table(rows)
    foot = protocol(config, rows, images)
    report.write_rows(rows, path, "rows")
    report.save_figure(lambda: draw_sweep(rows), path / "sweep.png")
    report.save_figure(lambda: draw_pictures(pictures, images), path / "pictures.png")
    below = f"{stopped}\n\n" if stopped else ""
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})"
    seconds = sum(row["train_seconds"] for row in rows)
    write_atomically(
        path / "table.md",
        f"# {config.name}: κ sweep on {images.name}\n\n"
        f"{report.markdown_table(header, body)}\n\n{below}{sentence(rows)}\n\n"
        f"{foot} Training took {seconds:.0f} s in all on {device}.\n\n"
        f"![error, NLL and active dimensions against κ](sweep.png)\n\n"
        f"![reconstructions and samples](pictures.png)\n\n"
        f"Versions: {', '.join(f'{k} {v}' for k, v in report.versions().items())}.\n\n"
        f"```json\n{json.dumps(config.to_dict(), indent=1)}\n```\n",
    )
    report.print_table(
        header,
        body,
        f"κ sweep on {images.name}",
        without=("Rec. Err. (sampled z)", "active > .1", "γ − E‖x−x̂‖²/d"),
    )
    print(f"{foot}\n")
    print(f"table {path / 'table.md'}\nfigures {path / 'sweep.png'} {path / 'pictures.png'}")
    print(f"\n{sentence(rows)}")
