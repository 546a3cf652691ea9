"""Where a run keeps what it has done: one lock on the config, checkpoints, finished rows."""

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from vaebal.errors import InputError


def open_workdir(workdir: str, config: dict[str, Any]) -> Path:
    """Creates `workdir` for `config`, or re-opens it if it holds the same config's run.

    Args:
      workdir: path of the run.
      config: the run's resolved config, of plain values.

    Raises:
      InputError: the directory cannot be written, or holds another config's run.
    """
    path = Path(workdir).expanduser().resolve()
    # Through JSON and back, so that tuples and lists compare alike.
    config = json.loads(json.dumps(config))
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = path / "config.json"
        if held.exists():
            _require_same(json.loads(held.read_text()), config, path)
        else:
            write_atomically(held, json.dumps(config, indent=2) + "\n")
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"--workdir={workdir} cannot be written ({error.strerror}): choose another."
        ) from error
    return path


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


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that `path` is always either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text)
    partial.replace(path)


class Checkpoints(contextlib.AbstractContextManager):
    """The last two checkpoints of a training state, saved asynchronously by Orbax.

    Steps are counted in epochs. A killed save leaves the one before it intact.
    """

    def __init__(self, directory: Path):
        # Orbax logs every save; the progress bar says what a user needs.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory, options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )

    def __exit__(self, *exception) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The epoch of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, epoch: int, state: Any) -> None:
        """Copies `state` off the device, then writes it in the background."""
        self._manager.save(epoch, args=ocp.args.StandardSave(state))

    def restore(self, epoch: int, shapes: Any) -> Any:
        """The state of `epoch`; `shapes` has its tree of jax.ShapeDtypeStruct with shardings."""
        return self._manager.restore(epoch, args=ocp.args.StandardRestore(shapes))

    def path(self, epoch: int) -> Path:
        """Where the checkpoint of `epoch` lies."""
        return self.directory / str(epoch)
