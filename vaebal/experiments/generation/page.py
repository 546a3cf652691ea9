"""The report of the generation experiment: Tables 3 and 4 beside the paper's, and pictures.

Rows come one a method and seed; numbers of reconstructions begin with "rec_", of samples with
"gen_". "held-out images" is what a perfect sampler would score.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from vaebal.data import ImageSet
from vaebal.experiments import report
from vaebal.experiments.report import Row, versions
from vaebal.training.workdir import write_atomically

# Table 3 (FID of reconstructions and samples) and Table 4 (NDB/K for K = 100, 200, 300), CelebA.
PAPER_FID = {
    "Downsample": (39.2, 39.2),
    "WAE-MMD": (59.8, 66.9),
    "VAE": (45.9, 64.8),
    "VAE+": (45.6, 47.5),
}
PAPER_NDB = {
    "Downsample": (0.05, 0.06, 0.04),
    "WAE-MMD": (0.64, 0.62, 0.58),
    "VAE": (0.88, 0.85, 0.81),
    "VAE+": (0.29, 0.28, 0.24),
}
PAPER_BINS = (100, 200, 300)
PAPER_DATA = "celeb_a"
DISTANCES = {"fd": "FD (classifier)", "fid": "FID"}
ABSENT = "–"


def methods(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by method, in the order they came, each a list over seeds."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def distances(rows: Sequence[Row]) -> list[str]:
    """Which Fréchet distances the rows hold."""
    return [name for name in DISTANCES if f"gen_{name}" in rows[0]]


def bins_of(rows: Sequence[Row]) -> list[int]:
    """Every K of NDB/K."""
    names = [name for name in rows[0] if name.startswith("gen_ndb_")]
    return sorted(int(name.rpartition("_")[2]) for name in names)


def _values(seeds: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in seeds if row.get(name) is not None]


def _cell(seeds: Sequence[Row], name: str, digits: int) -> str:
    values = _values(seeds, name)
    return report.with_spread(values, digits) if values else ABSENT


def _digits(rows: Sequence[Row], name: str) -> int:
    """Decimals that show three figures of the smallest model's number."""
    values = [abs(v) for v in _values(rows, f"gen_{name}") if v]
    return int(np.clip(2 - np.floor(np.log10(min(values, default=1.0))), 0, 4))


def frechet_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Table 3: reconstruction and generation, and how far the latents are from the prior."""
    names, beside = distances(rows), rows[0]["data"] == PAPER_DATA
    header = ["method"]
    for name in names:
        header += [
            f"{DISTANCES[name]} rec.",
            f"{DISTANCES[name]} gen.",
            f"{DISTANCES[name]} gen., N → ∞",
        ]
    if "fid" not in names:
        header += ["FID"]
    if beside:
        header += ["paper FID rec.", "paper FID gen."]
    header += ["Rec. Err.", "MMD² to N(0, I)"]
    body = []
    for method, seeds in methods(rows).items():
        line = [method]
        for name in names:
            digits = _digits(rows, name)
            line += [
                _cell(seeds, f"{which}_{name}{end}", digits)
                for which, end in (("rec", ""), ("gen", ""), ("gen", "_extrapolated"))
            ]
        line += [] if "fid" in names else [ABSENT]
        if beside:
            theirs = PAPER_FID.get(method)
            line += [f"{value:.1f}" for value in theirs] if theirs else [ABSENT] * 2
        body.append([*line, _cell(seeds, "error", 2), _cell(seeds, "mmd", 4)])
    return header, body


def ndb_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Table 4: NDB/K of samples (and of reconstructions), and the Jensen-Shannon divergence."""
    known, beside = bins_of(rows), rows[0]["data"] == PAPER_DATA
    header = ["method"]
    for k in known:
        header += [f"NDB/{k} gen."]
        header += ["paper"] if beside and k in PAPER_BINS else []
        header += [f"NDB/{k} rec.", f"JS gen., K = {k}"]
    body = []
    for method, seeds in methods(rows).items():
        line = [method]
        for k in known:
            line += [_cell(seeds, f"gen_ndb_{k}", 2)]
            if beside and k in PAPER_BINS:
                theirs = PAPER_NDB.get(method)
                line += [f"{theirs[PAPER_BINS.index(k)]:.2f}" if theirs else ABSENT]
            line += [_cell(seeds, f"rec_ndb_{k}", 2), _cell(seeds, f"gen_js_{k}", 3)]
        body.append(line)
    return header, body


def paper_table() -> tuple[list[str], list[list[str]]]:
    """The paper's Tables 3 and 4, for data other than its own."""
    header = ["CelebA 128", "FID rec.", "FID gen.", *(f"NDB/{k}" for k in PAPER_BINS)]
    body = [
        [method, *(f"{v:.1f}" for v in fids), *(f"{v:.2f}" for v in PAPER_NDB[method])]
        for method, fids in PAPER_FID.items()
    ]
    return header, body


