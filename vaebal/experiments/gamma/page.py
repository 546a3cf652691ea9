"""The report of learned against fixed gamma: Table 2, Figure 1, and balance over gamma's speed.

An arm says how gamma moves, r is the data's true dimension (0: unknown). Pairs are runs of the
same r and seed, so of the same data, initialisation and noise.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from matplotlib.axis import Axis

from vaebal.data import ImageSet
from vaebal.data.rendered import FACTORS
from vaebal.experiments import report
from vaebal.experiments.report import Row, rows_with
from vaebal.homotopy.opener import EARLY_PATIENCE
from vaebal.training.workdir import write_atomically

Key = tuple[str, int, int]  # arm, r, seed
Table = tuple[list[str], list[list[str]]]

# Table 2 of the paper (CelebA): pixels -> (Rec. Err., MMD) with gamma learned, and fixed.
PAPER = {64: ((60.5, 20.24), (59.6, 69.59)), 128: ((352.8, 93.3), (349.9, 291.8))}
KINDS = ("adaptive", "guarded", "learned", "adam", "annealed", "fixed")
HUES = {"learned": "Blues", "adam": "Greens", "annealed": "Purples"}
ACTIVE = "active_0.01"
MARKS: dict[str, dict[str, Any]] = {
    "learned": {"marker": "o", "markersize": 3.5, "label": "closed form, at most this speed"},
    "adam": {
        **{"marker": "^", "markersize": 4.5, "markerfacecolor": "w", "linestyle": ":"},
        "label": "Adam on log γ at this rate",
    },
    "annealed": {
        **{"marker": "s", "markersize": 4, "markerfacecolor": "w", "linestyle": "none"},
        "label": "prescribed, at this speed",
    },
    "adaptive": {
        **{"marker": "*", "markersize": 10, "markeredgecolor": "k", "linestyle": "none"},
        "label": "adaptive homotopy, at its mean speed",
    },
    "guarded": {
        **{"marker": "P", "markersize": 6, "markeredgecolor": "k", "linestyle": "none"},
        "label": "guarded to the end, at its mean speed",
    },
    "fixed": {"marker": "x", "markersize": 5, "linestyle": "none", "label": "γ fixed from scratch"},
}


def kind(arm: str) -> str:
    """Its first word, one of KINDS."""
    return arm.split()[0]


def source(arm: str) -> str:
    """The arm whose gamma* `arm` is fixed at."""
    return arm.removeprefix("fixed at ")


def rate(arm: str) -> float:
    """Its prescribed speed in nats of log gamma a step; NaN where there is none."""
    return float(arm.split()[1]) if kind(arm) in HUES else math.nan


def speed(row: Row) -> float:
    """Nats of log gamma a step: prescribed, or a guarded run's mean; NaN if gamma is fixed."""
    if kind(row["arm"]) in ("adaptive", "guarded"):
        return math.log(row["gamma_start"] / row["gamma"]) / row["steps"]
    return rate(row["arm"])


def in_order(arms: Iterable[str]) -> list[str]:
    """Distinct arms by kind, then rate; the fixed ones last, ordered as their sources."""

    def place(arm: str) -> tuple:
        fixed, moving = kind(arm) == "fixed", source(arm)
        return fixed, KINDS.index(kind(moving)), np.nan_to_num(rate(moving)), arm

    return sorted(set(arms), key=place)


def shown(arm: str) -> str:
    """`arm` as readers see it."""
    return arm.replace("fixed at ", "fixed at γ* of ").replace(" to ", " to γ* of ")


def ranks_of(rows: Sequence[Row]) -> list[int]:
    """Every r, ascending."""
    return sorted({row["rank"] for row in rows})


def pairs_of(rows: Sequence[Row], fixed: str) -> list[tuple[Row, Row]]:
    """(learned, fixed) runs of the same r and seed, for the arm `fixed`."""
    learned = {(row["rank"], row["seed"]): row for row in rows_with(rows, arm=source(fixed))}
    return [
        (learned[row["rank"], row["seed"]], row)
        for row in rows_with(rows, arm=fixed)
        if (row["rank"], row["seed"]) in learned
    ]


def crowded(rows: Sequence[Row]) -> dict[tuple[int, int], Row]:
    """By (r, seed): the "learned" run of least error of those with more than r active latents."""
    found: dict[tuple[int, int], Row] = {}
    for row in rows:
        place = row["rank"], row["seed"]
        if kind(row["arm"]) == "learned" and row[ACTIVE] > row["rank"]:
            found[place] = min(found.get(place, row), row, key=lambda run: run["error_mean"])
    return found


