"""Theorem 2: collapsed latents are stationary points, total collapse is a saddle; the ways out.

Four parts, each with its rows:
- certificates: the gradients that vanish, over nets, head biases, and kinds of expectation;
- curvature: the least eigenvalue at total collapse, predicted and measured;
- training: from near total collapse, Adam with gamma held where it starts, then learned:
  which of the data's directions wake up, with and without skips;
- descent: plain gradient descent, whose steps to escape the predicted curvature tells.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from vaebal.errors import InputError
from vaebal.experiments import checks
from vaebal.experiments.parts import finished
from vaebal.experiments.report import Row
from vaebal.experiments.theorem2 import escape, page, stationary
from vaebal.models.nets import ACTIVATIONS
from vaebal.training.workdir import open_workdir

SKIPS = ("residual+affine", "residual", "affine", "none")


def check(config: Any) -> None:
    """Raises InputError for the first field that cannot be meant."""
    checks.positive_integers(
        config,
        *("data.dim", "data.examples", "model.width", "model.encoder_layers"),
        *("certificate.kappa", "curvature.kappa", "descent.kappa"),
        *("train.steps", "descent.steps"),
    )
    checks.positive_numbers(
        config,
        *("certificate.gamma", "train.delta", "train.learning_rate", "train.clip_norm"),
        *("train.gamma_rate", "descent.learning_rate"),
    )
    for field in ("model.blocks", "model.kappas", "certificate.depths", "certificate.widths"):
        group, name = field.split(".")
        for value in checks.distinct(config, field):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{field}={config[group][name]!r} must be integers of at least 1.")
    for field in ("data.variances", "curvature.gammas", "train.gammas", "descent.gammas"):
        group, name = field.split(".")
        for value in checks.distinct(config, field):
            if not math.isfinite(value) or value <= 0:
                raise InputError(f"{field}={config[group][name]!r} must be finite numbers above 0.")
    for field, choices in (
        ("model.skips", SKIPS),
        ("certificate.activations", tuple(ACTIVATIONS)),
    ):
        group, name = field.split(".")
        for value in checks.distinct(config, field):
            if value not in choices:
                raise InputError(
                    f"{field}={config[group][name]!r} must be among {', '.join(choices)}."
                )
    checks.one_of(config, "model.activation", tuple(ACTIVATIONS))
    checks.seeds(config)
    rank = len(config.data.variances)
    if list(config.data.variances) != sorted(config.data.variances, reverse=True):
        raise InputError(f"data.variances={config.data.variances!r} must fall.")
    if rank > config.data.dim or rank >= config.data.examples:
        raise InputError(
            f"data.variances={config.data.variances!r} are {rank} directions: data.dim must be "
            f"at least {rank} and data.examples above it."
        )


def run(config: Any, workdir: str) -> list[Row]:
    """Runs every part and reports; what `workdir` holds already is not done again."""
    check(config)
    path = open_workdir(workdir, config.to_dict())
    parts: list[tuple[str, Callable[[], list[Row]]]] = [
        ("certificates", lambda: stationary.certificate_rows(config)),
        ("curvature", lambda: stationary.curvature_rows(config)),
    ]
    parts += [
        (
            f"training {skips} {blocks}",
            functools.partial(escape.training_rows, config, skips, blocks),
        )
        for blocks in config.model.blocks
        for skips in config.model.skips
    ]
    parts += [
        (f"descent {skips}", functools.partial(escape.descent_rows, config, skips))
        for skips in config.model.skips
    ]
    print(f"{config.name}: {len(parts)} parts; workdir {path}", flush=True)
    rows: list[Row] = []
    for index, (name, make) in enumerate(parts, 1):
        rows += finished(path, f"[{index}/{len(parts)}] ", name, make)
    page.write(config, path, rows)
    return rows
