"""The page of learned against fixed gamma: what was seen, how, tables and figures."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaebal.data import ImageSet
from vaebal.data.rendered import FACTORS
from vaebal.experiments import report
from vaebal.experiments.gamma import figures, order, tables
from vaebal.experiments.report import Figure, Row, Section, column, rows_with, scaled, signed
from vaebal.homotopy.opener import EARLY_PATIENCE, LEAST_PATIENCE
from vaebal.homotopy.rules import RELEASED_RATE

# The learned run that an arm's price is told beside: where r is known, and where it is not.
CROWDED = (
    "crowded run: of the learned runs of the same r and seed with more than r active latents, the "
    "one of least error"
)
LEARNED = "learned run of the same seed with the least error"


def _balance(known: Sequence[Row]) -> list[str]:
    """In how many runs, all of known r, exactly r latents are active."""
    said = []
    for arm in order.arms_of(known):
        runs = rows_with(known, arm=arm)
        excess = np.mean([row[order.ACTIVE] - row["rank"] for row in runs])
        said.append(f"{order.shown(arm)} in {order.count(runs)} runs ({signed([excess], 2)})")
    if not said:
        return []
    return [f"Exactly r latents are active (brackets: active − r on average): {'; '.join(said)}."]


def _adaptive(rows: Sequence[Row]) -> list[str]:
    """Where the adaptive homotopy's gamma ends, and its price."""
    adaptive, said = rows_with(rows, arm="adaptive"), []
    if adaptive:
        off = 100 * max(map(abs, column(adaptive, "gamma_residual_relative")))
        said.append(f"The adaptive homotopy's γ ends within {off:.1f} % of stationary.")
    if beside := order.price(adaptive, order.reference(rows)):
        run = "crowded learned run" if order.of_known_rank(rows) else "learned run"
        said.append(
            f"Beside the {run} of least error (same r, same seed; {len(beside)} pairs) it has "
            f"{_cost(beside)}."
        )
    return said


def _fixed(rows: Sequence[Row]) -> list[str]:
    """What fixing gamma changes, an arm a sentence, and what it does in the paper."""
    said = []
    for arm in order.arms_of(rows, "fixed"):
        if pairs := order.pairs_of(rows, arm):
            before, after = zip(*(column(pair, "mmd") for pair in pairs), strict=True)
            higher = sum(b > a for a, b in zip(before, after, strict=True))
            said.append(
                f"Fixing γ at the γ* of {order.source(arm)} gives the higher MMD² in {higher} of "
                f"{len(pairs)} pairs ({scaled([np.mean(before)])} → {scaled([np.mean(after)])} on "
                f"average), {_cost([order.compared(*pair) for pair in pairs])}."
            )
    theirs = "In the paper it gives 3.1 to 3.4 times the MMD and 0.99 times the error."
    return [*said, theirs] if said else []


