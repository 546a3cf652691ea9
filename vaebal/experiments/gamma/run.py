"""Learned against fixed gamma on images (Table 2, Figure 1), and the speed of gamma's descent.

A run is an arm (how gamma moves), a data set's true dimension r where it is known, and a seed, of
the training and, where the images are drawn here, of them too. Runs of a kind of arm train
together, and one compiled program serves every r: rates, prescribed ends and fixed values of gamma
are its inputs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vaebal.data import (
    MANIFOLDS,
    ImageSet,
    host_mean_image,
    mean_image,
    steps_per_epoch,
)
from vaebal.errors import InputError
from vaebal.experiments import cells as runner
from vaebal.experiments import checks, inputs, report
from vaebal.experiments.cells import Cells, schedule_of
from vaebal.experiments.gamma import fields, page
from vaebal.experiments.gamma.arms import Arm, arms, member, rule
from vaebal.experiments.gamma.evaluate import draw_pictures, evaluate, largest_variance
from vaebal.experiments.verdicts import Trained
from vaebal.models import GaussianVAE, conv_vae, infogan_vae, mlp_vae
from vaebal.models.nets import ACTIVATIONS, PRODUCTS
from vaebal.theory.collapse import collapse
from vaebal.training import (
    Optimisation,
    Program,
    State,
    Streamed,
    devices,
    gaussian_vae,
    stack_members,
    state_shapes,
)
from vaebal.training.progress import Progress
from vaebal.training.workdir import workdir_path
from vaebal.units import to_unit_pixels

NETWORKS = ("conv", "infogan", "mlp")
# Fields of the section `model` that not every network has, and those that have them.
OF_NETWORKS = {
    **dict.fromkeys(("patch", "remat"), ("conv",)),
    **dict.fromkeys(("pool", "encoder_skip"), ("mlp",)),
    **dict.fromkeys(("width", "blocks", "residual"), ("conv", "mlp")),
}
TOGETHER = ("all", "rank", "none")


class Run(NamedTuple):
    """One training run; r = 0 where the data's true dimension is not known."""

    arm: str
    rank: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.arm.replace(' ', '_')}_r{self.rank}_seed{self.seed}"


def check(config: Any) -> None:
    """Raises InputError for the first field that cannot be meant."""
    arms(config)
    known = config.data.name in MANIFOLDS
    if known:
        for rank in checks.distinct(config, "data.ranks"):
            if type(rank) is not int or not 1 <= rank <= 12:
                raise InputError(
                    f"data.ranks={tuple(config.data.ranks)!r} must be integers in 1..12."
                )
        checks.positive_integers(config, "data.train_size", "data.test_size")
    checks.seeds(config)
    checks.positive_integers(
        config,
        *("data.resolution", "model.latents", "model.width", "model.blocks", "model.patch"),
        "model.pool",
        *("train.epochs", "train.batch_size", "train.epochs_per_chunk"),
        *("train.epochs_per_checkpoint", "train.device_bytes", "eval.block", "eval.pictures"),
        *("eval.train_images", "train.guard_memory"),
    )
    checks.integers(config, "eval.mmd_samples", least=checks.MMD_POINTS)
    checks.positive_numbers(
        config, "train.learning_rate", "train.settled_learning_rate", "train.clip_norm",
        "train.fastest",
    )  # fmt: skip
    checks.positive_numbers(
        config, "data.noise", "model.gamma", "train.final_learning_rate", "train.warmup_steps",
        "eval.nll_samples", "train.guard", "train.slowest", "train.patience", "train.jitter",
        "train.weight_decay", zero=True,
    )  # fmt: skip
    checks.positive_integers(config, "eval.laplace_images", zero=True)
    if config.data.noise and not known:
        raise InputError(
            f"data.noise={config.data.noise!r} does nothing for data.name={config.data.name!r}: "
            f"set it to 0, or the data to one of {', '.join(map(repr, MANIFOLDS))}."
        )
    if config.eval.laplace_images and not config.eval.nll_samples:
        raise InputError(
            f"eval.laplace_images={config.eval.laplace_images} does nothing where "
            "eval.nll_samples=0: set it to 0 too, or eval.nll_samples above 0."
        )
    checks.fractions(config, "train.beta2")
    checks.one_of(config, "model.network", NETWORKS)
    checks.one_of(config, "model.activation", tuple(ACTIVATIONS))
    checks.one_of(config, "model.products", tuple(PRODUCTS))
    default = fields.defaults("").model
    for field, networks in OF_NETWORKS.items():
        if config.model[field] != default[field] and config.model.network not in networks:
            raise InputError(
                f"model.{field}={config.model[field]} does nothing for model.network="
                f"{config.model.network!r}: set it to {default[field]}, or the network to "
                f"{' or '.join(map(repr, networks))}."
            )
    release = tuple(config.train.release)
    if len(release) != 2 or not 0 <= release[0] < release[1] <= 1:
        raise InputError(
            f"train.release={release!r} must be two shares of the steps, 0 <= start < end <= 1."
        )


