"""What a measurement puts on paper: sections of Markdown, and perhaps a figure."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt

from vaebal.bench.timing import Spread
from vaebal.experiments.report import markdown_table


class Page(NamedTuple):
    """A measurement, rendered but for its machine."""

    name: str  # the beginning of its file's name
    title: str
    sections: Sequence[str]  # headings and tables
    method: Sequence[str]  # paragraphs: how it was measured
    machine: Sequence[tuple[str, str]] = ()  # rows beyond the machine's own
    notes: Sequence[str] = ()
    figure: Callable[[], plt.Figure] | None = None  # stands first, under the page's name


TURNS = (
    "Every number is the median over the repeats, with the smallest and the largest in brackets; "
    "what stands side by side was measured in turns (A B A B ...), and ratios are taken turn by "
    "turn."
)


def render(page: Page, machine: Sequence[tuple[str, str]], others: float, image: str = "") -> str:
    """The page as Markdown.

    Args:
      machine: rows of the machine's table.
      others: the share of the cores that other processes used meanwhile; NaN if unknown.
      image: the figure's file.
    """
    rows, busy = [*machine, *page.machine], []
    if others == others:
        rows.append(("Used by other processes", f"{others:.0%} of the cores, during the run"))
    if others > 0.1:
        busy = [
            "**The machine was busy with something else**: the numbers are low, and on a CPU "
            "PyTorch's most of all, because its threads wait for each other by spinning."
        ]
    return (
        "\n\n".join(
            [
                f"# {page.title}",
                markdown_table(["machine", ""], rows),
                *([f"![{page.title}]({image})"] if image else []),
                *page.sections,
                "## How it was measured",
                TURNS,
                *page.method,
                *busy,
                *page.notes,
            ]
        )
        + "\n"
    )


def three_digits(value: float) -> str:
    """The format spec that shows three significant digits of `value`, and never an exponent."""
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f",.{max(2 - magnitude, 0)}f"


def with_range(value: Spread, form: str = "", scale: float = 1.0) -> str:
    """ "9,450 (9,200–9,600)", each number written by the format spec `form`.

    Args:
      form: "" for three digits of the median.
    """
    form = form or three_digits(scale * value.median)
    median, low, high = (format(scale * number, form) for number in value)
    return f"{median} ({low}–{high})"


def seconds_text(value: float) -> str:
    """Seconds in a unit that suits them: "1.23 s", "12.3 ms", "123 µs"."""
    scale, unit = next(
        (each for each in ((1.0, "s"), (1e3, "ms")) if value * each[0] >= 1), (1e6, "µs")
    )
    return f"{value * scale:{three_digits(value * scale)}} {unit}"
