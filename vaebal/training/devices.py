"""The processes and devices that a run is spread over, and the notice to leave them."""

import contextlib
import queue
import signal
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from threadpoolctl import threadpool_limits

from vaebal.errors import InputError


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Makes this process one of several that train together; before anything touches a device.

    On TPU pods, Slurm, Open MPI and Kubernetes all three are found out by JAX; elsewhere all
    three are needed.

    Args:
      coordinator_address: host:port of process 0, the same in every process.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      InputError: some are given and some not, or nothing is found.
    """
    given = (coordinator_address, num_processes, process_id)
    if None in given and any(value is not None for value in given):
        raise InputError(
            f"--coordinator_address={coordinator_address}, --num_processes={num_processes} and "
            f"--process_id={process_id} belong together: give all three, or none on a TPU pod or "
            "under Slurm."
        )
    try:
        jax.distributed.initialize(*given)
    except ValueError as error:
        raise InputError(
            f"--distributed does not find the other processes ({error}): give "
            "--coordinator_address, --num_processes and --process_id."
        ) from error


def is_writer() -> bool:
    """Whether this process writes and prints: one of all does."""
    return jax.process_index() == 0


def are_cores() -> bool:
    """Whether JAX's devices are the cores of this CPU, one each, as `vaebal run` has it there."""
    cores = jax.config.jax_num_cpu_devices
    alone = jax.process_count() == 1
    return alone and jax.default_backend() == "cpu" and 1 < cores == jax.device_count()


def on_every_core(work: Callable[[Any], None], items: Iterable[Any]) -> Iterator[Any]:
    """Has work(item) done for all of `items`, and gives each item as it is done, in order.

    Where JAX's devices are the cores of this CPU every core works on an item of its own: what no
    device holds yet, NumPy arrays and what `work` makes itself, is computed there. Elsewhere one
    item is done after the other.

    Raises:
      what `work` raises; no item is begun after that.
    """
    cores = jax.local_devices() if are_cores() else []
    free, failed = queue.SimpleQueue(), threading.Event()
    for core in cores:
        free.put(core)

    def on_a_core(item: Any) -> None:
        core = free.get()
        try:
            if not failed.is_set():
                with jax.default_device(core):
                    work(item)
        except BaseException:
            failed.set()
            raise
        finally:
            free.put(core)

    if not cores:
        for item in items:
            work(item)
            yield item
        return
    pool = ThreadPoolExecutor(len(cores), "core")
    # Every core is busy; and scikit-learn, which limits BLAS for a while and then restores what it
    # found, would by two such whiles at once leave it limited.
    with threadpool_limits(1, "blas"):
        try:
            for item, ended in [(item, pool.submit(on_a_core, item)) for item in items]:
                ended.result()
                yield item
        finally:
            pool.shutdown(cancel_futures=True)


def agreed(value: bool) -> bool:
    """The first process's `value`, in every process; all wait here for it.

    Whether a file exists is a question for the first alone: on a network file system the others
    would remember a no for some seconds, and then not find what it has written.
    """
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays, the same in every process, laid out over devices as `sharding` says.

    Raises:
      AssertionError: the processes hold different values.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    tree = jax.tree.map(np.ascontiguousarray, tree)
    # device_put would send every byte from process 0 to all others, to compare them.
    sums = np.array([zlib.crc32(leaf) for leaf in jax.tree.leaves(tree)], np.uint32)
    multihost_utils.assert_equal(sums, "Data or members differ between processes")
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, leaf, leaf.shape), tree
    )


def local(tree: Any) -> Any:
    """Arrays over one mesh -> this process's own whole copies, each on one device.

    All processes call this, as what is spread over them is gathered. What is computed from the
    copies is computed by this process alone, with no word to the others.
    """
    leaves = jax.tree.leaves(tree)
    if not all(leaf.is_fully_replicated for leaf in leaves):
        whole = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
        tree = jax.jit(lambda tree: tree, out_shardings=whole)(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


class LeaveNotice(contextlib.AbstractContextManager):
    """Whether to leave: SIGTERM from a scheduler, or Ctrl-C, while the context is open.

    Of several processes any one may be told; JAX then finds the first epoch that none of them
    has passed, and all leave there. Outside the main thread of a single process, where Python
    gives signals to nobody, no notice is ever seen. A second Ctrl-C does not wait.
    """

    def __init__(self):
        self._told = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "LeaveNotice":
        alone = not jax.distributed.is_initialized()  # JAX has taken the signal already
        if alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._tell)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _tell(self, number: int, frame: Any) -> None:
        self._told = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])

    def given(self, epochs: Iterable[int]) -> bool:
        """Whether to leave after `epochs`, those done since this was last asked, in order."""
        if jax.distributed.is_initialized():
            # One by one: JAX compares for equality with the epoch agreed on.
            return any(map(multihost_utils.reached_preemption_sync_point, epochs))
        return self._told