def check_against_data(config: Any, images: ImageSet) -> None:
    """Raises InputError where the config does not fit the data or the devices."""
    checks.batch_size(config, images, 1 if streams(config, images) else len(config.train.seeds))
    try:
        build_model(config, images.image_shape)
    except ValueError as error:
        field = {"conv": "patch", "mlp": "pool"}.get(config.model.network, "network")
        raise InputError(f"model.{field}={config.model[field]!r}: {error}") from error


def streams(config: Any, images: ImageSet) -> bool:
    """Whether the training images are too large for the device."""
    return images.train.nbytes > config.train.device_bytes


def build_model(config: Any, image_shape: tuple[int, int, int]) -> GaussianVAE:
    """The config's network on images of `image_shape`; gamma is always a parameter."""
    model = _network(config, image_shape)
    return model.clone(linear_variance=config.model.linear_variance)


def _network(config: Any, image_shape: tuple[int, int, int]) -> GaussianVAE:
    settings = config.model
    shared = {
        "latents": settings.latents,
        "activation": ACTIVATIONS[settings.activation],
        "affine_skip": settings.affine_skip,
        "log_var_init": settings.log_var_init,
        "products": PRODUCTS[settings.products],
    }
    if settings.network == "infogan":
        return infogan_vae(image_shape=image_shape, **shared)
    shared |= {"width": settings.width, "residual": settings.residual}
    if settings.network == "conv":
        return conv_vae(
            image_shape=image_shape, patch=settings.patch, blocks=settings.blocks,
            remat=settings.remat, **shared,
        )  # fmt: skip
    return mlp_vae(
        outputs=int(np.prod(image_shape)), encoder_layers=settings.blocks + 1,
        decoder_blocks=settings.blocks, encoder_skip=settings.encoder_skip,
        image_shape=image_shape, pool=settings.pool, **shared,
    )  # fmt: skip


class Data:
    """The images of one workdir by r and seed; those of the last r asked for are kept, or all."""

    def __init__(
        self,
        config: Any,
        opened: dict[tuple[int, int], ImageSet] | None = None,
        keeps_all: bool = False,
    ):
        """`opened`: images by (r, data seed) that are loaded already."""
        self._config, self._opened, self._keeps_all = config, opened or {}, keeps_all
        self._kept: dict[tuple[int, int], tuple[ImageSet, float]] = {}
        self._means: dict[tuple[int, int], Any] = {}

    def of(self, run: Run) -> ImageSet:
        """The run's images."""
        return self._of(run)[0]

    def gamma_start(self, run: Run) -> float:
        """Where the run's gamma starts, if its arm says nothing else."""
        return self._of(run)[1]

    def mean(self, run: Run) -> Any:
        """x_bar [D] of the run's training images, found once."""
        key, images = self._key(run), self.of(run)
        if key not in self._means:
            self._means[key] = _mean(images, streams(self._config, images))
        return self._means[key]

    def _key(self, run: Run) -> tuple[int, int]:
        return run.rank, data_seed(self._config, run)

    def _of(self, run: Run) -> tuple[ImageSet, float]:
        key = self._key(run)
        if key not in self._kept:
            if not self._keeps_all and any(rank != run.rank for rank, _ in self._kept):
                self._kept.clear()
                self._means.clear()
            images = self._opened.pop(key, None) or inputs.open_data(self._config, *key)
            self._kept[key] = images, self._config.model.gamma or largest_variance(images)
        return self._kept[key]


def data_seed(config: Any, run: Run) -> int:
    """Of what is drawn here: every seed of training has data of its own."""
    return config.data.seed + run.seed if run.rank else 0


