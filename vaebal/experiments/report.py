"""Rows -> CSV, JSON, Markdown, terminal table, figures. Nothing here computes a result."""

import csv
import importlib.metadata
import io
import json
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from vaebal.training.checkpoints import write_atomically

Row = dict[str, Any]

# Okabe and Ito's palette: told apart by colour-blind readers, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}


def rows_with(rows: Sequence[Row], **fields: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def distinct(rows: Sequence[Row], field: str) -> list[Any]:
    """The field's values in the order they came."""
    return list(dict.fromkeys(row[field] for row in rows))


def stopped(rows: Mapping[str, Row], fix: str) -> str:
    """One sentence naming the members whose rows say that they stopped, and the `fix`; or ""."""
    steps = [f"{name} (step {row['stopped']})" for name, row in rows.items() if "stopped" in row]
    if not steps:
        return ""
    return (
        f"Stopped where a loss or gradient was not finite, and in no number here: "
        f"{', '.join(steps)}. {fix}, in a new --workdir."
    )


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    packages = ("vaebal", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


def write_rows(rows: Sequence[Row], directory: Path, name: str) -> None:
    """`name`.json with every field, `name`.csv with the scalar ones."""
    write_atomically(directory / f"{name}.json", json.dumps(rows, indent=1) + "\n")
    scalars = [k for k, value in rows[0].items() if not isinstance(value, list | dict)]
    text = io.StringIO()
    writer = csv.DictWriter(text, scalars, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(directory / f"{name}.csv", text.getvalue())


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds and their standard deviation (None for one seed)."""
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def number(value: float, digits: int) -> str:
    """`value` with `digits` decimals and a true minus sign; scientific where that would show 0."""
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{digits}f}"
        if float(text) == 0:
            text = text.lstrip("-")
    return text.replace("-", "−")


def with_spread(values: Sequence[float], digits: int) -> str:
    """ "4.98 ± 0.03" over seeds; no ± for one seed."""
    mean, spread = mean_and_spread(values)
    if spread is None:
        return number(mean, digits)
    return f"{number(mean, digits)} ± {spread:.{digits}f}"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, others right, padded to read well as text."""
    table = [list(header), *map(list, body)]
    widths = [max(2, *(len(row[i]) for row in table)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *(line(row) for row in body)])


def print_table(
    header: Sequence[str],
    body: Sequence[Sequence[str]],
    title: str,
    without: Collection[str] = (),
    *,
    grouped: bool = True,
) -> None:
    """A table for the terminal, less the columns `without`; `grouped` by the first cell."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    columns = [index for index, name in enumerate(header) if name not in without]
    for index in columns:
        shown.add_column(header[index], justify="right" if index else "left", no_wrap=True)
    for index, line in enumerate(body):
        last = index + 1 == len(body) or body[index + 1][0] != line[0]
        shown.add_row(*(line[column] for column in columns), end_section=grouped and last)
    # Without a terminal, and in one too narrow, long lines beat folded cells.
    width = max(Console().width, Console(width=1000).measure(shown).maximum)
    Console(width=width).print(shown)


def save_figure(draw: Callable[[], plt.Figure], path: Path) -> None:
    """Draws under the house style and saves atomically."""
    with plt.rc_context(STYLE):
        figure, octets = draw(), io.BytesIO()
        figure.savefig(octets, format=path.suffix[1:])
        plt.close(figure)
    write_atomically(path, octets.getvalue())


def image_grid(
    rows: Sequence[tuple[str, np.ndarray]], image_shape: tuple[int, int, int]
) -> plt.Figure:
    """Labelled rows of images, each [n, D] in [0, 1] (clipped only for display)."""
    height, width, channels = image_shape
    columns = max(len(images) for _, images in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.9 + 0.6 * columns, 0.66 * len(rows)), squeeze=False,
        gridspec_kw={"wspace": 0.06, "hspace": 0.06},
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    for (label, images), line in zip(rows, axes, strict=True):
        line[0].text(-0.15, 0.5, label, transform=line[0].transAxes, ha="right", va="center")
        for axis, image in zip(line, images, strict=False):
            pixels = np.clip(image.reshape(height, width, channels), 0, 1)
            axis.imshow(pixels if channels == 3 else pixels[..., 0], cmap="gray_r", vmin=0, vmax=1)
    return figure
