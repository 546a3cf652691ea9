"""What the rows in results/ say of a claim: `Source` -> `Found`, its numbers and its verdict."""

import csv
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from vaebal.experiments.gamma import order
from vaebal.experiments.report import (
    Row,
    column,
    distinct,
    number,
    rows_with,
    scaled,
    short,
    signed,
    with_spread,
)


class NoRows(Exception):
    """A source has rows, but none of an arm, a κ or a method that a claim is about."""


class Found(NamedTuple):
    """What a claim's row says."""

    text: str
    verdict: str


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
        if Path(name).suffix in (".csv", ".md"):
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

    @property
    def data(self) -> str:
        """The data, r and how long was trained, as far as the rows say."""
        names = [str(name) for name in self.over("data") + self.over("kind")]
        ranks = [str(rank) for rank in self.over("rank") if rank]
        noise = [short(noise) for noise in self.over("noise") if noise]
        steps = self.over("steps")
        told = [", ".join(names), f"r = {', '.join(ranks)}" if ranks else ""]
        told += [f"noise {', '.join(noise)}" if noise else ""]
        told += [f"{max(steps):,} steps" if steps else ""]
        return "; ".join(part for part in told if part) or "–"

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


def proportion(hits: int, trials: int) -> str:
    """ "15 of 15 [.80, 1.00]"."""
    low, high = stats.binomtest(int(hits), trials).proportion_ci(method="wilson")
    return f"{hits} of {trials} [{low:.2f}, {high:.2f}]"


# --- Theorems


def stationary_points(source: Source) -> Found:
    rows = source.rows
    right = sum(row["index"] == row["measured_index"] for row in rows)
    minima = sum(row["measured_index"] == 0 for row in rows)
    text = f"{right} of {len(rows)} stationary points have the predicted index, {minima} is minimal"
    return Found(text, reproduced(right == len(rows) and minima == 1))


def copies(source: Source) -> Found:
    kappa, gamma = source.config["model"]["kappa"], source.config["model"]["gamma"]
    rank = min(kappa, sum(value > gamma for value in source.config["data"]["eigenvalues"]))
    without = math.factorial(kappa) // math.factorial(kappa - rank)
    (here,) = column(source.only(index=0), "copies")
    text = f"{here} of them; without the signs {without}"
    return Found(text, shown(here == without * 2**rank))


def _gradients(rows: Sequence[Row], draws: str) -> float:
    return max(
        (value for row in rows for name, value in row.items() if name.startswith(draws)),
        default=math.nan,
    )


def collapsed_gradients(source: Source) -> Found:
    quiet = [row for row in source.rows if row["biases"] != "live"]
    largest = _gradients(quiet, "antithetic")
    text = f"largest gradient {short(largest)} in {len(quiet)} networks, averaged over ±ε"
    return Found(text, reproduced(largest == 0))


def conditions(source: Source) -> Found:
    quiet = [row for row in source.rows if row["biases"] != "live"]
    draw, live = _gradients(quiet, "one draw"), _gradients(source.only(biases="live"), "antithetic")
    text = f"largest gradient {short(draw)} with one draw of the noise, {short(live)} with biases"
    return Found(text, shown(min(draw, live) > 0))


def ways_out(source: Source) -> Found:
    shares = []
    told = {"residual+affine": "both skips", "residual": "residual skips", "none": "none"}
    for skips in told:
        rows = [row for row in source.only(skips=skips, blocks=3) if row["above_gamma"]]
        seeds = [rows_with(rows, seed=seed) for seed in distinct(rows, "seed")]
        shares.append([np.mean(column(own, "held_recovered")) for own in seeds])
    pairs = zip(told.values(), shares, strict=True)
    text = ", ".join(f"{with_spread(share, 2)} with {name}" for name, share in pairs)
    means = [np.mean(share) for share in shares]
    return Found(f"share of runs that leave it: {text}", reproduced(means[0] > means[1] > means[2]))


