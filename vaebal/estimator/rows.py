"""Anybody's data as rows [N, D]: arrays and files in, one scale out and back."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vaebal.errors import InputError

ARRAYS = (".npy", ".npz", ".csv")
ALIGNMENT = 64  # bytes, of an array that XLA's CPU devices need not copy
STANDARDISED = 1024  # rows at a time, in float64


def read(path: str | Path, resolution: int = 64) -> np.ndarray:
    """The rows in a file, or the images of a folder.

    Args:
      path: .npy, .npz (of one array, or one named "x" or "X"), .csv (numbers, with or without a
        header; 0,1,2,… of three or more columns is one), or a folder of JPEG, PNG, WebP or BMP
        files.
      resolution: pixels a side, of a folder's images.

    Returns:
      [N, D], or [N, H, W, C] of a folder's images.

    Raises:
      InputError: it is not there, of another kind, or cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        from vaebal.data import load

        images = load("folder", folder=str(path), resolution=resolution)
        rows = np.concatenate([images.train, images.test])
        return rows.reshape(-1, *images.image_shape)
    if not path.exists():
        raise InputError(f"{path} does not exist: give an array, a folder of images, or a file.")
    if path.suffix not in ARRAYS:
        raise InputError(
            f"{path} is of no kind that can be read: give one of {', '.join(ARRAYS)}, or a folder "
            "of images."
        )
    try:
        if path.suffix == ".npy":
            return np.load(path)
        return _from_csv(path) if path.suffix == ".csv" else _from_npz(path)
    except (ValueError, OSError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as {path.suffix} ({error}).") from error


def from_archive(
    path: Path, choose: Callable[[list[str]], list[str]] = list
) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, of the names that `choose` takes of all; others are not read.

    Raises:
      InputError: it is none, cut short, or what is read holds Python objects.
    """
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in choose(arrays.files)}
    except InputError:  # of `choose`
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is no .npz file, or not the whole of one; Python objects are not read."
        ) from error


def _from_npz(path: Path) -> np.ndarray:
    def the_one(names: list[str]) -> list[str]:
        named = [name for name in ("x", "X") if name in names]
        if not named and len(names) != 1:
            raise InputError(
                f"{path} holds the arrays {', '.join(names)}: name the one to fit 'x'."
            )
        return named[:1] or names

    (rows,) = from_archive(path, the_one).values()
    return rows


def _from_csv(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8-sig") as file:
        cells = [cell.strip() for cell in file.readline().split(",")]
    numeric = [_is_number(cell) for cell in cells]
    if not cells[0] and len(cells) > 1:
        raise InputError(
            f"{path} has a first column without a name, as pandas writes its index: leave it out "
            "(index=False), or name it."
        )
    if any(numeric) and not all(numeric):
        raise InputError(
            f"{path} has {cells[numeric.index(False)]!r} among the numbers of its first line: give "
            "a header of names alone, or none, and a number in every cell."
        )
    counted = len(cells) >= 3 and cells == [str(index) for index in range(len(cells))]
    header = counted or not any(numeric)  # pandas numbers the columns that have no name
    return np.loadtxt(path, delimiter=",", skiprows=int(header), ndmin=2, encoding="utf-8-sig")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


class Scale(NamedTuple):
    """What standardises rows: a mean, and one scale for all of their features.

    The largest variance along any direction becomes 1. One scale, as one gamma is the variance of
    every feature: features of different units want scaling of their own before.
    """

    mean: np.ndarray  # [D]
    scale: float  # in the data's own units

    def standardise(self, rows: np.ndarray) -> np.ndarray:
        """[N, D] -> float32."""
        return ((rows - self.mean) / self.scale).astype(np.float32)

    def standardise_in(self, rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        """rows[order] [n, D] -> float32, block by block: the result is all the memory it takes.

        It begins where a CPU's devices take an array as it is, without a copy.
        """
        size = len(order) * rows.shape[1]
        octets = np.empty(4 * size + ALIGNMENT, np.uint8)
        start = -octets.ctypes.data % ALIGNMENT
        made = octets[start : start + 4 * size].view(np.float32).reshape(len(order), -1)
        for first in range(0, len(order), STANDARDISED):
            block = slice(first, first + STANDARDISED)
            made[block] = self.standardise(rows[order[block]])
        return made

    def restore(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of `standardise`, in float64."""
        return np.asarray(rows, np.float64) * self.scale + self.mean


def scale_of(rows: np.ndarray, *, most: int = 4096, steps: int = 100) -> Scale:
    """The scale of rows [N, D], in float64.

    Args:
      most: rows, drawn at random, whose largest variance is measured.

    Raises:
      InputError: rows that do not vary.
    """
    mean = rows.mean(0, dtype=np.float64)
    rng = np.random.default_rng(0)
    used = rows[np.sort(rng.permutation(len(rows))[:most])].astype(np.float64)
    if (used == used[0]).all():  # their mean, rounded, may yet be another number
        raise InputError("X does not vary: every sample is the same; give samples that differ.")
    used -= mean
    unit = np.abs(used).max()
    used /= unit  # else squares could leave the range of floats
    v = rng.normal(size=used.shape[1])
    variance = 0.0
    for _ in range(steps):
        v = used.T @ (used @ v) / len(used)
        variance = float(np.linalg.norm(v))
        v /= variance
    return Scale(mean, float(unit * np.sqrt(variance)))
