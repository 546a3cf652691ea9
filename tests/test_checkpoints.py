"""What a workdir and its checkpoints promise: whole or refused, never half and never silently."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from vaebal.errors import CheckpointError, InputError
from vaebal.training import checkpoints as module
from vaebal.training.checkpoints import Checkpoints, fingerprint

# What TensorStore's threads still have to say when a save or a restore has failed.
pytestmark = [
    pytest.mark.usefixtures("nothing_left_behind"),
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
    ),
]


ROOT = Path(__file__).parent.parent


def state(epoch: int):
    """A tree of several types, none of whose bytes repeat."""
    rng = np.random.default_rng(epoch)
    return {
        "params": jnp.asarray(rng.normal(size=(30, 40)), jnp.float32),
        "step": jnp.full((2,), epoch, jnp.int32),
        "nothing": (),
    }


def shapes():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )


def equal(a, b) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def saved(directory: Path, epochs=(2, 4)) -> Path:
    with Checkpoints(directory) as checkpoints:
        for epoch in epochs:
            checkpoints.save(epoch, state(epoch))
    return directory


def restored(directory: Path):
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore_latest(shapes())


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_a_fingerprint_sees_every_single_byte(dtype):
    """Each byte of a leaf in turn takes another value: the fingerprint changes, and back."""
    octets = np.random.default_rng(0).integers(0, 256, 16, np.uint8)
    leaf = lambda octets: jnp.asarray(octets.view(jnp.dtype(dtype)))  # noqa: E731
    before = int(fingerprint(leaf(octets))[0])
    for at in range(len(octets)):
        changed = octets.copy()
        changed[at] ^= 1 << (at % 8)
        assert int(fingerprint(leaf(changed))[0]) != before
    weights = 2 * np.arange(16, dtype=np.uint64) + 1
    assert before == int(octets.astype(np.uint64) @ weights) % 2**32


def test_the_last_three_are_kept_and_what_a_killed_save_left_is_cleared(tmp_path):
    saved(tmp_path, (2, 4, 6, 8))
    (tmp_path / "10.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    epoch, got = restored(tmp_path)
    assert epoch == 8
    assert equal(got, state(8))
    assert {path.name for path in tmp_path.iterdir()} == {"4", "6", "8"}


def test_nothing_saved_is_no_error(tmp_path):
    assert restored(tmp_path / "new") is None


def halve(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path):
    octets = bytearray(file.read_bytes())
    octets[len(octets) // 2] ^= 0x10
    file.write_bytes(octets)


@pytest.mark.parametrize("damage", [halve, flip_a_bit, Path.unlink])
def test_any_damaged_file_gives_the_saved_state_or_the_one_before(tmp_path, damage, caplog):
    """Every file of a checkpoint in turn; the largest, with the values, must be missed."""
    saved(tmp_path / "ck")
    files = sorted((tmp_path / "ck" / "4").rglob("*"), key=lambda file: file.stat().st_size)
    files = [file.relative_to(tmp_path) for file in files if file.is_file()]
    assert len(files) > 8
    kept = {file: (tmp_path / file).read_bytes() for file in files}
    seen = []
    for file in files:
        damage(tmp_path / file)
        caplog.clear()
        epoch, got = restored(tmp_path / "ck")
        assert equal(got, state(epoch))
        said = [r.getMessage() for r in caplog.records if r.name == "vaebal.training.checkpoints"]
        assert len(said) == (epoch == 2)
        if epoch == 2:  # named in one line, and out of the way of the next save
            assert said[0].startswith(f"Checkpoint {tmp_path}/ck/4 ")
            assert "\n" not in said[0]
            assert not (tmp_path / "ck" / "4").exists()
            assert (tmp_path / "ck" / "4.damaged").exists()  # nothing is deleted
            shutil.rmtree(tmp_path / "ck" / "4.damaged")
        seen.append(epoch)
        for each, octets in kept.items():
            (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / each).write_bytes(octets)
    assert seen[-1] == 2


def test_a_run_goes_on_over_a_damaged_checkpoint(tmp_path):
    saved(tmp_path, (2, 4))
    halve(max((tmp_path / "4").rglob("d/*"), key=lambda file: file.stat().st_size))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(shapes())[0] == 2
        checkpoints.save(4, state(4))
    assert equal(restored(tmp_path)[1], state(4))
    halve(max((tmp_path / "4").rglob("d/*"), key=lambda file: file.stat().st_size))
    assert restored(tmp_path)[0] == 2
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"2", "4.damaged", "4.damaged1"}


FAILURES = (
    ("restore", OSError(5, "Input/output error")),
    ("restore", PermissionError(13, "Permission denied")),
    ("restore", ValueError("UNAVAILABLE: Error reading local file: connection reset")),
    ("restore", ValueError("DATA_LOSS: Error reading: [os_error_code='EIO']")),
    ("restore", RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes")),
    ("metadata", OSError(5, "Input/output error")),
    ("metadata", MemoryError()),
)


def test_a_read_that_fails_and_may_succeed_again_is_no_damage(tmp_path, monkeypatch):
    """The run ends there: nothing is stepped over, renamed or deleted."""
    saved(tmp_path)
    for call, failure in FAILURES:

        def fail(*arguments, failure=failure, **options):
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(module.ocp.CheckpointManager, call, fail)
            with pytest.raises(
                CheckpointError, match=f"Checkpoint {tmp_path}/4 cannot be read"
            ) as error:
                restored(tmp_path)
        assert not isinstance(error.value, module.Damaged)
        assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}
    epoch, got = restored(tmp_path)
    assert epoch == 4
    assert equal(got, state(4))


def test_other_types_shapes_and_leaves_are_named_and_nothing_is_touched(tmp_path):
    saved(tmp_path)
    other = shapes()
    sharding = other["params"].sharding

    def as_params(shape, dtype):
        return other | {"params": jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)}

    for wanted, said in (
        (as_params((30, 40), jnp.bfloat16), "params bfloat16[30, 40]: start it with the settings"),
        (as_params((40, 30), jnp.float32), "params float32[40, 30]: start it with the settings"),
        (other | {"a": other["step"]}, "a int32[2]: start it with the settings"),
    ):
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(InputError) as error,
        ):
            checkpoints.restore_latest(wanted)
        holds = f"Checkpoint {tmp_path}/4 holds params float32[30, 40], and this run has "
        assert str(error.value).startswith(holds + said)
    assert restored(tmp_path)[0] == 4


def test_another_jax_enable_x64_is_named_as_such(tmp_path):
    with jax.enable_x64(True), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"params": jnp.ones((3, 4), jnp.float64)})
    wanted = {
        "params": jax.ShapeDtypeStruct((3, 4), jnp.float32, sharding=shapes()["step"].sharding)
    }
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(
            InputError, match=r"params float64\[3, 4\], .* with jax_enable_x64 as it was"
        ),
    ):
        checkpoints.restore_latest(wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"2"}


def test_the_epoch_that_is_demanded_comes_or_none(tmp_path):
    """An older one in the place of a finished one's is refused, whether lost or damaged."""
    saved(tmp_path, (2, 4))
    with Checkpoints(tmp_path) as checkpoints:
        assert equal(checkpoints.restore(2, shapes()), state(2))
        assert equal(checkpoints.restore(4, shapes()), state(4))
        said = rf"Checkpoint {tmp_path}/6 of epoch 6, .* is not there \(of \[2, 4\] are\)"
        with pytest.raises(CheckpointError, match=said):
            checkpoints.restore(6, shapes())
    flip_a_bit(max((tmp_path / "4").rglob("d/*"), key=lambda file: file.stat().st_size))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=rf"Checkpoint {tmp_path}/4 is damaged"),
    ):
        checkpoints.restore(4, shapes())


