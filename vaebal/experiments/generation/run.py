"""From balance to samples (Tables 3 and 4, Figure 2): AE, VAE, VAE+, WAE-MMD and Downsample.

`generation_stages` trains, `generation_scores` measures, `generation_report` writes.
"""

from typing import Any

import jax

from vaebal.data import ImageSet, load, manifold
from vaebal.errors import InputError
from vaebal.experiments import checks
from vaebal.experiments.generation import page as generation_report
from vaebal.experiments.generation.scores import (
    Scorer,
    counts,
    evaluate_images,
    evaluate_pipeline,
    pictures_path,
)
from vaebal.experiments.generation.stages import (
    Session,
    StageProgress,
    build_models,
    make,
    networks,
)
from vaebal.generation import classifier
from vaebal.measures import inception_weights
from vaebal.models.nets import ACTIVATIONS
from vaebal.training import devices
from vaebal.training.checkpoints import load_arrays, open_workdir, workdir_path

SPACES = ("pixels", "codes")
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
    )
    for section in sections:
        layers = config[section].layers
        if not isinstance(layers, int) or layers < 2:
            raise InputError(f"{section}.layers={layers!r} must be an integer of at least 2.")
    for section in (*sections, "classifier"):
        checks.positive_numbers(config, f"{section}.learning_rate", f"{section}.clip_norm")
    for section in ("vae", "vae_plus"):
        checks.positive_numbers(config, f"{section}.gamma", f"{section}.gamma_rate")
    checks.positive_numbers(
        config, "train.final_learning_rate", "train.warmup_steps", "wae.weight",
        "eval.reference_images", "eval.samples", zero=True,
    )  # fmt: skip
    checks.one_of(config, "train.activation", tuple(ACTIVATIONS))
    checks.one_of(config, "ae.network", NETWORKS)
    if not isinstance(config.eval.parts, int) or config.eval.parts < 2:
        raise InputError(f"eval.parts={config.eval.parts!r} must be an integer of at least 2.")


def open_data(config: Any) -> ImageSet:
    """The config's images."""
    data = config.data
    if data.name == "rendered":
        return manifold(
            "rendered", rank=data.rank, resolution=data.resolution, train_size=data.train_size,
            test_size=data.test_size, seed=data.seed,
        )  # fmt: skip
    return load(data.name, data.dir, resolution=data.resolution, folder=data.folder, bad=data.bad)


def check_against_data(config: Any, images: ImageSet, targets: classifier.Targets | None) -> None:
    """Raises InputError where the config does not fit the data or the devices."""
    train, settings = len(images.train), config.eval
    if config.train.batch_size > train or config.train.batch_size % jax.device_count():
        raise InputError(
            f"train.batch_size={config.train.batch_size} must be at most the {train} training "
            f"images of {images.name!r}, and a multiple of the {jax.device_count()} devices."
        )
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
    images = open_data(config)
    targets = classifier.targets_of(images, config.data.dir)
    check_against_data(config, images, targets)
    if config.eval.fid and config.eval.inception_weights:
        inception_weights.load_params(
            config.eval.inception_weights
        )  # refuses before hours of training
    path = open_workdir(workdir, config.to_dict())
    session = Session(config, path, images, targets)
    print(
        f"{config.name}: {len(session.stages)} stages, {len(config.train.seeds)} pipelines on "
        f"{images.name} ({len(images.train)} training and {len(images.test)} test images, "
        f"{images.image_shape}), {jax.device_count()} {jax.devices()[0].device_kind} device(s); "
        f"workdir {path}",
        flush=True,
    )
    with StageProgress(len(session.stages), path / "tensorboard") as progress:
        for stage in session.stages:
            make(session, stage, progress)
    scorer = Scorer(session)
    rows = evaluate_images(session, scorer)
    for seed in config.train.seeds:
        rows += evaluate_pipeline(session, scorer, seed)
    if not devices.is_writer():
        return rows
    pictures = {seed: load_arrays(pictures_path(session, seed)) for seed in config.train.seeds}
    stage_rows = [session.row(stage) for stage in session.stages]
    generation_report.write(config, path, rows, stage_rows, pictures, images)
    return rows


def load_pipeline(config: Any, workdir: str, seed: int) -> tuple[Session, dict[str, Any]]:
    """A finished pipeline's session and parameters by stage, to probe in a notebook.

    Raises:
      InputError: a stage is not finished.
    """
    images = open_data(config)
    targets = classifier.targets_of(images, config.data.dir)
    session = Session(config, workdir_path(workdir), images, targets)
    return session, networks(session, seed)
