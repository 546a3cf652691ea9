"""Table 1: error, NLL and active units against kappa, with and without skip connections."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vaebal import homotopy
from vaebal.data import Decode, ImageSet, mean_image, steps_per_epoch
from vaebal.errors import InputError
from vaebal.experiments import cells as runner
from vaebal.experiments import checks, inputs, report
from vaebal.experiments.cells import Cells, schedule_of
from vaebal.experiments.kappa_sweep import fields, page
from vaebal.experiments.kappa_sweep.page import SKIP_NAMES
from vaebal.experiments.verdicts import Trained
from vaebal.homotopy import Homotopy
from vaebal.measures import evaluation, likelihood
from vaebal.models import GaussianVAE, mlp_vae, prior_samples, with_own_skips
from vaebal.models.nets import ACTIVATIONS, PRODUCTS
from vaebal.streams import stream
from vaebal.training import (
    Member,
    Objective,
    Optimisation,
    Program,
    State,
    devices,
    gaussian_vae,
    shared_given,
    stack_members,
    state_shapes,
)
from vaebal.training.progress import Progress
from vaebal.training.workdir import require_same_config, workdir_path

SKIPS = ("residual+affine", "residual", "affine", "none")
ACTIVE_THRESHOLDS = (0.001, 0.01, 0.1)
STACKS = {"all": "all members in one program", "none": "one program per member"}


class Cell(NamedTuple):
    """One member of the sweep."""

    skips: str
    kappa: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.skips}_kappa{self.kappa}_seed{self.seed}"


def check(config: Any) -> None:
    """Raises InputError for the first field that cannot be meant."""
    for kappa in checks.distinct(config, "model.kappas"):
        if not isinstance(kappa, int) or kappa < 1:
            raise InputError(
                f"model.kappas={config.model.kappas!r} must be integers of at least 1."
            )
    for skips in checks.distinct(config, "model.skips"):
        if skips not in SKIPS:
            raise InputError(f"model.skips={config.model.skips!r} must be among {SKIPS!r}.")
    checks.seeds(config)
    checks.positive_integers(
        config,
        *("eval.pictures", "model.width", "model.decoder_blocks"),
        *("train.epochs", "train.batch_size", "train.epochs_per_chunk"),
        *("train.epochs_per_checkpoint", "eval.nll_samples", "eval.block"),
    )
    if not isinstance(config.model.encoder_layers, int) or config.model.encoder_layers < 2:
        raise InputError(
            f"model.encoder_layers={config.model.encoder_layers!r} must be an integer of at least "
            "2: the last layer is the two heads."
        )
    checks.positive_numbers(
        config, "model.gamma", "model.weights", "train.learning_rate", "train.clip_norm"
    )
    checks.positive_numbers(config, "model.branch_scale", zero=True)
    checks.fractions(config, "train.beta2")
    checks.positive_numbers(config, "train.final_learning_rate", "train.warmup_steps", zero=True)
    checks.positive_integers(config, "eval.laplace_images", zero=True)
    checks.one_of(config, "model.activation", tuple(ACTIVATIONS))
    checks.one_of(config, "train.gamma_rule", ("closed_form", "adam", "fixed"))
    checks.one_of(config, "train.stack", ("auto", *STACKS))
    checks.one_of(config, "model.products", tuple(PRODUCTS))
    if config.train.gamma_rule != "fixed":
        checks.positive_numbers(config, "train.gamma_rate")


def build_model(config: Any, dim: int, latents: int, *skips: str) -> GaussianVAE:
    """The model of a cell, or of stacked cells: `latents` their largest kappa, `skips` all theirs.

    A skip that some of them have and others not is left open, for their parameters to decide.
    """

    def shared(skip: str) -> bool | None:
        having = {skip in variant for variant in skips}
        return having.pop() if len(having) == 1 else None

    return mlp_vae(
        outputs=dim,
        latents=latents,
        width=config.model.width,
        encoder_layers=config.model.encoder_layers,
        decoder_blocks=config.model.decoder_blocks,
        activation=ACTIVATIONS[config.model.activation],
        residual=shared("residual"),
        affine_skip=shared("affine"),
        branch_scale=config.model.branch_scale,
        log_var_init=config.model.log_var_init,
        linear_variance=config.model.linear_variance,
        products=PRODUCTS[config.model.products],
    )


def stack_mode(config: Any, dim: int) -> tuple[str, str]:
    """train.stack, where it is "auto" as decided here; and in words, with the reason if so."""
    mode, why = config.train.stack, ""
    if mode == "auto":
        largest = build_model(config, dim, max(config.model.kappas), "residual+affine")
        if jax.default_backend() != "cpu":
            mode, why = "all", ": stacked members fill an accelerator"
        elif runner.worth_stacking(runner.parameters(largest)):
            mode, why = "all", ": a step of so small a net is mostly overhead, which they share"
        else:
            mode, why = "none", ": one member's products fill the cores"
    return mode, STACKS[mode] + why


def stacks(config: Any, mode: str) -> list[list[Cell]]:
    """The cells, grouped into those that train in one program.

    Args:
      mode: "all" stacks every cell, padded to the largest kappa, "none" trains one at a time.
    """
    model, seeds = config.model, config.train.seeds
    cells = [Cell(*each) for each in itertools.product(model.skips, model.kappas, seeds)]
    return [cells] if mode == "all" else [[cell] for cell in cells]


def stack_name(cells: Sequence[Cell]) -> str:
    """The name of a stack's checkpoints."""
    if len(cells) == 1:
        return cells[0].name
    skips = [variant for variant in SKIPS if variant in {c.skips for c in cells}]
    kappas, seeds = sorted({c.kappa for c in cells}), sorted({c.seed for c in cells})
    return f"{'-'.join(skips)}_kappa{'-'.join(map(str, kappas))}_seed{'-'.join(map(str, seeds))}"


