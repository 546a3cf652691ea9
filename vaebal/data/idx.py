"""Sets published as IDX files: found, checked by TFDS's checksums, downloaded if absent, parsed.

Nothing here needs TensorFlow.
"""

import gzip
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

import numpy as np

from vaebal.errors import InputError

# The sets that TFDS downloads as IDX files; URLs and checksums are TFDS's own.
IDX_SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
IMAGE_FILES = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}
LABEL_FILES = {"train": "train-labels-idx1-ubyte.gz", "test": "t10k-labels-idx1-ubyte.gz"}


def data_root(directory: str = "") -> Path:
    """`directory`, else $VAEBAL_DATA_DIR, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(
        directory
        or os.environ.get("VAEBAL_DATA_DIR")
        or os.environ.get("TFDS_DATA_DIR")
        or "~/tensorflow_datasets"
    ).expanduser()


def is_prepared(name: str, root: Path) -> bool:
    """Whether TFDS has prepared the set `name` in `root` as array_record."""
    return (root / name).is_dir() and any((root / name).rglob("*.array_record*"))


def idx_content(name: str, file: str, root: Path) -> bytes:
    """The bytes of a published IDX file of the set `name`, found in `root` or downloaded there.

    Raises:
      InputError: damaged, or neither found nor downloaded.
    """
    import tensorflow_datasets as tfds

    published = {
        url.rsplit("/", 1)[1]: (url, info.checksum)
        for url, info in getattr(tfds.image_classification, IDX_SETS[name]).url_infos.items()
    }
    url, checksum = published[file]
    # A folder named after the set comes first: the sets' files share their names.
    folders = (root / name, root / "downloads" / "manual" / name, root / "downloads" / "manual")
    found = [path for folder in (*folders, root) if (path := folder / file).is_file()]
    path = found[0] if found else _download(name, url, root / name / file, root)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != checksum:
        raise InputError(
            f"{path} is damaged or is not {name}'s file: its sha256 is not the published "
            f"{checksum}; delete it and run again, or copy it anew."
        )
    return gzip.decompress(content)


def _words(content: bytes) -> np.ndarray:
    """The whole big-endian numbers of 4 bytes in it, [len // 4]."""
    return np.frombuffer(content[: len(content) // 4 * 4], ">u4")


def parse_idx_images(content: bytes) -> np.ndarray:
    """The bytes of an IDX3 file of unsigned bytes -> uint8 [N, H, W].

    Raises:
      InputError: another magic number, or fewer bytes than the header promises.
    """
    header = _words(content[:16])
    if len(header) != 4 or header[0] != 0x0803:
        raise InputError(
            "An IDX image file must start with the bytes 00 00 08 03; this one does not."
        )
    shape = tuple(int(n) for n in header[1:])
    if len(content) != 16 + np.prod(shape):
        raise InputError(
            f"An IDX image file promises {np.prod(shape)} pixels and holds {len(content) - 16}: "
            "it is truncated; copy it anew."
        )
    return np.frombuffer(content, np.uint8, offset=16).reshape(shape)


def _download(name: str, url: str, path: Path, root: Path) -> Path:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            content = response.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        partial.write_bytes(content)
        partial.replace(path)
    except (http.client.HTTPException, OSError) as error:  # a URLError is an OSError
        raise InputError(
            f"data.name={name!r} was not found in data.dir={str(root)!r} and could not be "
            f"downloaded ({error}): run once with a network connection, or put "
            f"{' and '.join(IMAGE_FILES.values())} into {root / name}."
        ) from error
    return path


def idx_labels(name: str, directory: str = "") -> dict[str, np.ndarray]:
    """The labels [N] of both splits of a set published as IDX files, in the images' order.

    Looked for where `data.load` looks for the images, checked by TFDS's checksums, downloaded
    there if absent.

    Raises:
      InputError: damaged, or neither found nor downloaded; or the images were prepared by TFDS,
        which shuffles them.
    """
    root = data_root(directory)
    if is_prepared(name, root):
        raise InputError(
            f"data.name={name!r} was prepared by TFDS in data.dir={str(root)!r}, in another order "
            "than the published labels: point data.dir at the published IDX files."
        )
    return {
        split: parse_idx_labels(idx_content(name, file, root))
        for split, file in LABEL_FILES.items()
    }


def parse_idx_labels(content: bytes) -> np.ndarray:
    """The bytes of an IDX1 file of unsigned bytes -> int32 [N].

    Raises:
      InputError: another magic number, or another length than the header promises.
    """
    header = _words(content[:8])
    if len(header) != 2 or header[0] != 0x0801 or len(content) != 8 + header[1]:
        raise InputError(
            "An IDX label file must start with the bytes 00 00 08 01 and hold as many labels as "
            "it says; this one does not."
        )
    return np.frombuffer(content, np.uint8, offset=8).astype(np.int32)
