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
from vaebal.experiments.report import Figure, Row, Section, column, rows_with, scaled
from vaebal.homotopy.opener import EARLY_PATIENCE


def _counted(rows: Sequence[Row]) -> str:
    """ "19 of 20 runs (active − r = +0.05 on average)"."""
    excess = np.mean([row[order.ACTIVE] - row["rank"] for row in rows])
    mean = f"{excess:+.2f}".replace("-", "−") if round(excess, 2) else "0"
    return f"{order.count(rows)} runs (active − r = {mean} on average)"


def _nats(difference: float) -> str:
    return f"{abs(difference):.1f} nats {'higher (worse)' if difference > 0 else 'lower (better)'}"


def _best(known: Sequence[Row], *kinds: str) -> list[str]:
    """The arm of these kinds that is balanced most often, of equals the last; none if none."""
    share = {
        arm: order.balanced(runs) / len(runs)
        for arm in order.arms_of(known, *kinds)
        for runs in [rows_with(known, arm=arm)]
    }
    return [max(reversed(share), key=share.__getitem__)] if share else []


def _balance(known: Sequence[Row]) -> str:
    """In how many runs, all of known r, exactly r latents are active; of chosen arms."""
    spoken = []
    if adaptive := rows_with(known, arm="adaptive"):
        spoken.append(f"with the adaptive homotopy in {_counted(adaptive)}")
    # Of equals the fastest: a slower one may not have arrived.
    learned, best = order.arms_of(known, "learned"), _best(known, "learned")
    for arm in dict.fromkeys([*best, *learned[-1:]]):
        name = "the best rate here" if [arm] == best else "the fastest"
        aside = f", {name}," if len(learned) > 1 else ""
        runs = rows_with(known, arm=arm)
        spoken.append(f"learned at {order.rate(arm):g} nats a step{aside} in {_counted(runs)}")
    if fixed := [row for row in known if order.kind(row["arm"]) == "fixed"]:
        spoken.append(f"with γ fixed from scratch in {_counted(fixed)}")
    for arm in _best(known, "held"):
        aside = ", the best value here," if len(order.arms_of(known, "held")) > 1 else ""
        runs = rows_with(known, arm=arm)
        spoken.append(f"with γ held at {arm.split()[1]}{aside} in {_counted(runs)}")
    return f"Exactly r latents are active {'; '.join(spoken)}." if spoken else ""


def _adaptive(rows: Sequence[Row]) -> list[str]:
    """Where the adaptive homotopy's gamma ends, and its price."""
    adaptive, said = rows_with(rows, arm="adaptive"), []
    if adaptive:
        off = 100 * max(map(abs, column(adaptive, "gamma_residual_relative")))
        said.append(f"The adaptive homotopy's γ ends within {off:.1f} % of stationary.")
    if beside := order.price(adaptive, order.crowded(rows)):
        error, elbo = np.mean(beside, axis=0)
        said.append(
            f"Beside the crowded learned run of least error (same r, same seed; {len(beside)} "
            f"pairs), the adaptive homotopy's error is {error:.2f} times as large and its −ELBO "
            f"{_nats(elbo)}."
        )
    return said


def _fixed(rows: Sequence[Row]) -> list[str]:
    """What fixing gamma changes, an arm a sentence, and what it does in the paper."""
    said = []
    for arm in order.arms_of(rows, "fixed"):
        pairs = order.pairs_of(rows, arm)
        if not pairs:
            continue
        higher = sum(after["mmd"] > before["mmd"] for before, after in pairs)
        paper = "the paper's direction" if 2 * higher > len(pairs) else "not the paper's direction"
        before, after = (scaled([np.mean([pair[i]["mmd"] for pair in pairs])]) for i in (0, 1))
        error, elbo = np.mean([order.compared(*pair) for pair in pairs], axis=0)
        said.append(
            f"Fixing γ at the γ* of {order.source(arm)} gives the higher MMD² in {higher} of "
            f"{len(pairs)} pairs ({before} → {after} on average; {paper}) at {error:.2f} times the "
            f"error and a −ELBO {_nats(elbo)}."
        )
    theirs = "The paper has 3.1 to 3.4 times the MMD at 0.99 times the error."
    return [*said, theirs] if said else []


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, from the rows alone."""
    parts = [_balance(order.of_known_rank(rows)), *_adaptive(rows), *_fixed(rows)]
    return " ".join(filter(None, parts))


def protocol(config: Any, rows: Sequence[Row], images: ImageSet) -> dict[str, str]:
    """How the numbers of the tables "main", "summary" and "paper" were made."""
    ranks = [rank for rank in order.ranks_of(rows) if rank]
    kinds = set(map(order.kind, column(rows, "arm")))
    how = report.protocol(
        "gamma",
        config,
        images=images,
        shape=" × ".join(map(str, images.image_shape)),
        train_images=len(images.train),
        test_images=rows[0]["test_images"],
        ranks=ranks,
        floor=config.data.noise**2,
        steps=rows[0]["steps"],
        early=EARLY_PATIENCE,
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
        **{kind: kind in kinds for kind in order.KINDS if kind != "adaptive"},
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
) -> dict[str, Figure]:
    """Those that the rows have something for, by name."""
    arms, known = order.arms_of(rows), order.of_known_rank(rows)
    moves = len(arms) > 1 and any(order.kind(arm) not in order.STILL for arm in arms)
    held = [row for row in known if row["active_latents"]]
    names = FACTORS if images.name == "rendered" else [f"{i}" for i in range(1, 13)]
    traversed = {key: each for key, each in pictures.items() if "traversals" in each}
    told = any(histories.values())
    found = (
        ("Balance over the speed of γ's descent", moves, figures.draw_speed, rows),
        ("Active dimensions against r", known, figures.draw_dimensions, known),
        ("Latents and factors", held, figures.draw_factors, held, names),
        ("One latent at a time", traversed, figures.draw_traversals, rows, traversed, images),
        ("Training", told, figures.draw_homotopy, histories, images),
        ("Images and samples", pictures, figures.draw_pictures, pictures, images),
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
    how, drawn = protocol(config, rows, images), _figures(rows, histories, pictures, images)
    headline = [drawn.pop(name) for name in ("speed", "dimensions") if name in drawn]
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
