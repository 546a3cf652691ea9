"""The page of the generation experiment: what was seen, how, tables and pictures."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaebal.data import ImageSet
from vaebal.experiments import report
from vaebal.experiments.generation import figures, tables
from vaebal.experiments.generation.pipeline import method
from vaebal.experiments.report import Figure, Row, Section, distinct, rows_with
from vaebal.generation import classifier


def measures(rows: Sequence[Row]) -> dict[str, str]:
    """The names of all generation scores in the rows -> how they are called."""
    found = {f"gen_{name}": tables.DISTANCES[name] for name in tables.distances(rows)}
    return found | {f"gen_ndb_{k}": f"NDB/{k}" for k in tables.bins_of(rows)}


def interval(seeds: Sequence[Row], name: str) -> tuple[float, float]:
    """A score's mean over seeds, plus and minus an error.

    That is the larger of the standard deviation over seeds and the standard error of one
    measurement: from subsets for a Fréchet distance, of a share of K bins for NDB.
    """
    values = tables.known(seeds, name)
    mean, spread = report.mean_and_spread(values)
    if "_ndb_" in name:
        share = float(np.clip(mean, 0.0, 1.0))
        error = np.sqrt(share * (1 - share) / int(name.rpartition("_")[2]))
    else:
        error = float(np.mean(tables.known(seeds, f"{name}_se")))
    error = max(error, spread or 0.0)
    return mean - error, mean + error


def _against(rows: Sequence[Row], other: str) -> str:
    """In which scores VAE+ is better than the other method, not told apart, and worse."""
    places: dict[str, list[str]] = {"better in": [], "not told apart in": [], "worse in": []}
    for name, called in measures(rows).items():
        (low, high), (other_low, other_high) = (
            interval(rows_with(rows, method=method), name) for method in ("VAE+", other)
        )
        apart = "worse in" if low > other_high else "not told apart in"
        places["better in" if high < other_low else apart].append(called)
    said = "; ".join(f"{place} {', '.join(names)}" for place, names in places.items() if names)
    return f"Against {other}, VAE+ is {said}."


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, from the rows alone."""
    first, called = next(iter(measures(rows).items()))

    def score(method: str, name: str) -> str:
        return report.scaled(tables.known(rows_with(rows, method=method), name))

    first_two = ["VAE+", "VAE"]
    others = [name for name in distinct(rows, "method") if name not in ("AE", *first_two)]
    shown = [*first_two, *others[2:], *others[:2]]  # what needs no model last
    scores = ", ".join(f"{method} {score(method, first)}" for method in shown)
    return (
        f"{called} of samples: {scores}. {_against(rows, 'VAE')} {_against(rows, 'WAE-MMD')} "
        f"VAE+'s reconstructions score {score('VAE+', first.replace('gen_', 'rec_'))}."
    )


def _spread(name: str, rows: Sequence[Row]) -> str:
    """ "0.12 (FID)": a distance's largest standard error over subsets."""
    error = max(tables.known(rows, f"gen_{name}_se"), default=0.0)
    return f"{error:.2g} ({tables.DISTANCES[name]})"


def _measured(config: Any) -> str:
    """Where every first VAE's error is measured."""
    where = {
        "pixels": "in pixels behind the autoencoder's decoder", "codes": "in codes",
        "images": "in images, which it reads itself",
    }  # fmt: skip
    return "; ".join(
        f"{method('VAE', space, config)}'s {where[space.removeprefix('balanced ')]}"
        for space in config.vae.spaces
    )


def protocol(config: Any, rows: Sequence[Row], images: ImageSet) -> dict[str, str]:
    """How the "scores" were made, and what the table of "stages" holds."""
    about, names = rows[0], tables.distances(rows)
    warned = {row[f"gen_{name}_warning"] for row in rows for name in names if f"gen_{name}" in row}
    kind = about.get("fd_targets", "")
    how = report.protocol(
        "generation",
        config,
        images=images,
        about={"fd_features": ""} | about,
        trained=classifier.TRAINED.get(kind, ""),
        train_images=len(images.train),
        test_images=len(images.test),
        shape=" × ".join(map(str, images.image_shape)),
        over_seeds=report.over_seeds(config.train.seeds),
        wrong=about.get("classifier_wrong", 0.0),
        what="variance unexplained" if kind == "factors" else "test images it gets wrong",
        errors=[_spread(name, rows) for name in names],
        whitening="whitened per pixel" if config.eval.whiten else "not whitened",
        measured=_measured(config),
    )
    said = ["data", *(name if name in names else f"no {name}" for name in ("fd", "fid"))]
    said += ["extrapolated"] if names else []
    cautions = [f"Caution: {text}." for text in sorted(warned - {""})]
    scores = [*(how[name] for name in said), *cautions, how["ndb"], how["networks"]]
    if config.flow.epochs:
        scores.append(how["flow"])
    if any(space.startswith("balanced") for space in config.vae.spaces):
        scores.append(how["balanced"])
    return {"scores": " ".join(scores), "stages": how["stages"]}


def write(
    config: Any,
    path: Path,
    rows: Sequence[Row],
    stages: Sequence[Row],
    pictures: Mapping[int, figures.Pictures],
    images: ImageSet,
) -> None:
    """Writes the page, rows and figures into `path`; prints the tables and what was seen.

    Args:
      rows: one a method and seed.
      stages: one a stage and seed.
      pictures: by seed, what `scores.evaluate_pipeline` saved.
      images: for their name, number and shape.
    """
    rows = [{**row, "data": images.name} for row in rows]
    how = protocol(config, rows, images)
    foot = f"{how['scores']} {report.training_took(stages)}"
    shown = figures.allowed(pictures[min(pictures)], config.eval.samples_only)
    found = (
        ("samples", "Reconstructions and samples", figures.draw_samples),
        ("nearest", "Nearest training images", figures.draw_nearest),
        ("interpolations", "Interpolations", figures.draw_interpolations),
        ("bins", "Bins that differ", figures.draw_bins),
    )
    drawn = [
        Figure(name, alt, functools.partial(draw, shown, images))
        for name, alt, draw in (found[:1] if config.eval.samples_only else found)
    ]
    theirs = "The paper's numbers, on its own data"
    reference = [Section(theirs, tables.paper_table(), shown=False)]
    report.write_page(
        config,
        path,
        title=f"from balance to samples on {images.name}",
        seen=sentence(rows),
        sections=[
            Section("Fréchet distances (Table 3)", tables.frechet_table(rows), grouped=False),
            Section("Bins that differ (Table 4)", tables.ndb_table(rows), [foot],
                    grouped=False, said=True),
            *(reference if images.name != tables.PAPER_DATA else []),
            Section("Stages", tables.stage_table(stages), [how["stages"]], shown=False),
            Section("Figures", figures=drawn),
        ],
        rows={"rows": rows, "stages": stages},
    )  # fmt: skip
