"""What the rows in results/ say of a claim: `Source` -> `Found`, its numbers and its verdict."""

import functools
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from claims_rows import Found, NoRows, Source, holds, reproduced, sharpened, shown
from scipy import stats

from vaebal.estimator.validation import CLOSED
from vaebal.experiments import table1
from vaebal.experiments.arena import page as arena_page
from vaebal.experiments.collapse.page import label as variant_label
from vaebal.experiments.counterclaim import page as counterclaim_page
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


def by_both_criteria(arm: str) -> Callable[[Source], Found]:
    """Exact by means that vary, and by small posterior variances."""

    def measure(source: Source) -> Found:
        rows = source.only(arm=arm)
        hits = [
            sum(row[count] == row["rank"] for row in rows)
            for count in (order.ACTIVE, "informative")
        ]
        text = (
            f"{proportion(hits[0], len(rows))} runs by means that vary, "
            f"{proportion(hits[1], len(rows))} by σ² < ½; MMD² {scaled(column(rows, 'mmd'))}"
        )
        return Found(text, all_or_part([each / len(rows) >= 0.95 for each in hits]))

    return measure


def all_or_part(so: Sequence[bool]) -> str:
    """The verdict on a claim of ours with several parts."""
    return holds(all(so)) if all(so) == any(so) else "in part"


def crowded(arm: str) -> Callable[[Source], Found]:
    def measure(source: Source) -> Found:
        rows = source.only(arm=arm)
        spare = [row[order.ACTIVE] - row["rank"] for row in rows]
        hits = sum(more > 0 for more in spare)
        text = f"{proportion(hits, len(rows))} runs with too many, {signed(spare, 1)} latents"
        return Found(text, holds(hits / len(rows) >= 0.95))

    return measure


SAME_ERROR = 1.1  # errors within this factor are about the same


def fixed_against_learned(source: Source) -> Found:
    if not (pairs := order.pairs_of(source.rows, "fixed at adaptive")):
        raise NoRows("arm = fixed at adaptive")
    higher = sum(fixed["mmd"] > learned["mmd"] for learned, fixed in pairs)
    learned, fixed = (scaled(column(rows, "mmd")) for rows in zip(*pairs, strict=True))
    errors = [fixed["error_mean"] / learned["error_mean"] for learned, fixed in pairs]
    # The arm that opens latents one by one is set against one that has all of them.
    opens = source.config.get("train", {}).get("patience", 0)
    text = (
        f"MMD² higher with γ fixed{' and all κ latents open' if opens else ''} in {higher} of "
        f"{len(pairs)} pairs: {learned} → {fixed}; error × {geometric(errors)}"
    )
    if higher < len(pairs):
        return Found(text, "not so here")
    same = abs(np.log(errors).mean()) <= math.log(SAME_ERROR)
    return Found(text, "reproduced" if same else "in part")


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
    arms = ["adaptive", *(["settled after adaptive"] if settled else [])]
    return Found(text, holds(max(counts) - min(counts) <= 2), arms)


def by_patience(source: Source) -> Found:
    arms = order.arms_of(source.rows, "adaptive")
    counts = [column(source.only(arm=arm), order.ACTIVE) for arm in arms]
    told = [
        f"{with_spread(count, 1)} {order.shown(arm)}"
        for count, arm in zip(counts, arms, strict=True)
    ]
    means = [np.mean(count) for count in counts]
    return Found("; ".join(told), holds(max(means) - min(means) <= 2))


def front(source: Source) -> Found:
    """At as many active latents as each of the paper's points, or fewer: the least error."""
    arms = [arm for arm in source.over("arm") if order.kind(arm) in ("settled", "plain")]
    ours = [source.only(arm=arm) for arm in arms]
    told, so = [], []
    for error, _, latents in table1.PAPER.values():
        few = [rows for rows in ours if np.mean(column(rows, order.ACTIVE)) <= latents + 0.5]
        if few:
            best = min(few, key=lambda rows: np.mean(column(rows, "error_mean")))
            so.append(np.mean(column(best, "error_mean")) <= error)
            count, errors = (column(best, name) for name in (order.ACTIVE, "error_mean"))
            told.append(f"{with_spread(count, 1)} latents {with_spread(errors, 2)}")
    if not told:
        raise NoRows("arm = settled or plain, of as few latents as the paper's")
    verdict = reproduced(all(so)) if all(so) == any(so) else "in part"
    return Found("; ".join(dict.fromkeys(told)), verdict, arms)