def _cost(compared: Sequence[tuple[float, float]]) -> str:
    """Means of what `order.compared` gave."""
    error, elbo = np.mean(compared, axis=0)
    return f"{error:.2f} times the error and −ELBO {signed([elbo], 1)} nats (positive: worse)"


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, from the rows alone."""
    return " ".join([*_balance(order.of_known_rank(rows)), *_adaptive(rows), *_fixed(rows)])


def protocol(config: Any, rows: Sequence[Row], images: ImageSet) -> dict[str, str]:
    """How the numbers of the tables "main", "summary" and "paper" were made."""
    ranks = [rank for rank in order.ranks_of(rows) if rank]
    arms = column(rows, "arm")
    kinds = set(map(order.kind, arms))
    plain = {arm.split()[2] for arm in arms if order.kind(arm) == "plain"}
    how = report.protocol(
        "gamma",
        config,
        images=images,
        shape=" × ".join(map(str, images.image_shape)),
        train_images=len(images.train),
        test_images=rows[0]["test_images"],
        ranks=ranks,
        floor=config.data.noise**2,
        steps=rows[0]["steps"] * config.train.epochs // rows[0]["epochs"],  # "plain" has twice
        released=max(config.train.fastest, RELEASED_RATE),
        early=EARLY_PATIENCE,
        least=LEAST_PATIENCE,
        beside=CROWDED if ranks else LEARNED,
        effective=np.median([row.get("effective_sample_size", 0.0) for row in rows]),
        laplace=report.laplace(rows),
        over_seeds=report.over_seeds(sorted(set(column(rows, "seed")))),
        drawn=min(config.eval.mmd_samples, rows[0]["test_images"]),
        largest={n: max(column(rows, f"{n}_se")) for n in ("error_mean", "negative_elbo", "mmd")},
    )
    guarded = kinds & {"adaptive", "guarded"}
    applies = {
        "known": ranks,
        "unknown": not ranks,
        "noise": config.data.noise,
        "own": len({row.get("data_seed") for row in rows}) > 1,
        "adaptive": guarded,
        **{name: guarded and config.train[name] for name in ("slowest", "jitter", "patience")},
        "decay": config.train.weight_decay,
        "nll": config.eval.nll_samples,
        "laplace": config.eval.nll_samples and config.eval.laplace_images,
        **{kind: kind in kinds for kind in order.KINDS if kind != "adaptive"},
        "plain": "after" in plain,
        "counted": "of" in plain,
        "whole": "fixed" in kinds and config.train.patience,
    }
    apart = ("summary", "paper")
    main = [text for name, text in how.items() if applies.get(name, name not in apart)]
    return {
        "main": " ".join([*main, report.training_took(rows)]),
        **{name: how[name] for name in apart},
    }


def _figures(
    rows: Sequence[Row],
    histories: Mapping[order.Key, list[dict]],
    pictures: Mapping[order.Key, dict[str, np.ndarray]],
    images: ImageSet,
    config: Any,
) -> dict[str, Figure]:
    """Those that the rows have something for, by name."""
    samples_only, opens = config.eval.samples_only, config.train.patience > 0
    arms, known = order.arms_of(rows), order.of_known_rank(rows)
    own = [order.kind(arm) for arm in arms if order.kind(arm) not in order.COUNTED]
    moves = len(own) > 1 and not set(own) <= set(order.ASIDE)
    held = [row for row in known if row["active_latents"]]
    names = FACTORS if images.name == "rendered" else [f"{i}" for i in range(1, 13)]
    traversed = {key: each for key, each in pictures.items() if "traversals" in each}
    traversed = {} if samples_only else traversed
    told = any(histories.values())
    found = (
        ("Balance over the speed of γ's descent", moves, figures.draw_speed, rows),
        ("Active dimensions against r", known, figures.draw_dimensions, known, opens),
        ("Error against active latents", not known and len(arms) > 1, figures.draw_front, rows),
        ("Latents and factors", held, figures.draw_factors, held, names),
        ("One latent at a time", traversed, figures.draw_traversals, rows, traversed, images),
        ("Training", told, figures.draw_homotopy, histories, images),
        ("Images and samples", pictures, figures.draw_pictures, pictures, images, samples_only),
    )
    made = {}
    for alt, wanted, draw, *arguments in found:
        name = draw.__name__.removeprefix("draw_")
        if wanted:
            made[name] = Figure(name, alt, functools.partial(draw, *arguments))
    return made


def write(
    config: Any,
    path: Path,
    rows: Sequence[Row],
    stopped: str,
    histories: Mapping[order.Key, list[dict]],
    pictures: Mapping[order.Key, dict[str, np.ndarray]],
    images: ImageSet,
) -> None:
    """Writes the page, rows and figures into `path`; prints the tables and what was seen.

    Args:
      rows: one a finished run.
      stopped: a sentence on the others, or "".
      histories: by (arm, r, seed), a run's metrics during training.
      pictures: by (arm, r, seed), what `evaluate.draw_pictures` made.
      images: for their name, number and shape.
    """
    how = protocol(config, rows, images)
    drawn = _figures(rows, histories, pictures, images, config)
    headline = [drawn.pop(name) for name in ("speed", "dimensions", "front") if name in drawn]
    hidden = ("−ELBO", "σ² < ½", "MMD² (active)", "factor R²")
    main, summary, paper = (
        table(rows) for table in (tables.main_table, tables.summary_table, tables.paper_table)
    )
    report.write_page(
        config,
        path,
        title=f"learned against fixed γ on {images.name}",
        seen=sentence(rows),
        sections=[
            Section("Over all runs", summary, [stopped, how["summary"]], headline, grouped=False,
                    said=True),
            Section("By r and arm", main, [how["main"]], without=hidden, said=True),
            Section("Learned against fixed γ: Table 2", paper, [how["paper"]], shown=False),
            Section("Figures", figures=[*drawn.values()]),
        ],
        rows={"rows": rows},
    )  # fmt: skip
