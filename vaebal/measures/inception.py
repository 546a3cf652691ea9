"""The Inception-v3 of 2015 whose pool features define FID, and the preprocessing that goes with it.

Szegedy et al., "Rethinking the Inception Architecture" (2015), in the version that Heusel et al.
(2017) measure with: 1008 classes, average pools that leave the padding out of the count, and a
max pool in the last block. Each of these, and each step from pixels to the network's input,
changes the number. Shapes: N images of H x W x C, any size; the network sees 299 x 299 x 3.

Modules carry the names of the published PyTorch weights. Batch norm is frozen (eps 1e-3) and
folded into the convolutions' kernels and biases when these weights are converted.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array

SIZE = 299
CLASSES = 1008
BATCH_NORM_EPS = 1e-3

# In words, to be stored with every number that these features yield.
PROTOCOL = (
    "uint8 (floats: clip to [0, 1], x255, round half to even), TF1 bilinear to 299 "
    "(no aligned corners, no half-pixel centres, no antialiasing), (x - 128)/128, "
    "2048 pool features of pt_inception-2015-12-05-6726825d"
)

# What decoders that fit pixels in [0, 1] overshoot by, and how often they exceed it at most; of
# photographs scaled to [-1, 1] about a third lies further out.
_OVERSHOOT, _SHARE_OUTSIDE = 0.25, 0.01

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
      params: what `inception_weights.load_params` returns.
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
    # Single pixels of a Gaussian decoder leave [0, 1] by a little and are clipped.
    outside = float((np.abs(images - 0.5) > 0.5 + _OVERSHOOT).mean())
    if outside > _SHARE_OUTSIDE:
        raise ValueError(
            f"images has {outside:.1%} of its pixels outside [{-_OVERSHOOT}, {1 + _OVERSHOOT}] and "
            f"spans [{images.min():.4g}, {images.max():.4g}], but floats must be scaled to [0, 1]: "
            "map [-1, 1] by (x + 1) / 2, or pass uint8."
        )