def scaled(values: Sequence[float]) -> str:
    """Mean ± standard deviation with three figures at any scale: "(1.43 ± 0.05)e−6", "45.6"."""
    mean, spread = report.mean_and_spread(values)
    size = max(abs(mean), spread or 0.0)
    if size == 0:
        return "0"
    exponent = math.floor(math.log10(size))
    small = exponent < -2
    unit, digits = (10.0**exponent, 2) if small else (1.0, max(0, 2 - exponent))
    text = report.number(round(mean / unit, digits), digits)
    text += f" ± {spread / unit:.{digits}f}" if spread is not None else ""
    if not small:
        return text
    return f"{text}e−{-exponent}" if spread is None else f"({text})e−{-exponent}"


def signed(values: Sequence[float], digits: int) -> str:
    """`report.with_spread`, with a plus sign where the mean is positive."""
    text = report.with_spread(values, digits)
    return f"+{text}" if np.mean(values) > 0 else text


def values(rows: Sequence[Row], name: str) -> list[float]:
    """One field of every row."""
    return [row[name] for row in rows]


def count(rows: Sequence[Row]) -> str:
    """In how many of the runs active = r; empty where r is unknown."""
    known = [row for row in rows if row["rank"]]
    exact = sum(row[ACTIVE] == row["rank"] for row in known)
    return f"{exact} of {len(known)}" if known else ""


def main_table(rows: Sequence[Row]) -> Table:
    """One line for every r and arm, over seeds."""
    header = ["r", "arm", "γ", "Rec. Err.", "−ELBO", "active > .01", "σ² < ½", "= r"]
    header += ["MMD²", "MMD² (active)", "factor R²", "residual/γ", "γ off by"]
    body = []
    for rank in ranks_of(rows):
        for arm in in_order(values(rows_with(rows, rank=rank), "arm")):
            seeds = rows_with(rows, rank=rank, arm=arm)
            factors = [np.mean(row["factor_r2"]) for row in seeds if row["factor_r2"]]
            off = 100 * np.mean(values(seeds, "gamma_residual_relative"))
            body.append(
                [
                    *(str(rank or "?"), shown(arm), scaled(values(seeds, "gamma"))),
                    scaled(values(seeds, "error_mean")),
                    report.with_spread(values(seeds, "negative_elbo"), 1),
                    report.with_spread(values(seeds, ACTIVE), 1),
                    report.with_spread(values(seeds, "informative"), 1),
                    *(count(seeds), scaled(values(seeds, "mmd"))),
                    scaled(values(seeds, "mmd_active")),
                    report.with_spread(factors, 2) if factors else "",
                    report.with_spread(values(seeds, "residual_over_gamma"), 2),
                    f"{off:+.1f} %".replace("-", "−"),
                ]
            )
    return header, body


def mmd_ratio(pairs: Sequence[tuple[Row, Row]]) -> str:
    """MMD² fixed over learned, a ratio a pair; a bound where a learned one may well be zero.

    The bound moves both by two standard errors and is the least of the pairs'.
    """
    if all(learned["mmd"] > 2 * learned["mmd_se"] for learned, _ in pairs):
        return scaled([fixed["mmd"] / learned["mmd"] for learned, fixed in pairs])
    least = min(
        (fixed["mmd"] - 2 * fixed["mmd_se"]) / (max(learned["mmd"], 0) + 2 * learned["mmd_se"])
        for learned, fixed in pairs
    )
    return f"> {scaled([least])}" if least > 0 else "–"


def paper_table(rows: Sequence[Row]) -> Table:
    """Table 2: the paper's two lines, then every pair of arms at every r."""
    header = ["data", "γ* from", "Rec. learned", "Rec. fixed", "Rec. ratio"]
    header += ["MMD learned", "MMD fixed", "MMD ratio", "−ELBO +"]
    body = []
    for pixels, ((error, mmd), (error_fixed, mmd_fixed)) in PAPER.items():
        line = [f"paper: CelebA, {pixels} px", "learned", f"{error}", f"{error_fixed}"]
        line += [f"{error_fixed / error:.3f}", f"{mmd}", f"{mmd_fixed}", f"{mmd_fixed / mmd:.2f}"]
        body.append([*line, ""])
    for arm in in_order(values(rows, "arm")):
        pairs = pairs_of(rows, arm) if kind(arm) == "fixed" else []
        for rank in sorted({learned["rank"] for learned, _ in pairs}):
            seeds = [pair for pair in pairs if pair[0]["rank"] == rank]
            learned, fixed = zip(*seeds, strict=True)
            ratios = [b["error_mean"] / a["error_mean"] for a, b in seeds]
            elbos = [b["negative_elbo"] - a["negative_elbo"] for a, b in seeds]
            body.append(
                [
                    learned[0]["data"] + (f", r = {rank}" if rank else ""),
                    *(source(arm), scaled(values(learned, "error_mean"))),
                    scaled(values(fixed, "error_mean")),
                    *(report.with_spread(ratios, 3), scaled(values(learned, "mmd"))),
                    *(scaled(values(fixed, "mmd")), mmd_ratio(seeds), signed(elbos, 1)),
                ]
            )
    return header, body


