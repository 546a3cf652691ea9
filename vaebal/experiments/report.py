"""Rows -> CSV, JSON, Markdown, terminal table, figures, pages. Nothing here computes a result."""

import csv
import importlib.metadata
import importlib.resources
import io
import json
import platform
import re
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from rich import box
from rich import table as rich_table
from rich.console import Console

from vaebal.experiments import shipped
from vaebal.training import devices
from vaebal.training.workdir import write_atomically

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # header and body

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


def column(rows: Sequence[Row], field: str) -> list[Any]:
    """One field of every row."""
    return [row[field] for row in rows]


def stopped(rows: Mapping[str, Row], fix: str, counted: str = "in no number here") -> str:
    """One sentence naming the members whose rows say that they stopped, and the `fix`; or "".

    Args:
      counted: as what the page has them.
    """
    steps = [f"{name} (step {row['stopped']})" for name, row in rows.items() if "stopped" in row]
    if not steps:
        return ""
    return (
        f"Stopped where a loss or gradient was not finite, and {counted}: "
        f"{', '.join(steps)}. {fix}, in a new --workdir."
    )


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    packages = ("vaebal", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


def device() -> str:
    """What they were made on: "1 × cpu (cpu)"."""
    if devices.are_cores():
        return f"{jax.device_count()} CPU cores, stacked runs spread over them"
    return f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})"


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


def short(value: float, digits: int = 2, sign: str = "") -> str:
    """`digits` figures, less trailing zeros, and a short exponent: "0.25", "1e−6", "−3.1e4", "0".

    Args:
      sign: "+" marks positive values too.
    """
    if value == 0:
        return "0"
    text = f"{value:{sign}.{digits}g}"
    if abs(value) < 1e-3:
        text = re.sub(r"\.?0*e", "e", f"{value:{sign}.{digits - 1}e}", count=1)
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), text).replace("-", "−")


def with_spread(values: Sequence[float], digits: int) -> str:
    """ "4.98 ± 0.03" over seeds; no ± for one seed."""
    mean, spread = mean_and_spread(values)
    if spread is None:
        return number(mean, digits)
    return f"{number(mean, digits)} ± {spread:.{digits}f}"


def scaled(values: Sequence[float]) -> str:
    """Mean and spread with three figures at any scale: "(1.43 ± 0.05)e−6", "45.6"."""
    mean, spread = mean_and_spread(values)
    size = max(abs(mean), spread or 0.0)
    if size == 0:
        return "0"
    exponent = int(f"{size:.2e}".partition("e")[2])  # as rounded
    if exponent >= -2:
        return with_spread(values, max(0, 2 - exponent))
    text = number(round(mean / 10.0**exponent, 2), 2)
    if spread is not None:
        text = f"({text} ± {spread / 10.0**exponent:.2f})"
    return f"{text}e−{-exponent}"


def signed(values: Sequence[float], digits: int) -> str:
    """`with_spread`, with a plus sign where the mean is positive."""
    text = with_spread(values, digits)
    return f"+{text}" if np.mean(values) > 0 else text


def over_seeds(seeds: Sequence[int]) -> str:
    """ "mean ± standard deviation over the 3 seeds 0, 1, 2"."""
    if len(seeds) == 1:
        return f"one seed ({seeds[0]}), so no spread"
    return f"mean ± standard deviation over the {len(seeds)} seeds {', '.join(map(str, seeds))}"


def laplace(rows: Sequence[Row]) -> str:
    """How much lower the NLL's bound is by the Laplace approximation, where rows have it."""
    own = [row for row in rows if "laplace_gain" in row]
    if not own:
        return ""
    gains, effective = column(own, "laplace_gain"), column(own, "laplace_effective_sample_size")
    return (
        "As many samples from the Laplace approximation of the posterior, on the first test "
        f"images, lower the bound by {short(min(gains))} to {short(max(gains))} nats (run by run; "
        f"the largest standard error over images {short(max(column(own, 'laplace_gain_se')))}), at "
        f"a median effective sample size of {short(min(effective))} to {short(max(effective))}."
    )


def training_took(rows: Sequence[Row]) -> str:
    """A sentence on how long the rows' training took, and on what; not where it is told from."""
    # Rows of before 0.10 do not say it.
    where = distinct([row for row in rows if "device" in row], "device") or [device()]
    return (
        f"Training took {sum(column(rows, 'train_seconds')):.0f} s in all on {' and '.join(where)}."
    )


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
    shown = rich_table.Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
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


GAP = 0.06  # between the images of a grid, in heights of one


