"""What can happen to a run, done to it for real: it ends as if nothing had happened, or says so."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from kills import stress
from small_run import small_program

from vaebal.errors import CheckpointError, Preempted
from vaebal.training import checkpoints as module
from vaebal.training import fit
from vaebal.training.checkpoints import Checkpoints

# What TensorStore's threads still have to say when a save or a restore has failed.
pytestmark = [
    pytest.mark.usefixtures("nothing_left_behind"),
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
    ),
]

ROOT = Path(__file__).parent.parent
EPOCHS = 10


@pytest.fixture(scope="module")
def small():
    """One compiled program for all tests here."""
    return small_program()


def run_fit(small, directory, report=lambda *_: None):
    with Checkpoints(directory) as checkpoints:
        return fit(
            small,
            epochs=EPOCHS,
            epochs_per_chunk=1,
            epochs_per_checkpoint=2,
            checkpoints=checkpoints,
            report=report,
        )


@pytest.fixture(scope="module")
def end(small, tmp_path_factory):
    """The end of a run that nothing befalls."""
    return jax.device_get(run_fit(small, tmp_path_factory.mktemp("whole")))


def assert_identical(got, end):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), end)


def kept(directory):
    with Checkpoints(directory) as checkpoints:
        return checkpoints.latest


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        (4, signal.SIGTERM),
        (9, signal.SIGINT),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(4, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(9, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_notice_saves_at_once_and_the_next_start_ends_the_same(
    small, end, tmp_path, moment, number
):
    """At a checkpoint (4) or between two; the notice comes while the next epoch is trained."""
    before = signal.getsignal(number)

    def report(epoch, *_):
        if epoch == moment:
            os.kill(os.getpid(), number)

    with pytest.raises(Preempted, match=f"after epoch {moment + 1} of 10, .*{tmp_path}"):
        run_fit(small, tmp_path, report)
    assert signal.getsignal(number) is before
    assert kept(tmp_path) == moment + 1
    epochs = []
    assert_identical(run_fit(small, tmp_path, lambda epoch, *_: epochs.append(epoch)), end)
    assert epochs == list(range(moment + 2, EPOCHS + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_notice_during_the_last_save_is_not_forgotten(small, end, tmp_path, number, monkeypatch):
    """What would come after training, as an evaluation of hours, does not begin."""
    save = Checkpoints.save

    def told(self, epoch, state):
        save(self, epoch, state)
        if epoch == EPOCHS:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", told)
        with pytest.raises(Preempted, match="after epoch 10 of 10, saved in"):
            run_fit(small, tmp_path)
    assert kept(tmp_path) == EPOCHS
    assert_identical(run_fit(small, tmp_path, lambda *_: pytest.fail("trained again")), end)


def test_a_notice_during_the_last_save_of_members_that_all_stopped_is_not_forgotten(
    small, tmp_path, monkeypatch
):
    """Their training ends before the last epoch."""
    members = jax.device_get(small._members)
    spoiled = members._replace(gamma=np.full_like(members.gamma, np.nan))
    none = small.on(spoiled, small.rows, given=small._given)
    save = Checkpoints.save

    def told(self, epoch, state):
        save(self, epoch, state)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", told)
        with pytest.raises(Preempted, match="after epoch 2 of 10"):
            run_fit(none, tmp_path)


def test_a_second_ctrl_c_does_not_wait(small, end, tmp_path):
    """The first is a notice, to which the epoch in training is finished; the second is none."""
    before = signal.getsignal(signal.SIGINT)

    def report(epoch, *_):
        assert epoch == 1
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        run_fit(small, tmp_path, report)
    assert signal.getsignal(signal.SIGINT) is before
    assert kept(tmp_path) is None
    assert_identical(run_fit(small, tmp_path), end)


def test_a_run_goes_on_from_before_a_damaged_checkpoint_to_the_same_end(small, end, tmp_path):
    run_fit(small, tmp_path)
    # One bit of the values, which neither Orbax nor zstd would miss.
    file = max((tmp_path / "10").rglob("*"), key=lambda file: file.stat().st_size)
    octets = bytearray(file.read_bytes())
    octets[len(octets) // 2] ^= 1
    file.write_bytes(octets)
    epochs = []
    assert_identical(run_fit(small, tmp_path, lambda epoch, *_: epochs.append(epoch)), end)
    assert epochs == [9, 10]


def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(small, end, tmp_path, monkeypatch):
    save = module.ocp.CheckpointManager.save

    def full(self, epoch, **options):
        if epoch == 6:
            self.wait_until_finished()
            raise OSError(28, "No space left on device")
        return save(self, epoch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module.ocp.CheckpointManager, "save", full)
        with pytest.raises(CheckpointError, match=r"\(.*No space left.*then goes on from epoch 4"):
            run_fit(small, tmp_path)
    assert kept(tmp_path) == 4
    assert_identical(run_fit(small, tmp_path), end)


# ----------------------------------------------------------------- whole programs


def main(workdir, *arguments, shell=""):
    """The program in a process of its own; `shell` is said to bash before it starts."""
    command = ["bash", "-c", f'{shell} exec "$@"', "bash", sys.executable]
    command += ["main.py", f"--workdir={workdir}", "--config.model.kappas=(2,)"]
    command += ["--config.model.skips=('none',)", "--config.train.seeds=(0,)"]
    command += ["--config.model.width=8", "--config.train.epochs_per_chunk=1", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


@pytest.mark.slow
def test_main_leaves_on_sigterm_with_the_code_for_another_try(tmp_path):
    process = main(tmp_path, "--config.train.epochs=100000")
    with process:
        while not list(tmp_path.glob("checkpoints/*/[0-9]*")) and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        try:
            _, said = process.communicate(timeout=300)
        finally:
            process.kill()  # one that goes on would do so for 100,000 epochs
    assert process.returncode == 75, said
    assert "error: Stopped on notice after epoch" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_main_says_that_the_disk_is_full(tmp_path):
    """No file may grow beyond what the config takes: a checkpoint is the first that would."""
    process = main(
        tmp_path,
        *("--config.model.width=64", "--config.train.epochs_per_checkpoint=1"),
        shell="ulimit -Sf 20;",
    )
    with process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 74, said
    assert "error: A checkpoint could not be written in " in said
    assert "(File too large)" in said


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path, monkeypatch):
    """Two of them; `python tests/kills.py` makes as many as one likes, of any command."""
    # A kill is to meet training more often than the compiler.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, str(ROOT / "tests" / "small_run.py"), "--epochs=100"]
    ends = stress(command, 2, tmp_path)
    assert ends >= 1
    for number in range(ends):
        assert json.loads((tmp_path / str(number) / "config.json").read_text()) == {"epochs": 100}