def summary_table(rows: Sequence[Row]) -> Table:
    """One line an arm, over every r and seed: balance, and what it costs."""
    header = ["arm", "active = r", "active − r", "MMD²", "γ off by, at most"]
    header += ["Rec. Err. ×", "−ELBO +", "in runs"]
    reference, body = crowded(rows), []
    for arm in in_order(values(rows, "arm")):
        runs = rows_with(rows, arm=arm)
        excess = [row[ACTIVE] - row["rank"] for row in runs if row["rank"]]
        beside = price(runs, reference)
        off = 100 * max(map(abs, values(runs, "gamma_residual_relative")))
        body.append(
            [
                *(shown(arm), count(runs), signed(excess, 2) if excess else ""),
                *(scaled(values(runs, "mmd")), f"{off:.1f} %"),
                report.with_spread([error for error, _ in beside], 2) if beside else "",
                signed([elbo for _, elbo in beside], 1) if beside else "",
                str(len(beside)),
            ]
        )
    return header, body


def price(runs: Sequence[Row], reference: Mapping[tuple[int, int], Row]) -> list[tuple]:
    """(error over the crowded run's, −ELBO less the crowded run's in nats), where there is one."""
    found = []
    for row in runs:
        other = reference.get((row["rank"], row["seed"]))
        if other:
            elbo = row["negative_elbo"] - other["negative_elbo"]
            found.append((row["error_mean"] / other["error_mean"], elbo))
    return found


def _said(rows: Sequence[Row]) -> str:
    """ "19 of 20 runs (active − r = +0.05 on average)"."""
    excess = np.mean([row[ACTIVE] - row["rank"] for row in rows if row["rank"]])
    mean = f"{excess:+.2f}".replace("-", "−") if round(excess, 2) else "0"
    return f"{count(rows)} runs (active − r = {mean} on average)"


