"""Checkpoints of a training state by Orbax: whole, or told from what is damaged or another's."""

import contextlib
import errno
import functools
import itertools
import json
import logging
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array

from vaebal.errors import CheckpointError, InputError
from vaebal.training.devices import agreed, is_writer, local

log = logging.getLogger(__name__)


class Damaged(CheckpointError):
    """A checkpoint's files are not those that were saved."""


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
                custom_metadata={"fingerprint": marks, "leaves": _leaves(state)},
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
        """The state of `epoch` and of no other, as it was saved.

        What is finished is loaded so, by the epoch that its row says.

        Args:
          shapes: its tree of jax.ShapeDtypeStruct with shardings, over any devices.

        Raises:
          InputError: it was saved with other shapes or types, as under another jax_enable_x64.
          CheckpointError: it is not there, damaged, or cannot be read for a reason that may pass.
        """
        held = sorted(self._manager.all_steps())
        if epoch not in held:
            raise CheckpointError(
                f"Checkpoint {self.path(epoch)} of epoch {epoch}, which is asked for, is not there "
                f"(of {held or 'none'} are): bring it back from a copy, or delete what says that "
                "it is finished."
            )
        said = self._said_of(epoch)
        _require_same_leaves(said.get("leaves"), shapes, self.path(epoch))
        try:
            state = self._manager.restore(epoch, args=ocp.args.StandardRestore(shapes))
        except Exception as error:  # of any type: they come from C++
            raise self._unreadable(epoch, error, _tells_damage(error)) from error
        marks = said.get("fingerprint")
        if marks is not None and marks != jax.device_get(local(fingerprint(state))).tolist():
            raise Damaged(
                f"Checkpoint {self.path(epoch)} is damaged (its values are not those saved)."
            )
        return state

    def _said_of(self, epoch: int) -> dict[str, Any]:
        """What `save` said of a checkpoint; nothing where that is lost, or never was."""
        try:
            return dict(self._manager.metadata(epoch).custom_metadata or {})
        except Exception as error:  # of any type, from reading or from parsing
            damaged = _tells_damage(error) or isinstance(error, ValueError | KeyError | TypeError)
            raise self._unreadable(epoch, error, damaged) from error

    def _unreadable(self, epoch: int, error: Exception, damaged: bool) -> CheckpointError:
        what = f"Checkpoint {self.path(epoch)}"
        if damaged:
            return Damaged(f"{what} is damaged ({_in_a_line(error)}).")
        return CheckpointError(
            f"{what} cannot be read ({_in_a_line(error)}): once it can, the same command goes on; "
            "without it, moved elsewhere, from the one before."
        )

    def restore_latest(self, shapes: Any) -> tuple[int, Any] | None:
        """The epoch and state of the newest whole checkpoint; None if there never was any.

        Damaged ones are named in the log, stepped over, and once an older one is found to be
        whole renamed to EPOCH.damaged. Nothing else is stepped over.

        Raises:
          InputError: as `restore`.
          CheckpointError: one cannot be read for a reason that may pass; or there are
            checkpoints, and all of them are damaged.
        """
        epochs = sorted(self._manager.all_steps(), reverse=True)
        for index, epoch in enumerate(epochs):
            try:
                state = self.restore(epoch, shapes)
            except Damaged as error:
                log.warning("%s Stepping over it.", error)
                continue
            self._set_aside(epochs[:index])
            return epoch, state
        if epochs:
            raise CheckpointError(
                f"None of the {len(epochs)} checkpoints in {self.directory} can be read: bring "
                "one back from a copy, or delete that directory to start anew."
            )
        return None

    def _set_aside(self, epochs: list[int]) -> None:
        """Renames checkpoints, so that their epochs can be saved again."""
        for epoch in epochs if is_writer() else ():
            names = (f"{epoch}.damaged{count or ''}" for count in itertools.count())
            unused = (self.directory / name for name in names)
            self.path(epoch).rename(next(path for path in unused if not path.exists()))
        if epochs:
            agreed(True)  # the others wait until they are renamed
            self._manager.reload()

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


def _leaves(state: Any) -> list[str]:
    """Name, type and shape of every leaf, as "params/step int32[2]"."""
    named, _ = jax.tree_util.tree_flatten_with_path(state)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return [f"{name(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in named]


def _require_same_leaves(saved: list[str] | None, shapes: Any, path: Path) -> None:
    # Orbax would refuse other shapes with pages of text, and convert other types unasked.
    wanted = _leaves(shapes)
    if saved is None or saved == wanted:
        return
    pairs = itertools.zip_longest(saved, wanted, fillvalue="nothing more")
    there, here = next(pair for pair in pairs if pair[0] != pair[1])
    hint = "with the settings that it was saved with"
    if there.replace("64[", "32[") == here.replace("64[", "32["):
        hint = "with jax_enable_x64 as it was then"
    raise InputError(
        f"Checkpoint {path} holds {there}, and this run has {here}: start it {hint}, or choose "
        "another workdir."
    )


# By these, and by no other of its states, TensorStore says that files are not what they were.
_DAMAGED = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND", "FAILED_PRECONDITION")


def _tells_damage(error: BaseException | None) -> bool:
    """Whether files are missing, cut or changed; not where a disk or network fails to give them."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError):
            return error.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR)
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            return True
        if text.startswith(_DAMAGED):
            return "[os_error_code=" not in text
        error = error.__cause__ or error.__context__
    return False
