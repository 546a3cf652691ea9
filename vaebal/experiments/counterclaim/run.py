"""Published claims that VAEs with a learned variance keep too many latents, by their protocols.

Koehler, Mehta, Zhou & Risteski (ICLR 2022): sigmoid sets and spheres. Zheng, He, Qiu & Wipf
(NeurIPS 2022): where gamma starts. All settings of an arm train in one program.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vaebal import homotopy
from vaebal.errors import InputError
from vaebal.estimator import train as estimator
from vaebal.estimator.plan import Plan
from vaebal.experiments import cells as runner
from vaebal.experiments import checks, fields_of, report
from vaebal.experiments.cells import Cells, Schedule
from vaebal.experiments.counterclaim import page, protocols
from vaebal.experiments.report import Row
from vaebal.homotopy import Homotopy
from vaebal.models import GaussianVAE
from vaebal.streams import stream
from vaebal.training import Member, Optimisation, Program, State, stack_members
from vaebal.training.progress import Progress
from vaebal.training.workdir import open_workdir

KINDS = ("sigmoid", "sphere", "mixture")
ARMS = ("theirs", "theirs, adaptive", "ours, adaptive")
LEARNED = "ours, learned "  # before a rate
STEPS_AN_EPOCH = 100  # data are drawn anew in every batch: an epoch is what is told of together


class Run(NamedTuple):
    """One arm on one setting."""

    arm: str
    kind: str
    rank: int  # their "dd": coordinates of z, or of a sphere's space
    padding: int
    kappa: int
    data_seed: int
    start: float | None  # log gamma; None: the log of the data's largest variance

    @property
    def name(self) -> str:
        """Its folder's name."""
        arm = re.sub(r"[^\w.+-]+", "_", self.arm)
        setting = f"{self.kind}_r{self.rank}_pad{self.padding}_kappa{self.kappa}"
        start = "" if self.start is None else f"_start{self.start:g}"
        return f"{arm}_{setting}_seed{self.data_seed}{start}"


def check(config: Any) -> None:
    """Raises InputError for the first field that cannot be meant."""
    for arm in checks.distinct(config, "arms"):
        learned = arm.startswith(LEARNED) and checks.is_positive(arm.removeprefix(LEARNED))
        if arm not in ARMS and not learned:
            raise InputError(
                f"arms holds {arm!r}: use {', '.join(map(repr, ARMS))} or 'ours, learned RATE', "
                "with a RATE in nats of log γ a step above 0."
            )
    checks.one_of(config, "data.kind", KINDS)
    data = config.data
    for field, least in (("ranks", 1), ("zeros", 0), ("kappas", 1)):
        values = data[field]
        if (
            not values
            or len(values) != len(data.ranks)
            or not all(checks.is_integer(value, least) for value in values)
        ):
            raise InputError(
                f"data.{field}={tuple(values)!r}: give one integer of at least {least} for each of "
                f"the {len(data.ranks)} settings in data.ranks."
            )
    for field, least in (("model.hidden", 1), ("data.seeds", 0)):
        checks.integers_each(config, field, least=least)
    checks.distinct(config, "data.seeds")
    checks.numbers_each(config, "data.starts")
    checks.distinct(config, "data.starts")
    checks.positive_integers(
        config, "data.tests", "model.width", "model.blocks", "train.batch_size",
        "train.their_steps", "train.steps", "train.epochs_per_chunk",
        "train.epochs_per_checkpoint",
    )  # fmt: skip
    checks.positive_numbers(
        config, "train.their_rate", "train.their_gamma_speed", "train.learning_rate",
        "train.patience",
    )  # fmt: skip


