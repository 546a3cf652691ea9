"""The page of latent diffusion in miniature: what was seen, how, tables and figures."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from vaebal.data import ImageSet
from vaebal.experiments import report
from vaebal.experiments.latent_diffusion.stages import CLASSIFIER, OPENING, First, Prior
from vaebal.experiments.report import Figure, Row, Section, Table, column, rows_with, scaled

Rows = Mapping[First | Prior, Row]
Pictures = Mapping[First | Prior, dict[str, np.ndarray]]


def firsts(rows: Rows) -> list[Row]:
    """The autoencoders' rows."""
    aside = ("classifier", OPENING)
    return [r for cell, r in rows.items() if isinstance(cell, First) and cell.arm not in aside]


def prior_rows(rows: Rows) -> list[Row]:
    """The priors' rows."""
    return [row for cell, row in rows.items() if isinstance(cell, Prior)]


def pictured(config: Any, rows: Rows) -> list[First | Prior]:
    """The cells whose pictures are shown: of the first seed, and the first of prior.stages."""
    seed, stage, end = config.train.seeds[0], config.prior.stages[0], max(config.prior.epochs)
    wanted = [First(arm, seed) for arm in config.train.arms]
    wanted += [Prior(arm, seed, stage, end) for arm in config.train.arms]
    return [cell for cell in wanted if cell in rows]


def arms_of(config: Any, rows: Sequence[Row]) -> list[str]:
    """The arms that have rows, in the config's order."""
    return [arm for arm in config.train.arms if rows_with(rows, arm=arm)]


def stages_of(config: Any, rows: Sequence[Row]) -> list[str]:
    """The second stages that have rows, in the config's order."""
    return [stage for stage in config.prior.stages if rows_with(rows, stage=stage)]


def first_table(config: Any, rows: Sequence[Row]) -> Table:
    """One line an arm: what its latent space is like, and what it costs."""
    header = ["arm", "γ", "error/dγ", "latents", "effective rank", "scaling factor"]
    header += ["Rec. Err.", "train", "sampled z", "FD rec.", "FD sampled z", "FD N(0, I)"]
    keys = ("latents", "effective_rank", "scaling_factor", "error", "error_train", "error_sampled",
            "fd_rec", "fd_rec_sampled", "fd_normal")  # fmt: skip
    body = []
    for arm in arms_of(config, rows):
        seeds = rows_with(rows, arm=arm)
        off = "" if arm == "none" else scaled(column(seeds, "over_gamma"))
        line = [arm, scaled(column(seeds, "gamma")), off]
        for key in keys:
            known = [row[key] for row in seeds if row.get(key) is not None]
            line.append(scaled(known) if known else "")
        body.append(line)
    return header, body


def prior_table(config: Any, rows: Sequence[Row]) -> Table:
    """One line a second stage and arm: the distance of samples after so many steps."""
    ends = sorted({row["after"] for row in rows})
    steps = [str(rows_with(rows, after=after)[0]["steps"]) for after in ends]
    header, body = ["second stage", "parameters", "arm", *steps, "loss", "seconds"], []
    for stage in stages_of(config, rows):
        for arm in arms_of(config, rows):
            some = rows_with(rows, arm=arm, stage=stage)
            by_end = [column(rows_with(some, after=after), "fd") for after in ends]
            last = rows_with(some, after=ends[-1])
            losses = [row["loss"] for row in last if "loss" in row]
            told = [scaled(v) if v else "" for v in (*by_end, losses)]
            # Each end is a cell of its own that went on from the one before.
            spent = [
                sum(column(rows_with(some, seed=row["seed"]), "train_seconds")) for row in last
            ]
            told.append(f"{np.mean(spent):.0f}" if last else "")
            size = f"{some[0]['parameters']:,}" if some else ""
            body.append([stage, size, arm, *told])
    return header, body


def measures_table(config: Any, rows: Sequence[Row], autoencoders: Sequence[Row]) -> Table:
    """One line an arm: the first second stage's other measures at the end."""
    keys = ("ndb", "precision", "recall", "density", "coverage", "copying_nearer", "copying_copied")
    header = [
        "arm",
        "FD",
        "FD, N → ∞",
        "FD / rec.",
        f"NDB/{config.eval.bins}",
        *keys[1:5],
        "nearer than held-out",
        "copied",
    ]
    body = []
    for arm in arms_of(config, rows):
        seeds = [row for row in rows_with(rows, arm=arm) if "precision" in row]
        if seeds:
            line = [arm, scaled(column(seeds, "fd")), scaled(column(seeds, "fd_extrapolated"))]
            floors = [rows_with(autoencoders, arm=arm, seed=r["seed"])[0]["fd_rec"] for r in seeds]
            ratios = [row["fd"] / floor for row, floor in zip(seeds, floors, strict=True)]
            line.append(report.with_spread(ratios, 2))
            body.append([*line, *(report.with_spread(column(seeds, key), 3) for key in keys)])
    return header, body


def overtaken(rows: Sequence[Row], arm: str, other: str, stage: str) -> list[float | None]:
    """A seed each: after which share of its steps `arm` is as near as `other` ever comes.

    `other`'s steps to its best; None where `arm` never is.
    """
    shares: list[float | None] = []
    for seed in sorted(set(column(rows, "seed"))):
        ours = rows_with(rows, arm=arm, seed=seed, stage=stage)
        theirs = rows_with(rows, arm=other, seed=seed, stage=stage)
        if not ours or not theirs:
            continue
        best = min(theirs, key=lambda row: row["fd"])
        reached = [row["steps"] for row in ours if row["fd"] <= best["fd"]]
        shares.append(min(reached) / best["steps"] if reached else None)
    return shares


