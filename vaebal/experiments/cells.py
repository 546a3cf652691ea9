"""Cells: the training runs of an experiment, each trained to a row once and kept.

An experiment says which cells there are, which of them train together, how a group becomes a
program, and how a trained member becomes a row. What happens besides is here: what is finished is
skipped, progress and histories are written, a member that diverges stops alone, and a row is
written last, as its presence says that the cell is finished.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vaebal.data import steps_per_epoch
from vaebal.errors import Diverged, InputError
from vaebal.experiments import report
from vaebal.experiments.report import Row
from vaebal.training import Program, State, Streamed, devices, fit, member_params, mesh_for
from vaebal.training.checkpoints import Checkpoints
from vaebal.training.optimiser import averaged
from vaebal.training.progress import Progress
from vaebal.training.workdir import (
    load_arrays,
    read_json,
    read_json_lines,
    save_arrays,
    write_atomically,
)

# Below this many parameters a training step is mostly overhead on a CPU, which stacked
# members share; above, one member's matrix products fill the cores and stacking only
# adds padding.
STACK_BELOW_PARAMETERS = 300_000


class Cell(Protocol):
    """A training run; a NamedTuple whose fields begin its row."""

    @property
    def name(self) -> str:
        """Its folder's name."""

    def _asdict(self) -> dict[str, Any]: ...


class Schedule(NamedTuple):
    """How long a group trains, and how often it is told of and saved."""

    epochs: int
    epochs_per_chunk: int
    epochs_per_checkpoint: int
    steps: int  # an epoch
    batch_size: int


def schedule_of(train: Any, examples: int) -> Schedule:
    """Of a config's section `train`, on so many training examples."""
    return Schedule(
        train.epochs, train.epochs_per_chunk, train.epochs_per_checkpoint,
        steps_per_epoch(examples, train.batch_size), train.batch_size,
    )  # fmt: skip


Arrays = dict[str, np.ndarray]
# (a cell, its parameters, its state without the optimiser's) -> row, and arrays to keep beside it.
Evaluate = Callable[[Cell, Any, State], tuple[Row, Arrays]]


class Cells:
    """What the cells of one workdir have made: rows, histories, arrays, checkpoints.

    Attributes:
      path: the workdir.
    """

    def __init__(self, path: Path, folder: str = "runs"):
        """`folder`: of the workdir, in which every cell has one."""
        self.path, self._within = path, folder

    def folder(self, cell: Cell) -> Path:
        """Where what a cell has made lies."""
        return self.path / self._within / cell.name

    def row(self, cell: Cell) -> Row:
        """The row of a cell that has finished or stopped."""
        return read_json(self.folder(cell) / "row.json")

    def write_row(self, cell: Cell, row: Row) -> None:
        """Writes what `row` reads."""
        write_atomically(self.folder(cell) / "row.json", json.dumps(row, indent=1) + "\n")

    def finished(self, *cells: Cell) -> bool:
        """Whether the rows of all are written; of several processes all ask together."""
        written = lambda cell: (self.folder(cell) / "row.json").exists()  # noqa: E731
        return devices.agreed(devices.is_writer() and all(map(written, cells)))

    def arrays(self, cell: Cell) -> Arrays:
        """What a finished cell keeps beside its row."""
        return load_arrays(self.folder(cell) / "arrays.npz")

    def params(self, cell: Cell, name: str, index: int, shapes: State) -> Any:
        """A finished cell's parameters, of the epoch that its row tells of.

        Args:
          name: its group's.
          index: its place in the group.
          shapes: the group's, see `training.state_shapes`.

        Raises:
          InputError: it is not finished, or it stopped.
          CheckpointError: there is no whole checkpoint of that epoch.
        """
        if not self.finished(cell):
            raise InputError(
                f"{cell.name!r} is not finished in {self.path}: make it first, by running the "
                "experiment in this workdir."
            )
        if "stopped" in self.row(cell):
            raise InputError(
                f"{cell.name!r} in {self.path} stopped at step {self.row(cell)['stopped']}, its "
                "loss, gradient or gamma not finite: it has no parameters to load."
            )
        with Checkpoints(self.path / "checkpoints" / name) as saved:
            state = saved.restore(self.row(cell)["epochs"], shapes)
        whole = NamedSharding(jax.tree.leaves(shapes)[0].sharding.mesh, PartitionSpec())
        own = jax.jit(lambda state: member_params(state, index), out_shardings=whole)
        params = own(_evaluated(state))
        # Over other cores than the next stack's: to where everything is that no stack has.
        alone = NamedSharding(mesh_for(1), PartitionSpec())
        return jax.device_put(params, alone) if devices.are_cores() else params

    def history(self, cell: Cell) -> list[dict[str, float]]:
        """Metrics at every chunk's end, up to the last checkpoint."""
        return read_json_lines(self.folder(cell) / "history.jsonl")