def _nats(difference: float) -> str:
    return f"{abs(difference):.1f} nats {'higher (worse)' if difference > 0 else 'lower (better)'}"


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, from the rows alone."""
    arms = in_order(values(rows, "arm"))
    known = [row for row in rows if row["rank"]]
    learned = [arm for arm in arms if kind(arm) == "learned"]
    parts = []
    if known:
        spoken = []
        if "adaptive" in arms:
            spoken.append(
                f"with the adaptive homotopy in {_said(rows_with(known, arm='adaptive'))}"
            )
        # Of equals the fastest: a slower one may not have arrived.
        best = max(
            reversed(learned), default=None,
            key=lambda arm: np.mean(
                [row[ACTIVE] == row["rank"] for row in rows_with(known, arm=arm)]
            ),
        )  # fmt: skip
        for arm in dict.fromkeys([best, *learned[-1:]] if best else ()):
            name = "the best rate here" if arm == best else "the fastest"
            aside = f", {name}," if len(learned) > 1 else ""
            spoken.append(
                f"learned at {rate(arm):g} nats a step{aside} in {_said(rows_with(known, arm=arm))}"
            )
        fixed = [row for row in known if kind(row["arm"]) == "fixed"]
        if fixed:
            spoken.append(f"with γ fixed from scratch in {_said(fixed)}")
        parts.append(f"Exactly r latents are active {'; '.join(spoken)}.")
    adaptive = rows_with(rows, arm="adaptive")
    if adaptive:
        off = 100 * max(map(abs, values(adaptive, "gamma_residual_relative")))
        parts.append(f"The adaptive homotopy's γ ends within {off:.1f} % of stationary.")
    beside = price(adaptive, crowded(rows))
    if beside:
        error, elbo = np.mean(beside, axis=0)
        parts.append(
            f"Beside the crowded learned run of least error (same r, same seed; {len(beside)} "
            f"pairs), the adaptive homotopy's error is {error:.2f} times as large and its −ELBO "
            f"{_nats(elbo)}."
        )
    for arm in (arm for arm in arms if kind(arm) == "fixed"):
        pairs = pairs_of(rows, arm)
        if not pairs:
            continue
        higher = sum(b["mmd"] > a["mmd"] for a, b in pairs)
        paper = "the paper's direction" if 2 * higher > len(pairs) else "not the paper's direction"
        before, after = (np.mean([pair[i]["mmd"] for pair in pairs]) for i in (0, 1))
        error = np.mean([b["error_mean"] / a["error_mean"] for a, b in pairs])
        elbo = np.mean([b["negative_elbo"] - a["negative_elbo"] for a, b in pairs])
        parts.append(
            f"Fixing γ at the γ* of {source(arm)} gives the higher MMD² in {higher} of "
            f"{len(pairs)} pairs ({scaled([before])} → {scaled([after])} on average; {paper}) at "
            f"{error:.2f} times the error and a −ELBO {_nats(elbo)}."
        )
    if any(pairs_of(rows, arm) for arm in arms if kind(arm) == "fixed"):
        parts.append("The paper has 3.1 to 3.4 times the MMD at 0.99 times the error.")
    return " ".join(parts)


def protocol(config: Any, rows: Sequence[Row], images: ImageSet) -> dict[str, str]:
    """How the numbers of every table were made and what its columns mean, in full sentences."""
    seeds, ranks = sorted({row["seed"] for row in rows}), ranks_of(rows)
    spread = (
        f"means ± standard deviations over the {len(seeds)} seeds {', '.join(map(str, seeds))}"
        if len(seeds) > 1
        else f"those of one seed ({seeds[0]}), so there is no spread"
    )
    true_dimension = (
        f"The data's true dimension is r = {', '.join(str(r) for r in ranks if r)}. "
        if any(ranks)
        else "The data's true dimension r is unknown. "
    )
    noise = (
        f"The pixels carry white noise of standard deviation {config.data.noise:g}, which gives γ "
        f"a floor of {config.data.noise**2:.2g}. "
        if config.data.noise
        else ""
    )
    start, end = config.train.release
    jitter = config.train.jitter
    steady = f", at a learning rate of at most √({jitter:g} γ/d)" if jitter else ""
    opening = (
        ". It begins with one latent; the next is opened where that variance has not fallen for "
        f"{config.train.patience} steps (or {EARLY_PATIENCE:.0%} of the steps so far, where that "
        "is less) and all open ones are in use. As that bound goes, one still idle is closed "
        "again; closed latents are the prior's, as after Theorem 2's collapse"
        if config.train.patience
        else ""
    )
    drawn = min(config.eval.mmd_samples, rows[0]["test_images"])
    meaning = {
        "adaptive": "adaptive lets γ fall towards the batch's E‖x−x̂‖²/d, but not below "
        f"{config.train.guard:g} times the residual's largest variance along any direction, "
        f"averaged over {config.train.guard_memory} steps (it falls by at least "
        f"{config.train.slowest:g} nats a step, and at most {config.train.fastest:g}), a bound "
        f"that is let go between {start:.0%} and {end:.0%} of the steps{steady}{opening}",
        "guarded": "guarded keeps that bound to the end",
        "learned": "learned RATE moves log γ towards the batch's log E‖x−x̂‖²/d by at most RATE "
        "nats a step",
        "adam": "adam RATE follows γ's gradient with Adam at that rate on log γ",
        "annealed": "annealed RATE to an arm's γ* moves log γ there by RATE nats a step, whatever "
        "the error",
        "fixed": "fixed at an arm's γ* is trained again from that arm's initialisation with γ "
        "held at the value γ* that the arm ended with",
    }
    arms = "; ".join(meaning[each] for each in KINDS if each in map(kind, values(rows, "arm")))
    largest = {
        name: max(values(rows, f"{name}_se")) for name in ("error_mean", "negative_elbo", "mmd")
    }
    return {
        "main": (
            f"Data: {images.name}, {' × '.join(map(str, images.image_shape))}, d = {images.dim}, "
            f"{len(images.train)} training and {rows[0]['test_images']} test images, pixels in "
            f"[0, 1]. {true_dimension}{noise}Training: {config.train.epochs} epochs "
            f"({_one_or_range(values(rows, 'steps'))} steps of batch size "
            f"{config.train.batch_size}), Adam at {config.train.learning_rate:g} with β₂ = "
            f"{config.train.beta2:g}, matrix products in {config.model.products}, a network of "
            f"kind {config.model.network!r} with κ = {config.model.latents} latents. Arms: {arms}. "
            f"Numbers are {spread}, on the test images unless said otherwise. Rec. Err. is "
            "Σ_pixels (x−x̂)² at the posterior mean, −ELBO is in nats. Active > .01 counts "
            "latents with Var_x(E[z|x]) above .01, σ² < ½ those whose mean posterior variance is "
            "below ½; = r counts the seeds in which active is exactly r. MMD² compares z "
            f"drawn from the aggregate posterior, one draw for each of {drawn} test images, with "
            "N(0, I): the seven-scale inverse multiquadric kernel Σ_s C/(C+‖a−b‖²), C = 2κs, s = "
            ".1, .2, .5, 1, 2, 5, 10, the prior integrated and the estimate unbiased, so below "
            "zero now and then where the two agree; (active) is the same on the active latents "
            "alone, κ their number. Factor R² is how well the true factors are predicted from the "
            "active latents by nearest neighbours, averaged over factors. Residual/γ is the "
            "largest variance of x−x̂ along any direction over γ: above 1 an idle latent, if "
            "there is one, could explain it, and training stands at a saddle (Theorem 2). γ off "
            "by is (γ − E‖x−x̂‖²/d)/γ on training images: 0 where γ is stationary, negative where "
            "γ is smaller than the error. Standard errors over test "
            f"images, at most: Rec. Err. {largest['error_mean']:.2g}, −ELBO "
            f"{largest['negative_elbo']:.2g}, MMD² {largest['mmd']:.2g}."
        ),
        "paper": (
            "Ratios are fixed over learned, one for each seed, then mean ± standard deviation. The "
            "paper does not define its MMD, so only ratios compare; ours is the MMD² defined "
            "above (if the paper's is not squared, compare the square root of ours). Where a "
            "learned MMD² is within two standard errors of zero, the ratio is a lower bound: both "
            "moved against it by two standard errors, the least over seeds; – where that says "
            "nothing. −ELBO + is fixed less learned in nats, both at the same γ (positive: fixed "
            "is worse)."
        ),
        "summary": (
            "Over every r and seed, mean ± standard deviation over runs; the columns are those of "
            "the table by r and arm, and γ off by, at most is the largest in any run. Rec. Err. × "
            "and −ELBO + are the error's ratio and −ELBO's difference in nats (positive: worse) to "
            "the crowded run: of the learned runs of the same r and seed with more than r active "
            "latents, the one of least error. In runs: how many have such a partner. These two "
            "differ in γ; Table 2 compares at one γ."
        ),
    }  # fmt: skip


def _one_or_range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def looks(arms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A line's style for every arm: hue by kind, darker if faster; fixed dashed, as its source."""
    arms = in_order(arms)
    moving = in_order(source(arm) for arm in arms)
    styles: dict[str, dict[str, Any]] = {
        "adaptive": {"color": report.COLOURS[1], "marker": "*"},
        "guarded": {"color": report.COLOURS[3], "marker": "P"},
    }
    for name, hue in HUES.items():
        members = [arm for arm in moving if kind(arm) == name]
        for shade, arm in zip(np.linspace(0.3, 1.0, len(members) + 1)[1:], members, strict=True):
            styles[arm] = {"color": plt.get_cmap(hue)(shade), "marker": "o"}
    fixed = {"marker": "x", "linestyle": "--"}
    return {arm: styles[source(arm)] | (fixed if kind(arm) == "fixed" else {}) for arm in arms}


