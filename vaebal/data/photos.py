"""Photographs from disk: decoded and cropped once, then memory-mapped as rows of uint8.

What is prepared lies in `<root>/vaebal_cache`: an .npy file per split, and a JSON file
that says what it was made from and how. A cache that is damaged (at every start all its bytes
are hashed, at about 1.5 GB/s a core), or made from other files or otherwise, is made anew.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from vaebal.data import digests
from vaebal.errors import InputError

# Width and height of the aligned images; left, top, right and bottom of their central
# 128 x 128, the cut of TwoStageVAE.
CELEBA_SIZE = (178, 218)
CELEBA_CROP = (25, 45, 153, 173)
CELEBA_SIDE = 128

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

_CACHE = "vaebal_cache"
_BLOCK = 512  # images in memory while a set is prepared


class Photos(NamedTuple):
    """Splits of colour images, prepared.

    Attributes:
      splits: by name, [N, R * R * 3] uint8, memory-mapped and read-only, of images
        (R, R, 3) flattened.
      provenance: what they were made from and how; plain values.
    """

    splits: dict[str, np.ndarray]
    provenance: dict[str, Any]


class _Source(NamedTuple):
    """A split before it is prepared.

    `decode(item)` is a row; or, of items that are names, the reason why there is none.
    """

    size: int
    items: Iterable[Any]
    decode: Callable[[Any], np.ndarray | str]


class _Unusable(Exception):
    """Why a cache cannot be used; empty if it is not there, or is another's."""


def celeba(root: Path, resolution: int) -> Photos:
    """CelebA as TFDS `celeb_a` 2 has it, with the official splits train, validation, test.

    Of the full-resolution aligned images (218 x 178), rows 45:173 and columns 25:153, the
    centre; below 128 pixels, means over blocks of this crop. Reads the array_record files
    in `root`/celeb_a, without TensorFlow, and no longer needs them afterwards. Rows are in
    TFDS's (shuffled) order.

    Args:
      root: the data directory of TFDS.
      resolution: R, a divisor of 128.

    Raises:
      InputError: R divides not 128, nothing was found, a damaged record, no space.
    """
    if resolution < 1 or CELEBA_SIDE % resolution:
        raise InputError(
            f"data.resolution={resolution} is no divisor of {CELEBA_SIDE}, the side of CelebA's "
            "crop: use 64 or 128 (or 32, 16, …)."
        )
    left, top, right, bottom = CELEBA_CROP
    block = CELEBA_SIDE // resolution
    recipe = {
        "set": "celeb_a of TFDS",
        "crop": {"rows": (top, bottom), "columns": (left, right)},
        "filter": f"mean over {block}x{block} pixels, half up",
        "resolution": resolution,
    }
    found = sorted(
        info.parent
        for info in root.glob("celeb_a/*/dataset_info.json")
        if any(info.parent.glob("*.array_record*"))
    )
    if found:  # else what was prepared from it may still be there
        files = sorted((path.name, path.stat().st_size) for path in found[-1].glob("*record*"))
        recipe["source"] = {"version": found[-1].name, "sha256_of_files": digests.of_plain(files)}

    def sources() -> dict[str, _Source]:
        if not found:
            raise InputError(
                f"data.name='celeb_a' was not found in data.dir={str(root)!r}: prepare it there "
                'once with `pip install tensorflow && python -c "import tensorflow_datasets as '
                f"tfds; tfds.builder('celeb_a', data_dir='{root}', file_format='array_record')"
                '.download_and_prepare()"`, or point data.dir at a directory that holds it.'
            )
        return _celeba_sources(found[-1], resolution)

    return _prepared(root / _CACHE, f"celeba_{resolution}", recipe, sources)