def run(config: Any, workdir: str) -> list[dict[str, Any]]:
    """Trains, evaluates and reports every cell; what `workdir` holds already is not done again.

    Raises:
      InputError: a field, the data or the workdir cannot be used; before any work.
      Diverged: some cells stopped; the others are reported.
    """
    check(config)
    images = inputs.open_data(config)
    mode, stacking = stack_mode(config, images.dim)
    groups = {stack_name(group): group for group in stacks(config, mode)}
    for members in set(map(len, groups.values())):
        checks.batch_size(config, images, members)
    # After all that can be refused: a workdir holds no config that never ran.
    path = inputs.open_run(config, workdir, images)
    print(
        f"{config.name}: {sum(map(len, groups.values()))} members, {stacking}; "
        f"{config.train.epochs} epochs each, on {images.name} ({len(images.train)} training and "
        f"{len(images.test)} test images), {report.device()}; workdir {path}",
        flush=True,
    )
    cells, rows = Cells(path, "members"), jax.device_put((images.train, images.test))

    def train_group(name: str, group: Sequence[Cell], progress: Progress) -> None:
        model = build_model(config, images.dim, max(c.kappa for c in group), *_skips(group))
        runner.train(
            cells, name, group, lambda: make_program(config, images, group),
            schedule_of(config.train, len(images.train)),
            functools.partial(_evaluate, config, model, images, rows), progress,
        )  # fmt: skip

    def write(finished: dict[Cell, dict[str, Any]], stopped: str) -> None:
        pictures = {cell: cells.arrays(cell) for cell in finished}
        page.write(config, path, list(finished.values()), stopped, pictures, images)

    fix = "Lower train.learning_rate or train.gamma_rate, or start from a larger model.gamma"
    return runner.report_all(runner.train_all(cells, groups, train_group), fix, write)


def _skips(cells: Sequence[Cell]) -> set[str]:
    return {cell.skips for cell in cells}


