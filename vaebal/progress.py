"""What a user sees while members train: one bar, and TensorBoard scalars per member."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from tensorboardX import SummaryWriter

from vaebal.devices import is_writer
from vaebal.training import EpochMetrics

Report = Callable[[int, int, EpochMetrics, float], None]  # see `training.fit`

# Without a terminal, a line this often instead of a bar.
SECONDS_BETWEEN_LINES = 30


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
        self._writers: list[SummaryWriter] = []

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
        self._writers = [
            SummaryWriter(str(self._directory / member)) for member in members if is_writer()
        ]
        self._begun = self._last_line = time.perf_counter()
        self._epochs, self._text = epochs, ""

    def reporter(self, images_per_epoch: int) -> Report:
        """A `report` for `training.fit`, for members that see so many images an epoch."""

        def report(epoch: int, epochs: int, metrics: EpochMetrics, seconds: float) -> None:
            rate = images_per_epoch * epochs * self._members / seconds
            text = self._text = f"{describe(metrics)}  {rate:,.0f} images/s"
            self._bar.update(self._task, completed=epoch, text=text)
            for index, writer in enumerate(self._writers):
                for name, values in metrics._asdict().items():
                    if name != "stopped" and np.isfinite(values[index]):
                        writer.add_scalar(name, float(values[index]), epoch)
            now = time.perf_counter()
            if not self._terminal and now - self._last_line > SECONDS_BETWEEN_LINES:
                self._last_line = now
                self._say(f"{self._name}  epoch {epoch}/{self._epochs}  {text}")

        return report

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
        """Puts the bar and the writers away, also after an error."""
        for writer in self._writers:
            writer.close()
        self._writers = []
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(metrics: EpochMetrics) -> str:
    """One line for a stack's metrics [M]: medians, and the range of active dimensions."""
    stopped = metrics.stopped >= 0
    end = f"{stopped.sum()} stopped" if stopped.any() else ""
    if stopped.all():
        return end
    metrics = EpochMetrics(*(values[~stopped] for values in metrics))
    low, high = int(np.min(metrics.active)), int(np.max(metrics.active))
    return (
        f"loss {np.median(metrics.loss):.1f}  rec {np.median(metrics.squared_error):.2f}  "
        f"γ {np.median(metrics.gamma):.2g}  active {low if low == high else f'{low}–{high}'}  {end}"
    ).rstrip()