class Programs:
    """The compiled programs of one workdir, by kind of arm and shape."""

    def __init__(self, config: Any, cells: Cells, data: Data, groups: dict[str, list[Run]]):
        self._config, self._cells, self._data = config, cells, data
        self._groups, self._arms = groups, {arm.name: arm for arm in arms(config)}
        self._compiled: dict[tuple, Program | Streamed] = {}

    def of(self, runs: Sequence[Run]) -> Program | Streamed:
        """The program of `runs`, all of one kind of arm."""
        sets = [self._data.of(run) for run in runs]
        images, split = sets[0], self._config.train.shard_parameters
        if all(other is images for other in sets):
            rows = {"rows": images.train}
        else:
            rows = {"rows": (), "own": np.stack([other.train for other in sets])}
        objective, settings, moves, members, rows["given"] = self._recipe(runs)
        # What does not depend on the arm's kind: "fixed" and "held" are one.
        kind = {"held": "fixed"}.get(self._kind(runs), self._kind(runs))
        key = kind, len(runs), images.train.shape, images.decode, "own" in rows
        if key in self._compiled:
            return self._compiled[key].on(members, **rows)
        program = self._compiled[key] = (Streamed if streams(self._config, images) else Program)(
            objective, settings, members, batch_size=self._config.train.batch_size, rule=moves,
            shard_parameters=split, **rows,
        )  # fmt: skip
        return program

    def _kind(self, runs: Sequence[Run]) -> str:
        return self._arms[runs[0].arm].kind

    def _recipe(self, runs: Sequence[Run]) -> tuple:
        """What a program of `runs` is made of: objective, settings, rule, members and given."""
        config, train, kind = self._config, self._config.train, self._kind(runs)
        images = self._data.of(runs[0])
        epochs = self._arms[runs[0].arm].lengths * train.epochs
        steps = epochs * steps_per_epoch(len(images.train), train.batch_size)
        settled = kind == "settled"
        settings = Optimisation(
            learning_rate=train.settled_learning_rate if settled else train.learning_rate,
            final_learning_rate=train.final_learning_rate,
            warmup_steps=train.warmup_steps,
            total_steps=steps,
            clip_norm=train.clip_norm,
            beta2=train.beta2,
            jitter=train.jitter if kind in ("adaptive", "guarded") else 0.0,
            weight_decay=train.weight_decay,
        )
        objective = gaussian_vae(build_model(config, images.image_shape), images.decode)
        if settled:
            objective = objective._replace(init=lambda member, weights: weights)
            each = [self._weights(run._replace(arm=self._arms[run.arm].of)) for run in runs]
        else:
            each = [self._data.mean(run) for run in runs]
        given = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        members = stack_members([self.member(run) for run in runs])
        return objective, settings, rule(kind, config, images.dim, steps), members, given

    def params(self, run: Run) -> Any:
        """Those that a finished run ended with; zeros of one that stopped."""
        name, group = next((n, g) for n, g in self._groups.items() if run in g)
        shapes = state_shapes(*self._recipe(group), split=self._config.train.shard_parameters)
        if "stopped" in self._cells.row(run):
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), shapes.params)
        return devices.local(self._cells.params(run, name, group.index(run), shapes))

    def _weights(self, run: Run) -> Any:
        params = self.params(run)
        return {name: leaf for name, leaf in params.items() if name != "log_gamma"}

    def member(self, run: Run) -> Any:
        """The run's part of the program's inputs."""
        arm = self._arms[run.arm]
        of = self._cells.row(run._replace(arm=arm.of)) if arm.of else {}
        start = self._data.gamma_start(run)
        return member(self._config, arm, run.seed, start, of)


def _mean(images: ImageSet, streamed: bool) -> Any:
    """x_bar [D] of the training images, which, if `streamed`, the device cannot hold at once."""
    if streamed:
        return host_mean_image(images.train, images.decode)
    return jax.jit(lambda rows: mean_image(rows, images.decode))(images.train)


def groups_of(config: Any, found: Sequence[Arm], ranks: Sequence[int], together: str) -> dict:
    """The runs by the name of the group in which they train; all are of one kind of arm.

    Args:
      together: what trains in one program: "all", "rank" (those of one r) or "none"; `TOGETHER`.
    """
    groups: dict[str, list[Run]] = {}
    for some in [tuple(ranks)] if together == "all" else [(rank,) for rank in ranks]:
        for kind in dict.fromkeys(arm.kind for arm in found):
            runs = [
                Run(arm.name, rank, seed)
                for rank in some
                for arm in found if arm.kind == kind for seed in config.train.seeds
            ]  # fmt: skip
            for each in [[run] for run in runs] if together == "none" else [runs]:
                groups[group_name(each)] = each
    return groups


def group_name(runs: Sequence[Run]) -> str:
    """The name of a group's checkpoints."""
    each = ("-".join(dict.fromkeys(map(str, values))) for values in zip(*runs, strict=True))
    named, ranks, seeds = each
    return f"{named.replace(' ', '_')}_r{ranks}_seed{seeds}"


