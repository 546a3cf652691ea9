"""Latent diffusion in miniature: one autoencoder regularised in several ways, one prior over each.

`stages` trains, `scores` measures, `page` writes.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from vaebal.errors import InputError
from vaebal.experiments import cells as runner
from vaebal.experiments import checks, inputs, report
from vaebal.experiments.latent_diffusion import page
from vaebal.experiments.latent_diffusion.scores import Scorer, evaluate
from vaebal.experiments.latent_diffusion.stages import (
    First,
    Prior,
    Session,
    numbers,
    second_stage,
)
from vaebal.experiments.verdicts import Trained
from vaebal.generation import classifier
from vaebal.models.nets import ACTIVATIONS
from vaebal.training.progress import Progress
from vaebal.training.workdir import workdir_path


def check(config: Any) -> None:
    """Raises InputError for the first field that cannot be meant."""
    for arm in checks.distinct(config, "train.arms"):
        if arm != "adaptive":
            numbers(config, arm)
    checks.seeds(config)
    for stage in checks.distinct(config, "prior.stages"):
        second_stage(stage, 1, 1)
    for value in checks.distinct(config, "prior.epochs"):
        if type(value) is not int or value < 1:
            raise InputError(
                f"prior.epochs={tuple(config.prior.epochs)!r} must be integers of at least 1."
            )
    if list(config.prior.epochs) != sorted(config.prior.epochs):
        raise InputError(f"prior.epochs={tuple(config.prior.epochs)!r} must rise.")
    checks.positive_integers(
        config, "train.epochs", "train.adaptive_epochs", "train.batch_size", "prior.blocks",
        "prior.batch_size", "model.latents", "model.width", "model.blocks", "classifier.features",
        "classifier.width", "classifier.epochs", "classifier.batch_size", "eval.samples",
        "eval.neighbours", "eval.block", "eval.pictures", "train.epochs_per_chunk",
        "train.epochs_per_checkpoint",
    )  # fmt: skip
    checks.positive_numbers(
        config, "train.learning_rate", "train.settled_learning_rate", "train.clip_norm",
        "train.fastest", "train.error_weight", "prior.learning_rate", "prior.clip_norm",
        "prior.gamma_rate", "classifier.learning_rate", "classifier.final_learning_rate",
        "classifier.clip_norm",
    )  # fmt: skip
    checks.positive_numbers(
        config, "train.final_learning_rate", "train.warmup_steps", "train.weight_decay",
        "prior.warmup_steps", zero=True,
    )  # fmt: skip
    checks.fractions(config, "train.beta2", "prior.average")
    checks.one_of(config, "model.network", ("mlp", "conv"))
    checks.one_of(config, "model.activation", tuple(ACTIVATIONS))
    for arm in config.train.arms:
        if arm.endswith("as adaptive") and "adaptive" not in config.train.arms:
            raise InputError(
                f"train.arms holds {arm!r}, and no 'adaptive' to count latents: add it."
            )
    if "adaptive" in config.train.arms and config.train.adaptive_epochs >= config.train.epochs:
        raise InputError(
            f"train.adaptive_epochs={config.train.adaptive_epochs} must be below train.epochs="
            f"{config.train.epochs}: what is left over settles the error."
        )
    for field in ("parts", "bins"):
        value = config.eval[field]
        if not isinstance(value, int) or value < 2:
            raise InputError(f"eval.{field}={value!r} must be an integer of at least 2.")


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
            f"which samples are compared, and images of {images.image_shape} cannot be turned to "
            "train them on that: use a set that has, or square images."
        )
    if config.eval.bins > len(images.train):
        raise InputError(
            f"eval.bins={config.eval.bins} needs as many training images as bins, and there are "
            f"{len(images.train)}: lower it."
        )
    members = len(config.train.seeds)
    checks.batch_size(config, images, members)
    checks.batch_size(config, images, members, "prior")
    checks.batch_size(config, images, 1, "classifier")
    samples = min(config.eval.samples, len(images.test))
    if samples < 2 * config.eval.parts or samples <= config.eval.neighbours:
        raise InputError(
            f"eval.parts={config.eval.parts} and eval.neighbours={config.eval.neighbours} want "
            f"more images than the {samples} of a set: lower them, or use more test images."
        )
    path = inputs.open_run(config, workdir, images)
    session = Session(config, path, images, targets)
    scorer, trained = Scorer(session), classifier.TRAINED[targets.kind]
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
        page.write(config, path, finished, stopped, pictures, images, trained)

    return runner.report_all(rows, "Lower train.learning_rate or prior.learning_rate", write)


def trained(config: Any, workdir: str) -> Iterator[Trained]:
    """The finished autoencoders that are VAEs; those that stopped are left out."""
    images = inputs.open_data(config)
    targets = classifier.targets_of(images, config.data.dir)
    session = Session(config, workdir_path(workdir), images, targets)
    for arm in (arm for arm in config.train.arms if arm != "none"):
        for cell in (First(arm, seed) for seed in config.train.seeds):
            if not session.stopped(cell):
                params, latents = session.params(cell), int(session.member(cell).latents)
                name = f"{arm}, seed {cell.seed}"
                yield Trained(name, session.model, params, latents, images.test, images.decode)