def _celeba_sources(directory: Path, resolution: int) -> dict[str, _Source]:
    import tensorflow_datasets as tfds

    def damaged(what: str) -> InputError:
        return InputError(
            f"data.name='celeb_a' in {directory} could not be read ({what}): prepare it again "
            "with file_format='array_record'."
        )

    def decode(record: bytes) -> np.ndarray:
        try:
            encoded = only_image.deserialize_example_np(record, decoders=as_encoded)["image"]
            with Image.open(io.BytesIO(encoded)) as image:
                cut = image.convert("RGB").crop(CELEBA_CROP)
        except Exception as error:  # TFDS and Pillow raise many kinds
            raise damaged(_reason(error)) from error
        if image.size != CELEBA_SIZE:
            raise damaged(f"an image of {image.size} pixels, not {CELEBA_SIZE}")
        # An exact mean, rounded once: linear, where a windowed sinc overshoots and clips.
        return np.asarray(cut.reduce(CELEBA_SIDE // resolution)).reshape(-1)

    def records(source) -> Iterator[bytes]:
        for start in range(0, len(source), _BLOCK):
            try:
                yield from source.__getitems__(list(range(start, min(start + _BLOCK, len(source)))))
            except Exception as error:  # array_record raises many kinds
                raise damaged(_reason(error)) from error

    try:
        builder = tfds.builder_from_directory(directory)
        # The forty attributes cost ten times the image, and are not asked for.
        only_image = tfds.features.FeaturesDict({"image": builder.info.features["image"]})
        as_encoded = {"image": tfds.decode.SkipDecoding()}
        raw = builder.as_data_source(deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        return {
            split: _Source(len(raw[split]), records(raw[split]), decode)
            for split in ("train", "validation", "test")
        }
    except Exception as error:  # TFDS raises many kinds; each means the same to the user
        raise damaged(_reason(error)) from error


def folder(path: Path, resolution: int, root: Path, *, bad: str) -> Photos:
    """A folder of one's own images, with splits train and test.

    Every file in `path` and the folders in it (hidden ones aside) must be a JPEG, PNG, WebP or
    BMP of at least R x R pixels, not animated and not 16-bit grey. Links to folders, broken links
    and folders that cannot be read are treated as files that cannot be used. Turned as EXIF
    says, composited on white where transparent, converted to RGB, cut to the central
    square, and resized by Pillow's Lanczos, never enlarged. The test split is every file whose
    relative path has a hash in the lowest tenth, so files keep their split when others are
    added (where none has, the lowest). Rows are in the order of the relative paths.

    Args:
      path: the folder.
      resolution: R.
      root: where the cache goes, as for `celeba`.
      bad: "refuse" files that cannot be used, after a look at all, or "skip" them with a
        warning; both name them, and provenance["skipped"] has the whole list with reasons.

    Raises:
      InputError: not a folder, or not readable, fewer than two images, a file that cannot be
        used (under "refuse"), no image left in a split, no space.
    """
    if bad not in ("refuse", "skip"):
        raise InputError(f"data.bad={bad!r} must be 'refuse' or 'skip'.")
    if resolution < 1:
        raise InputError(f"data.resolution={resolution} must be positive.")
    names, left_out = _files(path)
    if left_out and bad == "refuse":
        raise _refused(path, len(names) + len(left_out), left_out)
    if len(names) < 2:
        raise InputError(
            f"data.folder={str(path)!r} holds {len(names)} files{_aside(left_out)}: at least two "
            "images are needed, one for each split."
        )
    stats = [(name, (stat := (path / name).stat()).st_size, stat.st_mtime_ns) for name in names]
    recipe = {
        "set": f"folder {path.resolve()}",
        "crop": "central square",
        "filter": "Lanczos (Pillow)",
        "resolution": resolution,
        "source": {"files": len(names), "sha256_of_files": digests.of_plain(stats)},
    }
    stem = f"folder_{digests.of_plain(str(path.resolve()))[:8]}_{resolution}"
    photos = _prepared(
        root / _CACHE, stem, recipe, lambda: _folder_sources(path, names, resolution)
    )
    skipped = left_out | photos.provenance["skipped"]
    total = len(names) + len(left_out)
    if skipped and bad == "refuse":
        raise _refused(path, total, skipped)
    if skipped:
        text = f"{len(skipped)} of {total} files in {path} cannot be used: {_listed(skipped)}"
        warnings.warn(f"Skipped: {text}.", stacklevel=2)
    return photos._replace(provenance=photos.provenance | {"skipped": skipped})


def _folder_sources(path: Path, names: list[str], resolution: int) -> dict[str, _Source]:
    def decode(name: str) -> np.ndarray | str:
        try:
            return square(path / name, resolution).reshape(-1)
        except Exception as error:  # Pillow raises many kinds
            if isinstance(error, OSError) and error.errno:  # the disk's, which may pass
                raise InputError(
                    f"data.folder: {path / name} cannot be read ({error.strerror}): mend the disk, "
                    "or remove it."
                ) from error
            return _reason(error)

    in_test = held_out(names)
    splits = {
        "train": [name for name in names if name not in in_test],
        "test": [name for name in names if name in in_test],
    }
    return {split: _Source(len(items), items, decode) for split, items in splits.items()}


def _files(path: Path) -> tuple[list[str], dict[str, str]]:
    """The relative paths of all files below `path`, hidden ones aside; and of what is none, why.

    Files and folders that cannot be read, links to folders, which are not followed (they could
    lead round in a circle), broken links, and pipes and sockets are none.
    """
    if not path.is_dir():
        raise InputError(f"data.folder={str(path)!r} is not a folder; name one that holds images.")
    names: list[str] = []
    left_out: dict[str, str] = {}

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == path:
            raise InputError(
                f"data.folder={str(path)!r} cannot be read ({error.strerror}): mend its "
                "permissions."
            ) from error
        left_out[Path(error.filename).relative_to(path).as_posix()] = (
            f"a folder that cannot be read: {error.strerror}"
        )

    for above, folders, files in os.walk(path, onerror=unreadable):
        folders[:] = [name for name in folders if not (name.startswith(".") or name == _CACHE)]
        for name in (*folders, *files):
            file = Path(above, name)
            relative = file.relative_to(path).as_posix()
            if os.path.isdir(file):
                if file.is_symlink():
                    left_out[relative] = "a link to a folder"
            elif name.startswith("."):
                continue
            elif os.path.isfile(file) and os.access(file, os.R_OK):
                names.append(relative)
            else:
                left_out[relative] = _why_no_file(file)
    return sorted(names), dict(sorted(left_out.items()))


def _why_no_file(file: Path) -> str:
    try:
        file.stat()
    except FileNotFoundError:
        return "a broken link"
    except OSError as error:
        return error.strerror or type(error).__name__
    return os.strerror(errno.EACCES) if file.is_file() else "neither a file nor a folder"


def _refused(path: Path, total: int, skipped: dict[str, str]) -> InputError:
    return InputError(
        f"{len(skipped)} of {total} files in {path} cannot be used: {_listed(skipped)}; repair or "
        "remove them, or set data.bad='skip'."
    )


def _aside(left_out: dict[str, str]) -> str:
    return f", beside {_listed(left_out)}" if left_out else ""


def held_out(names: Iterable[str]) -> set[str]:
    """The names whose hash is in the lowest tenth; at least one, and not all of two or more."""
    by_hash = sorted((hashlib.sha256(os.fsencode(name)).hexdigest(), name) for name in names)
    low = sum(int(digest[:8], 16) < 2**32 / 10 for digest, _ in by_hash)
    return {name for _, name in by_hash[: max(1, min(low, len(by_hash) - 1))]}


def square(file: Path, resolution: int) -> np.ndarray:
    """The image in `file` as `folder` sees it: [R, R, 3] uint8.

    Raises:
      ValueError: an animation, more than 8 bits of grey, or smaller than R x R.
      Exception: whatever Pillow raises where the file is damaged or no image.
    """
    with Image.open(file, formats=FORMATS) as image:
        # Of a JPEG more frames are previews and depth, which cameras add.
        if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"an animation of {image.n_frames} frames")
        if image.mode.startswith(("I", "F")):  # Pillow would clip, not scale
            raise ValueError("more than 8 bits of grey")
        side = min(image.size)
        if side < resolution:
            width, height = image.size
            raise ValueError(f"{width}x{height} pixels, smaller than {resolution}x{resolution}")
        turned = ImageOps.exif_transpose(image)
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
    left, top = (turned.width - side) // 2, (turned.height - side) // 2
    cut = turned.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(cut.resize((resolution, resolution), Image.Resampling.LANCZOS))


def _prepared(
    cache: Path, stem: str, recipe: dict[str, Any], sources: Callable[[], dict[str, _Source]]
) -> Photos:
    """What lies in `cache` under `stem` by `recipe`, put there from `sources` if need be."""
    # Tuples and lists compare alike.
    recipe = json.loads(json.dumps(recipe | {"digests": "sha256 of all bytes"}))
    with contextlib.suppress(_Unusable):
        return _opened(cache, stem, recipe)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One process prepares, the others wait. The lock goes with the file's closing.
        with open(cache / f"{stem}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                return _opened(cache, stem, recipe)
            except _Unusable as reason:
                if reason.args:
                    warnings.warn(f"{reason}: it is prepared again.", stacklevel=3)
            _write(cache, stem, recipe, sources())
            return _opened(cache, stem, recipe)
    except OSError as error:
        raise InputError(
            f"data.dir: {cache} cannot be written ({error.strerror}): make space or choose another."
        ) from error


def _opened(cache: Path, stem: str, recipe: dict[str, Any]) -> Photos:
    try:
        return _read_cache(cache, stem, recipe)
    except OSError as error:  # not what is damaged, so not to be written over
        raise InputError(
            f"data.dir: {error.filename or cache} cannot be read ({error.strerror}): mend its "
            "permissions, or the disk."
        ) from error


def _read_cache(cache: Path, stem: str, recipe: dict[str, Any]) -> Photos:
    listing = cache / f"{stem}.json"
    if not listing.is_file():
        raise _Unusable
    try:
        provenance = json.loads(listing.read_text())
        if any(provenance.get(key) != value for key, value in recipe.items()):
            raise _Unusable
        expected, _ = provenance["splits"], provenance["skipped"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Unusable(f"{listing} is damaged") from error
    splits = {}
    for split, held in expected.items():
        file = cache / f"{stem}_{split}.npy"
        try:
            rows = splits[split] = np.load(file, mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise _Unusable(f"{file} is damaged ({_reason(error)})") from error
        if rows.dtype != np.uint8 or _fingerprint(rows) != held:
            raise _Unusable(f"{file} is damaged (it is not what {listing.name} says)")
    return Photos(splits, provenance)


def _fingerprint(rows: np.ndarray) -> dict[str, Any]:
    return {"shape": list(rows.shape), "sha256": digests.of_array(rows)}


def _write(cache: Path, stem: str, recipe: dict[str, Any], sources: dict[str, _Source]) -> None:
    """Files appear whole or not at all, the listing last; a killed run's parts are reused."""
    total = sum(source.size for source in sources.values())
    width = 3 * recipe["resolution"] ** 2
    free = shutil.disk_usage(cache).free
    if free < total * width:
        raise InputError(
            f"data.dir: {cache} has {free / 1e9:.1f} GB free and {total * width / 1e9:.1f} GB are "
            "needed: make space or choose another."
        )
    print(f"Preparing {total:,} images once: {cache / stem}_*.npy", file=sys.stderr, flush=True)
    parts = {split: cache / f"{stem}_{split}.npy.part" for split in sources}
    skipped: dict[str, str] = {}
    try:
        counts = {
            split: _write_rows(parts[split], width, _rows(source, skipped, f"{stem} {split}"))
            for split, source in sources.items()
        }
        for split, count in counts.items():
            if not count:
                raise InputError(
                    f"{recipe['set']} has no usable image for its split {split!r}: "
                    f"{_listed(skipped)}; repair these or add images."
                )
        listing = cache / f"{stem}.json"
        listing.unlink(missing_ok=True)
        for split, part in parts.items():
            part.replace(cache / f"{stem}_{split}.npy")
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    splits = {
        split: _fingerprint(np.load(cache / f"{stem}_{split}.npy", mmap_mode="r"))
        for split in sources
    }
    made = {"splits": splits, "skipped": dict(sorted(skipped.items()))}
    text = json.dumps(recipe | made, indent=2)
    part = listing.with_suffix(".json.part")
    part.write_text(text + "\n")
    part.replace(listing)


def _rows(source: _Source, skipped: dict[str, str], title: str) -> Iterator[np.ndarray]:
    """The rows of `source` in order, decoded by threads; `skipped` gets the reasons."""
    terminal = Console(stderr=True)
    items = iter(source.items)
    blocks = iter(lambda: list(itertools.islice(items, _BLOCK)), [])
    with ThreadPoolExecutor() as pool:
        for block in track(
            blocks,
            title,
            total=math.ceil(source.size / _BLOCK),
            console=terminal,
            transient=True,
            disable=not terminal.is_terminal,
        ):
            for item, row in zip(block, pool.map(source.decode, block), strict=True):
                if isinstance(row, str):
                    skipped[item] = row
                else:
                    yield row


def _write_rows(file: Path, width: int, rows: Iterable[np.ndarray]) -> int:
    """Writes `rows` [width] uint8 as an .npy file of as many as there are; returns how many."""

    def header(count: int) -> None:
        fields = {"descr": "|u1", "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(out, fields)

    count = 0
    with open(file, "wb") as out:
        header(0)  # NumPy leaves room in a header for its count to grow
        for row in rows:
            out.write(row.tobytes())
            count += 1
        out.seek(0)
        header(count)
        out.flush()
        os.fsync(out.fileno())
    return count


def _reason(error: Exception) -> str:
    """One line; Pillow's messages repeat the path."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image of the formats " + ", ".join(FORMATS)
    return (str(error) or type(error).__name__).splitlines()[0]


def _listed(skipped: dict[str, str], most: int = 5) -> str:
    named = [f"{name} ({reason})" for name, reason in itertools.islice(skipped.items(), most)]
    return ", ".join(named) + (f" and {len(skipped) - most} more" if len(skipped) > most else "")