def _log_ticks(axis: Axis, narrow: str, wide: str | ticker.Formatter) -> None:
    """Ticks at 1, 2, 5 over up to 50 times, at powers of ten over more, and their formats."""
    low, high = axis.get_view_interval()
    few = high < 50 * low
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(narrow if few else wide)
    axis.set_minor_formatter(ticker.NullFormatter())


def _ticks(axis: plt.Axes, ticks: Sequence[float]) -> None:
    """Ticks at 0 and ±`ticks`, where the axis reaches them."""
    low, high = axis.get_ylim()
    both = sorted({sign * tick for sign in (-1, 0, 1) for tick in ticks})
    chosen = [tick for tick in both if low <= tick <= high]
    axis.set_yticks(chosen, [f"{tick:g}".replace("-", "−") for tick in chosen])
    axis.minorticks_off()


def _plot_over_speed(
    axis: plt.Axes,
    rows: Sequence[Row],
    field: Callable[[Row], float],
    colours: Mapping[int, Any],
    margin: Mapping[str, float],
) -> None:
    """`field` over speed, means with bars from the least seed to the largest; fixed arms aside."""
    arms = in_order(values(rows, "arm"))
    rates = sorted({rate(arm) for arm in arms if kind(arm) in HUES})
    rates = rates or [
        np.mean([speed(row) for row in rows if kind(row["arm"]) in ("adaptive", "guarded")])
    ]
    for index, (rank, colour) in enumerate(colours.items()):
        # Side by side, so that bars of several r can be told apart.
        dodge = 1.09 ** (index - (len(colours) - 1) / 2)
        for name, style in MARKS.items():
            cells = [rows_with(rows, rank=rank, arm=arm) for arm in arms if kind(arm) == name]
            cells = [seeds for seeds in cells if seeds]
            if cells:
                places = [
                    margin.get(seeds[0]["arm"], np.mean(list(map(speed, seeds)))) for seeds in cells
                ]
                found = [list(map(field, seeds)) for seeds in cells]
                means = np.array([np.mean(numbers) for numbers in found])
                bars = [means - list(map(min, found)), list(map(max, found)) - means]
                axis.errorbar(
                    np.array(places) * dodge, means, np.maximum(bars, 0), color=colour,
                    elinewidth=0.8, linewidth=1.3, zorder=3 if name == "adaptive" else 2, **style,
                )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xticks(
        [*rates, *margin.values()],
        [*(f"{each:.2g}" for each in rates), *(f"γ* of {source(arm)}" for arm in margin)],
        rotation=40, ha="right", rotation_mode="anchor", fontsize=7.5,
    )  # fmt: skip
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    if margin:
        border = min(margin.values()) / 2.2
        axis.axvline(border, color="0.6", linewidth=0.8)
        axis.text(border, 1.0, " fixed", transform=axis.get_xaxis_transform(), va="bottom",
                  color="0.4", fontsize=8)  # fmt: skip
    axis.set_xlabel("speed: nats of log γ a step")