def slopes(source: Source) -> Found:
    def balanced(rows: Sequence[Row]) -> str:
        return f"{sum(column(rows, 'balanced'))} of {len(rows)}"

    held = [row for row in source.rows if row["homotopy"]]
    gentle = [row for row in held if row["slope_at_zero"] <= 1]
    steep = [row for row in held if row["slope_at_zero"] > 1]
    each = [
        f"{name} {balanced(rows_with(steep, penalty=name))}" for name in distinct(steep, "penalty")
    ]
    text = f"balanced with a slope of at most 1 in {balanced(gentle)} runs; {', '.join(each)}"
    so = not any(column(gentle, "balanced")) and any(column(steep, "balanced"))
    return Found(text, sharpened(so))


def powers(source: Source) -> Found:
    kept = {p: all(column(rows_with(source.rows, p=p), "zero_error")) for p in source.over("p")}
    largest = max(p for p, zero in kept.items() if zero)
    least = min(p for p, zero in kept.items() if not zero)
    text = f"every run at p ≤ {short(largest)}, not at {short(least)}"
    return Found(text, shown(largest <= 0.5 < least))


# --- γ's descent


def exact(arm: str) -> Callable[[Source], Found]:
    def measure(source: Source) -> Found:
        rows = source.only(arm=arm)
        hits = sum(row[order.ACTIVE] == row["rank"] for row in rows)
        return Found(proportion(hits, len(rows)) + " runs", holds(hits / len(rows) >= 0.95))

    return measure


def crowded(arm: str) -> Callable[[Source], Found]:
    def measure(source: Source) -> Found:
        rows = source.only(arm=arm)
        spare = [row[order.ACTIVE] - row["rank"] for row in rows]
        hits = sum(more > 0 for more in spare)
        text = f"{proportion(hits, len(rows))} runs with too many, {signed(spare, 1)} latents"
        return Found(text, holds(hits / len(rows) >= 0.95))

    return measure


def fixed_against_learned(source: Source) -> Found:
    if not (pairs := order.pairs_of(source.rows, "fixed at adaptive")):
        raise NoRows("arm = fixed at adaptive")
    higher = sum(fixed["mmd"] > learned["mmd"] for learned, fixed in pairs)
    learned, fixed = (scaled(column(rows, "mmd")) for rows in zip(*pairs, strict=True))
    ratio = geometric([fixed["error_mean"] / learned["error_mean"] for learned, fixed in pairs])
    text = (
        f"MMD² higher with γ fixed in {higher} of {len(pairs)} pairs: {learned} → {fixed}; "
        f"error × {ratio}"
    )
    return Found(text, sharpened(higher == len(pairs)))


def geometric(ratios: Sequence[float]) -> str:
    """The geometric mean and, of several, its factor of one standard deviation: "3.7 ×÷ 1.9"."""
    logs = np.log(ratios)
    text = number(math.exp(logs.mean()), 2)
    return text if len(logs) == 1 else f"{text} ×÷ {math.exp(logs.std(ddof=1)):.2f}"


def _paired(source: Source, arm: str) -> list[tuple[Row, Row]]:
    other = {(row["rank"], row["seed"]): row for row in source.only(arm=arm)}
    ours = {(row["rank"], row["seed"]): row for row in source.only(arm="adaptive")}
    if not (shared := [place for place in ours if place in other]):
        raise NoRows(f"arm = adaptive and {arm}, of one r and seed")
    return [(other[place], ours[place]) for place in shared]


def beside(arm: str) -> Callable[[Source], Found]:
    """What the adaptive homotopy costs beside another arm."""

    def measure(source: Source) -> Found:
        pairs = [order.compared(*pair) for pair in _paired(source, arm)]
        errors, elbos = zip(*pairs, strict=True)
        text = f"error × {geometric(errors)}, −ELBO {signed(elbos, 1)} nats"
        return Found(text, holds(np.mean(elbos) <= 0))

    return measure


