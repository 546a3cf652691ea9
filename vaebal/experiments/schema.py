"""A config against its experiment's defaults: every field known, none missing, all of their type.

Nothing here or in an experiment's `fields` imports JAX: what a config has against itself is said
at once.
"""

import difflib
import math
from typing import Any

import ml_collections

from vaebal.errors import InputError


def check_variant(name: str, variant: str, variants: tuple[str, ...]) -> None:
    """Checks the part of --config after ":".

    Raises:
      InputError: it is not one of `variants`.
    """
    if variant not in variants:
        known = ", ".join(f"'{name}.py:{known}'" if known else f"'{name}.py'" for known in variants)
        raise InputError(f"{name} has no variant {variant!r}: use one of {known}.")


def data_section(name: str) -> ml_collections.ConfigDict:
    """The section `data` of an experiment on images, which `inputs.open_data` reads."""
    data = ml_collections.ConfigDict()
    data.name = name  # a set of `vaebal.data.load`, or "rendered", "linear", "network"
    data.dir = ""  # "": $VAEBAL_DATA_DIR, $TFDS_DATA_DIR or ~/tensorflow_datasets
    data.folder = ""  # of "folder": where the images lie
    data.bad = "refuse"  # or "skip": files there that are no usable images
    data.resolution = 64  # of "celeb_a", "folder" and what we draw ourselves
    # Of what we draw ourselves: true dimension r, numbers of images, and the standard deviation
    # of observation noise, which gives gamma a floor.
    data.rank = 12
    data.train_size = 20_000
    data.test_size = 5_000
    data.noise = 0.0
    data.seed = 0
    return data


def check_fields(config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict) -> None:
    """Checks that `config` has the fields of `defaults`, all of them and no others.

    Numbers may be integers where the default is none, lists may be tuples and the other way
    round; every number is finite.

    Raises:
      InputError: the first field that is unknown, missing, of another type or not finite.
    """
    given, known = flat_fields(config.to_dict()), flat_fields(defaults.to_dict())
    for field, value in given.items():
        if field not in known:
            raise InputError(
                f"{field}={value!r} is no field of this experiment: {_hint(field, known)}"
            )
    for field, default in known.items():
        if field not in given:
            raise InputError(
                f"The config has no field {field}: set it (its default is {default!r}), or begin "
                "with this experiment's fields.defaults(name)."
            )
        _require_unquoted(field, given[field])
        wanted = _mismatch(given[field], default)
        if wanted:
            raise InputError(f"{field}={given[field]!r} must be {wanted}.")


def _require_unquoted(field: str, value: Any) -> None:
    # From --config.FIELD=(a,b) the command line makes a tuple of one string.
    if isinstance(value, tuple | list) and any(str(item)[:1] in "([" for item in value if item):
        raise InputError(
            f"{field}={value!r} holds brackets: on the command line put the tuple in quotes, and "
            f"each string in it in quotes of the other kind, as in --config.{field}=\"('a', 'b')\"."
        )


def flat_fields(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields by their whole names; an empty section is a field, so that it is seen."""
    flat = {}
    for name, value in section.items():
        if isinstance(value, dict) and value:
            flat |= flat_fields(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _hint(field: str, known: dict[str, Any]) -> str:
    section, _, name = field.rpartition(".")
    by_name = {each.rpartition(".")[2]: each for each in known}
    close = difflib.get_close_matches(name, by_name, n=1)
    if close:
        same_section = f"{section}.{close[0]}"
        return f"did you mean {same_section if same_section in known else by_name[close[0]]}?"
    return f"its fields are {', '.join(known)}."


def _mismatch(value: Any, default: Any) -> str:
    """What `value` must be to stand in for `default`; "" if it may."""
    if isinstance(default, tuple | list):
        if not isinstance(value, tuple | list):
            return f"a tuple, as {tuple(default)!r}"
        wanted = (_mismatch(item, _loosest(default)) for item in value if default)
        return next((f"a tuple of which each is {text}" for text in wanted if text), "")
    if isinstance(default, bool) or isinstance(value, bool):
        return "" if type(value) is type(default) else _kind(default)
    if isinstance(default, int):
        return "" if isinstance(value, int) else _kind(default)
    if isinstance(default, float):
        number = isinstance(value, int | float) and math.isfinite(value)
        return "" if number else _kind(default)
    return "" if isinstance(value, type(default)) else _kind(default)


def _loosest(values: tuple | list) -> Any:
    """One that admits all the others' types."""
    return next((value for value in values if isinstance(value, float)), values[0])


def _kind(default: Any) -> str:
    kinds = {bool: "True or False", int: "an integer", float: "a finite number", str: "a string"}
    return f"{kinds.get(type(default), type(default).__name__)}, as {default!r}"