def _rule(config: Any, dim: int, member: Member) -> Homotopy:
    rate = config.train.gamma_rate
    match config.train.gamma_rule:
        case "closed_form":
            return homotopy.closed_form(rate)
        case "adam":
            return homotopy.gradient(rate, dim)
    return homotopy.fixed()


class Recipe(NamedTuple):
    """What a group's program is made of."""

    model: GaussianVAE
    objective: Objective
    settings: Optimisation
    rule: Any
    members: Member


def recipe(config: Any, images: ImageSet, cells: Sequence[Cell]) -> Recipe:
    """Of stacked cells."""
    model = build_model(config, images.dim, max(c.kappa for c in cells), *_skips(cells))
    train = config.train
    settings = Optimisation(
        learning_rate=train.learning_rate,
        final_learning_rate=train.final_learning_rate,
        warmup_steps=train.warmup_steps,
        total_steps=train.epochs * steps_per_epoch(len(images.train), train.batch_size),
        clip_norm=train.clip_norm,
        beta2=train.beta2,
    )
    members = [
        Member(
            c.seed, c.kappa, config.model.gamma,
            residual="residual" in c.skips, affine="affine" in c.skips,
        )
        for c in cells
    ]  # fmt: skip
    return Recipe(
        model, scaled_start(gaussian_vae(model, images.decode), config.model.weights), settings,
        functools.partial(_rule, config, images.dim), stack_members(members),
    )  # fmt: skip


def scaled_start(objective: Objective, factor: float) -> Objective:
    """`objective`, whose kernels start at `factor` times their size."""

    def scale(path: tuple, leaf: Any) -> Any:
        return factor * leaf if path[-1].key == "kernel" else leaf

    def init(member: Member, given: Any) -> Any:
        return jax.tree_util.tree_map_with_path(scale, objective.init(member, given))

    return objective if factor == 1 else objective._replace(init=init)


def make_program(config: Any, images: ImageSet, cells: Sequence[Cell]) -> Program:
    """The compiled training program of stacked cells."""
    _, objective, settings, rule, members = recipe(config, images, cells)
    mean = jax.jit(lambda rows: mean_image(rows, images.decode))(images.train)
    return Program(
        objective, settings, members, images.train, config.train.batch_size, rule=rule,
        given=shared_given(mean, len(cells)), shard_parameters=config.train.shard_parameters,
    )  # fmt: skip


