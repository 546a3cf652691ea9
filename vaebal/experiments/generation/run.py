"""From balance to samples (Tables 3 and 4, Figure 2): AE, VAE, VAE+, WAE-MMD and Downsample.

`generation_stages` trains, `generation_scores` measures, `generation_report` writes.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import Array

from vaebal.data import ImageSet
from vaebal.errors import InputError
from vaebal.experiments import checks, inputs, report
from vaebal.experiments.cells import train_all
from vaebal.experiments.generation import page as generation_report
from vaebal.experiments.generation.pipeline import SPACES, Stage, pipeline
from vaebal.experiments.generation.scores import (
    Scorer,
    counts,
    evaluate_images,
    evaluate_pipeline,
    pictures_path,
)
from vaebal.experiments.generation.stages import (
    Session,
    build_models,
    make,
    networks,
)
from vaebal.experiments.verdicts import Trained
from vaebal.generation import classifier
from vaebal.measures import inception_weights
from vaebal.models.nets import ACTIVATIONS
from vaebal.training import devices
from vaebal.training.workdir import load_arrays, workdir_path

NETWORKS = ("mlp", "conv")


def check(config: Any) -> None:
    """Raises InputError for the first field that cannot be meant."""
    checks.seeds(config)
    for space in checks.distinct(config, "vae.spaces"):
        if space not in SPACES:
            raise InputError(f"vae.spaces={config.vae.spaces!r} must be among {SPACES!r}.")
    for bins in checks.distinct(config, "eval.bins"):
        if not isinstance(bins, int) or bins < 2:
            raise InputError(f"eval.bins={config.eval.bins!r} must be integers of at least 2.")
    sections = ("ae", "vae", "vae_plus", "wae")
    checks.positive_integers(
        config,
        *("train.batch_size", "train.epochs_per_checkpoint", "eval.block", "eval.pictures"),
        *("ae.codes", "ae.patch", "data.resolution", "data.rank"),
        *("data.train_size", "data.test_size"),
        *(f"{name}.{field}" for name in sections for field in ("width", "blocks", "epochs")),
        *("classifier.features", "classifier.width", "classifier.epochs"),
        *("flow.width", "flow.blocks", "flow.batch_size"),
        *("balanced.epochs", "balanced.settled_epochs", "balanced.batch_size"),
    )
    checks.positive_integers(config, "flow.epochs", zero=True)
    for section in sections:
        layers = config[section].layers
        if not isinstance(layers, int) or layers < 2:
            raise InputError(f"{section}.layers={layers!r} must be an integer of at least 2.")
    for section in (*sections, "classifier", "balanced", "flow"):
        checks.positive_numbers(config, f"{section}.learning_rate", f"{section}.clip_norm")
    for section in ("vae", "vae_plus"):
        checks.positive_numbers(config, f"{section}.gamma", f"{section}.gamma_rate")
    checks.positive_numbers(
        config, "balanced.settled_learning_rate", "balanced.fastest", "balanced.patience"
    )
    checks.positive_numbers(
        config, "balanced.final_learning_rate", "balanced.weight_decay",
        "train.final_learning_rate", "train.warmup_steps", "wae.weight",
        "eval.reference_images", "eval.samples", zero=True,
    )  # fmt: skip
    checks.fractions(config, "balanced.beta2")
    checks.one_of(config, "train.activation", tuple(ACTIVATIONS))
    checks.one_of(config, "ae.network", NETWORKS)
    if not isinstance(config.eval.parts, int) or config.eval.parts < 2:
        raise InputError(f"eval.parts={config.eval.parts!r} must be an integer of at least 2.")


def check_against_data(config: Any, images: ImageSet, targets: classifier.Targets | None) -> None:
    """Raises InputError where the config does not fit the data or the devices."""
    settings = config.eval
    checks.batch_size(config, images, members=1)
    if any(space.startswith("balanced") for space in config.vae.spaces):
        checks.batch_size(config, images, 1, "balanced")
    if config.flow.epochs:
        checks.batch_size(config, images, 1, "flow")
    reference, samples = counts(config, images)
    if max(settings.bins) > reference:
        raise InputError(
            f"eval.bins={tuple(settings.bins)!r} needs as many training images as bins, and "
            f"{reference} are used: lower it, or raise eval.reference_images."
        )
    if samples < 2 * settings.parts:
        raise InputError(
            f"eval.parts={settings.parts} cuts {samples} images into subsets of fewer than 2: "
            "lower it, or raise eval.samples."
        )
    if images.image_shape[0] % 2 or images.image_shape[1] % 2:
        raise InputError(f"data.name={images.name!r} has odd sides: Downsample needs even ones.")
    try:
        build_models(config, images.image_shape, targets)
    except ValueError as error:
        raise InputError(f"ae.patch={config.ae.patch}: {error}") from error


def run(config: Any, workdir: str) -> list[dict[str, Any]]:
    """Makes every stage, evaluates and reports; what `workdir` holds already is not done again."""
    check(config)
    images = inputs.open_data(config)
    targets = classifier.targets_of(images, config.data.dir)
    check_against_data(config, images, targets)
    if config.eval.fid and config.eval.inception_weights:
        # Refused before hours of training.
        inception_weights.load_params(config.eval.inception_weights)
    path = inputs.open_run(config, workdir, images)
    session = Session(config, path, images, targets)
    print(
        f"{config.name}: {sum(map(len, session.groups.values()))} stages, "
        f"{len(config.train.seeds)} pipelines on {images.name} ({len(images.train)} training and "
        f"{len(images.test)} test images, {images.image_shape}), "
        f"{report.device()}; workdir {path}",
        flush=True,
    )
    make_group = functools.partial(make, session)
    stage_rows = list(train_all(session.cells, session.groups, make_group).values())
    scorer = Scorer(session)
    rows = evaluate_images(session, scorer)
    for seed in config.train.seeds:
        rows += evaluate_pipeline(session, scorer, seed)
    if not devices.is_writer():
        return rows
    pictures = {seed: load_arrays(pictures_path(session, seed)) for seed in config.train.seeds}
    generation_report.write(config, path, rows, stage_rows, pictures, images)
    return rows


def load_pipeline(config: Any, workdir: str, seed: int) -> tuple[Session, dict[str, Any]]:
    """A finished pipeline's session and parameters by stage, to probe in a notebook.

    Raises:
      InputError: a stage is not finished.
    """
    images = inputs.open_data(config)
    targets = classifier.targets_of(images, config.data.dir)
    session = Session(config, workdir_path(workdir), images, targets)
    return session, networks(session, seed)


def _codes(rows: Array) -> Array:
    return rows


def trained(config: Any, workdir: str) -> Iterator[Trained]:
    """The VAEs of finished pipelines that reconstruct what they read, images or codes."""
    for seed in config.train.seeds:
        session, found = load_pipeline(config, workdir, seed)
        for stage in (Stage(name, seed) for name in pipeline(config)):
            if stage.kind != "vae" or not stage.alone:
                continue
            rows, decode = jnp.asarray(session.images.test), session.images.decode
            if stage.reads == ("codes",):
                means = session.posterior_of_images("ae", found["ae"], rows)[0]
                rows, decode = found["scale"].standardise(means), _codes
            model, opened = session.models[stage.network], session.config.ae.codes
            if stage.balanced:
                opened = session.cells.row(stage.before)["open"]
            params = found[stage.stage]
            name = f"VAE of {stage.space}, seed {seed}"
            yield Trained(name, model, params, opened, rows, decode)
