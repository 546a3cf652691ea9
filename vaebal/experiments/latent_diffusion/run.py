"""Latent diffusion in miniature: one autoencoder regularised in several ways, one prior over each.

`stages` trains, `scores` measures, `page` writes.
"""

import functools
from collections.abc import Sequence
from typing import Any

from vaebal.errors import InputError
from vaebal.experiments import cells as runner
from vaebal.experiments import checks, inputs, report
from vaebal.experiments.latent_diffusion import page
from vaebal.experiments.latent_diffusion.scores import Scorer, evaluate
from vaebal.experiments.latent_diffusion.stages import First, Prior, Session, check
from vaebal.generation import classifier
from vaebal.training.progress import Progress


def run(config: Any, workdir: str) -> list[dict[str, Any]]:
    """Trains, evaluates and reports every cell; what `workdir` holds already is not done again.

    Raises:
      InputError: a field, the data or the workdir cannot be used; before any work.
      Diverged: an autoencoder's or a prior's loss stopped being finite.
    """
    check(config)
    images = inputs.open_data(config)
    targets = classifier.targets_of(images, config.data.dir)
    if targets is None:
        raise InputError(
            f"data.name={images.name!r} has neither labels nor factors to train the features on in "
            "which samples are compared: use a set that has."
        )
    members = len(config.train.seeds)
    checks.batch_size(config, images, members)
    path = inputs.open_run(config, workdir, images)
    session = Session(config, path, images, targets)
    scorer = Scorer(session)
    print(
        f"{config.name}: {len(config.train.arms)} arms × {members} seeds, {len(session.groups)} "
        f"groups, on {images.name} ({len(images.train)} training and {len(images.test)} test "
        f"images, {images.image_shape}), {report.device()}; workdir {path}",
        flush=True,
    )

    def train_group(name: str, group: Sequence[First | Prior], progress: Progress) -> None:
        runner.train(
            session.cells, name.partition("_epoch")[0], group,
            lambda: session.program(name, group), session.schedule(group),
            functools.partial(evaluate, session, scorer), progress,
        )  # fmt: skip

    rows = runner.train_all(session.cells, session.groups, train_group)

    def write(finished: dict[First | Prior, dict[str, Any]], stopped: str) -> None:
        pictures = {cell: session.cells.arrays(cell) for cell in page.pictured(config, finished)}
        page.write(config, path, finished, stopped, pictures, images)

    return runner.report_all(rows, "Lower train.learning_rate or prior.learning_rate", write)
