"""Checks of config fields: one sentence naming the field, the value and the fix."""

import math
from collections.abc import Sequence
from typing import Any

from vaebal.data import ImageSet
from vaebal.errors import InputError
from vaebal.training import mesh_for

_BLOCK = 4096  # images looked at together
MMD_POINTS = 4  # measures.mmd takes no fewer


def _value(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = config[part]
    return config


def is_positive(text: str) -> bool:
    """Whether `text` spells a finite number above 0."""
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def is_integer(value: Any, least: int) -> bool:
    """Whether `value` is an integer of at least `least`, and no truth."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def positive_integers(config: Any, *fields: str, zero: bool = False) -> None:
    """Each field is an integer of at least 1 (or 0, where `zero`)."""
    integers(config, *fields, least=0 if zero else 1)


def integers(config: Any, *fields: str, least: int) -> None:
    """Each field is an integer of at least so much."""
    for field in fields:
        value = _value(config, field)
        if not is_integer(value, least):
            raise InputError(f"{field}={value!r} must be an integer of at least {least}.")


def integers_each(config: Any, *fields: str, least: int, most: int = 2**31 - 1) -> None:
    """Each field lists integers from `least` to `most`, or nothing; `schema` sees none of ()."""
    for field in fields:
        for value in _value(config, field):
            if not is_integer(value, least) or value > most:
                raise InputError(
                    f"{field} holds {value!r}: use integers of at least {least}"
                    + (f" and at most {most}." if most < 2**31 - 1 else ".")
                )


def numbers_each(config: Any, field: str, *, positive: bool = False) -> None:
    """The field lists finite numbers, above 0 where `positive`, or nothing."""
    for value in _value(config, field):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or (positive and value <= 0):
            raise InputError(
                f"{field} holds {value!r}: use finite numbers{' above 0' if positive else ''}."
            )


def positive_numbers(config: Any, *fields: str, zero: bool = False) -> None:
    """Each field is a finite number above 0 (or 0 itself, where `zero`)."""
    for field in fields:
        value = _value(config, field)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            bound = "0 or a finite number above it" if zero else "a finite number above 0"
            raise InputError(f"{field}={value!r} must be {bound}.")


def fractions(config: Any, *fields: str) -> None:
    """Each field lies between 0 and 1, and is neither."""
    for field in fields:
        value = _value(config, field)
        if not 0 < value < 1:
            raise InputError(f"{field}={value!r} must lie between 0 and 1.")


def one_of(config: Any, field: str, choices: Sequence[str]) -> None:
    """The field is one of `choices`."""
    value = _value(config, field)
    if value not in choices:
        raise InputError(f"{field}={value!r} must be one of {', '.join(map(repr, choices))}.")


def distinct(config: Any, field: str) -> Sequence[Any]:
    """The field is a non-empty sequence without repetitions; returns it."""
    values = _value(config, field)
    if not values or len(set(values)) < len(values):
        raise InputError(f"{field}={tuple(values)!r} must list at least one value, none twice.")
    return values


def seeds(config: Any) -> None:
    """train.seeds are distinct integers that random streams take."""
    for seed in distinct(config, "train.seeds"):
        if type(seed) is not int or not 0 <= seed < 2**31:
            raise InputError(f"train.seeds={config.train.seeds!r} must be integers in [0, 2^31).")


def variance(images: ImageSet) -> None:
    """The training images are not all alike: else gamma, their error, has no positive value."""
    rows = images.train
    blocks = (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))
    if not any((block != rows[:1]).any() for block in blocks):
        raise InputError(
            f"data.name={images.name!r} has no variance: its {len(rows)} training image(s) are all "
            "alike, so that there is nothing to learn; use images that differ."
        )


def batch_size(config: Any, images: ImageSet, members: int, section: str = "train") -> None:
    """A batch fits the training images, and the devices that share a stack's batches."""
    size, field = config[section].batch_size, f"{section}.batch_size"
    if size > len(images.train):
        raise InputError(
            f"{field}={size} is larger than the {len(images.train)} "
            f"training images of {images.name!r}: lower it."
        )
    sharing = mesh_for(members).shape["data"]
    if size % sharing:
        raise InputError(
            f"{field}={size} must be a multiple of the {sharing} devices that share it."
        )
