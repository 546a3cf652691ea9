"""Everything that claims to find the number of latents, on the same data.

A run is a method on a data set. Methods of a family (`methods.METHODS`) train in one program,
over all their data sets, whose number of rows is made equal by repeating them. What has a number
to choose is first tuned on one data set, and then run on the others untouched.
"""

import concurrent.futures
import functools
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaebal.data import steps_per_epoch
from vaebal.errors import Diverged, InputError
from vaebal.estimator import train as estimator
from vaebal.estimator.plan import HELD_OUT, Plan
from vaebal.experiments import cells as runner
from vaebal.experiments import checks, fields_of, report
from vaebal.experiments.arena import evaluate, methods, objectives, page, sources
from vaebal.experiments.arena.methods import Method
from vaebal.experiments.arena.sources import Rows, Source
from vaebal.experiments.cells import Cells, Schedule
from vaebal.experiments.report import Row
from vaebal.models import GaussianVAE
from vaebal.training import Member, Optimisation, Program, State, stack_members
from vaebal.training.progress import Progress
from vaebal.training.workdir import open_workdir

LEAST_ROWS = round(1 / HELD_OUT)  # of fewer none is held out


class Run(NamedTuple):
    """One method on one data set."""

    method: str
    family: str
    setting: float  # its number; 0 where it has none
    tuning: bool  # whether it is there to choose the setting
    kind: str
    rank: int
    noise: float
    size: int
    data_seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        of = "tuning_" if self.tuning else ""
        text = f"{of}{self.method}_{self.setting:g}_{self.kind}_r{self.rank}_n{self.size}"
        return re.sub(r"[^\w.+-]+", "_", f"{text}_noise{self.noise:g}_seed{self.data_seed}")

    @property
    def source(self) -> Source:
        """Its data set."""
        return Source(self.kind, self.rank, self.noise, self.size, self.data_seed)


def check(config: Any) -> list[Method]:
    """The config's methods.

    Raises:
      InputError: the first field that cannot be meant.
    """
    found = [methods.parse(text) for text in checks.distinct(config, "methods")]
    if len(set(found)) < len(found):
        raise InputError(f"methods={tuple(config.methods)!r} has one method twice: name it once.")
    for method in found:
        if method.tuned and not len(config.grids.get(method.name, ())):
            raise InputError(f"grids[{method.name!r}] is empty: name what is to be tried.")
        if method.name == "IRMAE" and not float(method.setting or 1).is_integer():
            raise InputError(
                f"methods holds 'IRMAE {method.setting:g}': its number is of linear layers, an "
                "integer."
            )
    for name in config.grids:
        checks.numbers_each(config, f"grids.{name}", positive=True)
    checks.integers_each(config, "grids.IRMAE", least=1)
    _check_data(config, tuned=any(method.tuned for method in found))
    if "fixed at adaptive" in config.methods and "adaptive" not in config.methods:
        raise InputError(
            "methods holds 'fixed at adaptive' without 'adaptive', whose γ it needs: add it."
        )
    checks.positive_integers(
        config, "model.latents", "model.width", "model.blocks", "train.steps", "train.batch_size",
        "train.members", "train.epochs_per_chunk", "train.epochs_per_checkpoint", "eval.block",
    )  # fmt: skip
    checks.integers(config, "eval.mmd_samples", least=checks.MMD_POINTS)
    checks.positive_numbers(config, "train.learning_rate", "train.clip_norm", "train.patience")
    checks.positive_numbers(
        config, "train.final_learning_rate", "train.warmup_steps", "train.weight_decay", zero=True
    )
    checks.fractions(config, "train.beta2")
    smallest = min((config.data.size, *config.data.few)) * (1 - HELD_OUT)
    if smallest < config.train.batch_size:
        raise InputError(
            f"train.batch_size={config.train.batch_size} is more than the {smallest:g} rows of the "
            "smallest data set that are trained on: lower it."
        )
    return found


