"""A run's directory: of one process, one config, one data set; its small files, whole or named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from vaebal.errors import CheckpointError, InputError
from vaebal.training import workdir as module
from vaebal.training.workdir import (
    load_arrays,
    open_workdir,
    read_json,
    read_json_lines,
    require_same_config,
    save_arrays,
    write_atomically,
)

ROOT = Path(__file__).parent.parent
CONFIG = {"name": "a", "train": {"epochs": 3, "seeds": (0, 1)}}
DATA = {"name": "digits", "train": 1438, "digest": "ab"}


HOLD = """
import sys, time
from vaebal.training.workdir import open_workdir
open_workdir(sys.argv[1], {"name": "a"})
print("held", flush=True)
time.sleep(600)
"""


def test_a_workdir_is_one_processs_until_it_dies(tmp_path):
    """Another process holds it, is killed, and the lock that it leaves behind holds nobody."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        said = rf"--workdir={tmp_path} is in use by process {holder.pid} on .*: let it end"
        with pytest.raises(InputError, match=said):
            open_workdir(str(tmp_path), {"name": "a"})
        holder.kill()
    assert (tmp_path / ".lock").exists()
    assert open_workdir(str(tmp_path), {"name": "a"}) == tmp_path
    assert open_workdir(str(tmp_path), {"name": "a"}) == tmp_path  # its own once more


def test_a_workdir_refused_for_its_config_is_not_kept_locked(tmp_path):
    open_workdir(str(tmp_path), CONFIG)
    os.close(module._locks.pop(tmp_path))
    with pytest.raises(InputError, match=r"train\.epochs=3, and this one has train\.epochs=4"):
        open_workdir(str(tmp_path), {"name": "a", "train": {"epochs": 4, "seeds": [0, 1]}})
    assert tmp_path not in module._locks
    # What it holds already it goes on holding.
    open_workdir(str(tmp_path), CONFIG)
    with pytest.raises(InputError, match="holds a run with name='a'"):
        open_workdir(str(tmp_path), CONFIG | {"name": "b"})
    assert tmp_path in module._locks


def test_a_workdir_made_again_is_locked_again(tmp_path):
    path = open_workdir(str(tmp_path / "run"), CONFIG)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    assert open_workdir(str(tmp_path / "run"), CONFIG) == path
    assert os.path.samestat(os.fstat(module._locks[path]), (path / ".lock").stat())


def test_where_there_are_no_locks_the_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    open_workdir(str(tmp_path), CONFIG)
    assert "cannot be locked (Function not implemented)" in caplog.text


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "row.json"
    write_atomically(file, "old")

    def full(handle):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_remote_workdir_is_opened_and_its_config_held(tmp_path):
    """gs:// as etils gives it, over a local directory; Orbax has its own client for the rest."""

    def elsewhere(original, *arguments, **options):
        return original(
            *(str(each).replace("gs://bucket", str(tmp_path)) for each in arguments), **options
        )

    mock = dict.fromkeys(("open", "exists", "mkdir", "makedirs", "remove", "replace"), elsewhere)
    with epath.testing.mock_epath(**mock):
        path = open_workdir("gs://bucket/run", CONFIG)
        assert str(path / "rows.json") == "gs://bucket/run/rows.json"
        write_atomically(path / "rows.json", "[]\n")
        assert open_workdir("gs://bucket/run", CONFIG) == path
        with pytest.raises(
            InputError, match=r"--workdir=gs://bucket/run holds a run with name='a'"
        ):
            open_workdir("gs://bucket/run", CONFIG | {"name": "b"})
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"config.json", "rows.json"}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["seeds"] == [0, 1]


# ------------------------------------------------------------- what a run is tied to


def test_other_data_are_refused_and_the_same_are_not(tmp_path):
    path = open_workdir(str(tmp_path), CONFIG, data=DATA)
    assert json.loads((path / "data.json").read_text()) == DATA
    assert open_workdir(str(tmp_path), CONFIG, data=DATA) == path
    for other in (DATA | {"train": 1439, "digest": "cd"}, DATA | {"digest": "cd"}):
        with pytest.raises(InputError) as error:
            open_workdir(str(tmp_path), CONFIG, data=other)
        assert "holds a run on other data (name digits, train 1438, digest ab)" in str(error.value)
        assert f"train {other['train']}, digest cd" in str(error.value)
    assert json.loads((path / "data.json").read_text()) == DATA


def test_a_run_that_does_not_say_its_data_is_not_taken_for_one_on_any(tmp_path):
    open_workdir(str(tmp_path), CONFIG)
    with pytest.raises(InputError, match=r"does not say what its data were .*data\.json"):
        open_workdir(str(tmp_path), CONFIG, data=DATA)


