"""The configs that come with vaebal, and the command that makes one."""

import inspect
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from vaebal.errors import InputError
from vaebal.experiments import schema


def folder() -> Path:
    """Where they lie: in the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def command(config: ml_collections.ConfigDict) -> str:
    """The command that makes `config`: the shipped one of its name, and what differs from that.

    "" where none has its name.
    """
    for variant, shipped in _of_name(config.name):
        own, theirs = (_fields(each) for each in (config, shipped))
        changed = [field for field in own if field in theirs and own[field] != theirs[field]]
        flags = [f"--config.{field}={_quoted(str(own[field]))}" for field in changed]
        return " ".join([f"python main.py --config=configs/{variant}", *flags])
    return ""


def _quoted(text: str) -> str:
    """For a shell: as it is, in double quotes, or by `shlex.quote` where these would not do."""
    if shlex.quote(text) == text or set(text) & set('"$`\\!'):
        return shlex.quote(text)
    return f'"{text}"'


def _of_name(name: str) -> Iterator[tuple[str, ml_collections.ConfigDict]]:
    """("file.py:variant", config) of the shipped configs that have this name."""
    for file in sorted(folder().glob("*.py")):
        if not (name + "_").startswith(file.stem + "_"):
            continue
        variant = name[len(file.stem) + 1 :]
        get = runpy.run_path(str(file))["get_config"]
        try:
            config = get(variant) if inspect.signature(get).parameters else get()
        except InputError:  # the name of another file begins like this one's
            continue
        if config.name == name:
            yield f"{file.name}:{variant}".rstrip(":"), config


def _fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """By their whole names; lists as the tuples that a command line takes."""
    flat = schema.flat_fields(config.to_dict())
    return {name: tuple(v) if isinstance(v, list) else v for name, v in flat.items()}
