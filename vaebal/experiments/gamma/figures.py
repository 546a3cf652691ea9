"""The figures of learned against fixed gamma."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from matplotlib.axis import Axis

from vaebal.data import ImageSet
from vaebal.experiments import report
from vaebal.experiments.gamma import order
from vaebal.experiments.report import Row, column, rows_with
from vaebal.experiments.table1 import PAPER, PAPER_DATA

HUES = {
    **{"learned": "Blues", "adam": "Greens", "annealed": "Purples", "held": "Greys"},
    **{"plain": "Greens", "adaptive": "YlOrRd"},
}
EDGED, HOLLOW = {"markeredgecolor": "k"}, {"markerfacecolor": "w"}
# By kind of arm: marker, its size, line, the rest of its look, and what the legend says.
_MARKS = {
    "learned": ("o", 3.5, "-", {}, "closed form, at most this speed"),
    "adam": ("^", 4.5, ":", HOLLOW, "Adam on log γ at this rate"),
    "annealed": ("s", 4, "none", HOLLOW, "prescribed, at this speed"),
    "adaptive": ("*", 10, "none", EDGED, "adaptive homotopy, at its mean speed"),
    "guarded": ("P", 6, "none", EDGED, "guarded to the end, at its mean speed"),
    "settled": ("D", 4.5, "none", EDGED, "gone on with, at the count found"),
    "plain": ("d", 4.5, "none", HOLLOW, "learned anew, at a count found or given"),
    "fixed": ("x", 5, "none", {}, "γ fixed from scratch"),
    "held": ("v", 5, "none", {}, "γ held at a value"),
}
MARKS = {
    kind: {"marker": marker, "markersize": size, "linestyle": line, "label": label, **rest}
    for kind, (marker, size, line, rest, label) in _MARKS.items()
}


def looks(arms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A line's style for every arm: hue by kind, darker if faster; fixed dashed, as its source."""
    arms = order.in_order(arms)
    moving = order.in_order(order.source(arm) for arm in arms)
    styles: dict[str, dict[str, Any]] = {}
    for name, hue in HUES.items():
        members = [arm for arm in moving if order.kind(arm) == name]
        for shade, arm in zip(np.linspace(0.3, 1.0, len(members) + 1)[1:], members, strict=True):
            styles[arm] = {"color": plt.get_cmap(hue)(shade), "marker": MARKS[name]["marker"]}
    styles["guarded"] = {"color": report.COLOURS[3], "marker": "P"}
    styles["adaptive"] = {"color": report.COLOURS[1], "marker": "*"}
    aside = {
        "fixed": {"marker": "x", "linestyle": "--"},
        "settled": {"marker": "D", "linestyle": "-."},
        "plain": {"marker": "d", "linestyle": ":"},
        "held": {"marker": "v"},
    }
    return {arm: styles[order.source(arm)] | aside.get(order.kind(arm), {}) for arm in arms}


def _legend(figure: plt.Figure, handles: Sequence[Any], height: float = 0.0, most: int = 9) -> None:
    """A legend below the panels, of at most so many columns."""
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, height),
                  ncols=min(len(handles), most), fontsize=8, columnspacing=1.3)  # fmt: skip
    figure.tight_layout()


def _log_ticks(axis: Axis, narrow: str, wide: str | ticker.Formatter) -> None:
    """Ticks at 1, 2, 5 over up to 50 times, at powers of ten over more, and their formats.

    At a few round numbers over less than five times, where these would be one or two.
    """
    low, high = axis.get_view_interval()
    few = high < 50 * low
    if high < 5 * low:
        axis.set_major_locator(ticker.MaxNLocator(4))
    else:
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


def _margin(rows: Sequence[Row]) -> dict[str, float]:
    """Where the arms without a speed are drawn: right of every speed."""
    fastest = max(order.speed(row) for row in rows if order.kind(row["arm"]) not in order.ASIDE)
    return {
        arm: fastest * 5 * 3**index for index, arm in enumerate(order.arms_of(rows, *order.ASIDE))
    }


def _speed_axis(axis: plt.Axes, rows: Sequence[Row], margin: Mapping[str, float]) -> None:
    """Ticks at prescribed speeds, and at the arms without one beyond a line."""
    rates = sorted(set(map(order.rate, order.arms_of(rows, *order.MOVING))))
    rates = rates or [
        np.mean([order.speed(row) for row in rows if order.kind(row["arm"]) not in order.ASIDE])
    ]
    axis.set_xscale("log")
    named = [order.shown(arm).removeprefix("fixed at ") for arm in margin]
    axis.set_xticks(
        [*rates, *margin.values()], [*(f"{each:.2g}" for each in rates), *named],
        rotation=40, ha="right", rotation_mode="anchor", fontsize=7.5,
    )  # fmt: skip
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    if margin:
        border = min(margin.values()) / 2.2
        axis.axvline(border, color="0.6", linewidth=0.8)
        axis.text(border, 1.0, " no descent", transform=axis.get_xaxis_transform(), va="bottom",
                  color="0.4", fontsize=8)  # fmt: skip
    axis.set_xlabel("speed: nats of log γ a step")


