"""The arena's page: how often each method's count is r, and what it costs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from vaebal.experiments import report
from vaebal.experiments.arena import methods
from vaebal.experiments.report import (
    COLOURS,
    Figure,
    Row,
    Section,
    Table,
    column,
    distinct,
    rows_with,
    short,
    signed,
)

OURS = "adaptive"


def label(row: Row) -> str:
    """The method as tables have it, with its number where it has one."""
    number = f" {short(row['setting'])}" if row["setting"] else ""
    return _greek(row["method"]) + number


def _greek(method: str) -> str:
    return method.replace("beta", "β").replace("sigma", "σ")


def labels(rows: Sequence[Row]) -> list[str]:
    """The methods there are, in order."""
    return list(dict.fromkeys(map(label, rows)))


def of_method(rows: Sequence[Row], name: str) -> list[Row]:
    """A method's rows."""
    return [row for row in rows if label(row) == name]


def known(rows: Sequence[Row]) -> list[Row]:
    """Rows of whole, clean data sets of known r; where there are none, of noisy and small ones."""
    clean = rows_with(rows, group="known")
    return clean or [row for row in rows if row["group"] in ("noise", "few")]


def source(row: Row) -> tuple:
    """What two methods' rows have in common where they are of one data set."""
    return tuple(row[name] for name in ("kind", "rank", "noise", "size", "data_seed"))


def exact(rows: Sequence[Row]) -> int:
    """In how many the count, rounded, is r; a run that stopped has none, and is no hit."""
    return sum(round(row["count"]) == row["rank"] for row in ended(rows))


def ended(rows: Sequence[Row]) -> list[Row]:
    """Those that did not stop."""
    return [row for row in rows if row["count"] is not None]


def off(rows: Sequence[Row]) -> list[float]:
    """Count less r, of each that did not stop."""
    return [row["count"] - row["rank"] for row in ended(rows)]


