"""A small network trained on what is known of the images, for a Fréchet distance in its features.

Inception's features were learned on photographs and say little of digits or drawn scenes. These
are learned on the data's own labels (cross-entropy) or true factors (regression), and where
neither is known on how far an image has been turned (Gidaris et al., 2018). A distance in them is
not FID, and numbers of two classifiers cannot be compared.

Shapes: B batch, N examples, D pixels, F features.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from vaebal.data import ImageSet, digits_splits, idx
from vaebal.errors import InputError
from vaebal.models.convnets import ConvEncoder, pyramid
from vaebal.models.nets import Activation, MLPEncoder, dense
from vaebal.units import to_unit_pixels

# What a page says that its network was trained to do, by `Targets.kind`.
TRAINED = {
    "labels": "on the data's labels",
    "factors": "on the data's factors",
    "turns": "to tell by how many right angles an image was turned, as the data have no labels",
}


class Targets(NamedTuple):
    """What a classifier is trained to tell."""

    kind: str  # "labels", "factors" or "turns"
    train: np.ndarray  # [N] int32 labels, or right angles; or [N, r] factors, standardised
    test: np.ndarray  # [M] or [M, r], on the training split's scale
    outputs: int  # classes, or r


def posed(
    targets: Targets, shape: tuple[int, int, int], x: Array, known: Array, key: Array | None = None
) -> tuple[Array, Array]:
    """A batch as it is shown, [B, D], and what is to be told of it, [B] or [B, r].

    Of kind "turns" every image is turned by its right angles and, given a key, by as many more as
    are drawn (Gidaris et al., 2018); of the others nothing is done.

    Args:
      shape: (height, width, channels) of an image, square for "turns".
      x: [B, D], pixels of any type.
      known: the batch's rows of `targets`.
      key: of the turns drawn; None turns by `known` alone.
    """
    if targets.kind != "turns":
        return x, known
    if key is not None:
        known = (known + jax.random.randint(key, known.shape, 0, 4)) % 4
    upright = x.reshape(-1, *shape)
    turned = jnp.stack([jnp.rot90(upright, quarters, (1, 2)) for quarters in range(4)])
    return turned[known, jnp.arange(len(x))].reshape(x.shape), known


class Classifier(nn.Module):
    """A body, F features, and a linear layer on them.

    Attributes:
      body: x [B, D] -> ([B, F], unused), an encoder of `nets` or `convnets`.
      outputs: classes, or factors.
    """

    body: nn.Module
    outputs: int
    activation: Activation

    def setup(self):
        self.last = dense(self.outputs, name="last")

    def features(self, x: Array) -> Array:
        """x [B, D] -> the penultimate layer [B, F], after its activation."""
        return self.activation(self.body(x)[0])

    def __call__(self, x: Array) -> Array:
        """x [B, D] -> logits, or factors, [B, outputs]."""
        return self.last(self.features(x))


def build(
    image_shape: tuple[int, int, int],
    outputs: int,
    *,
    features: int,
    width: int,
    activation: Activation,
) -> Classifier:
    """Three layers of `width` below 32 pixels; above, convolutions from `width` channels on.

    Raises:
      ValueError: a side of 32 or more that is not 4 times a power of two, or no square.
    """
    if image_shape[0] < 32:
        body = MLPEncoder(features, width, 3, activation)
    else:
        body = ConvEncoder(features, pyramid(image_shape, 4, width), 1, activation)
    return Classifier(body, outputs, activation)


def loss(model: Classifier, params: Any, x: Array, targets: Array) -> tuple[Array, dict]:
    """Mean cross-entropy in nats of labels [B], or mean squared error of factors [B, r].

    With the metric "wrong": the share of labels missed, or of the factors' variance.
    """
    outputs = model.apply({"params": params}, x)
    if targets.ndim == 1:
        value = optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()
        return value, {"wrong": (outputs.argmax(-1) != targets).mean()}
    value = jnp.square(outputs - targets).mean()
    return value, {"wrong": value}


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: Classifier, params: Any, pixels: Array) -> tuple[Array, Array]:
    x = to_unit_pixels(pixels)
    return (
        model.apply({"params": params}, x, method="features"),
        model.apply({"params": params}, x),
    )


def features_and_outputs(
    model: Classifier, params: Any, images: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """The penultimate features [N, F] and outputs of every uint8 image [N, D], each once.

    Args:
      block: images computed at a time.

    Raises:
      ValueError: images that are not uint8. Rounding is part of what is compared.
    """
    if images.dtype != np.uint8:
        raise ValueError(f"images has type {images.dtype}; give uint8, as every set compared.")
    parts = [
        _apply(model, params, images[start : start + block])
        for start in range(0, len(images), block)
    ]
    return tuple(
        np.concatenate([np.asarray(part) for part in side]) for side in zip(*parts, strict=True)
    )


def share_wrong(
    model: Classifier,
    params: Any,
    images: np.ndarray,
    targets: Targets,
    shape: tuple[int, int, int],
    block: int,
) -> float:
    """`wrong` of all test images [M, D] as they lie in the set, each once; shape as in `posed`.

    Raises:
      ValueError: images that are not uint8.
    """
    shown, known = posed(targets, shape, images, targets.test)
    return wrong(features_and_outputs(model, params, np.asarray(shown), block)[1], known)


def wrong(outputs: np.ndarray, targets: np.ndarray) -> float:
    """The share of labels [N] that outputs [N, classes] miss, or of the variance of factors."""
    if targets.ndim == 1:
        return float((outputs.argmax(-1) != targets).mean())
    return float(np.square(outputs - targets).mean() / targets.var(0).mean())


def targets_of(images: ImageSet, directory: str = "") -> Targets | None:
    """What is known of `images`: true factors, else labels, else turns, if square; else None.

    Args:
      images: a set as `data.load` or `data.manifold` returns it.
      directory: the one that `data.load` was given.

    Raises:
      InputError: the labels of a set that has some are absent or damaged.
    """
    if images.train_factors is not None:
        mean, std = images.train_factors.mean(0), images.train_factors.std(0)
        standard = lambda factors: ((factors - mean) / std).astype(np.float32)  # noqa: E731
        count = images.train_factors.shape[1]
        return Targets(
            "factors", standard(images.train_factors), standard(images.test_factors), count
        )
    if images.name == "digits":
        return Targets("labels", *(labels for _, labels in digits_splits()), 10)
    if images.name not in idx.IDX_SETS:
        height, width, _ = images.image_shape
        turns = (np.arange(len(rows), dtype=np.int32) % 4 for rows in (images.train, images.test))
        return Targets("turns", *turns, 4) if height == width else None
    splits = idx.idx_labels(images.name, directory)
    for split, pixels in (("train", images.train), ("test", images.test)):
        if len(splits[split]) != len(pixels):
            raise InputError(
                f"data.name={images.name!r} has {len(pixels)} images and {len(splits[split])} "
                f"labels in split {split!r}: its files are of two sets; copy them anew."
            )
    return Targets("labels", splits["train"], splits["test"], 10)