def draw_speed(rows: Sequence[Row]) -> plt.Figure:
    """The headline: active - r, MMD^2 and error over the speed of gamma's descent, a line an r."""
    known, arms = [row for row in rows if row["rank"]], in_order(values(rows, "arm"))
    fastest = max(speed(row) for row in rows if kind(row["arm"]) != "fixed")
    fixed = [arm for arm in arms if kind(arm) == "fixed"]
    margin = {arm: fastest * 5 * 3**index for index, arm in enumerate(fixed)}
    ranks = ranks_of(rows)
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(ranks)))
    colours = dict(zip(ranks, shades, strict=True))
    noise = 2 * float(np.median(values(rows, "mmd_se"))) or 1e-4

    figure, (dimensions, mmd, error) = plt.subplots(1, 3, figsize=(11.0, 3.6))
    if known:  # linear around 0, logarithmic beyond
        dimensions.set_yscale("symlog", linthresh=1)
        dimensions.axhline(0, color="0.3", linewidth=1, linestyle="--", zorder=0)
    mmd.set_yscale("symlog", linthresh=noise)
    error.set_yscale("log")
    for axis, title, shown_rows, field in (
        (
            *(dimensions, "active − r" if known else "active dimensions", known or rows),
            lambda row: row[ACTIVE] - row["rank"],
        ),
        (mmd, "MMD² to N(0, I)", rows, lambda row: row["mmd"]),
        (error, "reconstruction error  Σ(x−x̂)²", rows, lambda row: row["error_mean"]),
    ):
        _plot_over_speed(axis, shown_rows, field, colours, margin)
        axis.set_title(title, fontsize=10, pad=14)
    if known:
        low, high = dimensions.get_ylim()
        dimensions.set_ylim(min(low, -0.4), max(high, 1.3))
        _ticks(dimensions, (1, 2, 5, 10, 20, 50, 100, 200, 500))
    mmd.axhspan(-noise, noise, color="0.92", zorder=0)
    mmd.text(0.98, -0.9 * noise, "± 2 s.e.", transform=mmd.get_yaxis_transform(), ha="right",
             color="0.4", fontsize=7.5)  # fmt: skip
    _ticks(mmd, [10.0**k for k in range(math.ceil(math.log10(noise)), 1)])
    _log_ticks(error.yaxis, "{x:g}", ticker.LogFormatterMathtext())

    lines = [
        plt.Line2D([], [], color=colour, linewidth=2, label=f"r = {rank}" if rank else "r unknown")
        for rank, colour in colours.items()
    ]
    marks = [
        plt.Line2D([], [], color="0.25", **style)
        for name, style in MARKS.items()
        if name in map(kind, arms)
    ]
    for handles, height in ((lines, 0.0), (marks, -0.07)):
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, height),
                      ncols=len(handles), fontsize=8, columnspacing=1.3)  # fmt: skip
    figure.tight_layout()
    return figure