@pytest.mark.parametrize("left", ["members/a/row.json", "checkpoints/a/3/d", "rows.json", "a.npz"])
def test_files_of_a_run_without_its_config_are_not_adopted(tmp_path, left):
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("{}")
    with pytest.raises(InputError, match=rf"no config.json, but holds '{left.partition('/')[0]}'"):
        open_workdir(str(tmp_path), CONFIG)
    assert not (tmp_path / "config.json").exists()


def test_a_log_a_lock_and_a_killed_first_start_are_no_run(tmp_path):
    for name in ("slurm-17.out", ".lock", "config.json.99.part", "data.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "lost+found").mkdir()
    open_workdir(str(tmp_path), CONFIG, data=DATA)
    assert json.loads((tmp_path / "data.json").read_text()) == DATA


def test_fields_that_change_no_number_are_free_and_the_last_start_is_kept(tmp_path):
    free = frozenset({"train.epochs_per_chunk"})
    config = lambda chunk, epochs=3: {"train": {"epochs": epochs, "epochs_per_chunk": chunk}}  # noqa: E731
    open_workdir(str(tmp_path), config(1), free=free)
    open_workdir(str(tmp_path), config(5), free=free)
    assert json.loads((tmp_path / "config.json").read_text()) == config(5)
    with pytest.raises(InputError, match=r"train\.epochs=3, and this one has train\.epochs=4"):
        open_workdir(str(tmp_path), config(9, epochs=4), free=free)
    with pytest.raises(InputError, match=r"train\.epochs_per_chunk=5"):
        open_workdir(str(tmp_path), config(9))
    assert json.loads((tmp_path / "config.json").read_text()) == config(5)


def test_what_reads_a_run_compares_its_config(tmp_path):
    """Tuples are as lists; nothing is written, and nothing locked."""
    with pytest.raises(InputError, match=r"holds no run \(it has no config\.json\)"):
        require_same_config(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    require_same_config(tmp_path, CONFIG)
    other = CONFIG | {"model": {"activation": "relu"}}
    with pytest.raises(
        InputError, match=r"model\.activation=None, and .* model\.activation='relu'"
    ):
        require_same_config(tmp_path, other)
    require_same_config(tmp_path, other, free={"model.activation"})
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


# ------------------------------------------------------------- small files


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff\xfe"])
def test_a_small_file_that_is_missing_or_damaged_is_named_with_the_remedy(tmp_path, content):
    row, arrays = tmp_path / "row.json", tmp_path / "pictures.npz"
    if content is not None:
        row.write_bytes(content)
        arrays.write_bytes(content)
    how = "missing" if content is None else "damaged"
    with pytest.raises(CheckpointError) as error:
        read_json(row)
    assert str(error.value).startswith(f"{row} is {how}: ")
    assert str(error.value).endswith("the same command makes it anew.")
    with pytest.raises(CheckpointError) as error:
        load_arrays(arrays)
    assert str(error.value) == (
        f"{arrays} is {how}: delete {row}, and the same command makes both anew."
    )


def test_arrays_beside_a_file_of_their_name_name_that_one(tmp_path):
    (tmp_path / "seed0.json").write_text("[]")
    said = rf"seed0\.npz is missing: delete {tmp_path}/seed0\.json, and the same"
    with pytest.raises(CheckpointError, match=said):
        load_arrays(tmp_path / "seed0.npz")


def test_lines_are_read_one_by_one_and_half_a_line_is_damage(tmp_path):
    file = tmp_path / "history.jsonl"
    assert read_json_lines(file) == []
    file.write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert read_json_lines(file) == [{"epoch": 1}, {"epoch": 2}]
    file.write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(CheckpointError, match=rf"{file} is damaged: bring it back from a copy"):
        read_json_lines(file)


def test_a_file_whose_reading_fails_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "row.json").write_text("{}")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError) as error:
        read_json(tmp_path / "row.json")
    assert str(error.value) == (
        f"{tmp_path}/row.json cannot be read (Permission denied): once it can, the same command "
        "goes on."
    )


def test_arrays_cut_short_are_damaged_and_whole_ones_come_back(tmp_path):
    file, saved = tmp_path / "pictures.npz", {"x": np.arange(6.0).reshape(2, 3), "y": np.int8(3)}
    save_arrays(file, **saved)
    got = load_arrays(file)
    assert set(got) == {"x", "y"}
    np.testing.assert_array_equal(got["x"], saved["x"])
    whole = file.read_bytes()
    for size in range(0, len(whole), 37):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_arrays(file)


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_a_damaged_config_or_data_file_is_refused_and_kept(tmp_path, name):
    open_workdir(str(tmp_path), CONFIG, data=DATA)
    (tmp_path / name).write_text('{"na')
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: bring it back from a copy"):
        open_workdir(str(tmp_path), CONFIG, data=DATA)
    assert (tmp_path / name).read_text() == '{"na'
