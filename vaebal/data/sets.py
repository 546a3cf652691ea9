"""Image sets as arrays.

`load` returns whole splits; they fit on one device and are put there once. Nothing
here needs TensorFlow.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vaebal.data import digests, idx, photos, rendered
from vaebal.errors import InputError
from vaebal.streams import stream
from vaebal.units import to_unit_pixels

# Stored rows [B, ...] -> images [B, D] in [0, 1]; jit-able, and equal functions compare equal.
Decode = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Two splits of stored images.

    Attributes:
      name: what it is, for reports.
      train: [N, ...] rows as stored: flat pixels [N, D], uint8 in 0..255 or float32 in [0, 1],
        or whatever else `decode` turns into pixels.
      test: [M, ...], same type.
      image_shape: (height, width, channels), product D.
      decode: rows -> x [B, D] in [0, 1].
      train_factors, test_factors: [N, r] and [M, r], the true coordinates, where they are known.
      recipe: plain values that determine every image, where there are such; what was drawn differs
        in rounding from machine to machine, and what is memory-mapped has been hashed already.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    image_shape: tuple[int, int, int]
    decode: Decode = to_unit_pixels
    train_factors: np.ndarray | None = None
    test_factors: np.ndarray | None = None
    recipe: dict[str, Any] | None = None

    @property
    def dim(self) -> int:
        """D."""
        return math.prod(self.image_shape)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Plain values that differ where any image does: the recipe's digest, or all bytes'."""
        arrays = (self.train, self.test, self.train_factors, self.test_factors)
        told = self.recipe or [digests.of_array(rows) for rows in arrays if rows is not None]
        return {
            "name": self.name,
            "training images": len(self.train),
            "test images": len(self.test),
            "image shape": list(self.image_shape),
            "sha256": digests.of_plain(told),
        }


MANIFOLDS = ("rendered", "linear", "network")
# A manifold's images are kept as float32 pixels up to this size, and drawn in every batch above.
STORED_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class Scenes:
    """factors [B, r] -> drawn scenes [B, D]."""

    resolution: int

    def __call__(self, factors: Array) -> Array:
        return rendered.render(factors, self.resolution).reshape(len(factors), -1)


@dataclasses.dataclass(frozen=True)
class FlatCube:
    """factors [B, r] -> a cube of r orthogonal edges [B, D], variances from 1 down to 1/10."""

    dim: int
    seed: int

    def __call__(self, factors: Array) -> Array:
        variances = jnp.geomspace(1.0, 0.1, factors.shape[1])
        return rendered.linear_manifold(factors, self.seed, variances, self.dim)


@dataclasses.dataclass(frozen=True)
class CurvedCube:
    """factors [B, r] -> a random network's image of the cube [B, D]."""

    dim: int
    seed: int

    def __call__(self, factors: Array) -> Array:
        return rendered.network_manifold(factors, self.seed, 64, self.dim)


def manifold(
    name: str,
    *,
    rank: int,
    resolution: int,
    train_size: int,
    test_size: int,
    noise: float = 0.0,
    seed: int = 0,
) -> ImageSet:
    """Images on a manifold of known dimension r, drawn by us: no files.

    Args:
      name: "rendered" (scenes, see `rendered`), "linear" (of rank r) or "network" (a random
        network's image of the cube).
      rank: r.
      resolution: pixels a side, at least 8; three channels.
      noise: standard deviation of white observation noise added to every pixel once. It gives
        gamma a floor, noise^2, and lets pixels leave [0, 1] by as much.
      seed: of the factors, the noise, and the two abstract manifolds.

    Raises:
      InputError: unknown name, r or resolution out of range, noise on more pixels than can be
        stored.
    """
    if name not in MANIFOLDS:
        raise InputError(f"data.name={name!r} must be one of {', '.join(map(repr, MANIFOLDS))}.")
    if type(rank) is not int or not 1 <= rank <= rendered.MAX_FACTORS:
        raise InputError(
            f"r={rank} (data.rank, or of data.ranks) must be an integer in "
            f"1..{rendered.MAX_FACTORS}."
        )
    if resolution < 8:
        raise InputError(f"data.resolution={resolution} must be at least 8 pixels.")
    shape = (resolution, resolution, 3)
    dim = math.prod(shape)
    decode: Decode = Scenes(resolution)
    if name != "rendered":
        decode = (FlatCube if name == "linear" else CurvedCube)(dim, seed)
    factors = np.asarray(rendered.draw_factors(seed, jnp.arange(train_size + test_size), rank))
    if len(factors) * dim * 4 > STORED_BYTES:
        if noise:
            raise InputError(
                f"data.noise={noise} needs the {len(factors)} images of {dim} pixels stored, more "
                f"than {STORED_BYTES >> 30} GiB: lower data.train_size, or set data.noise=0."
            )
        rows = factors
    else:
        rows = np.asarray(jax.jit(lambda f: _drawn(f, decode))(factors))
        rows = rows + noise * np.asarray(_white_noise(seed, len(rows), dim)) if noise else rows
        decode = to_unit_pixels
    train, test = rows[:train_size], rows[train_size:]
    recipe = {
        "rank": rank, "resolution": resolution, "train_size": train_size, "test_size": test_size,
        "noise": float(noise), "seed": seed,
    }  # fmt: skip
    return ImageSet(
        name, train, test, shape, decode, factors[:train_size], factors[train_size:], recipe
    )