class Claims:
    """One workdir's runs: their programs and rows."""

    def __init__(self, config: Any):
        data, self.config, self.kind = config.data, config, config.data.kind
        self.most, self.latents = max(data.ranks), max(data.kappas)
        self.dim = protocols.features(self.kind, self.most, max(data.zeros))

    def runs(self, arm: str) -> list[Run]:
        """All settings of an arm."""
        data, several = self.config.data, len(self.config.data.starts) > 1
        starts = data.starts if several or arm == "theirs" else (None,)
        settings = zip(data.ranks, data.zeros, data.kappas, strict=True)
        return [
            Run(arm, self.kind, *setting, seed, start)
            for setting in settings for seed in data.seeds for start in starts
        ]  # fmt: skip

    def model(self, arm: str) -> GaussianVAE:
        """Their net or ours, of as many features and latents as the largest setting has."""
        settings = self.config.model
        if arm.startswith("theirs"):
            hidden = tuple(settings.hidden)
            return protocols.their_net(self.kind, hidden, self.dim, self.latents)
        plan = Plan(self.latents, settings.width, settings.blocks, 0, 0, 0, 0, 0.0)
        return estimator.build(plan, self.dim)

    def schedule(self, arm: str) -> Schedule:
        """How long an arm trains."""
        train = self.config.train
        steps = train.their_steps if arm == "theirs" else train.steps
        return Schedule(
            max(1, steps // STEPS_AN_EPOCH), train.epochs_per_chunk, train.epochs_per_checkpoint,
            STEPS_AN_EPOCH, train.batch_size,
        )  # fmt: skip

    def numbers(self, run: Run) -> dict[str, float]:
        """What says which data set it is."""
        return {"rank": run.rank, "padding": run.padding, "data_seed": run.data_seed}

    def draw(self, run: Run, name: str) -> np.ndarray:
        """Rows [data.tests, D] of its data set."""
        key, size = stream(run.data_seed, name), self.config.data.tests
        return np.asarray(
            protocols.draw(self.kind, key, size, self.dim, self.most, self.numbers(run))
        )

    def member(self, run: Run) -> Member:
        """A run's part of its program's inputs."""
        if run.start is not None:
            gamma = math.exp(run.start)
        else:
            covariance = np.cov(self.draw(run, "largest variance"), rowvar=False)
            gamma = float(np.linalg.eigvalsh(covariance)[-1])
        return Member(self.config.train.seed, run.kappa, gamma, rule=self.numbers(run))

    def program(self, runs: Sequence[Run]) -> Program:
        """The program of an arm."""
        arm, train = runs[0].arm, self.config.train
        schedule = self.schedule(arm)
        steps, plain = schedule.epochs * schedule.steps, arm == "theirs"
        if plain:
            settings = Optimisation(train.their_rate, train.their_rate, 0, steps, math.inf)
        else:
            settings = Optimisation(
                train.learning_rate, 2e-6, 200, steps, 20.0, beta2=0.99,
                weight_decay=0.0 if arm.startswith("theirs") else estimator.WEIGHT_DECAY,
            )  # fmt: skip
        loss = protocols.objective(
            self.kind, self.model(arm), self.most, theirs=arm.startswith("theirs"),
            speed=train.their_gamma_speed if plain else 0.0,
        )  # fmt: skip
        rows = np.zeros((STEPS_AN_EPOCH * train.batch_size, 1), np.float32)
        members = stack_members([self.member(run) for run in runs])
        return Program(loss, settings, members, rows, train.batch_size, rule=self._rule(arm, steps))

    def _rule(self, arm: str, steps: int) -> Any:
        if arm == "theirs":
            return None
        if arm.endswith("adaptive"):
            plan = Plan(0, 0, 0, 0, steps, 0, self.config.train.patience, 0.0)
            return functools.partial(estimator.adaptive, plan, self.dim)
        return functools.partial(_learned, float(arm.split()[-1]))

    def evaluate(self, run: Run, params: Any, state: State) -> tuple[Row, dict[str, np.ndarray]]:
        """A run's row, on fresh draws."""
        number = run.kappa if run.arm == "theirs" else int(state.homotopy.open)
        if "gamma_step" in params:
            log_gamma = run.start + self.config.train.their_gamma_speed * params["gamma_step"]
            params = {n: leaf for n, leaf in params.items() if n != "gamma_step"}
            params["log_gamma"] = log_gamma
        x = self.draw(run, "test")
        numbers = self.numbers(run)
        own = protocols.mask(self.kind, self.dim, self.most, numbers)
        found = jax.device_get(_measured(self.model(run.arm), params, x, own, number))
        return {name: float(value) for name, value in found.items()}, {}


def _learned(rate: float, member: Member) -> Homotopy:
    return homotopy.closed_form(rate)


@functools.partial(jax.jit, static_argnames="model")
def _measured(model: GaussianVAE, params: Any, x: Any, own: Any, number: Any) -> dict[str, Any]:
    """Counts by both criteria, the error at the posterior mean, KL, and gamma."""
    mean, log_var = model.apply({"params": params}, x, number, method="encode")
    x_hat = model.apply({"params": params}, mean, method="decode")
    kl = 0.5 * (jnp.square(mean) + jnp.expm1(log_var) - log_var).sum(1).mean()
    return {
        "active": (mean.var(0) > 0.01).sum(),
        "informative": (jnp.exp(log_var).mean(0) < 0.5).sum(),
        "error": (jnp.square(x - x_hat) @ own).mean(),
        "kl": kl,
        "gamma": jnp.exp(params["log_gamma"]),
    }


def run(config: Any, workdir: str) -> list[Row]:
    """Trains and reports every arm; what `workdir` holds already is not done again.

    Raises:
      InputError: a field or the workdir cannot be used; before any work.
      Diverged: some runs stopped; the others are reported.
    """
    check(config)
    path = open_workdir(workdir, config.to_dict(), free=fields_of("counterclaim").FREE)
    claims, cells = Claims(config), Cells(path)
    groups = {re.sub(r"[^\w.+-]+", "_", arm): claims.runs(arm) for arm in config.arms}
    print(
        f"{config.name}: {sum(map(len, groups.values()))} runs, {report.device()}; workdir {path}",
        flush=True,
    )

    def train_group(name: str, group: Sequence[Run], progress: Progress) -> None:
        runner.train(
            cells, name, group, lambda: claims.program(group), claims.schedule(group[0].arm),
            claims.evaluate, progress,
        )  # fmt: skip

    rows = runner.train_all(cells, groups, train_group)

    def write(finished: dict[Run, Row], stopped: str) -> None:
        page.write(config, path, list(finished.values()), stopped)

    return runner.report_all(rows, "Lower train.learning_rate", write)
