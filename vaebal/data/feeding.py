"""Batches from disk, whole chunks of steps at a time, gathered ahead of the training step.

For sets too large for the device. The batches are those of `vaebal.data.batch_indices`,
so streaming and training from the device see the same examples in the same order, and
an integer, the step, is all that resuming needs.
"""

import collections
import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from vaebal.data.batches import epoch_order, steps_per_epoch

# Waiting for pages of a disk, not computing: more threads than most machines need cores.
_THREADS = 4
# Double buffering: one chunk ready and one being gathered while a third is trained on.
_CHUNKS_AHEAD = 2


class Feeder(contextlib.AbstractContextManager):
    """An endless iterator of chunks of batches; a context manager that ends its threads.

    Each chunk is an array of its own, [M, T, B / P, ...] of the type of `rows`: member, step,
    example of this process's share, as stored. Member m's batch of step s has the rows
    `batch_indices(seeds[m], s, N, B)`; process p has the p-th of P equal runs of them, so
    that the shares side by side are the batch. If a gather fails, `next` raises its error
    and the feeder is closed; a closed feeder is an exhausted iterator.
    """

    def __init__(
        self,
        rows: np.ndarray,
        *,
        seeds: Sequence[int],
        batch_size: int,
        steps_per_chunk: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Starts gathering at once.

        Args:
          rows: [N, ...] as stored, in memory or memory-mapped; never written to.
          seeds: one per member (M of them), those that order its data in training.
          batch_size: B, over all processes.
          steps_per_chunk: T.
          start_step: the first step wanted.
          process_index: p, as jax.process_index().
          process_count: P, as jax.process_count().

        Raises:
          ValueError: B larger than N or not a multiple of P, or another count out of range.
        """
        if not 1 <= batch_size <= len(rows):
            raise ValueError(f"batch_size={batch_size} must lie in 1..{len(rows)}, the images.")
        if batch_size % process_count:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of process_count={process_count}."
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} must lie in 0..{process_count - 1}.")
        if steps_per_chunk < 1 or start_step < 0:
            raise ValueError(
                f"steps_per_chunk={steps_per_chunk} must be positive and start_step={start_step} "
                "not negative."
            )
        self._rows = np.asarray(rows)  # a memmap's own class makes every slice slow
        self._seeds = tuple(seeds)
        self._batch_size = batch_size
        self._steps = range(start_step, start_step + steps_per_chunk)
        share = batch_size // process_count
        self._share = slice(process_index * share, (process_index + 1) * share)
        self._orders: dict[int, list[Future]] = {}
        self._ahead: collections.deque[tuple[np.ndarray, list[Future]]] = collections.deque()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="feeder")
        for _ in range(_CHUNKS_AHEAD):
            self._start_chunk()

    def __iter__(self) -> "Feeder":
        return self

    def __next__(self) -> np.ndarray:
        if not self._ahead:
            raise StopIteration
        try:
            chunk, gathers = self._ahead.popleft()
            for gather in gathers:
                gather.result()
            self._start_chunk()
        except BaseException:
            self.close()  # a chunk is lost: going on would skip it without a word
            raise
        return chunk

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Drops what was gathered ahead and waits for the threads to end."""
        self._pool.shutdown(cancel_futures=True)
        self._ahead.clear()

    def _start_chunk(self) -> None:
        # Never a buffer used before: JAX on a CPU reads a chunk in place, not a copy.
        share = self._share.stop - self._share.start
        shape = (len(self._seeds), len(self._steps), share, *self._rows.shape[1:])
        chunk = np.empty(shape, self._rows.dtype)
        gathers = []
        for t, step in enumerate(self._steps):
            epoch, position = divmod(step, steps_per_epoch(len(self._rows), self._batch_size))
            for order, batches in zip(self._epoch(epoch), chunk, strict=True):
                gathers.append(self._pool.submit(self._gather, order, position, batches[t]))
        self._ahead.append((chunk, gathers))
        self._steps = range(self._steps.stop, self._steps.stop + len(self._steps))

    def _epoch(self, epoch: int) -> list[Future]:
        """Every member's order of `epoch`. Queued before the gathers that wait for it."""
        if epoch not in self._orders:
            size = (len(self._rows), self._batch_size)
            orders = [self._pool.submit(_host_order, seed, epoch, *size) for seed in self._seeds]
            self._orders = {epoch: orders}  # earlier gathers hold the orders they need
        return self._orders[epoch]

    def _gather(self, order: Future, position: int, out: np.ndarray) -> None:
        indices = order.result()[position, self._share]
        # The indices are in range; any mode but "raise" writes to `out` without a buffer.
        # Reading in the order of the file was no faster, from memory or from disk.
        np.take(self._rows, indices, axis=0, out=out, mode="clip")


def _host_order(seed: int, epoch: int, size: int, batch_size: int) -> np.ndarray:
    """`epoch_order`, away from the accelerator, where it would queue behind training."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        device = jax.local_devices()[0]
    with jax.default_device(device):
        return np.asarray(epoch_order(seed, epoch, size, batch_size))
