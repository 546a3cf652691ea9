"""The one training loop: a program from its newest whole checkpoint to its last epoch."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from vaebal.errors import CheckpointError, Diverged, Preempted
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

    A member whose loss, gradient or next gamma is not finite stops before that step, and its state
    stays as it was; the others go on. When none is left training ends.

    Metrics are fetched one chunk late, so that the device does not wait for the host, except at a
    checkpoint, as what is saved has been reported, and where rows are streamed, as each chunk's
    begin to be read when it begins. On SIGTERM or Ctrl-C, or on JAX's preemption notice
    where it runs in several processes, the chunk is finished and saved.

    Args:
      report: called after every chunk.
      diverged_goes_on: False: the first member that stops ends it all, and nothing is saved.

    Returns:
      The state, on the device; `stopped` says which members' is not of the last epoch.

    Raises:
      Preempted: stopped on notice; the next call goes on from there.
      Diverged: a member stopped, and `diverged_goes_on` is False.
      CheckpointError: a checkpoint cannot be written, or none of those present be read, or the
        newest is of a later epoch.
    """
    done, state = checkpoints.restore_latest(program.state_shapes) or (0, program.init())
    if done > epochs:
        raise CheckpointError(
            f"{checkpoints.directory} goes on to epoch {done}, and epoch {epochs} is asked for: "
            "move that folder elsewhere, and the same command trains it anew."
        )
    with LeaveNotice() as notice, _Late(report, None if diverged_goes_on else checkpoints) as late:
        while done < epochs and late.running:
            until_checkpoint = epochs_per_checkpoint - done % epochs_per_checkpoint
            count = min(epochs_per_chunk, epochs - done, until_checkpoint)
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


class _Late(contextlib.AbstractContextManager):
    """Metrics on their way from the device, told when the next ones are.

    A thread waits for each chunk's, to know when it ended: whether a call returns as its chunk
    begins, as it ends, or as the one before ends, differs among devices and versions of JAX.
    """

    def __init__(self, report: Report, strict: Checkpoints | None):
        """`strict`: where a member that stops ends it all, what is kept."""
        self._report, self._strict = report, strict
        # (epochs done, epochs in the chunk, metrics, when its chunk ended)
        self._waiting: tuple[int, int, Metrics, Future] | None = None
        self._watch = ThreadPoolExecutor(1, "chunks")
        self.running, self._last = True, time.perf_counter()

    def __exit__(self, *exception) -> None:
        self._watch.shutdown(wait=False)

    def take(self, done: int, count: int, metrics: Metrics) -> None:
        """A chunk's metrics, from the call that has just returned."""
        self._waiting = (done, count, metrics, self._watch.submit(_end_of, metrics))

    def settle(self) -> None:
        """Waits for what is on its way and reports it."""
        if self._waiting is None:
            return
        *counts, metrics, ended = self._waiting
        metrics, self._waiting = jax.device_get(metrics), None
        self.running = (metrics["stopped"] < 0).any()
        if self._strict is not None:
            _require_running(metrics["stopped"], self._strict)
        end = ended.result()
        self._report(*counts, metrics, max(end - self._last, 1e-6))  # rates divide by it
        self._last = end


def _end_of(metrics: Metrics) -> float:
    jax.block_until_ready(metrics)
    return time.perf_counter()


def _require_running(stopped: np.ndarray, checkpoints: Checkpoints) -> None:
    if (stopped < 0).all():
        return
    kept = checkpoints.latest
    where = checkpoints.path(kept) if kept is not None else "none yet"
    raise Diverged(
        f"Loss, gradient or gamma not finite at step {stopped[stopped >= 0].min()} of "
        f"{checkpoints.directory}; last good checkpoint: {where}. Lower its learning_rate or "
        "gamma_rate, in a new --workdir."
    )
