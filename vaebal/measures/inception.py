"""The Inception-v3 of 2015 whose pool features define FID, and the preprocessing that goes with it.

Szegedy et al., "Rethinking the Inception Architecture" (2015), in the version that Heusel et al.
(2017) measure with: 1008 classes, average pools that leave the padding out of the count, and a
max pool in the last block. Each of these, and each step from pixels to the network's input,
changes the number. Shapes: N images of H x W x C, any size; the network sees 299 x 299 x 3.

Modules carry the names of the published PyTorch weights. Batch norm is frozen (eps 1e-3) and
folded into the convolutions' kernels and biases when these weights are converted.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import urllib.request
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from vaebal.errors import InputError

SIZE = 299
CLASSES = 1008
BATCH_NORM_EPS = 1e-3

# In words, to be stored with every number that these features yield.
PROTOCOL = (
    "uint8 (floats: clip to [0, 1], x255, round half to even), TF1 bilinear to 299 "
    "(no aligned corners, no half-pixel centres, no antialiasing), (x - 128)/128, "
    "2048 pool features of pt_inception-2015-12-05-6726825d"
)

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
VARIABLE = "VAEBAL_INCEPTION_WEIGHTS"
DEFAULT_PATH = f"~/.cache/vaebal/{FILE}"

# An accelerator's shortened float32 products (TF32, bfloat16) would move features by 1e-3.
_EXACT = jax.lax.Precision.HIGHEST


class Features(NamedTuple):
    """What the network yields; FID is taken on `pool`."""

    stem: Array  # [N, 73, 73, 64] after the first max pool
    stem2: Array  # [N, 35, 35, 192] after the second max pool
    middle: Array  # [N, 17, 17, 768] where the auxiliary classifier was attached
    pool: Array  # [N, 2048] mean over the last 8 x 8 map
    logits: Array  # [N, 1008]


def _conv(x: Array, name: str, features: int, size=(1, 1), stride=1, padding="SAME") -> Array:
    layer = nn.Conv(features, size, stride, padding, precision=_EXACT, name=name)
    return nn.relu(layer(x))


def _halve(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def average_pool(x: Array) -> Array:
    """3 x 3 means [N, H, W, C] -> [N, H, W, C]; at the border, of the pixels that exist."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _max_pool(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


class _BlockA(nn.Module):
    pool_features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = _conv(x, "branch1x1", 64)
        five = _conv(x, "branch5x5_1", 48)
        five = _conv(five, "branch5x5_2", 64, (5, 5))
        three = _conv(x, "branch3x3dbl_1", 64)
        three = _conv(three, "branch3x3dbl_2", 96, (3, 3))
        three = _conv(three, "branch3x3dbl_3", 96, (3, 3))
        pool = _conv(average_pool(x), "branch_pool", self.pool_features)
        return jnp.concatenate([one, five, three, pool], -1)