def _check_data(config: Any, *, tuned: bool) -> None:
    """Raises InputError for the first field of the section `data` that cannot be meant.

    Args:
      tuned: whether a method is, on a data set of its own.
    """
    data = config.data
    checks.positive_integers(config, "data.dim", "data.rivals")
    checks.integers(config, "data.tests", least=checks.MMD_POINTS)
    checks.integers(config, "data.size", least=LEAST_ROWS)
    checks.integers_each(config, "data.ranks", "data.other_ranks", least=1, most=12)
    if not checks.is_integer(data.tuning_rank, 1) or data.tuning_rank > 12:
        raise InputError(f"data.tuning_rank={data.tuning_rank!r}: use 1 to 12.")
    checks.integers_each(config, "data.seeds", least=0)
    checks.integers_each(config, "data.few", least=LEAST_ROWS, most=data.size - 1)
    checks.integers_each(config, "data.spheres", least=1, most=data.dim - 1)
    checks.numbers_each(config, "data.noise", positive=True)
    for field, known in (("kinds", sources.KINDS[:3]), ("other_kinds", sources.KINDS[:2])):
        for kind in data[field]:
            if kind not in known:
                raise InputError(f"data.{field} holds {kind!r}: use {', '.join(known)}.")
    for field, values in data.items():
        if isinstance(values, tuple | list) and values:
            checks.distinct(config, f"data.{field}")
    if not data.seeds or not all_sources(config, data.seeds[:1]):
        raise InputError(
            f"data.kinds={tuple(data.kinds)!r}, data.ranks={tuple(data.ranks)!r}, data.seeds="
            f"{tuple(data.seeds)!r} and what stands beside them name no data set: name one."
        )
    if tuned and data.tuning_seed in data.seeds:
        raise InputError(
            f"data.seeds={tuple(data.seeds)!r} hold data.tuning_seed={data.tuning_seed}, on whose "
            "data methods are tuned: use others."
        )
    least = 2 * max((*data.ranks, *data.other_ranks, data.tuning_rank))
    least = max(least, sources.AMBIENT) if data.unions else least
    if data.dim < least:
        raise InputError(
            f"data.dim={data.dim} has no room for these data sets: use at least {least}."
        )
    if "rendered" in data.kinds and data.dim > sources.PIXELS:
        raise InputError(
            f"data.dim={data.dim} is more than the {sources.PIXELS} pixels of a rendered scene: "
            "lower it, or leave 'rendered' out of data.kinds."
        )


def all_sources(config: Any, seeds: Sequence[int]) -> list[Source]:
    """The data sets that are shown, with these seeds."""
    data, size = config.data, config.data.size
    found = [
        Source(kind, rank, 0.0, size, seed)
        for kind in data.kinds for rank in data.ranks for seed in seeds
    ]  # fmt: skip
    for kind in data.other_kinds:
        for rank in data.other_ranks:
            for seed in seeds:
                found += [Source(kind, rank, float(noise), size, seed) for noise in data.noise]
                found += [Source(kind, rank, 0.0, few, seed) for few in data.few]
    found += [Source("sphere", rank, 0.0, size, seed) for rank in data.spheres for seed in seeds]
    if data.unions:
        found += [Source("union", sources.PART_RANK, 0.0, size, seed) for seed in seeds]
    return found