def settled_against_plain(source: Source) -> Found:
    """At every count: the error on test images, and in training, of all three."""
    told, so, arms = [], [], []
    for arm in order.arms_of(source.rows, "settled"):
        arms += (own := _with_plain(arm))
        each = [source.only(arm=name) for name in own]
        errors = [np.mean(column(rows, "error_mean")) for rows in each]
        texts = [
            f"{scaled(column(rows, 'error_mean'))} (training {scaled(column(rows, 'error_train'))})"
            for rows in each
        ]
        count = with_spread(column(each[1], order.ACTIVE), 1)
        told.append(f"{count} latents: from {texts[0]} to {texts[1]}, plain {texts[2]}")
        so.append(errors[1] <= min(errors))
    return Found("; ".join(told), all_or_part(so), arms)


def _with_plain(settled: str) -> list[str]:
    """A settled arm between the arm that it goes on from and the plain one of its count."""
    ended = settled.removeprefix("settled after ")
    return [ended, settled, f"plain 5e-3 after {ended}"]


def generalises(source: Source) -> Found:
    """The test error over that in training, of the homotopy and of a plain VAE of its count."""

    def ratio(arm: str) -> list[float]:
        return [row["error_mean"] / row["error_train"] for row in source.only(arm=arm)]

    told, so, arms = [], [], []
    for arm in order.arms_of(source.rows, "settled"):
        arms += (own := _with_plain(arm))
        homotopy, settled, plain = map(ratio, own)
        count = with_spread(column(source.only(arm=own[0]), order.ACTIVE), 1)
        each = [with_spread(ratios, 2) for ratios in (homotopy, settled, plain)]
        told.append(f"{count} latents: {each[0]}, gone on with {each[1]}, plain {each[2]}")
        so.append(apart(homotopy, plain) and apart(settled, plain))
    return Found("; ".join(told), all_or_part(so), arms)


def superset(source: Source) -> Found:
    """How many runs keep too many latents: their nets, the same under the homotopy, ours under it.

    In part where ours are right, and their nets under the homotopy still have more than r.
    """
    arms = ("theirs", "theirs, adaptive", "ours, adaptive")
    theirs, moved, ours = each = [source.only(arm=arm) for arm in arms]
    more, right = (
        [count(rows) for rows in each]
        for count in (counterclaim_page.superset, counterclaim_page.right)
    )
    text = (
        f"more than r in {proportion(more[0], len(theirs))} of their runs, in "
        f"{proportion(more[1], len(moved))} of their nets under the homotopy, in "
        f"{proportion(more[2], len(ours))} of ours under it; right in {right[0]}, {right[1]} and "
        f"{right[2]} of them"
    )
    if right[2] < len(ours):
        return Found(text, "falls short", arms)
    return Found(text, "in part" if more[1] else "holds", arms)


def prior_speed(stage: str) -> Callable[[Source], Found]:
    """After which share of the steps the prior of balanced latents is as near as of crowded."""
    return functools.partial(_prior_speed, stage)


def _prior_speed(stage: str, source: Source) -> Found:
    # Pages of before there were several kinds tell a width.
    of = {"stage": stage} if "stage" in source.rows[0] else {"width": int(stage.split()[1])}
    arms = [source.only(arm=arm, **of) for arm in ("adaptive", "kl 1e-6")]
    last = [rows_with(rows, steps=max(column(rows, "steps"))) for rows in arms]
    ends = [scaled(column(rows, "fd")) for rows in last]
    shares = []
    for seed in distinct(arms[0], "seed"):
        best = min(rows_with(arms[1], seed=seed), key=lambda row: row["fd"])
        near = [row["steps"] for row in rows_with(arms[0], seed=seed) if row["fd"] <= best["fd"]]
        shares.append(min(near) / best["steps"] if near else math.inf)
    reached = [f"{share:.2f}" for share in shares if share < math.inf]
    text = (
        f"Fréchet distance (not FID) at the end {ends[0]}, crowded {ends[1]}; as near as its best"
    )
    text += f" in {len(reached)} of {len(shares)} seeds"
    text += f", after {', '.join(reached)} of its steps" if reached else ""
    return Found(text, all_or_part([share <= 1 / 3 for share in shares]))


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