def _plot_over_speed(
    axis: plt.Axes,
    rows: Sequence[Row],
    field: Callable[[Row], float],
    colours: Mapping[int, Any],
    margin: Mapping[str, float],
) -> None:
    """`field` over speed: means, bars from the least seed to the largest; ASIDE on the right."""
    for index, (rank, colour) in enumerate(colours.items()):
        # Side by side, so that bars of several r can be told apart.
        dodge = 1.09 ** (index - (len(colours) - 1) / 2)
        for name, style in MARKS.items():
            cells = [rows_with(rows, rank=rank, arm=arm) for arm in order.arms_of(rows, name)]
            cells = [seeds for seeds in cells if seeds]
            if cells:
                places = [margin.get(seeds[0]["arm"], np.mean([*map(order.speed, seeds)]))
                          for seeds in cells]  # fmt: skip
                found = [list(map(field, seeds)) for seeds in cells]
                means = np.array([np.mean(numbers) for numbers in found])
                bars = [means - list(map(min, found)), list(map(max, found)) - means]
                axis.errorbar(
                    np.array(places) * dodge, means, np.maximum(bars, 0), color=colour,
                    elinewidth=0.8, linewidth=1.3, zorder=3 if name == "adaptive" else 2, **style,
                )  # fmt: skip
    _speed_axis(axis, rows, margin)


def draw_speed(rows: Sequence[Row]) -> plt.Figure:
    """The headline: active - r, MMD^2 and error over the speed of gamma's descent, a line an r.

    Without the arms whose count another found: how gamma moves does not decide it.
    """
    rows = [row for row in rows if order.kind(row["arm"]) not in order.COUNTED]
    known, ranks, margin = order.of_known_rank(rows), order.ranks_of(rows), _margin(rows)
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(ranks)))
    colours = dict(zip(ranks, shades, strict=True))
    noise = 2 * float(np.median(column(rows, "mmd_se"))) or 1e-4

    figure, (dimensions, mmd, error) = plt.subplots(1, 3, figsize=(11.0, 3.6))
    if known:  # linear around 0, logarithmic beyond
        dimensions.set_yscale("symlog", linthresh=1)
        dimensions.axhline(0, color="0.3", linewidth=1, linestyle="--", zorder=0)
    mmd.set_yscale("symlog", linthresh=noise)
    error.set_yscale("log")
    for axis, title, field in (
        (
            *(dimensions, "active − r" if known else "active dimensions"),
            lambda row: row[order.ACTIVE] - row["rank"],
        ),
        (mmd, "MMD² to N(0, I)", lambda row: row["mmd"]),
        (error, "reconstruction error  Σ(x−x̂)²", lambda row: row["error_mean"]),
    ):
        _plot_over_speed(axis, rows, field, colours, margin)
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
    marks = [plt.Line2D([], [], color="0.25", **style)
             for name, style in MARKS.items() if order.arms_of(rows, name)]  # fmt: skip
    if known:
        _legend(figure, lines)
    _legend(figure, marks, -0.07 if known else 0.0)
    return figure


def draw_front(rows: Sequence[Row]) -> plt.Figure:
    """Test error and bound against the number of active latents, a point a run, a look a kind.

    Left and below is better; the paper's five points where the data is its own.
    """
    bound = "nll" if all("nll" in row for row in rows) else "negative_elbo"
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.9))
    styles, kinds = looks(column(rows, "arm")), [k for k in MARKS if order.arms_of(rows, k)]
    for axis, field, paper in zip(axes, ("error_mean", bound), (0, 1), strict=True):
        for row in rows:
            look = MARKS[order.kind(row["arm"])] | {"label": "", "linestyle": "none"}
            colour = styles[row["arm"]]["color"]
            axis.plot(row[order.ACTIVE], row[field], **look | {"color": colour})
        if rows[0]["data"] == PAPER_DATA:
            axis.plot(
                [theirs[2] for theirs in PAPER.values()],
                [theirs[paper] for theirs in PAPER.values()],
                color="k", marker="s", markersize=5, linestyle="none", zorder=0,
            )  # fmt: skip
        axis.set_xscale("log")
        _log_ticks(axis.xaxis, "{x:g}", "{x:g}")
        axis.set_xlabel("active latents")
    axes[0].set_yscale("log")
    _log_ticks(axes[0].yaxis, "{x:g}", "{x:g}")
    axes[0].set_title("test error  Σ(x−x̂)²", fontsize=10)
    title = "NLL, an upper bound (nats)" if bound == "nll" else "−ELBO (nats)"
    axes[1].set_title(title, fontsize=10)
    marks = [plt.Line2D([], [], color="0.25", **MARKS[name] | {"linestyle": "none"})
             for name in kinds]  # fmt: skip
    if rows[0]["data"] == PAPER_DATA:
        marks.append(plt.Line2D([], [], color="k", marker="s", markersize=5, linestyle="none",
                                label="the paper, κ = 50 … 784"))  # fmt: skip
    _legend(figure, marks, most=3)
    return figure


