"""Variants of one network, each with and without skip connections: who keeps latents."""

import ast
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from vaebal.errors import InputError
from vaebal.experiments import cells as runner
from vaebal.experiments import checks, inputs, report, schema
from vaebal.experiments.cells import Cells, schedule_of
from vaebal.experiments.collapse import fields, page
from vaebal.experiments.kappa_sweep import run as sweep
from vaebal.experiments.report import Row
from vaebal.training.progress import Progress


class Cell(NamedTuple):
    """One run."""

    variant: str
    skips: str
    kappa: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        changes = self.variant.replace(" ", "_") or "unchanged"
        return f"{changes}_{self.skips}_kappa{self.kappa}_seed{self.seed}"


def _value(text: str) -> Any:
    """A number, or else a name, as relu."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def changed(config: Any, variant: str) -> ml_collections.ConfigDict:
    """The config of a variant.

    Raises:
      InputError: it names no field of the model or the training, or a value that cannot be meant.
    """
    own = ml_collections.ConfigDict(config.to_dict())
    for change in variant.split():
        field, _, text = change.partition("=")
        section, _, name = field.partition(".")
        if section not in ("model", "train") or name not in own[section] or not text:
            raise InputError(
                f"variants holds {variant!r}: {change!r} is no field of model or train with a "
                "value; write 'model.gamma=1'."
            )
        try:
            own[section][name] = _value(text)
        except TypeError as error:
            raise InputError(
                f"variants holds {variant!r}: {change!r} has a value of another kind than "
                f"{own[section][name]!r}."
            ) from error
    schema.check_fields(own, fields.defaults(config.name))
    sweep.check(own)
    return own


def check(config: Any) -> dict[str, ml_collections.ConfigDict]:
    """The variants' configs by name.

    Raises:
      InputError: the first field that cannot be meant.
    """
    changed(config, "")
    return {variant: changed(config, variant) for variant in checks.distinct(config, "variants")}


def run(config: Any, workdir: str) -> list[Row]:
    """Trains, evaluates and reports every cell; what `workdir` holds already is not done again.

    Raises:
      InputError: a field, the data or the workdir cannot be used; before any work.
      Diverged: some cells stopped; the others are reported.
    """
    variants = check(config)
    images = inputs.open_data(config)
    for own in variants.values():
        checks.batch_size(own, images, 1)
    path = inputs.open_run(config, workdir, images)
    cells = Cells(path)
    every = [
        Cell(variant, skips, kappa, seed)
        for variant, own in variants.items()
        for skips in own.model.skips for kappa in own.model.kappas for seed in own.train.seeds
    ]  # fmt: skip
    print(
        f"{config.name}: {len(variants)} variants, {len(every)} runs, on {images.name} "
        f"({len(images.train)} training and {len(images.test)} test images), {report.device()}; "
        f"workdir {path}",
        flush=True,
    )
    rows = jax.device_put((images.train, images.test))

    def train_one(name: str, group: Sequence[Cell], progress: Progress) -> None:
        (cell,), own = group, variants[group[0].variant]
        model = sweep.build_model(own, images.dim, cell.kappa, cell.skips)

        def evaluate(cell: Cell, params: Any, state: Any) -> tuple[Row, dict]:
            alike = sweep.Cell(*cell[1:])
            return sweep.evaluate(own, model, params, alike, *rows, images.decode), {}

        runner.train(
            cells, name, group,
            lambda: sweep.make_program(own, images, [sweep.Cell(*cell[1:])]),
            schedule_of(own.train, len(images.train)), evaluate, progress,
        )  # fmt: skip

    def write(finished: dict[Cell, Row], stopped: str) -> None:
        page.write(config, path, list(finished.values()), stopped, images)

    found = runner.train_all(cells, {cell.name: [cell] for cell in every}, train_one)
    return runner.report_all(found, "Lower train.learning_rate in that variant", write)