def collapsing(source: Source) -> Found:
    """Which variants of the network keep no active latent, without skips and with both."""

    def gone(skips: str) -> list[str]:
        return [row["variant"] for row in source.only(skips=skips) if not row["active_0.01"]]

    alone, both = gone("none"), gone("residual+affine")
    named = "; ".join(variant_label(variant) for variant in alone)
    text = f"{len(alone)} of {len(source.only(skips='none'))} networks keep no latent ({named})"
    return Found(f"{text}; with both skips {len(both)}", sharpened(len(alone) > len(both)))


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


def bins_that_differ(source: Source) -> Found:
    """NDB/K of samples, for every K that was measured."""
    bins = sorted(int(key.removeprefix("gen_ndb_")) for key in source.rows[0] if "gen_ndb_" in key)
    each = {
        name: [column(source.only(method=name), f"gen_ndb_{k}") for k in bins]
        for name in ("VAE+", "VAE", "WAE-MMD", "Downsample", "held-out images")
    }
    told = [
        f"{name} {', '.join(with_spread(values, 2) for values in by_bins)}"
        for name, by_bins in each.items()
    ]
    ahead = all(
        apart(ours, theirs)
        for name in ("VAE", "WAE-MMD")
        for ours, theirs in zip(each["VAE+"], each[name], strict=True)
    )
    text = f"NDB/{', '.join(map(str, bins))} of samples: {'; '.join(told)}"
    return Found(text, reproduced(ahead))


def without_second_stage(source: Source) -> Found:
    """The nearest samples of a VAE's own prior against the nearest that any second one draws."""
    each = {
        kind: {
            name: column(source.only(method=name), "gen_fd")
            for name in distinct(source.rows, "method") if name.split()[0] == kind
        }
        for kind in ("VAE", "VAE+")
    }  # fmt: skip
    first, second = (min(each[kind], key=lambda name: np.mean(each[kind][name])) for kind in each)
    ours, theirs = each["VAE"][first], each["VAE+"][second]
    rival = column(source.only(method="WAE-MMD"), "gen_fd")
    text = (
        f"Fréchet distance (not FID) of samples: {first} {with_spread(ours, 1)}, nearest of those "
        f"that decode N(0, I); {second} {with_spread(theirs, 1)}; WAE-MMD {with_spread(rival, 1)}"
    )
    return Found(text, holds(not apart(theirs, ours) and apart(ours, rival)))


def opened_against_plain(space: str, kind: str = "VAE") -> Callable[[Source], Found]:
    """A first VAE whose latents were opened one by one, against one learned at a rate; on "codes"
    or "images". By samples of the prior, or of another `kind` of the tables.
    """

    def measure(source: Source) -> Found:
        names = distinct(source.rows, "method")
        plain = f"{kind} ({space})"
        plain = plain if plain in names else kind  # the first space has no name
        told, distances = [], []
        for label, name in (("opened one by one", f"{kind} (balanced {space})"), ("plain", plain)):
            rows = source.only(method=name)
            distances.append(column(rows, "gen_fd"))
            count, error = with_spread(column(rows, "latents"), 1), scaled(column(rows, "error"))
            far = scaled(distances[-1])
            told.append(f"{label}: {far} with {count} latents, error {error}")
        return Found("; ".join(told), holds(apart(*distances)))

    return measure


