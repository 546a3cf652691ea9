"""What an interrupted `fit` goes on from: a file a phase, whole after every chunk."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vaebal.data import digests
from vaebal.errors import InputError
from vaebal.training.workdir import load_arrays, write_atomically


class Kept:
    """The phases of one fit in a folder; nothing is kept where there is none."""

    def __init__(self, folder: str | Path | None, about: dict[str, Any]):
        """`about`: plain values that tell this fit from every other: data, plan, seed."""
        self._folder = None if folder is None else Path(folder).expanduser()
        self._about = digests.of_plain(about)

    def save(self, phase: str, tree: Any, told: dict[str, Any]) -> None:
        """A phase's arrays, and plain values beside them."""
        if self._folder is None:
            return
        octets = io.BytesIO()
        leaves = {f"leaf{i}": leaf for i, leaf in enumerate(jax.device_get(jax.tree.leaves(tree)))}
        np.savez(octets, told=json.dumps({"about": self._about, **told}), **leaves)
        write_atomically(self._folder / f"{phase}.npz", octets.getvalue())

    def load(self, phase: str, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """What `save` wrote, arrays laid out as those of `like`; None if nothing.

        Raises:
          InputError: the folder holds another fit.
          CheckpointError: the file is damaged.
        """
        file = None if self._folder is None else self._folder / f"{phase}.npz"
        if file is None or not file.exists():
            return None
        held = load_arrays(file, remedy=f"delete {file}, and its phase is done anew")
        told = json.loads(str(held["told"]))
        if told["about"] != self._about:
            raise InputError(
                f"path={str(self._folder)!r} holds a fit of other data, or with other arguments: "
                "choose another folder, or delete that one."
            )
        leaves, tree = jax.tree.flatten(like)
        placed = [jax.device_put(held[f"leaf{i}"], leaf.sharding) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(tree, placed), told
