import itertools
import threading

import jax
import numpy as np
import pytest

from vaebal.data import batch_indices
from vaebal.data.feeding import Feeder

N, B = 23, 6  # 3 steps an epoch, 5 examples left over


@pytest.fixture
def rows(tmp_path):
    """[23, 5], memory-mapped; the first column tells the row."""
    rows = np.arange(N * 5).reshape(N, 5).astype(np.uint8)
    np.save(tmp_path / "rows.npy", rows)
    return np.load(tmp_path / "rows.npy", mmap_mode="r")


def _threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("feeder")]


def _expected(rows, seed, step):
    return rows[np.asarray(batch_indices(seed, step, N, B))]


def test_every_start_continues_the_same_batches(rows):
    """Chunks of 2 cross every epoch of 3 steps; 7 chunks cover more than four epochs."""
    for start in range(8):
        with Feeder(rows, seeds=[3], batch_size=B, steps_per_chunk=2, start_step=start) as feeder:
            steps = np.concatenate([chunk[0] for chunk in itertools.islice(feeder, 7)])
        assert (steps.shape, steps.dtype) == ((14, B, 5), np.uint8)
        for step, batch in enumerate(steps, start):
            np.testing.assert_array_equal(batch, _expected(rows, 3, step))


def test_a_chunk_longer_than_several_epochs(rows):
    with Feeder(rows, seeds=[0], batch_size=B, steps_per_chunk=10, start_step=1) as feeder:
        first, second = itertools.islice(feeder, 2)
    for step, batch in enumerate(np.concatenate([first[0], second[0]]), 1):
        np.testing.assert_array_equal(batch, _expected(rows, 0, step))


def test_an_epoch_has_no_example_twice(rows):
    with Feeder(rows, seeds=[1], batch_size=B, steps_per_chunk=3) as feeder:
        epochs = [np.sort(chunk[0, ..., 0].ravel()) for chunk in itertools.islice(feeder, 6)]
    assert all(len(np.unique(epoch)) == 3 * B for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # the left-over ones change


def test_members_are_fed_by_their_own_seed(rows):
    with Feeder(rows, seeds=[4, 9, 5], batch_size=B, steps_per_chunk=4) as feeder:
        chunk = next(feeder)
    for member, seed in enumerate((4, 9, 5)):
        for step in range(4):
            np.testing.assert_array_equal(chunk[member, step], _expected(rows, seed, step))
    assert (chunk[0] != chunk[1]).any()


@pytest.mark.parametrize("count", [2, 3])
def test_the_processes_shares_tile_the_batch(rows, count):
    shares = []
    for index in range(count):
        with Feeder(
            rows,
            seeds=[2],
            batch_size=B,
            steps_per_chunk=5,
            start_step=2,
            process_index=index,
            process_count=count,
        ) as feeder:
            shares.append(next(feeder)[0])
    assert all(share.shape == (5, B // count, 5) for share in shares)
    for step, batch in enumerate(np.concatenate(shares, axis=1), 2):
        np.testing.assert_array_equal(batch, _expected(rows, 2, step))


def test_a_chunk_stays_as_it_was_while_others_come(rows):
    """JAX may keep a chunk's memory: no later one may write to it."""
    with Feeder(rows, seeds=[0], batch_size=B, steps_per_chunk=2) as feeder:
        held = next(feeder)
        before, on_device = held.copy(), jax.device_put(held)
        for _ in range(5):
            assert not np.shares_memory(held, next(feeder))
    np.testing.assert_array_equal(on_device, before)


def test_only_so_much_is_gathered_ahead(rows, monkeypatch):
    gathered, gather = [], Feeder._gather
    monkeypatch.setattr(Feeder, "_gather", lambda *args: (gathered.append(1), gather(*args)))
    with Feeder(rows, seeds=[0], batch_size=B, steps_per_chunk=2) as feeder:
        for _ in range(5):
            next(feeder)
        feeder._pool.shutdown()  # what was queued is done
    assert len(gathered) == (5 + 2) * 2


def test_closing_ends_threads_and_iteration(rows):
    with Feeder(rows, seeds=[0], batch_size=B, steps_per_chunk=50) as feeder:
        next(feeder)
        assert _threads()
    assert not _threads()
    with pytest.raises(StopIteration):
        next(feeder)


def test_leaving_by_an_exception_ends_threads(rows):
    def interrupted():
        with Feeder(rows, seeds=[0], batch_size=B, steps_per_chunk=50) as feeder:
            next(feeder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not _threads()


def test_a_failed_read_reaches_the_consumer_once(rows, monkeypatch):
    """The fourth batch fails: the first chunk of two is whole, the second is an error."""
    gather, numbers = Feeder._gather, itertools.count()

    def failing(*args):
        if next(numbers) == 3:
            raise OSError("the disk is gone")
        gather(*args)

    monkeypatch.setattr(Feeder, "_gather", failing)
    monkeypatch.setattr("vaebal.data.feeding._THREADS", 1)  # in order
    feeder = Feeder(rows, seeds=[0], batch_size=B, steps_per_chunk=2)
    np.testing.assert_array_equal(next(feeder)[0, 1], _expected(rows, 0, 1))
    with pytest.raises(OSError, match="the disk is gone"):
        next(feeder)
    assert not _threads()
    assert list(feeder) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": N + 1}, "batch_size=24 must lie in 1..23"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_count": 4}, "batch_size=6 must be a multiple of process_count=4"),
        ({"process_count": 2, "process_index": 2}, "process_index=2 must lie in 0..1"),
        ({"steps_per_chunk": 0}, "steps_per_chunk=0 must be positive"),
        ({"start_step": -1}, "start_step=-1 not negative"),
    ],
)
def test_bad_arguments_are_named(rows, changes, named):
    arguments = {"seeds": [0], "batch_size": B, "steps_per_chunk": 2} | changes
    with pytest.raises(ValueError, match=named):
        Feeder(rows, **arguments)
    assert not _threads()