def interval(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval."""
    return tuple(stats.binomtest(hits, trials).proportion_ci(method="wilson"))


def proportion(rows: Sequence[Row]) -> str:
    """ "103 of 108 [.90, .98]"."""
    if not rows:
        return ""
    low, high = interval(exact(rows), len(rows))
    return f"{exact(rows)} of {len(rows)} [{low:.2f}, {high:.2f}]"


def shared(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """The rows whose data sets `others` have too."""
    of_others = set(map(source, others))
    return [row for row in rows if source(row) in of_others]


def _median(rows: Sequence[Row], field: str, scale: float = 1.0) -> str:
    values = [row[field] for row in rows if row[field] is not None]
    return short(scale * float(np.median(values)), 2) if values else ""


def _mean(values: Sequence[float | None], digits: int = 2) -> str:
    """Of those there are; "" of none."""
    told = [value for value in values if value is not None]
    return short(float(np.mean(told)), digits) if told else ""


def _beside(rows: Sequence[Row], ours: Sequence[Row]) -> str:
    """-ELBO less ours on the same data, on average."""
    of_ours = {source(row): row["negative_elbo"] for row in ours}
    pairs = [
        row["negative_elbo"] - of_ours[source(row)]
        for row in rows
        if row["negative_elbo"] is not None and source(row) in of_ours
    ]
    return signed(pairs, 1) if pairs else ""


def main_table(rows: Sequence[Row]) -> Table:
    """A line a method, over whole, clean data sets of known r."""
    header = ["method", "count = r", "count − r", "error, %", "−ELBO + (nats)", "MMD²", "seconds"]
    shown = known(rows)
    ours = of_method(shown, OURS)
    lines = [(name, of_method(shown, name)) for name in labels(shown)]
    rivals = [row for row in shown if label(row) != OURS]
    there = shared(ours, rivals)
    if there and len(there) < len(ours):
        lines.insert(1, (f"{OURS}, on the rivals' sets", there))
    return header, [
        [
            *(name, proportion(own), signed(off(own), 2) if ended(own) else ""),
            *(_median(own, "error", 100), _beside(own, ours), _median(own, "mmd")),
            _mean(column(own, "train_seconds")),
        ]
        for name, own in lines
    ]


def kinds_table(rows: Sequence[Row]) -> Table:
    """Exact counts by kind of data."""
    kinds: dict[str, Callable[[Row], bool]] = {}
    for kind in distinct(rows_with(rows, group="known"), "kind"):
        kinds[kind] = lambda row, kind=kind: (row["group"], row["kind"]) == ("known", kind)
    for noise in sorted({row["noise"] for row in rows if row["group"] == "noise"}):
        kinds[f"noise {noise:g}"] = lambda row, noise=noise: row["noise"] == noise
    for size in sorted({row["size"] for row in rows if row["group"] == "few"}):
        kinds[f"N = {size:,}"] = lambda row, size=size: row["size"] == size
    body = []
    for name in labels(rows):
        own = of_method(rows, name)
        parts = [[row for row in own if holds(row)] for holds in kinds.values()]
        body.append([name, *(f"{exact(p)} of {len(p)}" if p else "" for p in parts)])
    return ["method", *kinds], body


def shapes_table(rows: Sequence[Row]) -> Table:
    """Counts where one number is no whole answer: spheres, and a union of manifolds."""
    spheres = rows_with(rows, group="sphere")
    ranks, unions = sorted(set(column(spheres, "rank"))), rows_with(rows, group="union")
    header = ["method", *(f"sphere, r = {rank}" for rank in ranks)]
    header += ["union", "in use, an example"] if unions else []
    body = []
    for name in labels([*spheres, *unions]):
        line = [name]
        for rank in ranks:
            own = rows_with(of_method(spheres, name), rank=rank)
            line.append(_mean(column(own, "count")))
        if unions:
            own = of_method(unions, name)
            used = [row["used_per_example"] for row in own if row["used_per_example"] is not None]
            line.append(_mean(column(own, "count"), 3))
            line.append(f"{np.mean(used):.1f}" if used else "")
        body.append(line)
    return header, body


def tuning_table(rows: Sequence[Row], settings: dict[str, float]) -> Table:
    """What was tried of every tuned method, and what it gave; the chosen one in bold.

    Args:
      rows: of tuning; a run that stopped has no count.
    """
    body = []
    for name in distinct(rows, "method"):
        own = rows_with(rows, method=name)
        line = []
        for row in own:
            found = "stopped"
            if row["count"] is not None:
                found = f"{row['count']:.0f} ({short(100 * row['error'])} %)"
            text = f"{short(row['setting'])}: {found}"
            line.append(f"**{text}**" if row["setting"] == settings.get(name) else text)
        body.append([_greek(name), "; ".join(line)])
    return ["method", "setting: count (error)"], body


def sentence(rows: Sequence[Row]) -> str:
    """What was seen; who is as good as the adaptive homotopy, or better, comes first."""
    shown = known(rows)
    ours, said = of_method(shown, OURS), []
    if not shown:
        return "No data set of known r is finished."
    if not ours:
        return "; ".join(f"{n}: {proportion(of_method(shown, n))}" for n in labels(shown)) + "."
    better, rivals = [], 0
    for name in labels(shown):
        own = of_method(shown, name)
        there = shared(ours, own)
        rivals += name != OURS and len(there) > 0
        if name != OURS and there and exact(shared(own, there)) >= exact(there):
            better.append(f"{name} ({exact(own)} of {len(own)}; it {exact(there)})")
    if better:
        said.append(f"As often exact as the adaptive homotopy, or more often: {', '.join(better)}.")
    end = "; no rival is exact as often on the data sets both have."
    end = "." if better or not rivals else end
    said.append(
        f"The adaptive homotopy's count is r on {proportion(ours)} data sets of known r (Wilson's "
        f"95 % interval){end}"
    )
    return " ".join(said)


def draw(rows: Sequence[Row]) -> plt.Figure:
    """Share of exact counts with its interval; and the mean count less r, by r."""
    shown = known(rows)
    names = labels(shown)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.6 + 0.3 * len(names)), gridspec_kw={"width_ratios": (1, 1.2)}
    )
    for index, name in enumerate(names):
        own = of_method(shown, name)
        low, high = interval(exact(own), len(own))
        colour = COLOURS[1] if name == OURS else COLOURS[0]
        left.plot([low, high], [index, index], color=colour, linewidth=2)
        left.plot(exact(own) / len(own), index, "o", color=colour)
    left.set(yticks=range(len(names)), yticklabels=names, xlim=(-0.02, 1.02))
    left.set(xlabel="share of data sets with count = r, and Wilson's 95 % interval")
    left.set_ylim(len(names) - 0.5, -0.5)
    ranks = sorted(set(column(shown, "rank")))
    grid = np.full((len(names), len(ranks)), np.nan)
    for i, name in enumerate(names):
        for j, rank in enumerate(ranks):
            own = ended(rows_with(of_method(shown, name), rank=rank))
            if own:
                grid[i, j] = np.mean(off(own))
    right.imshow(grid, cmap="RdBu_r", vmin=-6, vmax=6, aspect="auto")
    for i, j in np.argwhere(np.isfinite(grid)):
        colour = "white" if abs(grid[i, j]) > 4 else "black"
        text = f"{grid[i, j]:+.0f}" if round(grid[i, j]) else "0"
        right.text(j, i, text.replace("-", "−"), ha="center", va="center", size=7, color=colour)
    right.set(xticks=range(len(ranks)), xticklabels=ranks, yticks=[], xlabel="r")
    right.set_title("count − r, on average", fontsize=9)
    right.grid(visible=False)
    figure.tight_layout()
    return figure


def write(
    config: Any,
    path: Path,
    rows: Sequence[Row],
    tried: Sequence[Row],
    settings: dict[str, float],
    stopped: str,
) -> None:
    """Writes the page, rows and figure into `path`, and prints the tables.

    Args:
      rows: one a finished run that is shown.
      tried: those of tuning; of either, a run that stopped has no count.
      settings: what it chose.
      stopped: a sentence on the runs that stopped, or "".
    """
    trained, shown = [row for row in rows if row["steps"]], known(rows)
    ranks = ", ".join(map(str, sorted(set(column(shown, "rank")))))
    how = report.protocol(
        "arena", config, drawn=min(config.eval.mmd_samples, config.data.tests),
        manifolds=f"{', '.join(distinct(shown, 'kind'))} manifolds, r = {ranks}",
        relevant=methods.RELEVANT, singular=methods.SINGULAR,
        explained=methods.EXPLAINED, active=methods.ACTIVE,
    )  # fmt: skip
    sections = []
    if shown:
        figure = Figure("arena", "how often each method's count is r", lambda: draw(rows))
        took = [report.training_took(trained)] if trained else []
        sections.append(
            Section("", main_table(rows), [stopped, how["main"], *took], [figure], grouped=False)
        )
        others = {"noise", "few"} & set(column(rows, "group"))
        told = [how["kinds"], how["others"] if others else ""]
        sections.append(Section("By kind of data", kinds_table(rows), told, grouped=False))
    if any(row["group"] in ("sphere", "union") for row in rows):
        sections.append(
            Section("Where one number is no whole answer", shapes_table(rows), [how["shapes"]],
                    grouped=False)
        )  # fmt: skip
    if tried:
        sections.append(
            Section("Tuning", tuning_table(tried, settings), [how["tuning"]], shown=False)
        )
    report.write_page(
        config, path, title="who finds the number of latents", seen=sentence(rows),
        sections=sections, rows={"rows": rows, "tuning": tried},
    )  # fmt: skip