def beside_adaptive(arm: str) -> Callable[[Source], Found]:
    """What another arm gains beside the adaptive homotopy, and its count."""

    def measure(source: Source) -> Found:
        elbos = [order.compared(ours, other)[1] for other, ours in _paired(source, arm)]
        text = (
            f"active = r in {order.count(source.only(arm=arm))} runs learned at .1, in "
            f"{order.count(source.only(arm='adaptive'))} adaptive ones; −ELBO {signed(elbos, 1)} "
            "nats beside these"
        )
        return Found(text, holds(np.mean(elbos) >= -1))

    return measure


def one_count(source: Source) -> Found:
    rows = source.only(arm="adaptive")
    counts = column(rows, order.ACTIVE)
    text = f"{', '.join(f'{count:.0f}' for count in counts)} of κ = {rows[0]['kappa']}"
    text += f"; error {with_spread(column(rows, 'error_mean'), 2)}"
    settled = rows_with(source.rows, arm="settled after adaptive")
    if settled:
        text += f", settled {with_spread(column(settled, 'error_mean'), 2)}"
    return Found(text, holds(max(counts) - min(counts) <= 2))


def content(source: Source) -> Found:
    rows = source.only(arm="adaptive")
    shares = [np.mean(row["factor_r2"]) for row in rows]
    least = [min(row["factor_r2"]) for row in rows]
    text = f"R² {with_spread(shares, 2)} on average, {with_spread(least, 2)} for the least factor"
    return Found(text, holds(np.mean(least) >= 0.5))


# --- The sweep and the pipeline


def table_1(kappa: int, error: float, nll: float) -> Callable[[Source], Found]:
    def measure(source: Source) -> Found:
        rows = source.only(kappa=kappa, skips="residual+affine")
        errors, nlls = column(rows, "error_mean"), column(rows, "nll")
        better = np.mean(errors) <= error, np.mean(nlls) <= nll
        text = f"{with_spread(errors, 2)}, {with_spread(nlls, 0)}"
        return Found(text, reproduced(all(better)) if any(better) == all(better) else "in part")

    return measure


def saturation(paper: tuple[int, int]) -> Callable[[Source], Found]:
    def measure(source: Source) -> Found:
        rows = [row for row in source.only(skips="residual+affine") if row["kappa"] >= 50]
        counts, kappas = column(rows, "informative"), column(rows, "kappa")
        text = f"{min(counts)} to {max(counts)} with σ² < ½ for κ = {min(kappas)} to {max(kappas)}"
        return Found(text, reproduced(paper[0] <= min(counts) and max(counts) <= paper[1]))

    return measure


def without_skips(source: Source) -> Found:
    rows = source.only(skips="none")
    counts, kappas = column(rows, "informative"), source.over("kappa")
    text = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    few = " to ".join(str(kappa) for kappa in sorted({kappas[0], kappas[-1]}))
    return Found(f"{text} with σ² < ½ of κ = {few}", "not so here" if any(counts) else "reproduced")


def affine_skip(source: Source) -> Found:
    kappa = max(source.over("kappa"))
    told = {"residual+affine": "both skips", "residual": "residual skips", "none": "none"}
    counts = [column(source.only(skips=skips, kappa=kappa), "informative") for skips in told]
    pairs = zip(told.values(), counts, strict=True)
    text = ", ".join(f"{with_spread(count, 1)} with {name}" for name, count in pairs)
    both, residual, none = (np.mean(count) for count in counts)
    verdict = "reproduced" if both > residual > none else "in part"
    return Found(f"latents with σ² < ½ of κ = {kappa}: {text}", verdict)


def apart(less: Sequence[float], more: Sequence[float]) -> bool:
    """Whether the spreads of two sets of runs do not touch."""
    return np.mean(less) + np.std(less, ddof=len(less) > 1) < np.mean(more) - np.std(
        more, ddof=len(more) > 1
    )


