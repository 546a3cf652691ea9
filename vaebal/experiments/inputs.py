"""What every experiment on images begins with: its data opened, its workdir tied to them."""

from pathlib import Path
from typing import Any

from vaebal.data import MANIFOLDS, ImageSet, load, manifold
from vaebal.experiments import checks, fields_of
from vaebal.training.workdir import open_workdir


def open_data(config: Any, rank: int | None = None, seed: int | None = None) -> ImageSet:
    """The images of the config's section `data`.

    Args:
      rank: r, of images that we draw ourselves; None: data.rank. Else not read.
      seed: theirs; None: data.seed.

    Raises:
      InputError: a field that cannot be meant, or data that cannot be had.
    """
    data = config.data
    checks.positive_integers(config, "data.resolution")
    if data.name not in MANIFOLDS:
        return load(
            data.name, data.dir, resolution=data.resolution, folder=data.folder, bad=data.bad
        )
    checks.positive_integers(config, "data.train_size", "data.test_size")
    checks.positive_numbers(config, "data.noise", zero=True)
    return manifold(
        data.name, rank=data.rank if rank is None else rank, resolution=data.resolution,
        train_size=data.train_size, test_size=data.test_size, noise=data.noise,
        seed=data.seed if seed is None else seed,
    )  # fmt: skip


def open_run(config: Any, workdir: str, images: ImageSet) -> Path:
    """The run's directory, for this config and these images only.

    Raises:
      InputError: the images do not vary, or as `open_workdir`.
      CheckpointError: as `open_workdir`.
    """
    checks.variance(images)
    free = fields_of(config.experiment).FREE
    return open_workdir(workdir, config.to_dict(), data=images.fingerprint, free=free)
