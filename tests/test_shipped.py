"""The command that a page says it was made by, against what makes its config."""

import importlib
import shlex
import subprocess
import sys
import unittest.mock

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from configs import mnist_gamma
from vaebal.experiments import shipped

# ml_collections loads a config's file by what Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.*:DeprecationWarning")

VARIANTS = (
    "",
    "quick",
    "hard",
    "wide",
    "seeds",
    "spheres",
    "starts",
    "rendered64",
    "mlp",
    "folder",
)


def parsed(command: str) -> ml_collections.ConfigDict:
    """The config that a command makes."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    python, *argv = shlex.split(command)
    assert python == "python"
    with unittest.mock.patch.object(sys, "argv", argv):  # where it looks for its fields' flags
        values(argv)
    return values.config


def all_configs():
    """(file, variant, config) of every config that comes with vaebal."""
    for file in sorted(shipped.folder().glob("*.py")):
        for variant in VARIANTS:
            said = f"configs/{file.name}:{variant}".rstrip(":")
            try:
                yield said, parsed(f"python main.py --config={said}")
            except flags.IllegalFlagValueError:  # no such variant, or none at all
                assert variant


def test_every_shipped_config_is_made_by_its_own_command():
    found = dict(all_configs())
    assert len(found) > 30
    for said, config in found.items():
        assert shipped.command(config) == f"python main.py --config={said}"
        importlib.import_module(f"vaebal.experiments.{config.experiment}.run").check(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"data.name": "fashion_mnist", "train.seeds": (0, 1, 2)},
        {"train.arms": ("adaptive", "plain 5e-3 of 10"), "train.epochs": 60},
        {"data.dir": "/a folder/$HOME"},
        {"train.weight_decay": 1e-4, "data.noise": 0.0},
    ],
)
def test_what_differs_is_set_by_flags_that_are_read_back(changes):
    config = mnist_gamma.get_config("quick")
    config.update_from_flattened_dict(changes)
    assert parsed(shipped.command(config)).to_dict() == config.to_dict()


def test_a_config_of_another_name_has_no_command():
    config = mnist_gamma.get_config()
    config.name = "mnist_gamma_of_mine"
    assert shipped.command(config) == ""


def test_shipped_configs_are_found_from_anywhere(tmp_path):
    """By name, as after an installation that has no folder `configs` beside it."""
    command = [
        *(sys.executable, "-m", "vaebal", "run", "--config=linear_gamma"),
        "--config.train.seeds=()",  # refused, so that nothing is trained
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "train.seeds=() must list at least one" in ended.stderr
