"""Data: sets of images by name, batches by (seed, step), scenes of known dimension."""

from vaebal.data.batches import batch_indices, epoch_order, some_indices, steps_per_epoch
from vaebal.data.sets import (
    MANIFOLDS,
    CurvedCube,
    Decode,
    FlatCube,
    ImageSet,
    Scenes,
    digits_splits,
    host_mean_image,
    load,
    manifold,
    mean_image,
    mean_over,
)

__all__ = [
    "MANIFOLDS",
    "CurvedCube",
    "Decode",
    "FlatCube",
    "ImageSet",
    "Scenes",
    "batch_indices",
    "digits_splits",
    "epoch_order",
    "host_mean_image",
    "load",
    "manifold",
    "mean_image",
    "mean_over",
    "some_indices",
    "steps_per_epoch",
]