def counts_factors(method: str) -> Callable[[Source], Found]:
    """Pipelines whose first VAE ends with as many latents as the data have factors."""

    def measure(source: Source) -> Found:
        counts, factors = (
            column(source.only(method=method), "latents"),
            source.config["data"]["rank"],
        )
        hits = sum(count == factors for count in counts)
        errors = [scaled(column(source.only(method=name), "error")) for name in (method, "VAE")]
        text = (
            f"{', '.join(f'{count:.0f}' for count in counts)} of {factors}; error {errors[0]}, "
            f"with all latents {errors[1]}"
        )
        return Found(text, holds(hits == len(counts)))

    return measure


def reaches_reconstructions(method: str) -> Callable[[Source], Found]:
    """Samples of a second stage against what their first VAE makes of test images."""

    def measure(source: Source) -> Found:
        samples, floor = (column(source.only(method=method), f"{of}_fd") for of in ("gen", "rec"))
        times = np.asarray(samples) / np.asarray(floor)
        text = (
            f"Fréchet distance (not FID) of samples {scaled(samples)}, of reconstructions "
            f"{scaled(floor)}: {with_spread(times, 2)} times"
        )
        return Found(text, holds(times.mean() <= 1.5))

    return measure


def table_1_columns(error: float, nll: float, dim: int) -> Callable[[None], Found]:
    """(d/2)(log 2πγ + 1) at the stationary γ = error/d: what the error alone makes of the NLL."""

    def measure(_: None) -> Found:
        term = dim / 2 * (math.log(2 * math.pi * error / dim) + 1)
        return Found(f"{number(term, 0)} nats, by arithmetic", shown(term < nll - 100))

    return measure


# --- The tools


def fit_counts(source: Source) -> Found:
    rows = [row for row in source.rows if row["kind"] not in CLOSED]
    hits = sum(row["dimension"] == row["rank"] for row in rows)
    text = f"{proportion(hits, len(rows))} data sets"
    planned = re.search(r"(\d+) of (\d+) sets are done", source.text)
    so = holds(hits / len(rows) >= 0.95)
    if planned and planned[1] != planned[2]:
        return Found(f"{text}, of {planned[2]} planned", f"{so} so far")
    return Found(text, so)


def closed_counts(source: Source) -> Found:
    rows = [row for row in source.rows if row["kind"] in CLOSED]
    hits = sum(row["dimension"] in (row["rank"], row["rank"] + 1) for row in rows)
    return Found(f"{proportion(hits, len(rows))} shapes", holds(hits == len(rows)))


def allowed_counts(kind: str) -> Callable[[Source], Found]:
    """Of the "film"s or "face"s."""

    def found(source: Source) -> Found:
        rows = [row for row in source.rows if row["kind"] == kind]
        hits = sum(row["dimension"] in row["counts"] for row in rows)
        return Found(f"{proportion(hits, len(rows))} sets", holds(hits / len(rows) >= 0.9))

    return found


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
    """Ours on all data sets, and on those that rivals have too beside the best of them."""
    known = arena_page.known(source.rows)
    ours = arena_page.of_method(known, arena_page.OURS)
    rivals = {
        name: arena_page.of_method(known, name)
        for name in arena_page.labels(known)
        if name != arena_page.OURS
    }
    best = max(rivals, key=lambda name: arena_page.exact(rivals[name]) / len(rivals[name]))
    beside, theirs = arena_page.shared(ours, rivals[best]), rivals[best]
    text = (
        f"{proportion(arena_page.exact(ours), len(ours))}; where rivals ran "
        f"{arena_page.exact(beside)} of {len(beside)}, the best of them ({best}) "
        f"{arena_page.exact(theirs)} of {len(theirs)}"
    )
    return Found(text, holds(arena_page.exact(beside) > arena_page.exact(theirs)))


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
    ratios = re.findall(r"([\d,]+(?:\.\d+)?) times as fast as in ([^;]*?)[;.]\B", source.text)
    told = {library: ratio.replace(",", "") for ratio, library in ratios}
    eager, compiled = told["PyTorch eager"], told["torch.compile"]
    ideal = told["torch.compile, a run a core"]
    text = f"{eager} times as fast as PyTorch eager, {compiled} times torch.compile; {ideal} times"
    text += " that on one core, if the others were filled as well"
    return Found(f"{text} ({_processor(source.text)})", holds(float(ideal) >= 1))