def test_if_all_are_damaged_nothing_starts_anew(tmp_path):
    saved(tmp_path)
    for file in tmp_path.rglob("_METADATA"):
        halve(file)
    said = rf"None of the 2 checkpoints in {tmp_path} can be read: .* or delete that directory"
    with pytest.raises(CheckpointError, match=said):
        restored(tmp_path)
    assert {"2", "4"} <= {path.name for path in tmp_path.iterdir()}


def test_checkpoints_without_a_fingerprint_are_still_read(tmp_path, monkeypatch):
    """As others' and older ones are."""
    save = module.ocp.CheckpointManager.save
    with monkeypatch.context() as patch:
        patch.setattr(
            module.ocp.CheckpointManager,
            "save",
            lambda *arguments, custom_metadata, **options: save(*arguments, **options),
        )
        saved(tmp_path)
    assert equal(restored(tmp_path)[1], state(4))


FULL = """
import resource, signal, sys
from pathlib import Path
from test_checkpoints import Checkpoints, CheckpointError, state
checkpoints = Checkpoints(Path(sys.argv[1]))
with checkpoints:
    checkpoints.save(2, state(2))
try:
    with Checkpoints(Path(sys.argv[1])) as checkpoints:
        checkpoints.save(4, state(4))
        checkpoints._manager.wait_until_finished()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        checkpoints.save(6, state(6))
except CheckpointError as error:
    print(error)
    sys.exit(74)
"""


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoints_before_it(tmp_path):
    """The system refuses a file's growth for real (EFBIG), in Orbax's background threads."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 74, done.stderr
    assert done.stdout == (
        f"A checkpoint could not be written in {tmp_path} (File too large): free space or mend the "
        "disk; the same command then goes on from epoch 4, which is whole.\n"
    )
    epoch, got = restored(tmp_path)
    assert epoch == 4
    assert equal(got, state(4))


def test_checkpoints_take_the_paths_of_etils(tmp_path):
    directory = saved(epath.Path(tmp_path) / "ck")
    assert equal(restored(directory)[1], state(4))
