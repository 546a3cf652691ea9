"""A run's directory: one process's at a time, one config's, one data set's; its small files."""

import fcntl
import io
import json
import logging
import os
import socket
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from vaebal.errors import CheckpointError, InputError
from vaebal.training.devices import agreed, is_writer

log = logging.getLogger(__name__)

# Open files whose locks this process holds until it ends, by workdir.
_locks: dict[Path, int] = {}

_CONFIG, _DATA = "config.json", "data.json"


def open_workdir(
    workdir: str,
    config: dict[str, Any],
    *,
    data: dict[str, Any] | None = None,
    free: Collection[str] = (),
) -> Path:
    """Creates `workdir` for `config`, or re-opens it if it holds the same config's run.

    The directory is this process's until it ends, however it ends. Of several processes of one
    run (`devices.join`) the first opens it for all. Its config.json is the config of the last
    start: it differs from the first in `free` fields alone.

    Args:
      workdir: path of the run; with a scheme, as in gs://bucket/run, it is remote, and no lock
        keeps another process out.
      config: the run's resolved config, of plain values.
      data: what identifies the images, of plain values (`ImageSet.fingerprint`); None for a run
        that has none.
      free: fields that may differ as they change no number, as "train.epochs_per_chunk".

    Returns:
      The absolute path; an `epath.Path` if it is remote.

    Raises:
      InputError: the directory cannot be written, is in use, holds another config's run, a run on
        other data, or files of a run without its config.
      CheckpointError: its config.json or data.json is damaged.
    """
    path = workdir_path(workdir)
    refusal: InputError | CheckpointError | None = None
    if is_writer():
        try:
            _open(path, _plain(config), _plain(data), free)
        except (OSError, ImportError) as error:  # a scheme may want a package of its own
            reason = getattr(error, "strerror", None) or error
            refusal = InputError(
                f"--workdir={workdir} cannot be written ({reason}): choose another."
            )
            refusal.__cause__ = error
        except (InputError, CheckpointError) as error:
            refusal = error
    if agreed(refusal is not None):
        raise refusal or InputError(f"--workdir={workdir} was refused to the first process.")
    return path


def workdir_path(workdir: str) -> Path:
    """The absolute path of a run; an `epath.Path` if it has a scheme, as gs://bucket/run has."""
    return epath.Path(workdir) if "://" in workdir else Path(workdir).expanduser().resolve()


def require_same_config(path: Path, config: dict[str, Any], free: Collection[str] = ()) -> None:
    """Checks that the run in `path` is `config`'s, up to its `free` fields; writes nothing.

    Raises:
      InputError: there is no run, or it has another config; names the field.
      CheckpointError: its config.json is damaged.
    """
    if not (path / _CONFIG).exists():
        raise InputError(f"{path} holds no run (it has no {_CONFIG}): run the experiment there.")
    _require_same(_held(path / _CONFIG), _plain(config), path, free)


def _plain(config: Any) -> Any:
    # Through JSON and back, so that tuples and lists compare alike.
    return json.loads(json.dumps(config))


def _held(file: Path) -> dict[str, Any]:
    return read_json(file, remedy="bring it back from a copy, or choose another workdir")


