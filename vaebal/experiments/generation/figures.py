"""The figures of the generation experiment, of what `scores.evaluate_pipeline` saved of a seed."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np

from vaebal.data import ImageSet
from vaebal.experiments import report

Pictures = Mapping[str, np.ndarray]


def allowed(pictures: Pictures, samples_only: bool) -> Pictures:
    """Those that may be shown: with `samples_only` nothing of an image of the data."""
    if not samples_only:
        return pictures
    return {name: content for name, content in pictures.items() if name.startswith("gen ")}


def draw_samples(pictures: Pictures, images: ImageSet) -> plt.Figure:
    """Test images, reconstructions and samples of every method."""
    rows = [("test images", pictures["images"] / 255)] if "images" in pictures else []
    for kind, title in (("rec", "reconstructed"), ("gen", "samples")):
        rows += [
            (f"{title}, {name.removeprefix(kind).strip()}", content / 255)
            for name, content in pictures.items()
            if name.startswith(f"{kind} ")
        ]
    title = "uncurated: " + ("the first test images, " if "images" in pictures else "")
    return report.image_grid(rows, images.image_shape, title + "the first samples")


def draw_nearest(pictures: Pictures, images: ImageSet) -> plt.Figure:
    """Samples above the training images nearest to them."""
    rows = []
    for name in ("VAE+", "VAE"):
        rows += [(f"samples, {name}", pictures[f"gen {name}"] / 255)]
        rows += [("nearest training", pictures[f"nearest {name}"] / 255)]
    return report.image_grid(rows, images.image_shape, "nearest by distance in pixels")


def draw_interpolations(pictures: Pictures, images: ImageSet) -> plt.Figure:
    """Ways between pairs of test images, through the second stage's latents."""
    ends, paths = pictures["ends"] / 255, pictures["interpolations"] / 255
    rows = [
        ("", np.concatenate([start[None], path, end[None]]))
        for start, path, end in zip(ends[::2], paths, ends[1::2], strict=True)
    ]
    title = (
        "first and last: test images; between: VAE+, great circles in its latents "
        "(the first VAE's where it has collapsed)"
    )
    return report.image_grid(rows, images.image_shape, title)


def draw_bins(pictures: Pictures, images: ImageSet) -> plt.Figure:
    """For every method, its share of each bin over the training images', bins that differ dark.

    Below, the bins' centres that VAE+ fills least and most, beside their shares.
    """
    names = [name.partition(" ")[2] for name in pictures if name.startswith("different ")]
    figure = plt.figure(figsize=(9.5, 1.05 * len(names) + 1.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.05 * len(names), 1.5])
    _shares(upper, names, pictures)
    _centres(lower, pictures, images.image_shape)
    return figure


def _shares(figure: plt.Figure, names: list[str], pictures: Pictures) -> None:
    """A panel a method: its share of each bin, beside the training images'."""
    order = np.argsort(-pictures["bins train"])
    train = pictures["bins train"][order]
    axes = figure.subplots(len(names), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        share, different = pictures[f"bins {name}"][order], pictures[f"different {name}"][order]
        colours = np.where(different, report.COLOURS[1], "0.75")
        axis.bar(np.arange(len(order)), share, color=colours, width=0.85)
        axis.step(np.arange(-1, len(order)) + 0.5, [train[0], *train], color="k", linewidth=0.8)
        axis.set_title(f"{name}: {different.sum()} of {len(order)} bins differ", fontsize=8, pad=2)
        axis.grid(visible=False)
        axis.set(xticks=[], yticks=[], xlim=(-0.7, len(order) - 0.3), ylim=(0, 3 * train.max()))
    axes[-1].set_xlabel(
        "bins, by their share of the training images (line); bars: the set's share, "
        "orange where it differs (cut at three times the largest training share)", fontsize=8,
    )  # fmt: skip


def _centres(figure: plt.Figure, pictures: Pictures, image_shape: tuple[int, int, int]) -> None:
    """The centres of the bins that VAE+ fills least and most."""
    train, query = pictures["bins train"], pictures["bins VAE+"]
    ranked = np.argsort(query - train)
    half = min(6, len(train) // 2)
    cells = figure.subplots(1, 2 * half)
    for axis, index in zip(cells, [*ranked[:half], *ranked[-half:]], strict=True):
        centre = np.clip(pictures["centres"][index].reshape(image_shape), 0, 1)
        axis.imshow(centre.squeeze(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_axis_off()
        axis.set_title(f"{train[index]:.1%}\n→ {query[index]:.1%}", fontsize=7)
    figure.suptitle(
        "centres of the bins that VAE+ fills least (left) and most: share of training images → "
        "of samples", fontsize=8,
    )  # fmt: skip
