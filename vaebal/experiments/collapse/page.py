"""The report of the variants: how many latents each keeps, with and without skips."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaebal.data import ImageSet
from vaebal.experiments import report
from vaebal.experiments.kappa_sweep.page import SKIP_NAMES
from vaebal.experiments.report import Row, Section, Table, column, distinct, rows_with

# Heading -> (field, decimals), for each kind of skips.
COLUMNS = {
    "active": ("active_0.01", 1),
    "σ² < ½": ("informative", 1),
    "Rec. Err.": ("error_mean", 1),
}


def label(variant: str) -> str:
    """What a variant changes, as a table has it: "activation = relu"."""
    changes = [change.partition(".")[2].replace("=", " = ") for change in variant.split()]
    return ", ".join(changes).replace("gamma", "γ").replace("log_var_init", "log σ²") or "–"


def table(rows: Sequence[Row]) -> Table:
    """A line a variant and kappa, three columns a kind of skips."""
    kinds = distinct(rows, "skips")
    header = [
        "changed",
        "κ",
        *(f"{SKIP_NAMES[kind]}: {name}" for kind in kinds for name in COLUMNS),
    ]
    body = []
    for variant, kappa in dict.fromkeys((row["variant"], row["kappa"]) for row in rows):
        line = [label(variant), str(kappa)]
        for kind in kinds:
            own = rows_with(rows, variant=variant, kappa=kappa, skips=kind)
            for field, digits in COLUMNS.values():
                line.append(report.with_spread(column(own, field), digits) if own else "")
        body.append(line)
    return header, body


def sentence(rows: Sequence[Row]) -> str:
    """Which variants keep nothing, by kind of skips."""
    said = []
    for kind in distinct(rows, "skips"):
        own = rows_with(rows, skips=kind)
        variants = distinct(own, "variant")
        gone = [
            label(variant)
            for variant in variants
            if not any(column(rows_with(own, variant=variant), "active_0.01"))
        ]
        which = f": {'; '.join(gone)}" if gone else ""
        said.append(f"with {SKIP_NAMES[kind]} {len(gone)} of {len(variants)}{which}")
    return f"Variants that keep no active latent: {'. And '.join(said)}."


def write(config: Any, path: Path, rows: Sequence[Row], stopped: str, images: ImageSet) -> None:
    """Writes the page and rows into `path`, and prints the table."""
    x = np.asarray(images.decode(images.test))
    how = report.protocol(
        "collapse", config, images=images, train_images=len(images.train),
        test_images=len(images.test), collapsed=float(x.var(0).sum()),
        over_seeds=report.over_seeds(sorted(distinct(rows, "seed"))),
    )  # fmt: skip
    main = Section("", table(rows), [stopped, how["main"], report.training_took(rows)])
    report.write_page(
        config, path, title="where a network without skips collapses", seen=sentence(rows),
        sections=[main], rows={"rows": rows},
    )  # fmt: skip