def stage_table(stages: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """What every stage's last epoch left, over seeds."""
    found: dict[str, list[Row]] = {}
    for row in stages:
        found.setdefault(row["stage"], []).append(row)
    header = ["stage", "parameters", "epochs", "steps", "loss", "error", "γ (implied)", "seconds"]
    body = []
    for stage, seeds in found.items():
        gamma = "gamma" if "gamma" in seeds[0] else "mean_square"
        known = gamma in seeds[0]
        shown = f"{np.mean(_values(seeds, gamma)):.3g}" if known else ABSENT
        body.append(
            [
                *(stage, f"{seeds[0]['parameters']:,}"),
                *(str(seeds[0]["epochs"]), str(seeds[0]["steps"])),
                *(_cell(seeds, "loss", 3), _cell(seeds, "squared_error", 3)),
                shown if gamma == "gamma" or not known else f"({shown})",
                f"{np.mean(_values(seeds, 'train_seconds')):.0f}",
            ]
        )
    return header, body


def measures(rows: Sequence[Row]) -> dict[str, str]:
    """The names of all generation scores in the rows -> how they are called."""
    found = {f"gen_{name}": DISTANCES[name] for name in distances(rows)}
    return found | {f"gen_ndb_{k}": f"NDB/{k}" for k in bins_of(rows)}


def interval(seeds: Sequence[Row], name: str) -> tuple[float, float]:
    """A score's mean over seeds, plus and minus an error.

    That is the larger of the standard deviation over seeds and the standard error of one
    measurement: from subsets for a Fréchet distance, of a share of K bins for NDB.
    """
    values = _values(seeds, name)
    mean, spread = report.mean_and_spread(values)
    if "_ndb_" in name:
        share = float(np.clip(mean, 0.0, 1.0))
        error = np.sqrt(share * (1 - share) / int(name.rpartition("_")[2]))
    else:
        error = float(np.mean(_values(seeds, f"{name}_se")))
    error = max(error, spread or 0.0)
    return mean - error, mean + error


def _apart(rows: Sequence[Row], method: str, other: str, name: str) -> str:
    """How the method's interval lies to the other's: "below", "above" or "overlapping"."""
    by_method = methods(rows)
    (low, high), (other_low, other_high) = (
        interval(by_method[each], name) for each in (method, other)
    )
    if high < other_low:
        return "below"
    return "above" if low > other_high else "overlapping"


def sentence(rows: Sequence[Row]) -> str:
    """What was seen, from the rows alone."""
    names = measures(rows)
    first, by_method = next(iter(names)), methods(rows)
    digits = _digits(rows, first.removeprefix("gen_")) if not first.startswith("gen_ndb") else 2
    scores = ", ".join(
        f"{method} {_cell(by_method[method], first, digits)}"
        for method in ("VAE+", "VAE", "WAE-MMD", "Downsample", "held-out images")
    )
    parts = []
    for other in ("VAE", "WAE-MMD"):
        found = {names[name]: _apart(rows, "VAE+", other, name) for name in names}
        groups = {
            place: [name for name, where in found.items() if where == place]
            for place in ("below", "overlapping", "above")
        }
        words = {"below": "better in", "overlapping": "not told apart in", "above": "worse in"}
        said = "; ".join(
            f"{words[place]} {', '.join(listed)}" for place, listed in groups.items() if listed
        )
        parts.append(f"Against {other}, VAE+ is {said}.")
    rec = first.replace("gen_", "rec_")
    reconstruction = _cell(by_method["VAE+"], rec, digits)
    return (
        f"{names[first]} of samples: {scores}. {' '.join(parts)} "
        f"VAE+'s reconstructions score {reconstruction}."
    )


def protocol(config: Any, rows: Sequence[Row], images: ImageSet) -> str:
    """How the numbers were made, for the foot of the tables."""
    seeds, about = config.train.seeds, rows[0]
    spread = (
        f"mean ± standard deviation over {len(seeds)} whole pipelines, the autoencoder included "
        f"(seeds {', '.join(map(str, seeds))})"
        if len(seeds) > 1
        else f"one pipeline (seed {seeds[0]}), so no spread"
    )
    said = [
        f"Data: {images.name}, {len(images.train)} training and {len(images.test)} test images of "
        f"{' × '.join(map(str, images.image_shape))}, pixels in [0, 1]; {spread}.",
        f"All sets compared hold {about['images']} images and are compared with "
        f"{about['reference_images']} training images: reconstructions and Downsample of "
        "test images, samples, and those test images themselves as the floor; of a split that is "
        "not used whole, images are drawn at random. No image is resized (FID: by its own "
        "preprocessing); all are "
        f"{about['rounding']}.",
    ]
    names = distances(rows)
    if "fd" in names:
        wrong = rows[0]["classifier_wrong"]
        what = (
            "test images it gets wrong"
            if about["fd_targets"] == "labels"
            else "variance unexplained"
        )
        said.append(
            f"FD (classifier) is the Fréchet distance in the {about['fd_features']} penultimate "
            f"features of a network trained on the data's {about['fd_targets']} ({what}: "
            f"{wrong:.1%}); it is not FID and compares only within this table."
        )
    else:
        said.append(f"No FD (classifier): {about['without_fd']}.")
    said.append(
        f"FID: {about['fid_protocol']}." if "fid" in names else f"No FID: {about['without_fid']}."
    )
    if names:
        errors = {
            DISTANCES[name]: max(_values(rows, f"gen_{name}_se"), default=0.0) for name in names
        }
        said.append(
            f"“N → ∞” follows the distances of {config.eval.parts} and fewer disjoint subsets to "
            "infinitely many images; standard error from the spread over subsets at most "
            + ", ".join(f"{error:.2g} ({name})" for name, error in errors.items())
            + "."
        )
        warned = {
            row[f"gen_{name}_warning"] for row in rows for name in names if f"gen_{name}" in row
        }
        said += [f"Caution: {text}." for text in sorted(warned - {""})]
    whitening = "whitened per pixel" if config.eval.whiten else "not whitened"
    said.append(
        f"NDB: k-means on the {about['reference_images']} training images, {whitening}; "
        "two-proportion z-test at .05; JS in nats. Two methods are told apart where their means "
        "± the larger of the standard deviation over seeds and one measurement's standard error "
        "(Fréchet: over subsets; NDB: of a share of K) do not overlap."
    )
    said.append(
        f"Networks: autoencoder ({config.ae.network}) to {config.ae.codes} codes without "
        "regularisation, both VAEs with as many latents; "
        f"VAE's error is measured in {config.vae.spaces[0]}"
        + "".join(f", VAE ({space})'s in {space}" for space in config.vae.spaces[1:])
        + f"; WAE-MMD with λ = {config.wae.weight:g} on errors summed over pixels. Rec. Err. is "
        "Σ_pixels (x−x̂)² at posterior means. MMD² is from one draw of q(z|x) for every test "
        "image (VAE+: of its own latents) to N(0, I)."
    )
    return " ".join(said)


def draw_samples(pictures: Mapping[str, np.ndarray], images: ImageSet) -> plt.Figure:
    """Test images, reconstructions and samples of every method."""
    rows = [("test images", pictures["images"] / 255)]
    for kind, title in (("rec", "reconstructed"), ("gen", "samples")):
        for name, content in pictures.items():
            if name.startswith(f"{kind} "):
                rows.append((f"{title}, {name.partition(' ')[2]}", content / 255))
    figure = report.image_grid(rows, images.image_shape)
    figure.suptitle(
        "uncurated: the first test images, the first samples", y=0.89 + 0.2 / figure.get_figheight()
    )
    return figure


def draw_nearest(pictures: Mapping[str, np.ndarray], images: ImageSet) -> plt.Figure:
    """Samples above the training images nearest to them."""
    rows = []
    for name in ("VAE+", "VAE"):
        rows += [(f"samples, {name}", pictures[f"gen {name}"] / 255)]
        rows += [("nearest training", pictures[f"nearest {name}"] / 255)]
    figure = report.image_grid(rows, images.image_shape)
    figure.suptitle("nearest by distance in pixels", y=0.89 + 0.2 / figure.get_figheight())
    return figure


def draw_interpolations(pictures: Mapping[str, np.ndarray], images: ImageSet) -> plt.Figure:
    """Ways between pairs of test images, through the second stage's latents."""
    ends, paths = pictures["ends"] / 255, pictures["interpolations"] / 255
    rows = [
        ("", np.concatenate([start[None], path, end[None]]))
        for start, path, end in zip(ends[::2], paths, ends[1::2], strict=True)
    ]
    figure = report.image_grid(rows, images.image_shape)
    figure.suptitle(
        "first and last: test images; between: VAE+, great circles in its latents",
        y=0.89 + 0.2 / figure.get_figheight(),
    )
    return figure


def draw_bins(pictures: Mapping[str, np.ndarray], images: ImageSet) -> plt.Figure:
    """For every method, its share of each bin over the training images', bins that differ dark.

    Below, the bins' centres that VAE+ fills least and most, beside their shares.
    """
    names = [name.partition(" ")[2] for name in pictures if name.startswith("different ")]
    train = pictures["bins train"]
    order = np.argsort(-train)
    figure = plt.figure(figsize=(9.5, 1.05 * len(names) + 1.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.05 * len(names), 1.5])
    axes = upper.subplots(len(names), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        share, different = pictures[f"bins {name}"][order], pictures[f"different {name}"][order]
        colours = np.where(different, report.COLOURS[1], "0.75")
        axis.bar(np.arange(len(order)), share, color=colours, width=0.85)
        axis.step(np.arange(-1, len(order)) + 0.5, [train[order][0], *train[order]], color="k",
                  linewidth=0.8)  # fmt: skip
        axis.set_title(f"{name}: {different.sum()} of {len(order)} bins differ", fontsize=8, pad=2)
        axis.grid(visible=False)
        axis.set_yticks([])
        axis.set_xticks([])
        axis.set_xlim(-0.7, len(order) - 0.3)
        axis.set_ylim(0, 3 * train.max())
    axes[-1].set_xlabel(
        "bins, by their share of the training images (line); bars: the set's share, "
        "orange where it differs (cut at three times the largest training share)", fontsize=8,
    )  # fmt: skip
    query = pictures["bins VAE+"]
    ranked = np.argsort(query - train)
    half = min(6, len(order) // 2)
    shown = np.concatenate([ranked[:half], ranked[-half:]])
    cells = lower.subplots(1, 2 * half)
    height, width, channels = images.image_shape
    for axis, index in zip(cells, shown, strict=True):
        centre = np.clip(pictures["centres"][index].reshape(height, width, channels), 0, 1)
        axis.imshow(centre if channels == 3 else centre[..., 0], cmap="gray_r", vmin=0, vmax=1)
        axis.set_axis_off()
        axis.set_title(f"{train[index]:.1%}\n→ {query[index]:.1%}", fontsize=7)
    lower.suptitle(
        "centres of the bins that VAE+ fills least (left) and most: share of training images → "
        "of samples", fontsize=8,
    )  # fmt: skip
    return figure


def write(
    config: Any,
    path: Path,
    rows: Sequence[Row],
    stages: Sequence[Row],
    pictures: Mapping[int, Mapping[str, np.ndarray]],
    images: ImageSet,
) -> None:
    """Writes tables, rows and figures into `path`; prints the tables and what was seen.

    Args:
      rows: one a method and seed.
      stages: one a stage and seed.
      pictures: by seed, what `generation.evaluate_pipeline` saved.
      images: for their name, number and shape.
    """
    rows = [{**row, "data": images.name} for row in rows]
    report.write_rows(rows, path, "rows")
    report.write_rows(stages, path, "stages")
    shown = pictures[min(pictures)]
    figures: dict[str, tuple[str, Callable[[], plt.Figure]]] = {
        "samples": ("Reconstructions and samples", lambda: draw_samples(shown, images)),
        "nearest": ("Nearest training images", lambda: draw_nearest(shown, images)),
        "interpolations": ("Interpolations", lambda: draw_interpolations(shown, images)),
        "bins": ("Bins that differ", lambda: draw_bins(shown, images)),
    }
    for name, (_, draw) in figures.items():
        report.save_figure(draw, path / f"{name}.png")
    foot = protocol(config, rows, images)
    seconds = sum(_values(stages, "train_seconds"))
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})"
    reference = (
        []
        if images.name == PAPER_DATA
        else ["## The paper's numbers, on its own data", report.markdown_table(*paper_table())]
    )
    sections = [
        f"# {config.name}: from balance to samples on {images.name}",
        sentence(rows),
        "## Fréchet distances (Table 3)",
        report.markdown_table(*frechet_table(rows)),
        "## Bins that differ (Table 4)",
        report.markdown_table(*ndb_table(rows)),
        f"{foot} Training took {seconds:.0f} s in all on {device}.",
        *reference,
        "## Stages",
        report.markdown_table(*stage_table(stages)),
        "Loss and error are the last epoch's means over batches (−ELBO in nats; ae: the error; "
        "wae: error + λ MMD²; classifier: cross-entropy or squared error); γ in brackets is "
        "E‖x−x̂‖²/d of a stage that has none.",
        "## Figures",
        *(f"![{title}]({name}.png)" for name, (title, _) in figures.items()),
        f"Versions: {', '.join(f'{k} {v}' for k, v in versions().items())}.",
        f"```json\n{json.dumps(config.to_dict(), indent=1)}\n```\n",
    ]
    write_atomically(path / "table.md", "\n\n".join(sections))
    report.print_table(*frechet_table(rows), f"Fréchet distances on {images.name}", grouped=False)
    report.print_table(*ndb_table(rows), f"NDB on {images.name}", grouped=False)
    print(f"{foot}\n")
    print(f"table {path / 'table.md'}")
    print(f"figures {' '.join(str(path / f'{name}.png') for name in figures)}")
    print(f"\n{sentence(rows)}")