def draw_dimensions(rows: Sequence[Row]) -> plt.Figure:
    """Active dimensions against the true r, a panel an arm, seeds side by side."""
    known = [row for row in rows if row["rank"]]
    arms, ranks = in_order(values(known, "arm")), ranks_of(known)
    styles, kappa = looks(arms), max(values(known, "kappa"))
    columns = min(len(arms), 5)
    lines = -(-len(arms) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(0.5 + 2.3 * columns, 0.5 + 2.2 * lines), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    width = 0.7 * min(np.diff(ranks), default=1)
    ends = [ranks[0] - 0.5, ranks[-1] + 0.5]
    for axis in axes.flat[len(arms) :]:
        axis.set_axis_off()
    for index, (axis, arm) in enumerate(zip(axes.flat, arms, strict=False)):
        axis.plot(ends, ends, color="0.3", linewidth=1, linestyle="--", zorder=0)
        axis.axhline(kappa, color="0.3", linewidth=1, linestyle=":", zorder=0)
        for rank in ranks:
            seeds = sorted(rows_with(known, rank=rank, arm=arm), key=lambda row: row["seed"])
            offsets = width * ((np.arange(len(seeds)) + 0.5) / max(len(seeds), 1) - 0.5)
            axis.plot(
                rank + offsets, values(seeds, ACTIVE), linestyle="none",
                color=styles[arm]["color"], marker=styles[arm]["marker"],
                markersize=5 if arm == "adaptive" else 3,
            )  # fmt: skip
        axis.set_title(
            f"{shown(arm)}\nactive = r in {count(rows_with(known, arm=arm))}", fontsize=8
        )
        axis.set_xticks(ranks)
        axis.tick_params(labelsize=7.5, labelbottom=True)
        axis.grid(axis="x", visible=False)
        if index + columns >= len(arms):
            axis.set_xlabel("true dimension r")
    axes[0, 0].set_ylim(0, 1.06 * kappa)
    for axis in axes[:, 0]:
        axis.set_ylabel("active dimensions")
    figure.legend(
        handles=[
            plt.Line2D([], [], color="0.3", linewidth=1, linestyle="--", label="active = r"),
            plt.Line2D([], [], color="0.3", linewidth=1, linestyle=":", label=f"all κ = {kappa}"),
            plt.Line2D([], [], color="0.3", linestyle="none", marker="o", markersize=3,
                       label="a run (seeds side by side)"),
        ],
        loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, fontsize=8,
    )  # fmt: skip
    figure.tight_layout()
    return figure


def draw_homotopy(histories: Mapping[Key, list[dict]], images: ImageSet) -> plt.Figure:
    """Figure 1 and what goes with it: |dL/dz|, gamma and active dimensions during training."""
    ranks = sorted({rank for _, rank, _ in histories})
    rank = ranks[len(ranks) // 2]
    runs = {key: entries for key, entries in histories.items() if key[1] == rank and entries}
    styles = looks(arm for arm, _, _ in runs)
    figure, axes = plt.subplots(1, 3, figsize=(11.0, 3.4))
    for arm, style in styles.items():
        line = {"color": style["color"], "linestyle": style.get("linestyle", "-")}
        line |= {"linewidth": 1.5 if arm == "adaptive" else 0.9}
        line |= {"zorder": 3 if arm == "adaptive" else 2, "alpha": 0.85}
        for entries in (entries for key, entries in runs.items() if key[0] == arm):
            steps = [max(entry["step"], 1) for entry in entries]
            for axis, name in zip(axes, ("latent_gradient", "gamma", "active"), strict=True):
                axis.plot(steps, values(entries, name), **line)
            error = np.array(values(entries, "squared_error")) / images.dim
            axes[1].plot(steps, error, **line | {"linestyle": ":", "zorder": 1})
    counted = "active dimensions (r dashed)" if rank else "active dimensions"
    for axis, title in zip(
        axes, ("E‖dL/dz‖₂ (nats)", "γ, and E‖x−x̂‖²/d (dotted)", counted), strict=True
    ):  # fmt: skip
        axis.set_xscale("log")
        _log_ticks(axis.xaxis, "{x:,.0f}", "{x:,.0f}")
        axis.set_xlabel("training steps")
        axis.set_title(title, fontsize=10)
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[2].set_ylim(bottom=0)
    if rank:
        axes[2].axhline(rank, color="0.3", linewidth=1, linestyle="--", zorder=0)
    lines = [
        plt.Line2D(
            [], [], color=style["color"], linestyle=style.get("linestyle", "-"), label=shown(arm)
        )
        for arm, style in styles.items()
    ]
    figure.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=5, fontsize=8)
    seeds = len({seed for _, _, seed in runs})
    figure.suptitle(
        f"r = {rank or 'unknown'}; a line a run, {seeds} seed{'s' * (seeds > 1)} an arm"
    )
    figure.tight_layout()
    return figure


def draw_factors(rows: Sequence[Row], names: Sequence[str]) -> plt.Figure:
    """Which active latent holds which factor: shares of variance, a panel an r.

    Of one run an r, the first arm's lowest seed. Latents are ordered by the factor they hold most
    of.

    Args:
      rows: of known r, with "factor_shares".
      names: of the factors, at least r.
    """
    arm = in_order(values(rows, "arm"))[0]
    runs = [min(rows_with(rows, arm=arm, rank=r), key=lambda row: row["seed"])
            for r in ranks_of(rows_with(rows, arm=arm))]  # fmt: skip
    held = [_held(run) for run in runs]
    figure, axes = plt.subplots(
        1, len(runs), squeeze=False, layout="constrained",
        figsize=(max(1.6 + sum(0.8 + 0.3 * len(each) for each in held), 5.0), 1.3 + 0.3 * max(
            run["rank"] for run in runs)),
    )  # fmt: skip
    for axis, run, shares in zip(axes[0], runs, held, strict=True):
        image = axis.imshow(shares.T, vmin=0.0, vmax=1.0, cmap="Blues", aspect="equal")
        axis.set_xticks([])
        axis.set_yticks(range(run["rank"]), names[: run["rank"]])
        axis.tick_params(labelsize=7.5, length=0)
        axis.grid(visible=False)
        axis.set_xlabel(f"{len(shares)} active", fontsize=8)
        axis.set_title(f"r = {run['rank']}, seed {run['seed']}", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of a latent's variance")
    figure.suptitle(f"{shown(arm)}: which latent (column) holds which factor (row)", fontsize=10)
    return figure


def _held(run: Row) -> np.ndarray:
    """The active latents' shares [K', r], in the order of the factors that they hold most of."""
    shares = np.array(run["factor_shares"])[np.array(run["active_latents"], int)]
    return shares[np.lexsort((-shares.max(1), shares.argmax(1)))] if len(shares) else shares


def draw_pictures(pictures: Mapping[Key, dict[str, np.ndarray]], images: ImageSet) -> plt.Figure:
    """Test images, reconstructions and samples of every arm, at the largest r, of one seed."""
    rank = max(rank for _, rank, _ in pictures)
    seed = min(seed for _, known, seed in pictures if known == rank)
    content = {
        arm: pictures[arm, rank, seed]
        for arm in in_order(arm for arm, _, _ in pictures)
        if (arm, rank, seed) in pictures
    }
    rows = [("test images", next(iter(content.values()))["images"])]
    for title, name in (("reconstructed,\n", "reconstructions"), ("samples,\n", "samples")):
        rows += [(title + shown(arm), each[name]) for arm, each in content.items()]
    figure = report.image_grid(rows, images.image_shape)
    where = f"r = {rank}, " if rank else ""
    figure.suptitle(
        f"{where}seed {seed}; uncurated: the first test images, the first samples",
        y=0.88 + 0.3 / figure.get_figheight(),
    )
    return figure


def write(
    config: Any,
    path: Path,
    rows: Sequence[Row],
    stopped: str,
    histories: Mapping[Key, list[dict]],
    pictures: Mapping[Key, dict[str, np.ndarray]],
    images: ImageSet,
) -> None:
    """Writes tables, rows and figures into `path`; prints the tables and what was seen.

    Args:
      rows: one a finished run.
      stopped: a sentence on the others, or "".
      histories: by (arm, r, seed), a run's metrics during training.
      pictures: by (arm, r, seed), "images", "reconstructions" and "samples", each [n, D].
      images: for their name, number and shape.
    """
    report.write_rows(rows, path, "rows")
    figures: dict[str, tuple[str, Callable[[], plt.Figure]]] = {}
    if len({row["arm"] for row in rows}) > 1:
        figures["speed"] = ("Balance over the speed of γ's descent", lambda: draw_speed(rows))
    if any(ranks_of(rows)):
        figures["dimensions"] = ("Active dimensions against r", lambda: draw_dimensions(rows))
    if known := [row for row in rows if row["rank"] and row["active_latents"]]:
        names = FACTORS if images.name == "rendered" else [f"{i}" for i in range(1, 13)]
        figures["factors"] = ("Latents and factors", lambda: draw_factors(known, names))
    if any(histories.values()):
        figures["homotopy"] = ("Training", lambda: draw_homotopy(histories, images))
    if pictures:
        figures["pictures"] = ("Images and samples", lambda: draw_pictures(pictures, images))
    for name, (_, draw) in figures.items():
        report.save_figure(draw, path / f"{name}.png")
    how, links = (
        protocol(config, rows, images),
        {name: f"![{title}]({name}.png)" for name, (title, _) in figures.items()},
    )
    main, summary, beside = main_table(rows), summary_table(rows), paper_table(rows)
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})"
    seconds = sum(values(rows, "train_seconds"))
    sections = [
        f"# {config.name}: learned against fixed γ on {images.name}",
        sentence(rows),
        *filter(None, [links.get("speed")]),
        "## Over all runs",
        *(report.markdown_table(*summary), *filter(None, [stopped]), how["summary"]),
        "## By r and arm",
        report.markdown_table(*main),
        f"{how['main']} Training took {seconds:.0f} s in all on {device}.",
        "## Learned against fixed γ: Table 2",
        *(report.markdown_table(*beside), how["paper"]),
        "## Figures",
        *(link for name, link in links.items() if name != "speed"),
        f"Versions: {', '.join(f'{k} {v}' for k, v in report.versions().items())}.",
        f"```json\n{json.dumps(config.to_dict(), indent=1)}\n```\n",
    ]
    write_atomically(path / "table.md", "\n\n".join(sections))
    report.print_table(*summary, "over every r and seed", grouped=False)
    print(f"{how['summary']}\n")
    report.print_table(
        *main,
        f"learned against fixed γ on {images.name}",
        without=("−ELBO", "σ² < ½", "MMD² (active)", "factor R²"),
    )
    print(f"{how['main']}\n")
    print(f"table {path / 'table.md'}\nfigures", *(path / f"{name}.png" for name in figures))
    print(f"\n{sentence(rows)}")
