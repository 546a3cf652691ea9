"""Any config of a Gaussian VAE, made ready to be timed: its network, its program, its images."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from vaebal.bench.timing import Work
from vaebal.data import MANIFOLDS, ImageSet
from vaebal.errors import InputError
from vaebal.experiments import checks
from vaebal.experiments.cells import Cells
from vaebal.experiments.gamma import run as gamma
from vaebal.experiments.gamma.arms import arms
from vaebal.experiments.kappa_sweep import run as kappa_sweep
from vaebal.models import GaussianVAE
from vaebal.training import Program, Streamed, member_params

RESOLVED = ("celeb_a", "folder", *MANIFOLDS)  # in colour, of data.resolution
IMAGE_SHAPES = {"digits": (8, 8, 1)}  # any other data set: MNIST's
MNIST_SHAPE = (28, 28, 1)
# Above an epoch of so many images nothing changes any more.
EPOCH_IMAGES = 8192
# An epoch's end costs one more pass over a batch, for its metrics: few steps would feel it.
LEAST_STEPS = 8


class Subject(NamedTuple):
    """A network and its compiled training program."""

    config: Any
    model: GaussianVAE
    program: Program | Streamed

    @property
    def params(self) -> Any:
        """One member's parameters before the first step."""
        return member_params(self.program.init(), 0)


def load_config(text: str) -> Any:
    """The config that "configs/FILE.py" or "configs/FILE.py:variant" names.

    Raises:
      InputError: there is none.
    """
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", text, flag_values=values)
        values(["vaebal.bench"], known_only=True)
        return copy.deepcopy(values.config)
    except (OSError, ValueError, flags.Error) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--configs holds {text!r}: {lines[-1]}") from error


def image_shape(config: Any) -> tuple[int, int, int]:
    """(H, W, C) of the config's data.

    Raises:
      InputError: the experiment does not train one Gaussian VAE on images.
    """
    if config.experiment not in ("gamma", "kappa_sweep"):
        raise InputError(
            f"experiment={config.experiment!r} has no training step of one Gaussian VAE: give a "
            "config of the experiments 'kappa_sweep' or 'gamma'."
        )
    if config.data.name in RESOLVED:
        return (config.data.resolution, config.data.resolution, 3)
    return IMAGE_SHAPES.get(config.data.name, MNIST_SHAPE)


def random_images(config: Any, train: int, test: int = 1, seed: int = 0) -> ImageSet:
    """Uniform noise of the config's shape, stored as its data are: speed does not see the rest."""
    shape = image_shape(config)
    rng, dim = np.random.default_rng(seed), int(np.prod(shape))

    def draw(size: int) -> np.ndarray:
        if config.data.name in ("digits", *MANIFOLDS):
            return rng.random((size, dim), np.float32)
        return rng.integers(0, 256, (size, dim), dtype=np.uint8)

    return ImageSet("random", draw(train), draw(test), shape)


def with_batch_size(config: Any, batch_size: int) -> Any:
    """A copy of the config."""
    config = copy.deepcopy(config)
    config.train.batch_size = batch_size
    return config


def latents(config: Any, kappa: int | None) -> int:
    """K: `kappa`, or a sweep's first; the other experiments have one of their own."""
    if config.experiment == "gamma":
        return config.model.latents
    return config.model.kappas[0] if kappa is None else kappa


def build_model(config: Any, kappa: int | None) -> GaussianVAE:
    """The config's network (of a sweep: with its first kind of skips).

    Raises:
      InputError: a field that cannot be meant, or a network that does not fit the images.
    """
    shape = image_shape(config)
    if config.experiment == "gamma":
        gamma.check(config)
        gamma.check_against_data(config, random_images(config, config.train.batch_size))
        return gamma.build_model(config, shape)
    kappa_sweep.check(config)
    return kappa_sweep.build_model(
        config, int(np.prod(shape)), latents(config, kappa), config.model.skips[0]
    )


def build(
    config: Any, images: ImageSet, kappa: int | None = None, seeds: Sequence[int] = (0,)
) -> Subject:
    """The experiment's own program for members that differ in their seeds.

    Raises:
      InputError: a field that cannot be meant.
    """
    model = build_model(config, kappa)
    checks.batch_size(config, images, len(seeds))
    if config.experiment == "kappa_sweep":
        cells = [
            kappa_sweep.Cell(config.model.skips[0], latents(config, kappa), seed) for seed in seeds
        ]
        return Subject(config, model, kappa_sweep.make_program(config, images, cells))
    config = copy.deepcopy(config)
    config.model.gamma = config.model.gamma or 0.1  # else a pass over the data finds it
    arm = arms(config)[0]
    runs = [gamma.Run(arm.name, 0, seed) for seed in seeds]
    data = gamma.Data(config, {(0, gamma.data_seed(config, runs[0])): images})
    programs = gamma.Programs(config, Cells(Path()), data, {arm.name: arm})
    return Subject(config, model, programs.of(runs))


def epoch_size(batch_size: int, flops: int, peak: float, aim: float) -> tuple[int, int]:
    """Batch and steps of an epoch of about `aim` seconds at the rate `peak` (FLOP/s).

    The batch is halved where `LEAST_STEPS` of it would take longer.

    Args:
      flops: of a training step per image.
    """
    while batch_size > 1 and LEAST_STEPS * batch_size * flops > aim * peak:
        batch_size //= 2
    most = max(EPOCH_IMAGES // batch_size, 1)
    return batch_size, int(np.clip(aim * peak / (batch_size * flops), min(LEAST_STEPS, most), most))


def training(program: Program | Streamed) -> Work:
    """Epochs of the program, all of them in one call."""
    state = program.init()

    def work(count: int) -> None:
        nonlocal state  # donated: the old one is gone
        state, _ = program.run(state, count)
        jax.block_until_ready(state)

    return work