def _drawn(factors: Array, decode: Decode) -> Array:
    return jax.lax.map(lambda row: decode(row[None])[0], factors, batch_size=256)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _white_noise(seed: int, size: int, dim: int) -> Array:
    return jax.lax.map(
        lambda index: jax.random.normal(stream(seed, "observation noise", index), (dim,)),
        jnp.arange(size),
        batch_size=256,
    )


def mean_image(rows: Array, decode: Decode = to_unit_pixels, block: int = 256) -> Array:
    """x_bar [D] of stored rows [N, ...], a block of images at a time."""
    return mean_over(lambda row: decode(row[None])[0], rows, block)


def mean_over(function: Callable[[Array], Array], rows: Array, block: int = 256) -> Array:
    """The mean of function(row) over rows [N, ...], of which one block is computed at a time."""
    size, block = len(rows), min(block, len(rows))
    each = jax.vmap(function)

    def add(index: Array, total: Array) -> Array:
        return total + each(jax.lax.dynamic_slice_in_dim(rows, index * block, block)).sum(0) / size

    shape = jax.eval_shape(function, jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype))
    total = jax.lax.fori_loop(0, size // block, add, jnp.zeros(shape.shape, shape.dtype))
    rest = rows[size - size % block :]
    return total + each(rest).sum(0) / size if len(rest) else total


def host_mean_image(
    rows: np.ndarray, decode: Decode = to_unit_pixels, block: int = 256
) -> np.ndarray:
    """`mean_image` of rows [N, ...] on disk, of which never more than a block is read at once."""
    decoded = jax.jit(decode)
    total = sum(
        np.asarray(decoded(np.asarray(rows[start : start + block]))).sum(0, dtype=np.float64)
        for start in range(0, len(rows), block)
    )
    return np.asarray(total / len(rows), jnp.result_type(float))


def load(
    name: str,
    directory: str = "",
    *,
    resolution: int = 64,
    folder: str = "",
    bad: str = "refuse",
) -> ImageSet:
    """The image set `name`.

    "digits" comes with scikit-learn: 8x8; a fifth, drawn at random in each class, is the test
    split. Any other name is an image set of TensorFlow Datasets with splits train and test, read
    from `directory` if it was prepared there as array_record. The sets that are
    published as IDX files (mnist, fashion_mnist, kmnist) are read from these files
    too, found in `directory` or below it, and are downloaded there if absent. "celeb_a"
    (centre crop; memory-mapped) and "folder", the user's own photographs, are decoded once
    at `resolution` and cached under `directory`: see `photos`.

    Args:
      name: "digits", "folder" or a TFDS name.
      directory: where data lies; "" means $VAEBAL_DATA_DIR, else $TFDS_DATA_DIR, else
        ~/tensorflow_datasets.
      resolution: pixels a side of "celeb_a" and "folder".
      folder: where the images of "folder" lie.
      bad: "refuse" or "skip" files of "folder" that are no usable images.

    Raises:
      InputError: unknown name, nothing found, no folder named, a file damaged or not readable,
        pixels not in range.
    """
    root = idx.data_root(directory)
    try:
        return _load(name, root, resolution, folder, bad)
    except OSError as error:
        raise InputError(
            f"data.name={name!r}: {error.filename or root} cannot be read "
            f"({error.strerror or error}): mend its permissions, or the disk."
        ) from error


def _load(name: str, root: Path, resolution: int, folder: str, bad: str) -> ImageSet:
    if name == "digits":
        return check_pixels(_digits())
    if name in ("celeb_a", "folder"):
        if name == "folder" and not folder.strip():
            raise InputError("data.folder='' names no folder: set it to one that holds images.")
        prepared = (
            photos.celeba(root, resolution)
            if name == "celeb_a"
            else photos.folder(Path(folder).expanduser(), resolution, root, bad=bad)
        )
        return ImageSet(
            name, prepared.splits["train"], prepared.splits["test"], (resolution, resolution, 3),
            recipe={key: prepared.provenance["splits"][key] for key in ("train", "test")},
        )  # fmt: skip
    if idx.is_prepared(name, root):
        return check_pixels(_tfds(name, root))
    if name in idx.IDX_SETS:
        return check_pixels(_idx(name, root))
    _require_known(name)
    raise InputError(
        f"data.name={name!r} was not found in data.dir={str(root)!r}: prepare it there once with "
        f'`pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{root}', file_format='array_record')"
        f'.download_and_prepare()"`, or point data.dir at a directory that holds it prepared.'
    )