def _open(path: Path, config: dict[str, Any], data: Any, free: Collection[str]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    taken = isinstance(path, Path) and _lock(path)
    try:
        # The config last: where it is, what the data are is known too.
        if (path / _CONFIG).exists():
            held = _held(path / _CONFIG)
            _require_same(held, config, path, free)
            if data is not None:
                _require_same_data(path, data)
        else:
            held = None
            _require_no_run(path)
            if data is not None:
                write_atomically(path / _DATA, json.dumps(data, indent=2) + "\n")
        if held != config:
            write_atomically(path / _CONFIG, json.dumps(config, indent=2) + "\n")
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except BaseException:
        if taken:
            os.close(_locks.pop(path))
        raise


def _lock(path: Path) -> bool:
    """Whether this took the lock: this process may have it already, or there may be none."""
    file = path / ".lock"
    if path in _locks:
        if file.exists() and os.path.samestat(os.fstat(_locks[path]), file.stat()):
            return False
        os.close(_locks.pop(path))  # the directory has been deleted since
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Unlike a file's presence, this ends with its process.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(handle, 300).decode()
        os.close(handle)
        raise InputError(
            f"--workdir={path} is in use by {owner or 'another process'}: let it end, or choose "
            "another."
        ) from error
    except OSError as error:
        os.close(handle)
        log.warning("%s cannot be locked (%s): start no second run there.", path, error.strerror)
        return False
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _locks[path] = handle
    return True


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _require_same(
    held: dict[str, Any], config: dict[str, Any], path: Path, free: Collection[str]
) -> None:
    held, config = _flatten(held), _flatten(config)
    for name in sorted((held | config).keys() - free):
        if held.get(name) != config.get(name):
            raise InputError(
                f"--workdir={path} holds a run with {name}={held.get(name)!r}, and this one has "
                f"{name}={config.get(name)!r}: choose another workdir, or delete that one."
            )


def _require_same_data(path: Path, data: dict[str, Any]) -> None:
    if not (path / _DATA).exists():
        raise InputError(
            f"--workdir={path} holds a run that does not say what its data were (it has no "
            f"{_DATA}): choose another workdir."
        )
    held = _held(path / _DATA)
    if held != data:
        # Where the counts are the same the digests tell them apart.
        raise InputError(
            f"--workdir={path} holds a run on other data ({_listed(held)}) than the data are now "
            f"({_listed(data)}): bring them back as they were, or choose another workdir."
        )


def _listed(data: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in _flatten(data).items())


def _require_no_run(path: Path) -> None:
    try:
        held = list(path.iterdir())
    except FileNotFoundError:  # a bucket knows no empty directories
        held = []
    for left in held:
        run = left.is_dir() or left.suffix in (".json", ".npz")
        # A killed first start leaves its data.json, a fresh disk has a lost+found.
        if run and not left.name.startswith(".") and left.name not in (_DATA, "lost+found"):
            raise InputError(
                f"--workdir={path} has no {_CONFIG}, but holds {left.name!r}, which may be another "
                f"run's: choose an empty directory, or bring {_CONFIG} back from a copy."
            )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes `content` so that `path` is always either the old file or the whole new one."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(path, Path):  # an object in a bucket appears whole, or not at all
        path.write_bytes(content)
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(content)
            # Else the name could outlive the content when a machine goes down.
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def save_arrays(path: Path, **arrays: Any) -> None:
    """Writes arrays by name into an .npz file, atomically; `path` may be remote."""
    octets = io.BytesIO()
    np.savez(octets, **arrays)
    write_atomically(path, octets.getvalue())


def load_arrays(path: Path, remedy: str = "") -> dict[str, np.ndarray]:
    """What `save_arrays` wrote.

    Args:
      remedy: what to do about a file that is missing or damaged; "": delete the .json of its
        name, or row.json, beside it, without which what it belongs to is unfinished and made anew.

    Raises:
      CheckpointError: it is missing, damaged or cannot be read; names it and the remedy.
    """
    of_its_name = path.with_suffix(".json")
    beside = of_its_name if of_its_name.exists() else path.parent / "row.json"
    remedy = remedy or f"delete {beside}, and the same command makes both anew"
    octets = _read(path, remedy)
    try:
        with np.load(io.BytesIO(octets)) as arrays:
            return dict(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _unusable(path, "is damaged", remedy) from error


def read_json(path: Path, remedy: str = "") -> Any:
    """The content of a run's JSON file; `path` may be remote.

    Args:
      remedy: as for `load_arrays`; "": delete the file itself, which is then made anew.

    Raises:
      CheckpointError: it is missing, damaged or cannot be read; names it and the remedy.
    """
    octets = _read(path, remedy or "the same command makes it anew")
    return _parsed(path, octets, remedy or "delete it, and the same command makes it anew")


def read_json_lines(path: Path) -> list[Any]:
    """The values in a run's file of one JSON value a line; none where it is not there.

    Raises:
      CheckpointError: it is damaged or cannot be read; names it and the remedy.
    """
    if not path.exists():
        return []
    remedy = "bring it back from a copy, or delete it, and its record begins where the run goes on"
    lines = _read(path, remedy).splitlines()
    return [_parsed(path, line, remedy) for line in lines]


def _parsed(path: Path, octets: bytes, remedy: str) -> Any:
    try:
        return json.loads(octets)
    except ValueError as error:  # neither JSON nor UTF-8
        raise _unusable(path, "is damaged", remedy) from error


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _unusable(path, "is missing", remedy) from error
    except OSError as error:  # may pass: nothing to delete
        reason = error.strerror or error
        raise CheckpointError(
            f"{path} cannot be read ({reason}): once it can, the same command goes on."
        ) from error


def _unusable(path: Path, how: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{path} {how}: {remedy}.")