class Arena:
    """One workdir's runs: their data, programs and rows."""

    def __init__(self, config: Any, path: Path, found: Sequence[Method]):
        self.config, self.cells, self.found = config, Cells(path), found

    def rows(self, source: Source) -> Rows:
        """A data set."""
        return sources.draw(source, self.config.data.tests, self.config.data.dim)

    # ------------------------------------------------------------ which runs there are

    def tuning_runs(self) -> list[Run]:
        """Every value that is tried of every tuned method."""
        data = self.config.data
        source = Source("network", data.tuning_rank, 0.0, data.size, data.tuning_seed)
        return [
            Run(method.name, method.family, float(setting), True, *source)
            for method in self.found if method.tuned
            for setting in self.config.grids[method.name]
        ]  # fmt: skip

    def runs(self, settings: dict[str, float]) -> list[Run]:
        """The runs that are shown; `settings` are those that tuning chose."""
        seeds = tuple(self.config.data.seeds)
        return [
            Run(method.name, method.family, self._setting(method, settings), False, *source)
            for method in self.found
            for source in all_sources(
                self.config,
                seeds if method.name == "adaptive" else seeds[: self.config.data.rivals],
            )
        ]

    def _setting(self, method: Method, settings: dict[str, float]) -> float:
        return settings[method.name] if method.tuned else method.setting or 0.0

    def groups(self, runs: Sequence[Run]) -> dict[str, list[Run]]:
        """Runs by the name of the program that trains them; the adaptive ones come first."""
        most, groups = self.config.train.members, {}
        for family in ("adaptive", "vae", "autoencoder"):
            own = of_family(runs, family)
            for index, start in enumerate(range(0, len(own), most)):
                part = own[start : start + most]
                groups[f"{'tuning_' if part[0].tuning else ''}{family}{index}"] = part
        return groups

    # ------------------------------------------------------------ how they are trained

    def model(self, family: str) -> GaussianVAE:
        """The network of all methods: that of `vaebal.fit`."""
        settings = self.config.model
        plan = Plan(settings.latents, settings.width, settings.blocks, 0, 0, 0, 0, 0.0)
        model = estimator.build(plan, self.config.data.dim)
        return model.clone(gamma=1.0) if family == "autoencoder" else model

    def schedule(self, family: str) -> Schedule:
        """Whole epochs, of as many steps as `train.steps` says, nearly."""
        train, size = self.config.train, self.config.data.size
        used = size - self.held_out(size) if family == "adaptive" else size
        steps = steps_per_epoch(used, train.batch_size)
        return Schedule(
            max(1, round(train.steps / steps)), train.epochs_per_chunk,
            train.epochs_per_checkpoint, steps, train.batch_size,
        )  # fmt: skip

    def held_out(self, size: int) -> int:
        """How many of so many rows the adaptive homotopy holds out, to follow their residual."""
        return int(HELD_OUT * size)

    def program(self, runs: Sequence[Run]) -> Program:
        """The program of runs of one family."""
        family, train = runs[0].family, self.config.train
        schedule = self.schedule(family)
        steps = schedule.epochs * schedule.steps
        decay = 0.0 if family == "autoencoder" else train.weight_decay
        settings = Optimisation(
            train.learning_rate, train.final_learning_rate, train.warmup_steps, steps,
            train.clip_norm, beta2=train.beta2, weight_decay=decay,
        )  # fmt: skip
        members = stack_members([self.member(run) for run in runs])
        own, given = self._rows_of(runs)
        return Program(
            self._objective(family, steps), settings, members, (), train.batch_size,
            given=given, own=own, rule=self._rule(family, steps),
        )  # fmt: skip

    def _objective(self, family: str, steps: int) -> Any:
        model = self.model(family)
        if family == "adaptive":
            return estimator.objective(model)
        if family == "vae":
            return objectives.vae(model)
        given = [method.setting or 1 for method in self.found if method.name == "IRMAE"]
        layers = int(max((*self.config.grids.get("IRMAE", ()), *given), default=1))
        return objectives.autoencoder(model, steps, layers)

    def _rule(self, family: str, steps: int) -> Any:
        dim = self.config.data.dim
        if family == "adaptive":
            plan = Plan(0, 0, 0, 0, steps, 0, self.config.train.patience, 0.0)
            return functools.partial(estimator.adaptive, plan, dim)
        return functools.partial(methods.vae_rule, dim) if family == "vae" else None

    def _rows_of(self, runs: Sequence[Run]) -> tuple[np.ndarray, Any]:
        """The runs' own rows [M, n, D], repeated to equal numbers, and what their loss is given."""
        size = self.config.data.size
        with concurrent.futures.ThreadPoolExecutor() as pool:  # on the machine's cores
            list(pool.map(self.rows, dict.fromkeys(run.source for run in runs)))
        held = self.held_out(size) if runs[0].family == "adaptive" else 0
        own = np.empty((len(runs), size - held, self.config.data.dim), np.float32)
        kept = np.empty((len(runs), held, self.config.data.dim), np.float32)
        means = []
        for index, run in enumerate(runs):
            x = self.rows(run.source).train
            cut = self.held_out(len(x)) if held else 0
            used, rest = x[: len(x) - cut], x[len(x) - cut :]
            own[index] = np.resize(used, own.shape[1:])
            if held:
                kept[index] = np.resize(rest, kept.shape[1:])
            means.append(used.mean(0))
        mean = np.stack(means)
        return own, estimator.Given(mean, kept) if held else mean

    def member(self, run: Run) -> Any:
        """A run's part of its program's inputs."""
        seed, latents = self.config.train.seed + run.data_seed, self.config.model.latents
        if run.family == "adaptive":
            return Member(seed, latents, 1.0)
        variance = self.rows(run.source).variance
        if run.family == "autoencoder":
            return methods.autoencoder_member(run.method, run.setting, seed, latents, variance)
        found = math.nan
        if run.method == "fixed at adaptive":
            source = Run("adaptive", "adaptive", 0.0, False, *run.source)
            found = self.cells.row(source).get("gamma", math.nan)
        return methods.vae_member(run.method, run.setting, seed, latents, variance, found)

    # ------------------------------------------------------------ how they become rows

    def evaluate(self, run: Run, params: Any, state: State) -> tuple[Row, dict[str, np.ndarray]]:
        """A trained run's row."""
        rows, model = self.rows(run.source), self.model(run.family)
        if run.family == "autoencoder":
            numbers = self.member(run).rule
            row = evaluate.autoencoder(model, params, numbers, run.method, rows)
        else:
            number = int(state.homotopy.open)
            row = evaluate.vae(self.config, model, params, number, run.method, rows)
        return {"group": run.source.group(self.config.data.size)} | row, {}

    def train(self, runs: Sequence[Run]) -> dict[Run, Row]:
        """Rows of runs that are trained."""

        def train_group(name: str, group: Sequence[Run], progress: Progress) -> None:
            runner.train(
                self.cells, name, group, lambda: self.program(group),
                self.schedule(group[0].family), self.evaluate, progress,
            )  # fmt: skip

        return runner.train_all(self.cells, self.groups(runs), train_group)

    def without_count(self, run: Run) -> Row:
        """The row of a run that stopped: it counts among its method's, and found nothing."""
        group = run.source.group(self.config.data.size)
        row = self.cells.row(run) | {"group": group, "count": None} | evaluate.nothing()
        return row | {"epochs": 0, "steps": 0, "batch_size": 0, "train_seconds": None}

    def estimate(self, runs: Sequence[Run]) -> dict[Run, Row]:
        """Rows of runs by neighbours, a data set at a time."""
        by_source: dict[Source, list[Run]] = {}
        for run in runs:
            by_source.setdefault(run.source, []).append(run)
        for index, (source, own) in enumerate(by_source.items()):
            if self.cells.finished(*own):
                continue
            start = time.perf_counter()
            found = methods.neighbours(self.rows(source).train)
            seconds = (time.perf_counter() - start) / len(found)
            for run in own:
                row = {
                    "group": source.group(self.config.data.size),
                    "count": found[run.method],
                } | evaluate.nothing()
                told = {"epochs": 0, "steps": 0, "batch_size": 0, "train_seconds": seconds}
                self.cells.write_row(run, run._asdict() | row | told)
            print(f"neighbours: {index + 1} of {len(by_source)} data sets", flush=True)
        return {run: self.cells.row(run) for run in runs}


