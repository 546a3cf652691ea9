"""What an experiment on images begins with: its data, and a workdir tied to them."""

import json

import numpy as np
import pytest
from PIL import Image

from vaebal.data import ImageSet
from vaebal.errors import InputError
from vaebal.experiments import checks, fields_of, inputs

ON_IMAGES = ("kappa_sweep", "gamma", "generation")


def config_of(experiment, **data):
    config = fields_of(experiment).defaults("a")
    config.data.update(data)
    return config


@pytest.mark.parametrize("experiment", ON_IMAGES)
def test_every_experiment_takes_every_kind_of_set(experiment, tmp_path):
    for level in range(6):
        Image.new("RGB", (9, 9), (40 * level,) * 3).save(tmp_path / f"{level}.png")
    sizes = {"resolution": 8, "train_size": 12, "test_size": 5}
    read = inputs.open_data(config_of(experiment, name="digits"))
    assert (read.name, len(read.train)) == ("digits", 1438)
    mine = {"folder": str(tmp_path), "dir": str(tmp_path / "cache")}
    photos = inputs.open_data(config_of(experiment, name="folder", resolution=8, **mine))
    assert len(photos.train) + len(photos.test) == 6
    drawn = inputs.open_data(config_of(experiment, name="network", **sizes), rank=3)
    assert (drawn.train.shape, drawn.train_factors.shape) == ((12, 192), (12, 3))


def test_true_dimension_comes_from_the_config_or_its_caller():
    config = config_of(
        "kappa_sweep", name="linear", rank=2, resolution=8, train_size=9, test_size=3
    )
    assert inputs.open_data(config).train_factors.shape == (9, 2)
    assert inputs.open_data(config, rank=4).train_factors.shape == (9, 4)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"name": "netwrk"}, r"data\.name='netwrk' is not a known data set: .*'network'"),
        ({"name": "folder"}, r"data\.folder='' names no folder"),
        ({"name": "linear", "train_size": 0}, r"data\.train_size=0 must be an integer of at least"),
        ({"name": "linear", "noise": -1.0}, r"data\.noise=-1\.0 must be 0 or a finite number"),
        ({"name": "linear", "rank": 13}, r"r=13 \(data\.rank, or of data\.ranks\)"),
        ({"resolution": 0}, r"data\.resolution=0 must be an integer of at least 1"),
    ],
)
def test_data_that_cannot_be_meant_are_named(data, said):
    with pytest.raises(InputError, match=said):
        inputs.open_data(config_of("kappa_sweep", **data))


def images(train):
    return ImageSet("mine", np.asarray(train), np.zeros((2, 4), np.uint8), (2, 2, 1))


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("count", [1, 2, 9000])
def test_images_without_variance_are_refused(value, count):
    rows = np.full((count, 4), value, np.uint8)
    said = rf"data\.name='mine' has no variance: its {count} training image\(s\) are all alike"
    with pytest.raises(InputError, match=said):
        checks.variance(images(rows))
    if count > 1:
        rows[-1, 3] ^= 1  # the last pixel of the last image is enough
        checks.variance(images(rows))


def test_a_run_is_tied_to_its_images_and_free_in_what_changes_no_number(tmp_path):
    rows = np.arange(24, dtype=np.uint8).reshape(6, 4)
    config = config_of("kappa_sweep")
    path = inputs.open_run(config, str(tmp_path / "run"), images(rows))
    assert json.loads((path / "data.json").read_text())["training images"] == 6
    config.train.epochs_per_chunk, config.data.dir, config.eval.pictures = 7, "/elsewhere", 3
    config.train.epochs_per_checkpoint = 5
    assert inputs.open_run(config, str(path), images(rows)) == path
    rows[5, 3] ^= 1
    with pytest.raises(InputError, match="holds a run on other data"):
        inputs.open_run(config, str(path), images(rows))
    rows[5, 3] ^= 1
    config.train.learning_rate = 0.1
    with pytest.raises(InputError, match=r"train\.learning_rate=0\.001, and this one has"):
        inputs.open_run(config, str(path), images(rows))


def test_images_that_do_not_vary_leave_no_workdir(tmp_path):
    with pytest.raises(InputError, match="has no variance"):
        inputs.open_run(config_of("gamma"), str(tmp_path / "run"), images(np.zeros((3, 4))))
    assert not (tmp_path / "run").exists()