def check_pixels(images: ImageSet) -> ImageSet:
    """`images` unchanged if every pixel is finite and in range.

    Raises:
      InputError: otherwise, naming the first bad image.
    """
    for split, pixels in (("train", images.train), ("test", images.test)):
        if pixels.dtype == np.uint8:
            continue
        bad = ~((pixels >= 0) & (pixels <= 1))  # NaN compares false
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InputError(
                f"data.name={images.name!r} has the pixel {pixels[row, column]} in image {row} of "
                f"split {split!r}: pixels must lie in [0, 1] (or be uint8); rescale or repair it."
            )
    return images


def _digits() -> ImageSet:
    train, test = (images for images, _ in digits_splits())
    return ImageSet("digits", train, test, (8, 8, 1))


def digits_splits() -> list[tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits, images [N, 64] and labels [N], for training and, a fifth, for tests.

    Drawn at random in each class: they lie in an order in which every fifth one is another mixture.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    parts = train_test_split(
        np.arange(len(found.data)), test_size=359, random_state=0, stratify=found.target
    )
    # 0..16 counts of dark pixels in 4x4 blocks: sixteenths are exact in float32.
    images, labels = (found.data / 16).astype(np.float32), found.target.astype(np.int32)
    return [(images[part], labels[part]) for part in map(np.sort, parts)]


def _idx(name: str, root: Path) -> ImageSet:
    splits = {
        split: idx.parse_idx_images(idx.idx_content(name, file, root))
        for split, file in idx.IMAGE_FILES.items()
    }
    height, width = splits["train"].shape[1:]
    flat = {split: pixels.reshape(len(pixels), -1) for split, pixels in splits.items()}
    return ImageSet(name, flat["train"], flat["test"], (height, width, 1))


def _require_known(name: str) -> None:
    if name in MANIFOLDS:
        raise InputError(f"data.name={name!r} is drawn and not read: use `manifold`.")
    import tensorflow_datasets as tfds

    known = ["digits", "folder", *MANIFOLDS, *tfds.list_builders(with_community_datasets=False)]
    if name not in known:
        import difflib

        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "use 'digits' or an image set of TFDS."
        raise InputError(f"data.name={name!r} is not a known data set: {hint}")


def _tfds(name: str, root: Path) -> ImageSet:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        sources = builder.as_data_source()
    except Exception as error:  # TFDS raises many kinds; each means the same to the user
        raise InputError(
            f"data.name={name!r} in data.dir={str(root)!r} could not be read as array_record "
            f"({type(error).__name__}: {str(error).splitlines()[0]}): prepare it again with "
            "file_format='array_record'."
        ) from error
    features = builder.info.features
    feature = features["image"] if "image" in features else None  # noqa: SIM401 (no dict)
    if feature is None or None in (feature.shape or (None,)):
        raise InputError(
            f"data.name={name!r} has no feature 'image' of one fixed shape; this loader reads "
            "sets of equally sized images."
        )
    missing = {"train", "test"} - set(sources)
    if missing:
        raise InputError(
            f"data.name={name!r} has no split {sorted(missing)[0]!r} (it has {sorted(sources)}); "
            "use a set with splits 'train' and 'test'."
        )

    def read(source) -> np.ndarray:
        rows = source.__getitems__(list(range(len(source))))
        return np.stack([np.asarray(row["image"]).reshape(-1) for row in rows])

    return ImageSet(name, read(sources["train"]), read(sources["test"]), tuple(feature.shape))