def _evaluate(
    config: Any,
    model: GaussianVAE,
    images: ImageSet,
    rows: tuple,
    cell: Cell,
    params: Any,
    state: State,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    row = evaluate(config, model, params, cell, *rows, images.decode) | {"data": images.name}
    x = images.decode(rows[1][: config.eval.pictures])
    pictures = draw_pictures(model, params, cell.kappa, cell.seed, x)
    return row, jax.tree.map(np.asarray, pictures)


def evaluate(
    config: Any, model: GaussianVAE, params: Any, cell: Cell, train: Any, test: Any, decode: Decode
) -> dict[str, Any]:
    """Every number of one member's row; `x` with its standard error `x_se` over the test images."""
    options = {"seed": cell.seed, "block": config.eval.block, "kappa": cell.kappa}
    options["decode"] = decode
    posterior = evaluation.posterior(model, params, test, **options)
    nll, effective = evaluation.importance_weighted_nll(
        model, params, test, samples=config.eval.nll_samples, **options
    )
    gamma = float(np.exp(jax.device_get(model.apply({"params": params}, method="log_gamma"))))
    dim = model.outputs
    estimates = {
        "error_mean": evaluation.mean_estimate(posterior.squared_error_mean),
        "error_sampled": evaluation.mean_estimate(posterior.squared_error_sampled),
        "negative_elbo": evaluation.mean_estimate(posterior.negative_elbo),
        "nll": evaluation.mean_estimate(nll),
        "gamma_residual": evaluation.mean_estimate(gamma - posterior.squared_error_sampled / dim),
        "gamma_residual_train": evaluation.mean_estimate(
            gamma
            - evaluation.posterior(model, params, train, **options).squared_error_sampled / dim
        ),
    }
    means = posterior.mean[:, : cell.kappa]
    for threshold in ACTIVE_THRESHOLDS:
        estimates[f"active_{threshold}"] = evaluation.active_units(means, threshold)
    row = {"gamma": gamma}
    for name, estimate in estimates.items():
        row[name], row[f"{name}_se"] = estimate
    most = config.eval.laplace_images
    if most:
        del options["block"]
        row |= likelihood.laplace_beside(
            nll[:most], model, params, test[:most], samples=config.eval.nll_samples, **options
        )
    variance = posterior.variance[: cell.kappa]
    return row | {
        "informative": int((variance < 0.5).sum()),
        "kl": float(posterior.kl.sum()),
        "nll_samples": config.eval.nll_samples,
        "effective_sample_size": float(np.median(effective)),
        "test_images": len(test),
        "kl_per_dimension": sorted(posterior.kl[: cell.kappa].tolist(), reverse=True),
        "variance_per_dimension": variance.tolist(),
    }


@functools.partial(jax.jit, static_argnames="model")
def draw_pictures(
    model: GaussianVAE, params: Any, kappa: int, seed: int, x: jax.Array
) -> dict[str, jax.Array]:
    """Images x [N, D], their reconstructions, and as many samples from the prior."""
    mean, _ = model.apply({"params": params}, x, kappa, method="encode")
    z = prior_samples(stream(seed, "evaluation/pictures"), len(x), model.latents, kappa)
    decode = functools.partial(model.apply, {"params": params}, method="decode")
    return {"images": x, "reconstructions": decode(mean), "samples": decode(z)}


def trained(config: Any, workdir: str) -> Iterator[Trained]:
    """The VAEs of a finished sweep; those that stopped are left out."""
    images, cells = inputs.open_data(config), Cells(workdir_path(workdir), "members")
    for (cell,) in stacks(config, "none"):
        if "stopped" not in cells.row(cell):
            model, params = load_member(config, workdir, *cell, images=images)
            name = f"{SKIP_NAMES[cell.skips]}, κ = {cell.kappa}, seed {cell.seed}"
            yield Trained(name, model, params, cell.kappa, images.test, images.decode)


def load_member(
    config: Any, workdir: str, skips: str, kappa: int, seed: int, images: ImageSet | None = None
) -> tuple[GaussianVAE, dict[str, Any]]:
    """A finished member's model (its skips fixed) and parameters, to probe in a notebook.

    Args:
      images: the config's, where they are loaded already.

    Raises:
      InputError: the sweep has no such member, it has not been trained yet, or with another
        config.
      CheckpointError: its checkpoint is damaged, or is not there.
    """
    wanted = Cell(skips, kappa, seed)
    # "auto" may have chosen otherwise on the devices that trained it.
    modes = tuple(STACKS) if config.train.stack == "auto" else (config.train.stack,)
    groups = [group for mode in modes for group in stacks(config, mode) if wanted in group]
    if not groups:
        raise InputError(f"{wanted.name} is not a member of this sweep.")
    require_same_config(workdir_path(workdir), config.to_dict(), fields.FREE)
    cells = Cells(workdir_path(workdir), "members")
    for group in groups:
        name = stack_name(group)
        if (cells.path / "checkpoints" / name).exists():
            images = images or inputs.open_data(config)
            model, *made = recipe(config, images, group)
            given = np.zeros((len(group), images.dim), np.float32)
            shapes = state_shapes(*made, given, split=config.train.shard_parameters)
            params = cells.params(wanted, name, group.index(wanted), shapes)
            return with_own_skips(model, devices.local(params))
    raise InputError(f"{wanted.name} has no checkpoint in {workdir}: train it first.")
