"""What lies in results/, as the claims read it: `Source`, and the words of a verdict."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vaebal.experiments.report import Row, column, distinct, rows_with, short


class NoRows(Exception):
    """A source has rows, but none of an arm, a κ or a method that a claim is about."""


class Found(NamedTuple):
    """What a claim's row says."""

    text: str
    verdict: str
    arms: Sequence[str] = ()  # those it is about, where an experiment's train for unequal times


def holds(so: bool) -> str:
    """The verdict on a claim of ours."""
    return "holds" if so else "falls short"


def reproduced(so: bool) -> str:
    """The verdict on a number or a proof of the paper's."""
    return "reproduced" if so else "not reached"


def sharpened(so: bool) -> str:
    """The verdict on a claim of the paper's of which more is said here."""
    return "sharpened" if so else "not so here"


def shown(so: bool) -> str:
    """The verdict on what the paper has wrong."""
    return "shown" if so else "not shown"


class Source(NamedTuple):
    """An experiment's rows, its config and its page."""

    name: str
    rows: list[Row]
    config: dict[str, Any]
    text: str  # of its page
    page: str  # below results/

    @staticmethod
    def file(results: Path, name: str) -> Path:
        """The file that holds the numbers of a folder; or `name` itself, a file."""
        if Path(name).suffix in (".csv", ".json", ".md"):
            return results / name
        rows = results / name / "rows.json"
        return rows if rows.exists() else rows.with_suffix(".csv")

    @classmethod
    def of(cls, results: Path, name: str) -> "Source | None":
        """What is there; None where nothing has been run."""
        file = cls.file(results, name)
        if not file.exists():
            return None
        page = file if file.suffix == ".md" else file.parent / "table.md"
        text = page.read_text()
        config = re.findall(r"^```json\n(.*?)^```", text, re.M | re.S)
        rows = [] if file == page else read(file)
        given = json.loads(config[-1]) if config else {}
        return cls(name, rows, given, text, str(page.relative_to(results)))

    def only(self, **fields: Any) -> list[Row]:
        """The rows with these values.

        Raises:
          NoRows: there are none.
        """
        rows = rows_with(self.rows, **fields)
        if not rows:
            raise NoRows(", ".join(f"{name} = {value}" for name, value in fields.items()))
        return rows

    def data(self, arms: Sequence[str] = ()) -> str:
        """The data, r and how long was trained (of `arms` where there are any), as rows say."""
        names = [str(name) for name in self.over("data") + self.over("kind")]
        ranks = [str(rank) for rank in self.over("rank") if rank]
        noise = [short(noise) for noise in self.over("noise") if noise]
        if arms:
            steps = sorted(set(map(self.steps, arms)))
        else:  # a plain VAE's are those of two arms: of one that opens latents and one that goes on
            own = [row for row in self.rows if not str(row.get("arm", "")).startswith("plain")]
            steps = self._replace(rows=own).over("steps")[-1:]
        told = [", ".join(names), f"r = {', '.join(ranks)}" if ranks else ""]
        told += [f"noise {', '.join(noise)}" if noise else ""]
        told += [f"{' and '.join(f'{each:,}' for each in steps)} steps" if steps else ""]
        return "; ".join(part for part in told if part) or "–"

    def steps(self, arm: str) -> int:
        """How many an arm trained, with those of the arm that it goes on from."""
        before = arm.removeprefix("settled after ")
        return max(column(self.only(arm=arm), "steps")) + (
            self.steps(before) if before != arm else 0
        )

    @property
    def seeds(self) -> str:
        """How many seeds, and which."""
        seeds = self.over("seed")
        if len(seeds) > 3 and seeds == list(range(seeds[0], seeds[-1] + 1)):
            return f"{seeds[0]} to {seeds[-1]}"
        return ", ".join(map(str, seeds))

    def over(self, field: str) -> list[Any]:
        """A field's distinct values, in order; of rows that do not have it none."""
        values = distinct([row for row in self.rows if row.get(field) is not None], field)
        return sorted(values)


def read(file: Path) -> list[Row]:
    """Rows of a .json or a .csv, of which the cells become numbers and truths again."""
    if file.suffix == ".json":
        return json.loads(file.read_text())
    with file.open(newline="") as lines:
        return [{name: _value(cell) for name, cell in row.items()} for row in csv.DictReader(lines)]


def _value(cell: str) -> Any:
    if cell in ("True", "False"):
        return cell == "True"
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell
