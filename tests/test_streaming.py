"""Training from rows on disk against training from the device, and against the disk's limits."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from training_runs import data_of, member_of, program

from vaebal import homotopy
from vaebal.data import host_mean_image, mean_image
from vaebal.models import mlp_vae
from vaebal.training import Member, Program, Streamed, fit, stack_members
from vaebal.training.checkpoints import Checkpoints

B = 20  # 4 steps an epoch, 16 of the 96 rows left over


def members(seeds):
    return stack_members([Member(seed, 5, rule={"guard": 0.5}) for seed in seeds])


def guarded(member):
    return homotopy.guarded(0.02, dim=16, guard=member.rule["guard"], memory=10)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """[96, 16] uint8, memory-mapped, of rank about 4."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(96, 4)) @ rng.normal(size=(4, 16))
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, (255 / (1 + np.exp(-raw))).astype(np.uint8))
    return np.load(path, mmap_mode="r")


def build(kind, rows):
    """Of seeds 0 and 7; chunks of 3 steps cross the epochs of 4."""
    model = mlp_vae(
        outputs=16, latents=5, width=12, encoder_layers=2, decoder_blocks=1,
        activation=jax.nn.silu, residual=True, affine_skip=True,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[Streamed.__module__], "CHUNK_BYTES", 3 * 2 * B * 16)
        return program(model, members((0, 7)), rows, B, rule=guarded, build=kind)


@pytest.fixture(scope="module")
def both(rows):
    """Streaming and from the device."""
    return build(Streamed, rows), build(Program, np.asarray(rows))


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
    streamed, _ = both

    def fitted(folder, epochs):
        with Checkpoints(tmp_path / folder) as checkpoints:
            return fit(
                streamed, epochs=epochs, epochs_per_chunk=1, epochs_per_checkpoint=2,
                checkpoints=checkpoints, report=lambda *args: None,
            )  # fmt: skip

    whole = fitted("a", 3)
    fitted("b", 1)
    jax.tree.map(np.testing.assert_array_equal, fitted("b", 3), whole)


def test_a_member_that_stops_leaves_the_others_their_batches(both, rows):
    """The first of two, at step 0: the second still gets the batches of its own step."""
    spoiled = members((0, 7))._replace(gamma=np.float32([np.nan, 1.0]))
    ends = []
    for stack in (members((0, 7)), spoiled):
        streamed = both[0].on(**data_of(stack, rows))
        state, _ = streamed.run(streamed.init(), 1)
        ends.append(streamed.run(state, 2)[0])
    assert ends[1].stopped.tolist() == [0, -1]
    assert ends[1].step.tolist() == [0, 12]
    jax.tree.map(np.testing.assert_array_equal, *(member_of(end, 1) for end in ends))


def test_a_program_serves_other_members_and_rows(both, rows):
    streamed, resident = both
    other = np.ascontiguousarray(255 - rows[::-1])
    data = data_of(members((3, 4)), other)
    got, _ = (t := streamed.on(**data)).run(t.init(), 1)
    expected, _ = (t := resident.on(**data)).run(t.init(), 1)
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


def test_no_chunk_is_sent_before_the_one_before_the_last_is_trained_on(both, rows, monkeypatch):
    """However long the run, two are on the device; and one is always sent ahead."""
    streamed, unfinished, ahead = both[0].on(**data_of(members((0, 7)), rows)), [], []
    advance, put, wait = (
        streamed._advance,
        jax.make_array_from_process_local_data,
        jax.block_until_ready,
    )

    def advanced(*arguments):
        state, tally = advance(*arguments)
        unfinished.append(tally)
        return state, tally

    def sent(sharding, local, *shape):
        if np.ndim(local):
            ahead.append(len(unfinished))
        return put(sharding, local, *shape)

    def waited(tally):
        if tally is not None:
            assert unfinished.pop(0) is tally
        return wait(tally)

    streamed._advance = advanced
    monkeypatch.setattr(jax, "make_array_from_process_local_data", sent)
    monkeypatch.setattr(jax, "block_until_ready", waited)
    streamed.run(streamed.init(), 6)
    assert ahead == [0] + [1] * 7  # 24 steps are 8 chunks


IN_TWO = """
import sys
import jax, numpy as np
from test_streaming import Streamed, build
from vaebal.training import devices

devices.join(sys.argv[1], 2, int(sys.argv[2]))
streamed = build(Streamed, np.load(sys.argv[3], mmap_mode="r"))
state, _ = streamed.run(streamed.init(), 3)
np.savez(sys.argv[4], *jax.tree.leaves(jax.device_get(state)))
"""


@pytest.mark.slow
def test_two_processes_that_read_half_a_batch_each_are_one(both, rows, tmp_path):
    root = Path(__file__).parent.parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{root}:{root / 'tests'}",
    }
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IN_TWO, address, str(i), rows.filename, tmp_path / f"{i}.npz"],
            env=environment,
        )
        for i in (0, 1)
    ]
    try:
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    expected, _ = both[0].run(both[0].init(), 3)
    for i in (0, 1):
        with np.load(tmp_path / f"{i}.npz") as leaves:
            assert_close(list(leaves.values()), jax.tree.leaves(expected))