class _Histories:
    """The histories of a group, by epoch: a killed run may have told more than it goes on from."""

    def __init__(self, cells: Cells, group: Sequence[Cell], steps: int):
        self._cells, self._group, self._steps = cells, group, steps
        self._entries = {cell: {e["epoch"]: e for e in cells.history(cell)} for cell in group}

    def add(self, epoch: int, epochs: int, metrics: Mapping[str, np.ndarray], seconds: float):
        """A chunk of `epochs` that ended at `epoch` has taken `seconds`."""
        for index, cell in enumerate(self._group if devices.is_writer() else ()):
            if metrics["stopped"][index] >= 0:
                continue
            entries = self._entries[cell]
            before = [e["seconds"] for at, e in entries.items() if at < epoch]
            entry = {"epoch": epoch, "step": epoch * self._steps}
            entry |= {"seconds": max(before, default=0.0) + seconds}
            entries[epoch] = entry | {name: float(v[index]) for name, v in metrics.items()}

    def write(self) -> None:
        """Brings the files up to date, each as a whole: a full disk would leave half a line."""
        for cell, entries in self._entries.items() if devices.is_writer() else ():
            if entries:
                text = "".join(f"{json.dumps(entries[epoch])}\n" for epoch in sorted(entries))
                write_atomically(self._cells.folder(cell) / "history.jsonl", text)


def parameters(model: Any) -> int:
    """How many a network has that knows its `outputs` and `latents`."""
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), np.zeros((1, model.outputs)), np.zeros((1, model.latents))
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def worth_stacking(parameters: int) -> bool:
    """Whether members of so many parameters gain by training in one program here."""
    return jax.default_backend() != "cpu" or parameters < STACK_BELOW_PARAMETERS


def train(
    cells: Cells,
    name: str,
    group: Sequence[Cell],
    make_program: Callable[[], Program | Streamed],
    schedule: Schedule,
    evaluate: Evaluate,
    progress: Progress,
    *,
    diverged_goes_on: bool = True,
) -> None:
    """Trains a group to its end, from its last checkpoint, and writes the cells' rows.

    Args:
      name: of the group, and of its checkpoints.
      make_program: compiles it.

    Raises:
      Diverged, Preempted, CheckpointError: see `training.fit`.
    """
    progress.start(name, [cell.name for cell in group], schedule.epochs)
    begun = time.perf_counter()
    program = make_program()
    compiling = time.perf_counter() - begun
    histories = _Histories(cells, group, schedule.steps)
    bar = progress.reporter(schedule.steps * schedule.batch_size)

    def tell(*told) -> None:
        histories.add(*told)
        bar(*told)

    with Checkpoints(cells.path / "checkpoints" / name, histories.write) as checkpoints:
        state = fit(
            program,
            epochs=schedule.epochs,
            epochs_per_chunk=schedule.epochs_per_chunk,
            epochs_per_checkpoint=schedule.epochs_per_checkpoint,
            checkpoints=checkpoints,
            report=tell,
            diverged_goes_on=diverged_goes_on,
        )
    state = devices.local(_evaluated(state))

    def finish(index: int) -> None:
        own = jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), state)  # on this core, if on one
        seconds = (compiling + _seconds(cells, group[index])) / len(group)
        _finish(cells, group[index], own, schedule, seconds, evaluate)

    if devices.is_writer():
        if devices.are_cores():
            state = jax.device_get(state)
        progress.note("evaluating")
        for index in devices.on_every_core(finish, range(len(group))):
            progress.note(f"evaluated {group[index].name}")
    devices.agreed(True)  # all wait until the rows are written: what comes next may need them
    progress.done()


def _evaluated(state: State) -> State:
    """What a row tells of: the mean of the weights where one is kept, and no optimiser's state."""
    weights = averaged(state.opt_state, state.weights)
    return state._replace(weights=weights, opt_state=())


def _seconds(cells: Cells, cell: Cell) -> float:
    """What a cell's group has trained, over all starts."""
    history = cells.history(cell)
    return history[-1]["seconds"] if history else 0.0


def _finish(
    cells: Cells,
    cell: Cell,
    state: State,
    schedule: Schedule,
    seconds: float,
    evaluate: Evaluate,
) -> None:
    if state.stopped >= 0:
        cells.write_row(cell, cell._asdict() | {"stopped": int(state.stopped)})
        return
    row, arrays = evaluate(cell, state.params, state)
    if arrays:
        save_arrays(cells.folder(cell) / "arrays.npz", **arrays)
    told = {
        "epochs": schedule.epochs,
        "steps": int(state.step),
        "batch_size": schedule.batch_size,
        "train_seconds": seconds,
        "device": report.device(),
    }
    # The row last: its presence says that the cell is finished.
    cells.write_row(cell, cell._asdict() | row | told)


def train_all(
    cells: Cells,
    groups: Mapping[str, Sequence[Cell]],
    train_group: Callable[[str, Sequence[Cell], Progress], None],
) -> dict[Cell, Row]:
    """The rows of all cells, in order; groups that are finished are not trained again."""
    with Progress(len(groups), cells.path / "tensorboard") as progress:
        for name, group in groups.items():
            if cells.finished(*group):
                progress.skip(name)
            else:
                train_group(name, group, progress)
    devices.agreed(True)  # all wait until the first process has written the last rows
    return {cell: cells.row(cell) for group in groups.values() for cell in group}


def report_all(
    rows: Mapping[Cell, Row], fix: str, write: Callable[[dict[Cell, Row], str], None]
) -> list[Row]:
    """Has the finished cells' page written by `write`, and returns all rows.

    Args:
      fix: what to do about those that stopped.
      write: (finished rows, a sentence on the others or "").

    Raises:
      Diverged: some cells stopped; the others have been reported.
    """
    finished = {cell: row for cell, row in rows.items() if "stopped" not in row}
    stopped = report.stopped({cell.name: row for cell, row in rows.items()}, fix)
    if finished and devices.is_writer():
        write(finished, stopped)
    if stopped:
        raise Diverged(stopped)
    return list(rows.values())
