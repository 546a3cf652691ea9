"""A config against its experiment's fields, before JAX, data or a workdir are touched."""

import importlib
import math
from pathlib import Path

import ml_collections
import pytest

from vaebal.errors import InputError
from vaebal.experiments import EXPERIMENTS, check_config, fields_of, schema

CONFIGS = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("*.py"))


def defaults():
    config = ml_collections.ConfigDict()
    config.name = "a"
    config.train = ml_collections.ConfigDict()
    config.train.epochs = 3
    config.train.rate = 0.5
    config.train.seeds = (0, 1)
    config.train.gammas = (1, 0.5)
    config.train.skips = ("none",)
    config.train.shard = False
    return config


def refused(**changes):
    """The sentence that `defaults` with these fields is refused with; None deletes one."""
    given = defaults().to_dict()
    for field, value in changes.items():
        *above, name = field.split("__")
        section = given["train"] if above else given
        if value is None:
            del section[name]
        else:
            section[name] = value
    with pytest.raises(InputError) as error:
        schema.check_fields(ml_collections.ConfigDict(given), defaults())
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__epoches": 1}, "train.epoches=1 is no field of this experiment: did you mean "
         "train.epochs?"),
        ({"epochs": 1}, "epochs=1 is no field of this experiment: did you mean train.epochs?"),
        ({"train__zzz": 1}, "train.zzz=1 is no field of this experiment: its fields are name, "),
        ({"model": {}}, "model={} is no field of this experiment: "),
        ({"train__epochs": None}, "The config has no field train.epochs: set it (its default is "
         "3), or begin with this experiment's fields.defaults(name)."),
        ({"train": None}, "The config has no field train.epochs: "),
        ({"train__epochs": 3.0}, "train.epochs=3.0 must be an integer, as 3."),
        ({"train__epochs": True}, "train.epochs=True must be an integer, as 3."),
        ({"train__epochs": "3"}, "train.epochs='3' must be an integer, as 3."),
        ({"train__rate": math.nan}, "train.rate=nan must be a finite number, as 0.5."),
        ({"train__rate": math.inf}, "train.rate=inf must be a finite number, as 0.5."),
        ({"train__rate": "fast"}, "train.rate='fast' must be a finite number, as 0.5."),
        ({"train__shard": 1}, "train.shard=1 must be True or False, as False."),
        ({"train__seeds": 0}, "train.seeds=0 must be a tuple, as (0, 1)."),
        ({"train__seeds": (0.5,)}, "train.seeds=(0.5,) must be a tuple of which each is an "
         "integer, as 0."),
        ({"train__gammas": (1, math.nan)}, "train.gammas=(1, nan) must be a tuple of which each is "
         "a finite number, as 0.5."),
        ({"train__skips": (1,)}, "train.skips=(1,) must be a tuple of which each is a string"),
        ({"train__skips": ("(a,b)",)}, "train.skips=('(a,b)',) holds brackets: on the command line "
         "put the tuple in quotes"),
        ({"name": 3}, "name=3 must be a string, as 'a'."),
    ],
)  # fmt: skip
def test_the_first_field_that_cannot_be_meant_is_named(changes, said):
    assert refused(**changes).startswith(said)


def test_what_is_meant_the_same_is_taken():
    config = defaults().to_dict()
    config["train"] |= {"rate": 2, "seeds": [3], "gammas": (2,), "skips": ()}
    schema.check_fields(ml_collections.ConfigDict(config), defaults())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_its_own_defaults_and_no_others(experiment):
    config = fields_of(experiment).defaults("a")
    check_config(config, "runs/a")
    foreign = EXPERIMENTS[EXPERIMENTS.index(experiment) - 1]
    config.experiment = foreign
    with pytest.raises(InputError, match=r"is no field of this experiment"):
        check_config(config, "runs/a")
    del config.experiment
    with pytest.raises(InputError, match="experiment=None does not exist"):
        check_config(config, "runs/a")


@pytest.mark.parametrize("experiment", ["kappa_sweep", "gamma", "generation", "latent_diffusion"])
def test_free_fields_are_fields(experiment):
    fields = fields_of(experiment)
    assert set(schema.flat_fields(fields.defaults("a").to_dict())) >= fields.FREE


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_of_ours_is_taken(name):
    check_config(importlib.import_module(f"configs.{name}").get_config(), "runs/a")


def test_a_misspelt_field_of_a_file_leaves_no_workdir(tmp_path):
    from configs import digits_kappa
    from vaebal.experiments import run

    config = digits_kappa.get_config()
    config.train.epoches = 1
    with pytest.raises(InputError, match=r"train\.epoches=1 .* did you mean train\.epochs\?"):
        run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_workdir_among_the_images_is_refused(tmp_path, below):
    config = fields_of("gamma").defaults("a")
    config.data.name, config.data.folder = "folder", str(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    with pytest.raises(
        InputError, match=r"lies in data\.folder='.*mine', whose images its figures"
    ):
        check_config(config, str(tmp_path / "mine" / below))
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"lies in data\.folder"):
        check_config(config, str(tmp_path / "link" / "run"))
    for beside in (tmp_path / "mine_run", tmp_path, "gs://bucket/run"):
        check_config(config, str(beside))
    config.data.name = "rendered"  # the folder is then not read
    check_config(config, str(tmp_path / "mine"))