def sentence(config: Any, rows: Rows) -> str:
    """What was seen, from the rows alone."""
    autoencoders, priors = firsts(rows), prior_rows(rows)
    if not priors:
        return "No prior was trained to its end."
    stage = stages_of(config, priors)[0]
    of_first = rows_with(priors, stage=stage)
    end = rows_with(of_first, after=max(column(of_first, "after")))
    said = []
    for arm in arms_of(config, end):
        recs = column(rows_with(autoencoders, arm=arm), "fd_rec")
        fds = scaled(column(rows_with(end, arm=arm), "fd"))
        said.append(f"{arm} {fds} (reconstructions {scaled(recs)})")
    steps = end[0]["steps"]
    text = (
        f"FD (classifier) of samples of {stage!r} after {steps} steps: {'; '.join(said)}; "
        f"held-out images {scaled(column(autoencoders, 'fd_held_out')[:1])}."
    )
    crowded = next((arm for arm in config.train.arms if arm.startswith("kl")), "")
    for arm in arms_of(config, priors):
        if not crowded or arm == crowded:
            continue
        shares = overtaken(priors, arm, crowded, stage)
        reached = [f"{share:.2g}" for share in shares if share is not None]
        text += (
            f" The prior over {arm!r} comes as near as {crowded!r}'s best in {len(reached)} of "
            f"{len(shares)} seeds"
            + (f", in {', '.join(reached)} of its steps." if reached else ".")
        )
    return text


def draw_steps(config: Any, rows: Rows) -> plt.Figure:
    """Distance over the prior's steps, a panel a second stage; dashed: reconstructions."""
    autoencoders, priors = firsts(rows), prior_rows(rows)
    stages = stages_of(config, priors)
    figure, axes = plt.subplots(
        1, len(stages), figsize=(2.8 * len(stages) + 2.4, 3.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, stage in zip(axes[0], stages, strict=True):
        for colour, arm in zip(report.COLOURS, arms_of(config, priors), strict=False):
            some = rows_with(priors, arm=arm, stage=stage)
            for index, seed in enumerate(sorted(set(column(some, "seed")))):
                line = rows_with(some, seed=seed)
                axis.plot(column(line, "steps"), column(line, "fd"), ".-", color=colour,
                          linewidth=1, label=arm if index == 0 else None)  # fmt: skip
            rec = np.mean(column(rows_with(autoencoders, arm=arm), "fd_rec"))
            axis.axhline(rec, color=colour, linestyle="--", linewidth=0.8)
        axis.axhline(autoencoders[0]["fd_held_out"], color="k", linestyle=":", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=stage)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("FD (classifier) of samples")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    figure.supxlabel(
        "steps of the prior (dashed: reconstructions; dotted: held-out images)", fontsize=8
    )
    return figure


def draw_samples(config: Any, pictures: Pictures, images: ImageSet) -> plt.Figure:
    """Test images, and for every arm reconstructions, N(0, I) decoded, and the prior's samples.

    With `eval.samples_only` nothing of an image of the data.
    """
    drawn: list[tuple[str, np.ndarray]] = []
    made = [("normal", "N(0, I) decoded"), ("samples", "prior's")]
    made = made if config.eval.samples_only else [("rec", "reconstructed"), *made]
    for arm in config.train.arms:
        for cell, content in pictures.items():
            if cell.arm != arm:
                continue
            if not (drawn or config.eval.samples_only) and "images" in content:
                drawn.append(("test images", content["images"] / 255))
            for key, name in made:
                drawn += [(f"{name}, {arm}", content[key] / 255)] if key in content else []
    return report.image_grid(drawn, images.image_shape, "uncurated: the first of each")


def write(
    config: Any,
    path: Path,
    rows: Rows,
    stopped: str,
    pictures: Pictures,
    images: ImageSet,
    trained: str,
) -> None:
    """Writes the page, rows and figures into `path`; prints the tables and what was seen.

    Args:
      rows: of the finished cells.
      stopped: a sentence on the others, or "".
      pictures: of the cells of `pictured`.
      images: for their name, number and shape.
      trained: what the features' network was trained on, see `classifier.TRAINED`.
    """
    autoencoders, priors = firsts(rows), prior_rows(rows)
    how = report.protocol(
        "latent_diffusion", config, images=images, train_images=len(images.train),
        test_images=len(images.test), shape=" × ".join(map(str, images.image_shape)),
        over_seeds=report.over_seeds(config.train.seeds), wrong=rows[CLASSIFIER]["wrong"],
        trained=trained, samples=min(config.eval.samples, len(images.test)),
        ends=sorted(set(column(priors, "steps"))),
        ndb_held_out=next((f"{row['ndb_held_out']:.2f}" for row in priors if "ndb" in row), "–"),
    )  # fmt: skip
    took = report.training_took([*rows.values()])
    drawn = [
        Figure("samples", "Samples", functools.partial(draw_samples, config, pictures, images))
    ]
    if priors:
        steps = Figure("steps", "Distance over steps", functools.partial(draw_steps, config, rows))
        drawn.insert(0, steps)
    report.write_page(
        config,
        path,
        title=f"latent diffusion in miniature on {images.name}",
        seen=sentence(config, rows),
        sections=[
            Section("The prior: FD of samples over its steps", prior_table(config, priors),
                    [stopped, how["prior"]], drawn[:-1]),
            Section("The autoencoders", first_table(config, autoencoders), [how["first"]],
                    grouped=False),
            Section(f"Samples by {config.prior.stages[0]!r}",
                    measures_table(config, priors, autoencoders), [how["measures"]], drawn[-1:],
                    grouped=False),
            Section("How", text=[how["data"], how["arms"], took]),
        ],
        rows={"rows": autoencoders, "priors": priors},
    )  # fmt: skip