def image_grid(
    rows: Sequence[tuple[str, np.ndarray]],
    image_shape: tuple[int, int, int],
    title: str,
    heads: Sequence[str] = (),
) -> plt.Figure:
    """Labelled rows of images, each [n, D] in [0, 1] (clipped only for display).

    Args:
      heads: of the columns.
    """
    height, width, channels = image_shape
    columns = max(len(images) for _, images in rows)
    figure, axis = plt.subplots(figsize=(1.9 + 0.6 * columns, 0.66 * len(rows)))
    # One axis for all: an axis an image takes longer to make than all else of a figure.
    step = 1 + GAP
    wide = width / height
    for line, (label, images) in enumerate(rows):
        axis.text(-0.15 * wide, line * step + 0.5, label, ha="right", va="center")
        for column, image in enumerate(images):
            pixels = np.clip(image.reshape(height, width, channels), 0, 1)
            left, top = column * step * wide, line * step
            axis.imshow(
                pixels if channels == 3 else pixels[..., 0], cmap="gray_r", vmin=0, vmax=1,
                extent=(left, left + wide, top + 1, top),
            )  # fmt: skip
    for column, head in enumerate(heads):
        axis.text((column * step + 0.5) * wide, -GAP, head, ha="center", va="bottom", fontsize=8)
    axis.set(xlim=(0, (columns * step - GAP) * wide), ylim=(len(rows) * step - GAP, 0), anchor="N")
    axis.set_axis_off()
    above = 0.25 + 0.2 * bool(heads)  # inches over the images, which end at .88
    figure.suptitle(title, y=0.88 + above / figure.get_figheight(), va="center", fontsize=10)
    return figure


# ---------------------------------------------------------------- protocols and pages


class _Fields(string.Formatter):
    """str.format with the page's own formats: sequences joined, and ":short"."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec.startswith("short"):
            return short(value, int(format_spec.removeprefix("short") or 2))
        if isinstance(value, list | tuple):
            return ", ".join(self.format_field(each, format_spec) for each in value)
        return super().format_field(value, format_spec)


def protocol(experiment: str, config: Any, **computed: Any) -> dict[str, str]:
    """How numbers were made: the sections of the experiment's protocol.md, fields filled in.

    Args:
      experiment: the name of its package, "theorem2"; in its folder lies the template. There
        "## name" begins a section, "{train.steps}" is a field of the config or of `computed`,
        formatted as by str.format; ":short" is `short`, ":short1" of one figure; sequences are
        joined by commas.
      computed: values that the config does not hold.

    Returns:
      {name: text}, one line a paragraph.

    Raises:
      KeyError, AttributeError: the template names a field that there is not.
    """
    folder = importlib.resources.files(f"vaebal.experiments.{experiment}")
    text = (folder / "protocol.md").read_text(encoding="utf-8")
    sections = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        name, _, template = section.partition("\n")
        filled = _Fields().vformat(template.strip(), (), {**config, **computed})
        sections[name] = re.sub(r"(?<!\n)\n(?!\n)", " ", filled)
    return sections


class Figure(NamedTuple):
    """A figure of a page."""

    name: str  # of its file, without ".png"
    alt: str  # what it shows, for those who cannot see it
    draw: Callable[[], plt.Figure]


class Section(NamedTuple):
    """A part of a page: heading, table, paragraphs, figures, in this order; each may be absent."""

    title: str = ""
    table: Table | None = None
    text: Sequence[str] = ()  # paragraphs; empty ones are left out
    figures: Sequence[Figure] = ()
    # In the terminal: whether the table is shown, as `print_table` does, and the text said.
    shown: bool = True
    without: Collection[str] = ()
    grouped: bool = True
    said: bool = False


def write_page(
    config: Any,
    path: Path,
    *,
    title: str,
    seen: str,
    sections: Sequence[Section],
    rows: Mapping[str, Sequence[Row]],
) -> None:
    """Writes an experiment's page and what it rests on, and prints its tables.

    `path` gets NAME.json and NAME.csv of every item of `rows`, the figures as PNG, and table.md:
    title, what was seen, the sections, the command, versions, and the config as JSON. Every file is
    written atomically, the page last: where it is, all that it names is too.

    Args:
      title: of the page, after the config's name.
      seen: what was seen, in a sentence or two; stands first.
      rows: {NAME: rows}; names without rows are left out.
    """
    for name, content in rows.items():
        if content:
            write_rows(content, path, name)
    lines = [f"# {config.name}: {title}", seen]
    for section in sections:
        lines += [f"## {section.title}"] if section.title else []
        lines += [markdown_table(*section.table)] if section.table else []
        lines += filter(None, section.text)
        for figure in section.figures:
            save_figure(figure.draw, path / f"{figure.name}.png")
            lines.append(f"![{figure.alt}]({figure.name}.png)")
    command = shipped.command(config)
    lines += [f"Command: `{command}`."] if command else []
    lines.append(f"Versions: {', '.join(f'{k} {v}' for k, v in versions().items())}.")
    lines.append(f"```json\n{json.dumps(config.to_dict(), indent=1)}\n```\n")
    write_atomically(path / "table.md", "\n\n".join(lines))

    for section in sections:
        if section.table and section.shown:
            heading = section.title or title
            print_table(*section.table, heading, section.without, grouped=section.grouped)
        if section.said:
            print("\n\n".join(filter(None, section.text)), end="\n\n")
    files = [str(path / f"{figure.name}.png") for part in sections for figure in part.figures]
    print(
        "\n".join([f"table {path / 'table.md'}", *([" ".join(["figures", *files])] * bool(files))])
    )
    print(f"\n{seen}")
