"""Training from rows on disk against training from the device, and against the disk's limits."""

import jax
import numpy as np
import pytest

from vaebal import streaming
from vaebal.checkpoints import Checkpoints
from vaebal.data import mean_image
from vaebal.streaming import StreamingTrainer, host_mean_image
from vaebal.training import Member, Optimisation, Trainer, fit, stack_members

B = 20  # 4 steps an epoch, 16 of the 96 rows left over
SETTINGS = Optimisation(3e-3, 1e-4, 5, 600, 20.0, "adaptive")


def members(seeds):
    return stack_members([Member(seed, 5, 1.0, 0.02, gamma_guard=0.5) for seed in seeds])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """[96, 16] uint8, memory-mapped, of rank about 4."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(96, 4)) @ rng.normal(size=(4, 16))
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, (255 / (1 + np.exp(-raw))).astype(np.uint8))
    return np.load(path, mmap_mode="r")


@pytest.fixture
def both(small_vae, rows, monkeypatch):
    """The two trainers of seeds 0 and 7; chunks of 3 steps cross the epochs of 4."""
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 3 * 2 * B * 16)
    model = small_vae()
    return (
        StreamingTrainer(model, SETTINGS, members((0, 7)), rows, B),
        Trainer(model, SETTINGS, members((0, 7)), np.asarray(rows), B),
    )


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_the_run_is_that_of_the_rows_on_the_device(both):
    """Three epochs, one and then two: states and metrics."""
    streamed, resident = both
    assert streamed._chunk_steps == 3
    got, expected = streamed.init(), resident.init()
    assert_close(got, expected)
    for epochs in (1, 2):
        got, got_metrics = streamed.run(got, epochs)
        expected, expected_metrics = resident.run(expected, epochs)
        assert_close(got_metrics, expected_metrics)
    assert np.asarray(got.step).tolist() == [12, 12]
    assert_close(got, expected)
    # The comparison can fail: two seeds differ by far more than its tolerance.
    kernel = np.asarray(got.params["encoder"]["mean"]["kernel"])
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_fit_resumes_at_the_states_step(both, tmp_path):
    """Stopped after one epoch and begun again elsewhere: bit for bit the uninterrupted run."""
    trainer, _ = both

    def fitted(folder, epochs):
        with Checkpoints(tmp_path / folder) as checkpoints:
            return fit(
                trainer, epochs=epochs, epochs_per_chunk=1, epochs_per_checkpoint=2,
                checkpoints=checkpoints, report=lambda *args: None,
            )  # fmt: skip

    whole = fitted("a", 3)
    fitted("b", 1)
    jax.tree.map(np.testing.assert_array_equal, fitted("b", 3), whole)


def test_a_program_serves_other_members_and_rows(both, rows):
    streamed, resident = both
    other = np.ascontiguousarray(255 - rows[::-1])
    got, _ = (t := streamed.on(members((3, 4)), other)).run(t.init(), 1)
    expected, _ = (t := resident.on(members((3, 4)), other)).run(t.init(), 1)
    assert_close(got, expected)


def test_the_mean_reads_a_block_at_a_time(rows):
    """Blocks that do not divide N; never more rows at once than a block."""
    seen = []

    class Watched(np.ndarray):
        def __getitem__(self, key):
            part = np.asarray(super().__getitem__(key))
            seen.append(len(part))
            return part

    got = host_mean_image(rows.view(Watched), block=10)
    np.testing.assert_allclose(got, mean_image(np.asarray(rows)), rtol=1e-6)
    np.testing.assert_allclose(got, np.mean(rows, 0, np.float64) / 255, rtol=1e-6)
    assert sum(seen) == 96
    assert max(seen) == 10


def test_few_chunks_are_on_the_device_at_once(both, monkeypatch):
    """However long the run: one in training, one waiting, and one whose memory goes."""
    streamed, _ = both
    shape, most = (2, 3, B, 16), 0
    put = jax.make_array_from_process_local_data

    def counted(sharding, chunk):
        nonlocal most
        array = put(sharding, chunk)
        most = max(most, sum(a.shape == shape for a in jax.live_arrays()))
        return array

    monkeypatch.setattr(jax, "make_array_from_process_local_data", counted)
    streamed.run(streamed.init(), 6)  # 8 chunks
    assert 1 <= most <= 3