def second_stage(source: Source) -> Found:
    ours = source.only(method="VAE+")
    made, kept = column(ours, "gen_fd"), column(ours, "rec_fd")
    rivals = {name: column(source.only(method=name), "gen_fd") for name in ("VAE", "WAE-MMD")}
    told = ", ".join(f"{name} {with_spread(values, 1)}" for name, values in rivals.items())
    text = (
        f"Fréchet distance (not FID) of samples {with_spread(made, 1)}, of reconstructions "
        f"{with_spread(kept, 1)}; {told}"
    )
    if np.mean(made) <= 1.1 * np.mean(kept):
        return Found(text, "reproduced")
    ahead = all(apart(made, values) for values in rivals.values())
    return Found(text, "direction only" if ahead else "not reached")


def table_1_columns(error: float, nll: float, dim: int) -> Callable[[None], Found]:
    """(d/2)(log 2πγ + 1) at the stationary γ = error/d: what the error alone makes of the NLL."""

    def measure(_: None) -> Found:
        term = dim / 2 * (math.log(2 * math.pi * error / dim) + 1)
        return Found(f"{number(term, 0)} nats, by arithmetic", shown(term < nll - 100))

    return measure


# --- The tools


def fit_counts(source: Source) -> Found:
    hits = sum(row["dimension"] == row["rank"] for row in source.rows)
    text = f"{proportion(hits, len(source.rows))} data sets"
    planned = re.search(r"(\d+) of (\d+) sets are done", source.text)
    so = holds(hits / len(source.rows) >= 0.95)
    if planned and planned[1] != planned[2]:
        return Found(f"{text}, of {planned[2]} planned", f"{so} so far")
    return Found(text, so)


def verdicts(source: Source) -> Found:
    right, all_, wrongly = map(
        int,
        re.search(
            r"(\d+) of (\d+) verdicts are right.*?(\d+) collapsed or crowded VAEs",
            source.text,
            re.S,
        ).groups(),
    )
    text = f"{proportion(right, all_)} VAEs; {wrongly} collapsed or crowded ones called balanced"
    return Found(text, holds(right / all_ >= 0.95 and not wrongly))


def arena(source: Source) -> Found:
    known = source.only(group="known")

    def hits(method: str) -> tuple[float, str]:
        rows = rows_with(known, method=method)
        right = sum(round(row["count"]) == row["rank"] for row in rows)
        return right / len(rows), f"{method} {proportion(right, len(rows))}"

    ours, told = hits("adaptive")
    best = max(hits(name) for name in distinct(known, "method") if name != "adaptive")
    return Found(f"{told}; best rival: {best[1]}", holds(ours > best[0]))


def _ratios(text: str, at: int) -> dict[str, float]:
    """First cell: the number that begins cell `at`, of the lines of a page's tables with a "("."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| ")]
    found = {cells[0].strip(): cells[at].strip() for cells in lines if len(cells) > abs(at)}
    numbers = {name: re.match(r"(\d+\.\d+) \(", cell) for name, cell in found.items()}
    return {name: float(match[1]) for name, match in numbers.items() if match}


def _processor(text: str) -> str:
    return re.search(r"^\| CPU +\| +(.*?) \|", text, re.M)[1].strip()


def step_speed(source: Source) -> Found:
    step = source.text.partition("## The training step")[2].partition("###")[0]
    ratios = _ratios(step, -1)
    told = ", ".join(f"{ratio:.2f} at {batch}" for batch, ratio in ratios.items())
    text = f"times as fast: {told} images a batch ({_processor(source.text)})"
    return Found(text, holds(min(ratios.values()) >= 1))


def sweep_speed(source: Source) -> Found:
    told = re.search(r"(\d\.\d+) times as fast as in PyTorch eager, (\d\.\d+)", source.text)
    text = f"{told[1]} times as fast as PyTorch eager, {told[2]} times torch.compile"
    return Found(f"{text} ({_processor(source.text)})", holds(float(told[2]) >= 1))