def choose(rows: Sequence[Row]) -> dict[str, float]:
    """By method the setting whose count is nearest r on the tuning set; of equal ones least error.

    Every method sees r there, and nowhere else.
    """
    chosen: dict[str, tuple[tuple[float, float], float]] = {}
    for row in rows:
        if "stopped" in row:
            continue
        score = (abs(row["count"] - row["rank"]), row["error"])
        if row["method"] not in chosen or score < chosen[row["method"]][0]:
            chosen[row["method"]] = (score, row["setting"])
    return {method: setting for method, (_, setting) in chosen.items()}


def run(config: Any, workdir: str) -> list[Row]:
    """Tunes, trains, estimates and reports; what `workdir` holds already is not done again.

    Raises:
      InputError: a field or the workdir cannot be used; before any work.
      Diverged: some runs stopped; the others are reported.
    """
    found = check(config)
    path = open_workdir(workdir, config.to_dict(), free=fields_of("arena").FREE)
    arena = Arena(config, path, found)
    tuning = arena.tuning_runs()
    if config.eval.report_only:
        tuned = finished_rows(arena, tuning)
        settings = choose(list(tuned.values()))
        missing = {method.name: math.nan for method in found if method.tuned} | settings
        rows = finished_rows(arena, arena.runs(missing))
        if not rows:
            raise InputError(
                "eval.report_only=True, and nothing is finished here: leave it out first."
            )
    else:
        parameters = runner.parameters(arena.model("vae"))
        settings = first(config, found)
        shown = len(arena.runs(settings))
        print(
            f"{config.name}: {len(tuning)} runs to tune, {shown} to show, "
            f"of {config.train.steps} steps of {config.train.batch_size}, {parameters} parameters, "
            f"{report.device()}; workdir {path}",
            flush=True,
        )
        # What needs no tuning first: a start that is cut short has the most of it.
        rows = arena.train(of_family(arena.runs(settings), "adaptive"))
        tuned = arena.train(tuning)
        settings |= choose(list(tuned.values()))
        shown = arena.runs(settings)
        rows |= arena.train(of_family(shown, "vae", "autoencoder"))
        if config.eval.estimate:
            rows |= arena.estimate(of_family(shown, "neighbours"))
    # Here a run that stopped is in the numbers: it found nothing.
    stopped = report.stopped(
        {run.name: row for run, row in rows.items()}, "Lower train.learning_rate",
        "counted as misses",
    )  # fmt: skip
    told, tried = (
        [arena.without_count(run) if "stopped" in row else row for run, row in each.items()]
        for each in (rows, tuned)
    )
    page.write(config, path, told, tried, settings, stopped)
    if stopped:
        raise Diverged(stopped)
    return list(rows.values())


def first(config: Any, found: Sequence[Method]) -> dict[str, float]:
    """The first value of every tuned method, for one of which no value trains."""
    return {each.name: float(config.grids[each.name][0]) for each in found if each.tuned}


def of_family(runs: Sequence[Run], *families: str) -> list[Run]:
    """The runs of these families."""
    return [run for run in runs if run.family in families]


def finished_rows(arena: Arena, runs: Sequence[Run]) -> dict[Run, Row]:
    """Those that there are."""
    return {run: arena.cells.row(run) for run in runs if arena.cells.finished(run)}