def run(config: Any, workdir: str) -> list[dict[str, Any]]:
    """Trains, evaluates and reports every run; what `workdir` holds already is not done again.

    Raises:
      InputError: a field, the data or the workdir cannot be used; before any work.
      Diverged: some runs stopped; the others are reported.
    """
    check(config)
    ranks = tuple(config.data.ranks) if config.data.name in MANIFOLDS else (0,)
    first = Run("", ranks[0], config.train.seeds[0])
    key = first.rank, data_seed(config, first)
    images = inputs.open_data(config, *key)
    check_against_data(config, images)
    path = inputs.open_run(config, workdir, images)
    found = arms(config)
    together, cells = _together(config, images, len(ranks)), Cells(path)
    data = Data(config, {key: images}, keeps_all=together == "all")
    groups = groups_of(config, found, ranks, together)
    programs = Programs(config, cells, data, groups)
    print(
        f"{config.name}: {sum(map(len, groups.values()))} runs of {config.train.epochs} epochs on "
        f"{images.name} ({len(images.train)} training and {len(images.test)} test images, "
        f"{images.image_shape}), {report.device()}; "
        f"workdir {path}",
        flush=True,
    )

    def train_group(name: str, group: Sequence[Run], progress: Progress) -> None:
        schedule = schedule_of(config.train, len(images.train))
        lengths = next(arm.lengths for arm in found if arm.name == group[0].arm)
        runner.train(
            cells, name, group, lambda: programs.of(group),
            schedule._replace(epochs=lengths * schedule.epochs),
            functools.partial(_evaluate, config, data, programs), progress,
        )  # fmt: skip

    rows = runner.train_all(cells, groups, train_group)

    def write(finished: dict[Run, dict[str, Any]], stopped: str) -> None:
        histories = {each: cells.history(each) for each in finished}
        pictures = {each: cells.arrays(each) for each in finished}
        page.write(config, path, list(finished.values()), stopped, histories, pictures, images)

    fix = (
        "Lower train.learning_rate or the arm's rate (an arm that needs the γ* of a stopped run "
        "stops at step 0)"
    )
    return runner.report_all(rows, fix, write)


def _together(config: Any, images: ImageSet, ranks: int) -> str:
    """What trains in one program, for `groups_of`: as much as the device holds and gains by."""
    drawn = config.data.name in MANIFOLDS
    runs = len(config.train.seeds) * len(config.train.arms)
    needed = images.train.nbytes * (runs if drawn else 1)
    # Pixels that are drawn in every batch are drawn by one function for a program, from r factors.
    stored, one_each = images.decode is to_unit_pixels, hasattr(images.decode, "seed")
    small = runner.worth_stacking(runner.parameters(build_model(config, images.image_shape)))
    too_much = needed > config.train.device_bytes
    if not small or too_much or (one_each and len(config.train.seeds) > 1):
        return "none"
    return "all" if stored and ranks * needed <= config.train.device_bytes else "rank"


def trained(config: Any, workdir: str) -> Iterator[Trained]:
    """The VAEs of a finished run; those that stopped are left out."""
    check(config)
    drawn = config.data.name in MANIFOLDS
    ranks = tuple(config.data.ranks) if drawn else (0,)
    path = workdir_path(workdir)
    # What trains in one program was another matter, on other devices perhaps.
    each = (groups_of(config, arms(config), ranks, together) for together in TOGETHER)
    there = lambda name: (path / "checkpoints" / name).exists()  # noqa: E731
    groups = next((groups for groups in each if all(map(there, groups))), None)
    if groups is None:
        raise InputError(f"{workdir} has no checkpoints of all its runs: finish it first.")
    cells, data = Cells(path), Data(config)
    programs = Programs(config, cells, data, groups)
    for run in (run for group in groups.values() for run in group):
        row = cells.row(run)
        if "stopped" not in row:
            images = data.of(run)
            model = build_model(config, images.image_shape)
            params = collapse(programs.params(run), slice(row["open"], None))
            name = f"{run.arm}, r = {run.rank}" if drawn else run.arm
            name += f", seed {run.seed}"
            yield Trained(name, model, params, row["open"], images.test, images.decode)


def _evaluate(
    config: Any, data: Data, programs: Programs, run: Run, params: Any, state: State
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    images, number = data.of(run), int(state.homotopy.open)
    model = build_model(config, images.image_shape)
    params = collapse(params, slice(number, None))  # what was never opened, as training had it
    row = {
        "open": number,
        **evaluate(config, model, params, run.seed, images),
        "gamma_start": programs.member(run).gamma,
        "kappa": config.model.latents,
        "data": images.name,
        "data_seed": data_seed(config, run),
        "noise": config.data.noise,
        "test_images": len(images.test),
    }
    return row, draw_pictures(config, model, params, run.seed, images, row)
