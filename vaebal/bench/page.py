"""What a measurement puts on paper: sections of Markdown, and perhaps a figure."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt

from vaebal.bench.timing import Spread
from vaebal.report import markdown_table


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


def with_range(value: Spread, form: str, scale: float = 1.0) -> str:
    """ "9,450 (9,200–9,600)", each number written by the format spec `form`."""
    median, low, high = (format(scale * number, form) for number in value)
    return f"{median} ({low}–{high})"


def seconds_text(value: float) -> str:
    """Seconds in a unit that leaves three digits: "1.23 s", "12.3 ms", "123 µs"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            digits = 2 if value * scale < 10 else 1 if value * scale < 100 else 0
            return f"{value * scale:.{digits}f} {unit}"
    raise AssertionError
