"""The published weights of `vaebal.measures.inception`: fetched, checked, converted, kept.

PyTorch's file is read without PyTorch, and nothing in it is run.
"""

import contextlib
import hashlib
import os
import pickle
import shutil
import urllib.request
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vaebal.errors import InputError
from vaebal.measures.inception import BATCH_NORM_EPS, CLASSES, parameter_shapes

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
VARIABLE = "VAEBAL_INCEPTION_WEIGHTS"
DEFAULT_PATH = f"~/.cache/vaebal/{FILE}"


def load_params(inception_weights: str = "") -> dict[str, Any]:
    """The published weights as Flax parameters of `InceptionV3`.

    Args:
      inception_weights: the published PyTorch file; "" means $VAEBAL_INCEPTION_WEIGHTS, else
        ~/.cache/vaebal/pt_inception-2015-12-05-6726825d.pth, downloaded there if absent.
        Converted once: the parameters are kept beside it with the ending .npz, which alone is
        enough from then on.

    Raises:
      InputError: no such file and no download, a wrong checksum, missing or misshaped tensors.
    """
    named = inception_weights or os.environ.get(VARIABLE, "")
    path = Path(named or DEFAULT_PATH).expanduser()
    converted = path.parent / f"{path.stem}.npz"
    if converted.is_file():
        return _read_converted(converted)
    if not path.is_file():
        if named:
            raise InputError(_absent(path, "is not a file"))
        _download(path)
    _check_sha256(path, str(path))
    params = params_from_torch(read_torch_file(path), str(path))
    with contextlib.suppress(OSError):  # in a read-only folder it is converted every time
        _write_converted(params, converted)
    return params


def _absent(path: Path, reason: str) -> str:
    return (
        f"The Inception weights {str(path)!r} cannot be had ({reason}): download {URL} and name "
        f"the file by the field inception_weights or ${VARIABLE}, or put it at {DEFAULT_PATH}."
    )


def _download(path: Path) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(URL, timeout=10) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        _check_sha256(partial, "the downloaded file")
        partial.replace(path)
    except OSError as error:  # URLError is one
        raise InputError(_absent(path, f"the download failed: {error}")) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_sha256(path: Path, name: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise InputError(
            f"Inception weights: {name} is damaged or is not {FILE}: its sha256 is {found}, not "
            f"{SHA256}; get it anew from {URL}."
        )


def _write_converted(params: dict[str, Any], path: Path) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            np.savez(file, source_sha256=SHA256, **flatten_dict(params, sep="/"))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_converted(path: Path) -> dict[str, Any]:
    fix = "delete it and run again with the .pth file beside it"
    try:
        with path.open("rb") as file, np.load(file) as archive:
            arrays = dict(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}); {fix}.") from error
    if str(arrays.pop("source_sha256", "")) != SHA256:
        raise InputError(f"{path} was not converted from {FILE}; {fix}.")
    _check_shapes(arrays, parameter_shapes(), str(path), fix)
    return unflatten_dict(arrays, sep="/")


def _check_shapes(arrays, shapes: dict[str, tuple[int, ...]], source: str, fix: str) -> None:
    missing = [name for name in shapes if name not in arrays]
    if missing:
        raise InputError(
            f"{source} lacks {len(missing)} of {len(shapes)} tensors ({', '.join(missing[:3])}"
            f"{', …' * (len(missing) > 3)}); {fix}."
        )
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise InputError(
                f"{source} has {name} of shape {arrays[name].shape}, not {shape}; {fix}."
            )


_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def params_from_torch(tensors: dict[str, np.ndarray], source: str) -> dict[str, Any]:
    """A PyTorch state dict -> Flax parameters, batch norm folded.

    Args:
      tensors: "Mixed_5b.branch1x1.conv.weight" [out, in, h, w], "….bn.running_var" [out], …,
        "fc.weight" [1008, 2048]; others are left aside.
      source: where they come from, for the message.

    Raises:
      InputError: a missing or misshaped tensor.
    """
    convolutions = {
        name.removesuffix("/kernel"): shape
        for name, shape in parameter_shapes().items()
        if len(shape) == 4
    }
    wanted = {"fc.weight": (CLASSES, 2048), "fc.bias": (CLASSES,)}
    for path, (*window, fan_in, out) in convolutions.items():
        layer = path.replace("/", ".")
        wanted[f"{layer}.conv.weight"] = (out, fan_in, *window)
        wanted |= {f"{layer}.bn.{part}": (out,) for part in _BATCH_NORM}
    _check_shapes(tensors, wanted, source, f"use {FILE} from {URL}")

    params = {"fc/kernel": tensors["fc.weight"].T, "fc/bias": tensors["fc.bias"]}
    for path in convolutions:
        layer = path.replace("/", ".")
        gain, shift, mean, variance = (
            tensors[f"{layer}.bn.{part}"].astype(np.float64) for part in _BATCH_NORM
        )
        scale = gain / np.sqrt(variance + BATCH_NORM_EPS)
        params[f"{path}/kernel"] = tensors[f"{layer}.conv.weight"].transpose(2, 3, 1, 0) * scale
        params[f"{path}/bias"] = shift - mean * scale
    contiguous = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in params.items()}
    return unflatten_dict(contiguous, sep="/")


# torch.save's two formats, without torch. Both hold one pickle in which a tensor is a call of
# _rebuild_tensor_v2 on a storage, and the storages' raw little-endian bytes apart from it.

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


def _view(storage, offset, shape, strides, *_) -> np.ndarray:
    step = storage.itemsize
    # Unlike as_strided, the constructor refuses a view that leaves its storage.
    return np.ndarray(
        shape, storage.dtype, storage, offset * step, tuple(step * stride for stride in strides)
    )


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "LongStorage"): np.dtype("<i8"),
}


class _StateUnpickler(pickle.Unpickler):
    """Unpickles tensors as views of storages that are filled later; refuses everything else."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which a state dict has no use for"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, identity: tuple) -> np.ndarray:
        _, dtype, key, _, size, *view = identity
        if view not in ([], [None]):
            raise pickle.UnpicklingError("it has a view of a storage, which is not read here")
        return self.storages.setdefault(key, np.empty(size, dtype))


def _fill(storage: np.ndarray, file: BinaryIO) -> None:
    if file.readinto(storage) != storage.nbytes:
        raise ValueError("it ends inside a tensor")


def read_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The state dict in a file of torch.save, zip or legacy format; needs no torch.

    Runs no code from the file: the pickle may build ordered dictionaries and float32 and int64
    tensors, nothing else.

    Raises:
      pickle.UnpicklingError: the file asks for anything else.
      ValueError: another format, or a truncated file.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        return _read_zip(file) if is_zip else _read_legacy(file)


def _read_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        root = archive.namelist()[0].split("/")[0]
        with archive.open(f"{root}/data.pkl") as member:
            unpickler = _StateUnpickler(member)
            tensors = unpickler.load()
        for key, storage in unpickler.storages.items():
            with archive.open(f"{root}/data/{key}") as member:
                _fill(storage, member)
    return dict(tensors)


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    header = [_StateUnpickler(file).load() for _ in range(3)]
    if header[:2] != [_LEGACY_MAGIC, _LEGACY_VERSION] or not header[2]["little_endian"]:
        raise ValueError("it is not a file of torch.save")
    unpickler = _StateUnpickler(file)
    tensors = unpickler.load()
    for key in _StateUnpickler(file).load():
        storage = unpickler.storages[key]
        if int.from_bytes(file.read(8), "little") != storage.size:
            raise ValueError(f"its storage {key} has not the promised size")
        _fill(storage, file)
    return dict(tensors)