class _BlockB(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = _conv(x, "branch3x3", 384, (3, 3), 2, "VALID")
        double = _conv(x, "branch3x3dbl_1", 64)
        double = _conv(double, "branch3x3dbl_2", 96, (3, 3))
        double = _conv(double, "branch3x3dbl_3", 96, (3, 3), 2, "VALID")
        return jnp.concatenate([three, double, _halve(x)], -1)


class _BlockC(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = _conv(x, "branch1x1", 192)
        seven = _conv(x, "branch7x7_1", self.width)
        seven = _conv(seven, "branch7x7_2", self.width, (1, 7))
        seven = _conv(seven, "branch7x7_3", 192, (7, 1))
        double = _conv(x, "branch7x7dbl_1", self.width)
        double = _conv(double, "branch7x7dbl_2", self.width, (7, 1))
        double = _conv(double, "branch7x7dbl_3", self.width, (1, 7))
        double = _conv(double, "branch7x7dbl_4", self.width, (7, 1))
        double = _conv(double, "branch7x7dbl_5", 192, (1, 7))
        pool = _conv(average_pool(x), "branch_pool", 192)
        return jnp.concatenate([one, seven, double, pool], -1)


class _BlockD(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = _conv(x, "branch3x3_1", 192)
        three = _conv(three, "branch3x3_2", 320, (3, 3), 2, "VALID")
        seven = _conv(x, "branch7x7x3_1", 192)
        seven = _conv(seven, "branch7x7x3_2", 192, (1, 7))
        seven = _conv(seven, "branch7x7x3_3", 192, (7, 1))
        seven = _conv(seven, "branch7x7x3_4", 192, (3, 3), 2, "VALID")
        return jnp.concatenate([three, seven, _halve(x)], -1)


class _BlockE(nn.Module):
    max_pool: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one = _conv(x, "branch1x1", 320)
        three = _conv(x, "branch3x3_1", 384)
        three_a = _conv(three, "branch3x3_2a", 384, (1, 3))
        three_b = _conv(three, "branch3x3_2b", 384, (3, 1))
        double = _conv(x, "branch3x3dbl_1", 448)
        double = _conv(double, "branch3x3dbl_2", 384, (3, 3))
        double_a = _conv(double, "branch3x3dbl_3a", 384, (1, 3))
        double_b = _conv(double, "branch3x3dbl_3b", 384, (3, 1))
        pooled = _max_pool(x) if self.max_pool else average_pool(x)
        pool = _conv(pooled, "branch_pool", 192)
        return jnp.concatenate([one, three_a, three_b, double_a, double_b, pool], -1)


class InceptionV3(nn.Module):
    """The network, from the preprocessed image on."""

    @nn.compact
    def __call__(self, x: Array) -> Features:
        """x [N, 299, 299, 3] in [-1, 1) -> Features."""
        x = _conv(x, "Conv2d_1a_3x3", 32, (3, 3), 2, "VALID")
        x = _conv(x, "Conv2d_2a_3x3", 32, (3, 3), 1, "VALID")
        x = _conv(x, "Conv2d_2b_3x3", 64, (3, 3))
        x = stem = _halve(x)
        x = _conv(x, "Conv2d_3b_1x1", 80)
        x = _conv(x, "Conv2d_4a_3x3", 192, (3, 3), 1, "VALID")
        x = stem2 = _halve(x)
        x = _BlockA(32, name="Mixed_5b")(x)
        x = _BlockA(64, name="Mixed_5c")(x)
        x = _BlockA(64, name="Mixed_5d")(x)
        x = _BlockB(name="Mixed_6a")(x)
        x = _BlockC(128, name="Mixed_6b")(x)
        x = _BlockC(160, name="Mixed_6c")(x)
        x = _BlockC(160, name="Mixed_6d")(x)
        x = middle = _BlockC(192, name="Mixed_6e")(x)
        x = _BlockD(name="Mixed_7a")(x)
        x = _BlockE(name="Mixed_7b")(x)
        x = _BlockE(max_pool=True, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        logits = nn.Dense(CLASSES, precision=_EXACT, name="fc")(pool)
        return Features(stem, stem2, middle, pool, logits)


@functools.cache
def parameter_shapes() -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path, "Mixed_5b/branch1x1/kernel"."""
    variables = jax.eval_shape(
        lambda: InceptionV3().init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    )
    flat = flatten_dict(variables["params"], sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def _resize_matrix(source: int) -> np.ndarray:
    """[299, source]: TF1's bilinear weights along one axis, source position = target * in/out."""
    # float32 throughout, as in TF1's kernel, so that positions fall on the same side of a pixel.
    position = np.arange(SIZE, dtype=np.float32) * (np.float32(source) / np.float32(SIZE))
    low = np.minimum(np.floor(position).astype(int), source - 1)
    high = np.minimum(low + 1, source - 1)
    weight = position - low.astype(np.float32)
    matrix = np.zeros((SIZE, source), np.float32)
    rows = np.arange(SIZE)
    matrix[rows, low] += 1 - weight
    matrix[rows, high] += weight
    return matrix


@jax.jit
def preprocess(images: Array) -> Array:
    """[N, H, W, C] -> [N, 299, 299, 3], the network's input, as the TF1 graph makes it.

    uint8 pixels as they are; float pixels in [0, 1] become integers first: clipped, times 255,
    rounded half to even. Then TF1's bilinear resize (source = target * in/out, neither aligned
    corners nor half-pixel centres, not antialiased; the last pixels are repeated), then
    (x - 128)/128. One channel is repeated to three.
    """
    x = images.astype(jnp.float32)
    if jnp.issubdtype(images.dtype, jnp.floating):
        x = jnp.round(jnp.clip(x, 0, 1) * 255)
    rows, columns = _resize_matrix(images.shape[1]), _resize_matrix(images.shape[2])
    x = jnp.einsum("ph,nhwc->npwc", rows, x, precision=_EXACT)
    x = jnp.einsum("qw,npwc->npqc", columns, x, precision=_EXACT)
    return jnp.broadcast_to((x - 128) / 128, (*x.shape[:3], 3))


@jax.jit
def _block_features(params, images: Array) -> Array:
    return InceptionV3().apply({"params": params}, preprocess(images)).pool


def inception_features(params, images: np.ndarray, block: int) -> np.ndarray:
    """The 2048 pool features of every image, in the given order, each image once.

    Args:
      params: what `load_params` returns.
      images: [N, H, W, C], C = 1 or 3, uint8 or float in [0, 1].
      block: images computed at a time; the last block is filled up, and the rest cut off.

    Returns:
      [N, 2048] float32.

    Raises:
      ValueError: another shape or type, or floats that are not finite or not scaled to [0, 1].
    """
    images = np.asarray(images)
    _check_images(images)
    if block < 1:
        raise ValueError(f"block={block} must be at least 1: it is the images computed at a time.")
    params, features = jax.device_put(params), []
    for start in range(0, len(images), block):
        part = images[start : start + block]
        filled = np.concatenate([part, np.repeat(part[:1], block - len(part), 0)])
        # Fetched at once: many blocks under way would multiply the memory that one needs.
        features.append(np.asarray(_block_features(params, filled))[: len(part)])
    return np.concatenate(features)


def _check_images(images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"images has shape {images.shape}, but must be [N, H, W, C] with C = 1 or 3 and at "
            "least one image: reshape flattened images first."
        )
    if images.dtype == np.uint8:
        return
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images has type {images.dtype}: pass uint8, or floats in [0, 1].")
    finite = np.isfinite(images).all((1, 2, 3))
    if not finite.all():
        raise ValueError(
            f"images has a pixel that is not finite in image {np.argmin(finite)}: repair or leave "
            "out what made it."
        )
    # Single pixels of a Gaussian decoder may leave [0, 1] and are clipped; the mean cannot.
    mean = images.mean(dtype=np.float64)
    if not 0 <= mean <= 1:
        raise ValueError(
            f"images has the mean {mean:.4g}, but floats must be scaled to [0, 1]: rescale them, "
            "or pass uint8."
        )


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
