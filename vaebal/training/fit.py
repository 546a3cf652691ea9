"""The one training loop: a program from its newest whole checkpoint to its last epoch."""

import time
from collections.abc import Callable

import jax
import numpy as np

from vaebal.errors import Diverged, Preempted
from vaebal.training.checkpoints import Checkpoints
from vaebal.training.devices import LeaveNotice
from vaebal.training.program import Metrics, Program, Streamed
from vaebal.training.step import State

# (epochs done, epochs in the chunk, metrics as NumPy arrays [M], seconds)
Report = Callable[[int, int, dict[str, np.ndarray], float], None]


def fit(
    program: Program | Streamed,
    *,
    epochs: int,
    epochs_per_chunk: int = 1,
    epochs_per_checkpoint: int,
    checkpoints: Checkpoints,
    report: Report,
    diverged_goes_on: bool = True,
) -> State:
    """Trains to `epochs`, from the newest whole checkpoint if there is one.

    A member whose loss or gradient is not finite stops before that step, and its state stays as
    it was; the others go on. When none is left training ends.

    Metrics are fetched one chunk late, so that the device never waits for the host, except at a
    checkpoint: what is saved has been reported. On SIGTERM or Ctrl-C, or on JAX's preemption notice
    where it runs in several processes, the chunk is finished and saved.

    Args:
      report: called after every chunk.
      diverged_goes_on: False: the first member that stops ends it all, and nothing is saved.

    Returns:
      The state, on the device; `stopped` says which members' is not of the last epoch.

    Raises:
      Preempted: stopped on notice; the next call goes on from there.
      Diverged: a member stopped, and `diverged_goes_on` is False.
      CheckpointError: a checkpoint cannot be written, or none of those present be read.
    """
    done, state = checkpoints.restore_latest(program.state_shapes) or (0, program.init())
    late = _Late(report, None if diverged_goes_on else checkpoints)
    with LeaveNotice() as notice:
        while done < epochs and late.running:
            until_checkpoint = epochs_per_checkpoint - done % epochs_per_checkpoint
            count = min(epochs_per_chunk, epochs - done, until_checkpoint)
            late.look()
            state, metrics = program.run(state, count)
            done += count
            late.settle()
            late.take(done, count, metrics)
            leave = notice.given(range(done - count + 1, done + 1))
            if leave or count == until_checkpoint or done == epochs or not late.running:
                late.settle()
                checkpoints.save(done, state)
            # Asked again where training ends: what comes after the last save must not begin.
            if leave or ((done == epochs or not late.running) and notice.given(())):
                raise Preempted(
                    f"Stopped on notice after epoch {done} of {epochs}, saved in "
                    f"{checkpoints.directory}: the same command goes on from there."
                )
    return state


class _Late:
    """Metrics on their way from the device, told when the next ones are."""

    def __init__(self, report: Report, strict: Checkpoints | None):
        """`strict`: where a member that stops ends it all, what is kept."""
        self._report, self._strict = report, strict
        # (epochs done, epochs in the chunk, metrics)
        self._waiting: tuple[int, int, Metrics] | None = None
        self._ended: float | None = None  # when its chunk had, where that was seen
        self.running, self._last = True, time.perf_counter()

    def take(self, done: int, count: int, metrics: Metrics) -> None:
        """A chunk's metrics, from the call that has just returned."""
        self._waiting = (done, count, metrics)
        self.look()

    def look(self) -> None:
        """Whether what is on its way has come.

        A GPU's loops are driven by the host: their call returns as the chunk ends, and the next
        one has been run by the time it is settled. A CPU's call returns at once, and the next one
        waits for it.
        """
        if self._waiting is None or self._ended is not None:
            return
        if all(leaf.is_ready() for leaf in jax.tree.leaves(self._waiting[2])):
            self._ended = time.perf_counter()

    def settle(self) -> None:
        """Waits for what is on its way and reports it."""
        if self._waiting is None:
            return
        *counts, metrics = self._waiting
        metrics, self._waiting = jax.device_get(metrics), None
        self.running = (metrics["stopped"] < 0).any()
        if self._strict is not None:
            _require_running(metrics["stopped"], self._strict)
        end, self._ended = self._ended or time.perf_counter(), None
        self._report(*counts, metrics, max(end - self._last, 1e-6))  # rates divide by it
        self._last = end


def _require_running(stopped: np.ndarray, checkpoints: Checkpoints) -> None:
    if (stopped < 0).all():
        return
    kept = checkpoints.latest
    where = checkpoints.path(kept) if kept is not None else "none yet"
    raise Diverged(
        f"Loss or gradient not finite at step {stopped[stopped >= 0].min()} of "
        f"{checkpoints.directory}; last good checkpoint: {where}. Lower its learning_rate or "
        "gamma_rate, in a new --workdir."
    )