def draw_dimensions(known: Sequence[Row], opens: bool) -> plt.Figure:
    """Active dimensions against the true r, known of every row; a panel an arm, seeds abreast.

    Args:
      opens: whether the adaptive arm opens latents one by one.
    """
    arms, ranks = order.arms_of(known), order.ranks_of(known)
    styles, kappa = looks(arms), max(column(known, "kappa"))
    lines = -(-len(arms) // 5)
    columns = -(-len(arms) // lines)
    figure, axes = plt.subplots(
        lines, columns, figsize=(0.5 + 2.3 * columns, 0.5 + 2.2 * lines), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    width = 0.7 * min(np.diff(ranks), default=1)
    ends = [ranks[0] - 0.5, ranks[-1] + 0.5]
    line = {"color": "0.3", "linewidth": 1, "zorder": 0}
    for axis in axes.flat[len(arms) :]:
        axis.set_axis_off()
    for index, (axis, arm) in enumerate(zip(axes.flat, arms, strict=False)):
        axis.plot(ends, ends, linestyle="--", label="as many as the data have", **line)
        axis.axhline(kappa, linestyle=":", label=f"all {kappa} latents", **line)
        for rank in ranks:
            seeds = sorted(rows_with(known, rank=rank, arm=arm), key=lambda row: row["seed"])
            offsets = width * ((np.arange(len(seeds)) + 0.5) / max(len(seeds), 1) - 0.5)
            axis.plot(
                rank + offsets, column(seeds, order.ACTIVE), linestyle="none",
                color=styles[arm]["color"], marker=styles[arm]["marker"],
                markersize=4 if order.kind(arm) == "adaptive" else 3,
            )  # fmt: skip
        share = order.count(rows_with(known, arm=arm))
        axis.set_title(f"{_in_words(arm, opens)}\nactive = r in {share}", fontsize=8)
        axis.set_xticks(ranks)
        axis.tick_params(labelsize=7.5, labelbottom=True)
        axis.grid(axis="x", visible=False)
        if index + columns >= len(arms):
            axis.set_xlabel("dimension r of the data")
    axes[0, 0].set_ylim(0, 1.06 * kappa)
    for axis in axes[:, 0]:
        axis.set_ylabel("active latents")
    handles, _ = axes[0, 0].get_legend_handles_labels()
    run = plt.Line2D([], [], color="0.3", linestyle="none", marker="o", markersize=3,
                     label="any mark: a run, seeds side by side")  # fmt: skip
    _legend(figure, [*handles, run])
    return figure


def _in_words(arm: str, opens: bool) -> str:
    """An arm in two lines, for a reader who has seen no table."""
    match order.kind(arm):
        case "adaptive":
            how = "latents opened one by one" if opens else "all latents from the start"
            return f"{how}\n({order.shown(arm)})"
        case "learned":
            return f"γ learned, at most\n{arm.removeprefix('learned ')} nats a step"
        case "fixed":
            return f"γ fixed from scratch where\n{order.source(arm)} ends"
    return f"{order.shown(arm)}\n"


def draw_homotopy(histories: Mapping[order.Key, list[dict]], images: ImageSet) -> plt.Figure:
    """Figure 1 and what goes with it: |dL/dz|, gamma and active dimensions during training."""
    ranks = sorted({rank for _, rank, _ in histories})
    rank = ranks[len(ranks) // 2]
    runs = {key: entries for key, entries in histories.items() if key[1] == rank and entries}
    styles = looks(arm for arm, _, _ in runs)
    lines = {
        arm: {"color": style["color"], "linestyle": style.get("linestyle", "-")}
        for arm, style in styles.items()
    }
    figure, axes = plt.subplots(1, 3, figsize=(11.0, 3.4))
    for (arm, _, _), entries in runs.items():
        first = order.kind(arm) == "adaptive"
        line = lines[arm] | {"linewidth": 1.5 if first else 0.9, "zorder": 3 if first else 2}
        steps = [max(entry["step"], 1) for entry in entries]
        for axis, name in zip(axes, ("latent_gradient", "gamma", "active"), strict=True):
            axis.plot(steps, column(entries, name), alpha=0.85, **line)
        error = np.array(column(entries, "squared_error")) / images.dim
        axes[1].plot(steps, error, alpha=0.85, **line | {"linestyle": ":", "zorder": 1})
    counted = "active dimensions (r dashed)" if rank else "active dimensions"
    titles = ("E‖dL/dz‖₂ (nats)", "γ, and E‖x−x̂‖²/d (dotted)", counted)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xscale("log")
        _log_ticks(axis.xaxis, "{x:,.0f}", "{x:,.0f}")
        axis.set_xlabel("training steps")
        axis.set_title(title, fontsize=10)
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[2].set_ylim(bottom=0)
    axes[2].yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if rank:
        axes[2].axhline(rank, color="0.3", linewidth=1, linestyle="--", zorder=0)
    seeds = len({seed for _, _, seed in runs})
    figure.suptitle(
        f"r = {rank or 'unknown'}; a line a run, {seeds} seed{'s' * (seeds > 1)} an arm",
        fontsize=10,
    )
    handles = [plt.Line2D([], [], label=order.shown(arm), **line) for arm, line in lines.items()]
    _legend(figure, handles, most=5)
    return figure


def draw_factors(rows: Sequence[Row], names: Sequence[str]) -> plt.Figure:
    """Which active latent holds which factor: shares of variance, a panel an r.

    Of one run an r, the first arm's lowest seed. Latents are ordered by the factor they hold most
    of.

    Args:
      rows: of known r, with "factor_shares".
      names: of the factors, at least r.
    """
    arm = order.arms_of(rows)[0]
    runs = [min(rows_with(rows, arm=arm, rank=r), key=lambda row: row["seed"])
            for r in order.ranks_of(rows_with(rows, arm=arm))]  # fmt: skip
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
    figure.suptitle(
        f"{order.shown(arm)}: which latent (column) holds which factor (row)", fontsize=10
    )
    return figure


def _held(run: Row) -> np.ndarray:
    """The active latents' shares [K', r], in the order of the factors that they hold most of."""
    shares = np.array(run["factor_shares"])[np.array(run["active_latents"], int)]
    return shares[np.lexsort((-shares.max(1), shares.argmax(1)))] if len(shares) else shares


def _run(arm: str, rank: int, seed: int) -> str:
    """ "learned 1e-2, r = 4, seed 0", less what is not known or said."""
    where = [order.shown(arm) if arm else "", f"r = {rank}" if rank else "", f"seed {seed}"]
    return ", ".join(filter(None, where))


def draw_traversals(
    rows: Sequence[Row], pictures: Mapping[order.Key, dict[str, np.ndarray]], images: ImageSet
) -> plt.Figure:
    """One latent varied a row, active ones first; of the first arm, the largest r, the least seed.

    Args:
      rows: for the latents' KL.
      pictures: by (arm, r, seed), "traversals" and the rest of `evaluate.traverse`.
    """
    arms = order.in_order(arm for arm, _, _ in pictures)
    key = min(pictures, key=lambda key: (arms.index(key[0]), -key[1], key[2]))
    arm, rank, seed = key
    (row,) = rows_with(rows, arm=arm, rank=rank, seed=seed)
    found, active = pictures[key], set(row["active_latents"])
    lines = []
    for latent, content in zip(found["latents"].tolist(), found["traversals"], strict=True):
        held = f"KL {row['kl_per_dimension'][latent]:.1f}" if latent in active else "idle"
        lines.append((f"z{latent}, {held}", content))
    title = f"{_run(arm, rank, seed)}: one latent varied, the rest at an image's posterior mean"
    heads = [f"{value:g}".replace("-", "−") for value in found["values"]]
    return report.image_grid(lines, images.image_shape, title, heads)


def draw_pictures(
    pictures: Mapping[order.Key, dict[str, np.ndarray]], images: ImageSet, samples_only: bool
) -> plt.Figure:
    """Test images, reconstructions and samples of every arm, at the largest r, of one seed."""
    rank = max(rank for _, rank, _ in pictures)
    seed = min(seed for _, known, seed in pictures if known == rank)
    content = {
        arm: pictures[arm, rank, seed]
        for arm in order.in_order(arm for arm, _, _ in pictures)
        if (arm, rank, seed) in pictures
    }
    rows, what = [], "the first samples"
    if not samples_only:
        rows, what = (
            [("test images", next(iter(content.values()))["images"])],
            f"the first test images, {what}",
        )
        rows += [
            (f"reconstructed,\n{order.shown(arm)}", each["reconstructions"])
            for arm, each in content.items()
        ]
    rows += [(f"samples,\n{order.shown(arm)}", each["samples"]) for arm, each in content.items()]
    title = f"{_run('', rank, seed)}; uncurated: {what}"
    return report.image_grid(rows, images.image_shape, title)
