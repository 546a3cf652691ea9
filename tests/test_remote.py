"""A run in a bucket: the same files as on a disk, none of them beside it, and resumed there.

The bucket is etils' own way to gs:// over a file system in memory. Not covered: Orbax's
checkpoints, which TensorStore writes by itself, lie on the disk here; and what gcsfs adds.
"""

import json

import fsspec
import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem
from test_gamma import tiny as tiny_gamma
from test_main import tiny as tiny_sweep

from vaebal.experiments import cells, parts
from vaebal.experiments import run as run_experiment
from vaebal.training import checkpoints
from vaebal.training.progress import Scalars
from vaebal.training.workdir import load_arrays

SWEEP = {"model.skips": ("none",), "train.seeds": (0,)}
GAMMA = {
    "data__ranks": (1,), "train__arms": ("adaptive", "fixed at adaptive"),
    "train__epochs": 5, "train__epochs_per_checkpoint": 2,
}  # fmt: skip


class Bucket(MemoryFileSystem):
    """As Google's: objects are put whole, and nothing can be appended to them."""

    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb")
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """gs://bucket, empty. Checkpoints of what lies in it go to tmp_path/checkpoints."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    fsspec.filesystem("gcs").clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.chdir(tmp_path)
    made = checkpoints.Checkpoints.__init__

    def on_disk(self, directory, *options):
        remote = str(directory).startswith("gs://bucket/run/")
        made(self, tmp_path / "checkpoints" / directory.name if remote else directory, *options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "__init__", on_disk)
        yield "gs://bucket/run"
    assert [path.name for path in tmp_path.iterdir()] in ([], ["checkpoints"])
    backend.fsspec_backend._get_filesystem.cache_clear()


def files_in_bucket() -> set[str]:
    """Their paths in the run, without what a time or a process is part of the name of."""
    return {name.removeprefix("/bucket/run/").partition("events.out")[0] for name in Bucket.store}


def files_on_disk(path) -> set[str]:
    names = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
    return {
        name.partition("events.out")[0]
        for name in names
        if not name.startswith((".lock", "checkpoints"))
    }


def timeless(rows) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def stop_at(epoch, real):
    """`fit`, interrupted when that epoch is reported."""

    def fit(program, *, report, **options):
        def reported(done, *rest):
            report(done, *rest)
            if done == epoch:
                raise KeyboardInterrupt

        return real(program, report=reported, **options)

    return fit


def interrupted_and_resumed(config, workdir, epoch) -> list[dict]:
    """The rows of a run that is interrupted, goes on, and is then found to be finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "fit", stop_at(epoch, cells.fit))
        with pytest.raises(KeyboardInterrupt):
            run_experiment(config, workdir)
    rows = run_experiment(config, workdir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "fit", lambda *_, **__: pytest.fail("trained again"))
        assert run_experiment(config, workdir) == rows
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [tiny_sweep(**SWEEP), tiny_gamma(**GAMMA)],
    ids=["kappa_sweep", "gamma"],
)
def test_a_run_in_a_bucket_is_as_one_on_a_disk(config, bucket, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    expected = run_experiment(config, str(disk))
    got = interrupted_and_resumed(config, bucket, config.train.epochs)
    assert timeless(got) == timeless(expected)
    assert files_in_bucket() == files_on_disk(disk)
    for file in disk.rglob("*"):
        theirs = epath.Path(bucket) / str(file.relative_to(disk))
        if file.name == "config.json":
            assert theirs.read_text() == file.read_text()
        if file.name == "history.jsonl":
            histories = (map(json.loads, each.read_text().splitlines()) for each in (theirs, file))
            assert timeless(next(histories)) == timeless(next(histories))
        if file.suffix == ".npz":
            arrays = load_arrays(theirs)
            with np.load(file) as on_disk:
                assert set(arrays) == set(on_disk)
                for name in on_disk:
                    np.testing.assert_array_equal(arrays[name], on_disk[name])
    assert json.loads((epath.Path(bucket) / "rows.json").read_text()) == got


def test_scalars_and_parts_of_a_bucket(bucket):
    """What is written again is the whole; a part that is there is not made again."""
    scalars = Scalars(epath.Path(bucket) / "tensorboard")
    sizes = []
    for step in (1, 2):
        scalars.add(step, {"loss": float(step)})
        scalars.write()
        (written,) = Bucket.store.values()
        sizes.append(len(written.getvalue()))
    assert 0 < sizes[0] < sizes[1]
    rows = parts.finished(epath.Path(bucket), "", "a part", lambda: [{"x": 1}])
    assert rows[0]["x"] == 1
    again = parts.finished(epath.Path(bucket), "", "a part", lambda: pytest.fail("made again"))
    assert again == rows
