"""What a user sees while members train: one bar, and TensorBoard scalars per member."""

import contextlib
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from vaebal.training.devices import is_writer

log = logging.getLogger(__name__)

Report = Callable[[int, int, Mapping[str, np.ndarray], float], None]  # see `fit.fit`

# Without a terminal, a line this often instead of a bar.
SECONDS_BETWEEN_LINES = 30
SECONDS_BETWEEN_WRITES = 10  # of scalars; a bucket takes a file only as a whole


class Scalars:
    """One member's scalars, in a file of events for TensorBoard.

    The caller's thread writes it: tensorboardX's own writer has a thread for it, and when a full
    disk has killed that one, it waits for it for ever.
    """

    def __init__(self, directory: Path):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file, self._octets, self._written = directory / name, bytearray(), 0
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the values of a step, those that are finite, to be written by `write`."""
        named = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if np.isfinite(value)
        ]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=named)))

    def _add(self, event: Event) -> None:
        data = event.SerializeToString()
        for part in (struct.pack("<Q", len(data)), data):
            self._octets += part + struct.pack("<I", masked_crc32c(part))

    def write(self) -> None:
        """Brings the file up to date; after a failure it can be tried again.

        Raises:
          OSError: it cannot be written (in a bucket also what that raises).
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(self._file, Path):
            self._file.write_bytes(bytes(self._octets))
        else:
            with self._file.open("ab") as file:
                file.truncate(self._written)  # without the half record of a failure
                file.write(self._octets[self._written :])
        self._written = len(self._octets)


class Progress(contextlib.AbstractContextManager):
    """Progress over `total` programs, each training one member or a stack."""

    def __init__(self, total: int, tensorboard: Path):
        self._total, self._started, self._directory = total, 0, tensorboard
        self._terminal = sys.stdout.isatty()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=Console(),
            disable=not self._terminal,
        )
        self._task = None
        self._scalars: list[Scalars] = []
        self._told = False  # that there are no scalars

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.finish()
        self._bar.stop()

    def skip(self, name: str) -> None:
        """A program whose members are all finished."""
        self._started += 1
        self._say(f"[{self._started}/{self._total}] {name}: finished before, not done again")

    def start(self, name: str, members: Sequence[str], epochs: int) -> None:
        """A program begins (its compilation first)."""
        self._started += 1
        self._name = f"[{self._started}/{self._total}] {name}"
        # Rich would take "[1/15]" for markup.
        self._task = self._bar.add_task(
            self._name.replace("[", r"\["), total=epochs, text="compiling"
        )
        self._members = len(members)
        # Of several processes of one run the first alone writes.
        self._scalars = [Scalars(self._directory / member) for member in members if is_writer()]
        self._begun = self._last_line = self._last_write = time.perf_counter()
        self._epochs, self._text = epochs, ""

    def reporter(self, examples_per_epoch: int) -> Report:
        """A `report` for `training.fit`, for members that see so many examples an epoch."""

        def report(epoch: int, epochs: int, metrics: Mapping[str, np.ndarray], seconds: float):
            rate = examples_per_epoch * epochs * self._members / seconds
            self._text = f"{describe(metrics)}  {rate:,.0f} examples/s"
            self._bar.update(self._task, completed=epoch, text=self._text)
            for index, scalars in enumerate(self._scalars):
                told = {name: v[index] for name, v in metrics.items() if name != "stopped"}
                scalars.add(epoch, told)
            self._show(epoch)

        return report

    def _show(self, epoch: int) -> None:
        now = time.perf_counter()
        if now - self._last_write > SECONDS_BETWEEN_WRITES:
            self._last_write = now
            self._write_scalars()
        if not self._terminal and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._say(f"{self._name}  epoch {epoch}/{self._epochs}  {self._text}")

    def _write_scalars(self) -> None:
        """A run does not end for want of scalars; if a disk is full, its checkpoints tell."""
        try:
            for scalars in self._scalars:
                scalars.write()
        except Exception as error:  # of any type: buckets have their own
            if not self._told:
                log.warning("TensorBoard's scalars cannot be written now (%s).", error)
            self._told = True

    def note(self, text: str) -> None:
        """What is being done now, beside the bar."""
        if self._task is not None:
            self._bar.update(self._task, text=text)

    def done(self) -> None:
        """The program's members are written: leaves one line that says how they ended."""
        seconds = time.perf_counter() - self._begun
        self._say(f"{self._name}: done in {seconds:.0f} s  {self._text}")
        self.finish()

    def finish(self) -> None:
        """Puts the bar and the scalars away, also after an error."""
        self._write_scalars()
        self._scalars = []
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


# By metric: what it is called in a line, and how it is printed.
SHOWN = {
    "loss": ("loss", ".1f"),
    "squared_error": ("rec", ".3g"),
    "gamma": ("γ", ".2g"),
    "wrong": ("wrong", ".2g"),
}


def describe(metrics: Mapping[str, np.ndarray]) -> str:
    """One line for a stack's metrics [M]: medians, and the range of active dimensions."""
    stopped = metrics["stopped"] >= 0
    end = f"{stopped.sum()} stopped" if stopped.any() else ""
    if stopped.all():
        return end
    running = {name: values[~stopped] for name, values in metrics.items()}
    parts = [
        f"{called} {np.median(running[name]):{digits}}"
        for name, (called, digits) in SHOWN.items()
        if name in running
    ]
    if "active" in running:
        low, high = int(np.min(running["active"])), int(np.max(running["active"]))
        parts.append(f"active {low if low == high else f'{low}–{high}'}")
    return "  ".join([*parts, end]).rstrip()
