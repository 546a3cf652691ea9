"""Where a run keeps what it has done: one lock on the config, checkpoints, finished rows."""

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import socket
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import Array

from vaebal.errors import InputError
from vaebal.training.devices import agreed, is_writer, local

log = logging.getLogger(__name__)

# Open files whose locks this process holds until it ends, by workdir.
_locks: dict[Path, int] = {}


class CheckpointError(RuntimeError):
    """A checkpoint can be neither written nor read; says what is left. Exit code 74."""


class Preempted(RuntimeError):
    """Stopped on notice, with everything saved: the same command goes on. Exit code 75."""


def open_workdir(workdir: str, config: dict[str, Any]) -> Path:
    """Creates `workdir` for `config`, or re-opens it if it holds the same config's run.

    The directory is this process's until it ends, however it ends. Of several processes of one
    run (`devices.join`) the first opens it for all.

    Args:
      workdir: path of the run; with a scheme, as in gs://bucket/run, it is remote, and no lock
        keeps another process out.
      config: the run's resolved config, of plain values.

    Returns:
      The absolute path; an `epath.Path` if it is remote.

    Raises:
      InputError: the directory cannot be written, is in use, or holds another config's run.
    """
    path = workdir_path(workdir)
    # Through JSON and back, so that tuples and lists compare alike.
    config = json.loads(json.dumps(config))
    refusal = None
    if is_writer():
        try:
            _open(path, config)
        except (OSError, ImportError) as error:  # a scheme may want a package of its own
            reason = getattr(error, "strerror", None) or error
            refusal = InputError(
                f"--workdir={workdir} cannot be written ({reason}): choose another."
            )
            refusal.__cause__ = error
        except InputError as error:
            refusal = error
    if agreed(refusal is not None):
        raise refusal or InputError(f"--workdir={workdir} was refused to the first process.")
    return path


def workdir_path(workdir: str) -> Path:
    """The absolute path of a run; an `epath.Path` if it has a scheme, as gs://bucket/run has."""
    return epath.Path(workdir) if "://" in workdir else Path(workdir).expanduser().resolve()


def _open(path: Path, config: dict[str, Any]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    taken = isinstance(path, Path) and _lock(path)
    held = path / "config.json"
    try:
        if held.exists():
            _require_same(json.loads(held.read_text()), config, path)
        else:
            write_atomically(held, json.dumps(config, indent=2) + "\n")
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


def _require_same(held: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    held, config = _flatten(held), _flatten(config)
    for name in sorted(held | config):
        if held.get(name) != config.get(name):
            raise InputError(
                f"--workdir={path} holds a run with {name}={held.get(name)!r}, and this one has "
                f"{name}={config.get(name)!r}: choose another workdir, or delete that one."
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


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote."""
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        return dict(arrays)


@jax.jit
def fingerprint(state: Any) -> Array:
    """[leaves] uint32, on any number of devices the same; one byte changed always changes it.

    Every byte of a leaf counts with an odd weight of its own, modulo 2^32.
    """

    def one(leaf: Array) -> Array:
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        octets = jax.lax.bitcast_convert_type(leaf, jnp.uint8).ravel().astype(jnp.uint32)
        weights = 2 * jnp.arange(octets.size, dtype=jnp.uint32) + 1
        return (octets * weights).sum(dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in jax.tree.leaves(state)])


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


class Checkpoints(contextlib.AbstractContextManager):
    """The last three checkpoints of a training state, saved asynchronously by Orbax.

    Steps are counted in epochs. A killed or failed save leaves those before it intact.
    """

    def __init__(self, directory: Path, before_save: Callable[[], None] = lambda: None):
        """`before_save` writes what must be there wherever a run goes on from a checkpoint."""
        # Orbax logs every save, and every failure with its traceback; here failures are raised.
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self.directory, self._before_save = directory, before_save
        self._manager = ocp.CheckpointManager(
            directory,
            # Named at once, so that a checkpoint's metadata can be read before its state.
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=3,
                create=True,
                cleanup_tmp_directories=True,
                # Else one damaged checkpoint keeps all others from being opened.
                lightweight_initialize=True,
            ),
        )

    def __exit__(self, *exception) -> None:
        with self._writing():
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The epoch of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, epoch: int, state: Any) -> None:
        """Copies `state` off the device, then writes it in the background.

        Raises:
          CheckpointError: this save, or the one before it, cannot be written.
        """
        self._before_save()
        # Orbax and what is below it check metadata and lengths, but not the values.
        marks = jax.device_get(local(fingerprint(state))).tolist()
        with self._writing():
            self._manager.save(
                epoch,
                args=ocp.args.StandardSave(state),
                custom_metadata={"fingerprint": marks},
                force=True,
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any type: they come from C++, and through threads
            whole = self._manager.all_steps(read=True)
            left = f"epoch {max(whole)}, which is whole" if whole else "the start"
            raise CheckpointError(
                f"A checkpoint could not be written in {self.directory} ({_in_a_line(error)}): "
                f"free space or mend the disk; the same command then goes on from {left}."
            ) from error

    def restore(self, epoch: int, shapes: Any) -> Any:
        """The state of `epoch`, as it was saved.

        Args:
          shapes: its tree of jax.ShapeDtypeStruct with shardings, over any devices.

        Raises:
          CheckpointError: it is damaged, or not of these shapes.
        """
        try:
            state = self._manager.restore(epoch, args=ocp.args.StandardRestore(shapes))
            marks = self._manager.metadata(epoch).custom_metadata.get("fingerprint")
        except Exception as error:  # of any type: whatever the damage brings about
            raise CheckpointError(
                f"Checkpoint {self.path(epoch)} cannot be read ({_in_a_line(error)})."
            ) from error
        if marks is not None and marks != jax.device_get(local(fingerprint(state))).tolist():
            raise CheckpointError(
                f"Checkpoint {self.path(epoch)} is damaged (its values are not those saved)."
            )
        return state

    def restore_latest(self, shapes: Any) -> tuple[int, Any] | None:
        """The epoch and state of the newest whole checkpoint; None if there never was any.

        Damaged ones are named in the log, stepped over, and deleted once an older one is found
        to be whole.

        Raises:
          CheckpointError: there are checkpoints, and all of them are damaged.
        """
        epochs = sorted(self._manager.all_steps(), reverse=True)
        for index, epoch in enumerate(epochs):
            try:
                state = self.restore(epoch, shapes)
            except CheckpointError as error:
                log.warning("%s Stepping over it.", error)
                continue
            for damaged in epochs[:index]:
                self._manager.delete(damaged)
            return epoch, state
        if epochs:
            raise CheckpointError(
                f"None of the {len(epochs)} checkpoints in {self.directory} can be read: bring "
                "one back from a copy, or delete that directory to start anew."
            )
        return None

    def path(self, epoch: int) -> Path:
        """Where the checkpoint of `epoch` lies."""
        return self.directory / str(epoch)


def _in_a_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error) or type(error).__name__
    said = re.split(r"\s\[\w+='", text)[0]  # without the details that TensorStore appends
    if "[os_error_code=" in text:  # after all that was being tried
        said = said.rpartition(": ")[2]
    return textwrap.shorten(said.splitlines()[0], 200)
