"""The training runs of latent diffusion in miniature: which there are, on what each is trained.

For every arm and seed an autoencoder, "adaptive" in two goes; one classifier, for its features;
for every arm, seed and second stage a prior over the autoencoder's latents. A prior is trained
once, and a cell for each number of epochs after which it is judged.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vaebal import homotopy
from vaebal.data import ImageSet, mean_image, steps_per_epoch
from vaebal.diagnosis import implied_gamma
from vaebal.errors import InputError
from vaebal.experiments import checks
from vaebal.experiments.cells import Cells, Schedule, parameters, worth_stacking
from vaebal.experiments.gamma import arms as gamma_arms
from vaebal.experiments.gamma.evaluate import largest_variance
from vaebal.experiments.gamma.run import build_model
from vaebal.generation import classifier, priors
from vaebal.homotopy import Homotopy
from vaebal.models.nets import ACTIVATIONS
from vaebal.streams import stream
from vaebal.theory.collapse import collapse
from vaebal.training import (
    At,
    Member,
    Objective,
    Optimisation,
    Program,
    Told,
    gaussian_vae,
    shared_given,
    stack_members,
    state_shapes,
)

OPENING = "opening"  # the adaptive arm's first go
FASTEST = 0.02  # nats a step at which the gamma of "none" is followed: it moves nothing


class First(NamedTuple):
    """An autoencoder; or the classifier, of arm "classifier"."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.arm.replace(' ', '_')}_seed{self.seed}"


class Prior(NamedTuple):
    """A prior over the latents of the autoencoder (arm, seed), after so many epochs."""

    arm: str
    seed: int
    stage: str  # "KIND WIDTH"
    after: int  # epochs

    @property
    def name(self) -> str:
        """Its folder's name."""
        autoencoder = First(self.arm, self.seed).name
        return f"prior_{self.stage.replace(' ', '_')}_{autoencoder}_epoch{self.after}"


CLASSIFIER = First("classifier", 0)  # one for all, so that their distances compare


def numbers(config: Any, arm: str) -> dict[str, float]:
    """What the rule of an arm other than "adaptive" is given; "gamma" where it fixes it.

    Raises:
      InputError: no arm is spelt so.
    """
    match arm.split():
        case ["none"]:
            return {"rate": FASTEST, "variational": 0.0}
        case ["kl", number, *words] if words in ([], ["as", "adaptive"]) and checks.is_positive(
            number
        ):
            gamma = implied_gamma(float(number), factor=config.train.error_weight)
            return {"rate": 0.0, "variational": 1.0, "gamma": gamma}
        case ["learned", number] if checks.is_positive(number):
            return {"rate": float(number), "variational": 1.0}
    raise InputError(
        f"train.arms holds {arm!r}: an arm is 'kl WEIGHT', 'kl WEIGHT as adaptive', "
        "'learned RATE', 'adaptive' or 'none'."
    )


def second_stage(stage: str, latents: int, blocks: int) -> priors.SecondStage:
    """The second stage that is spelt "KIND WIDTH".

    Raises:
      InputError: none is spelt so.
    """
    match stage.split():
        case [kind, width] if kind in priors.KINDS and width.isdecimal() and int(width):
            return priors.KINDS[kind](latents, int(width), blocks)
    known = ", ".join(f"'{kind} WIDTH'" for kind in priors.KINDS)
    raise InputError(f"prior.stages holds {stage!r}: a second stage is one of {known}.")


class Session:
    """What the runs of one workdir share: data, networks, compiled programs, finished runs.

    Attributes:
      model: the autoencoder.
      groups: by name, the cells that train together, in the order in which they can.
    """

    def __init__(self, config: Any, path: Path, images: ImageSet, targets: classifier.Targets):
        self.config, self.images, self.targets = config, images, targets
        self.cells = Cells(path)
        self.model = build_model(config, images.image_shape)
        self.classifier = classifier.build(
            images.image_shape, targets.outputs, features=config.classifier.features,
            width=config.classifier.width, activation=ACTIVATIONS[config.model.activation],
        )  # fmt: skip
        self.groups = self._groups()
        self._params: dict[First, Any] = {}
        self._latents: dict[First, Any] = {}
        self._programs: dict[tuple, tuple[str, Program]] = {}

    def _groups(self) -> dict[str, list]:
        config, groups = self.config, {CLASSIFIER.name: [CLASSIFIER]}
        others = [arm for arm in config.train.arms if arm != "adaptive"]
        kinds = {"plain": others}
        if "adaptive" in config.train.arms:
            kinds = {OPENING: [OPENING], "adaptive": ["adaptive"], **kinds}
        together = worth_stacking(parameters(self.model))
        for kind, of_kind in kinds.items():
            some = [First(arm, seed) for arm in of_kind for seed in config.train.seeds]
            if together:
                groups |= {f"first_{kind}": some} if some else {}
            else:
                groups |= {f"first_{one.name}": [one] for one in some}
        for stage in config.prior.stages:
            size = sum(leaf.size for leaf in jax.tree.leaves(self._prior_shapes(stage)))
            each = [(arm, seed) for arm in config.train.arms for seed in config.train.seeds]
            for some in [each] if worth_stacking(size) else [[one] for one in each]:
                name = "" if len(some) > 1 else f"_{First(*some[0]).name}"
                for after in config.prior.epochs:
                    cells = [Prior(*one, stage, after) for one in some]
                    groups[f"prior_{stage.replace(' ', '_')}{name}_epoch{after}"] = cells
        return groups

    def prior(self, stage: str) -> priors.SecondStage:
        """The second stage."""
        return second_stage(stage, self.model.latents, self.config.prior.blocks)

    def _prior_shapes(self, stage: str) -> Any:
        mask = np.zeros(self.model.latents, np.float32)
        return jax.eval_shape(self.prior(stage).init, jax.random.key(0), mask)

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """The training images' mean [D]."""
        return np.asarray(jax.jit(lambda rows: mean_image(rows, self.images.decode))(
            self.images.train
        ))  # fmt: skip

    @functools.cached_property
    def variance(self) -> float:
        """lambda_1 of the training images, where gamma starts."""
        return self.config.model.gamma or largest_variance(self.images)

    # ------------------------------------------------------------ programs

    def schedule(self, group: Sequence[First | Prior]) -> Schedule:
        """How long a group trains."""
        config, first = self.config, group[0]
        train, size = config.train, len(self.images.train)
        every = train.epochs_per_chunk, train.epochs_per_checkpoint
        if isinstance(first, Prior):
            batch = config.prior.batch_size
            return Schedule(first.after, every[0], 10**6, steps_per_epoch(size, batch), batch)
        epochs, batch = train.epochs, train.batch_size
        if first.arm == "classifier":
            epochs, batch = config.classifier.epochs, config.classifier.batch_size
        elif first.arm in (OPENING, "adaptive"):
            opening = train.adaptive_epochs
            epochs = opening if first.arm == OPENING else epochs - opening
        return Schedule(epochs, *every, steps_per_epoch(size, batch), batch)

    def program(self, name: str, group: Sequence[First | Prior]) -> Program:
        """The compiled program of a group; groups of one kind and size share it."""
        name, first = name.partition("_epoch")[0], group[0]
        kind = first.stage if isinstance(first, Prior) else self._kind(first)
        key = kind, len(group)
        made = self._programs.get(key, ("", None))
        if made[0] == name:  # of a prior that has been judged and goes on
            return made[1]
        objective, settings, rule, members, given = self._recipe(group)
        data = {"given": given, **self._rows(group)}
        if made[0]:
            program = made[1].on(members, **data)
        else:
            batch = self.schedule(group).batch_size
            program = Program(objective, settings, members, batch_size=batch, rule=rule, **data)
        self._programs = {key: (name, program)}  # the last kind's alone: they hold the data
        return program

    @staticmethod
    def _kind(cell: First) -> str:
        return cell.arm if cell.arm in (OPENING, "adaptive", "classifier") else "plain"

    def _rows(self, group: Sequence[First | Prior]) -> dict[str, Any]:
        if isinstance(group[0], Prior):
            each = [self.latents(First(*cell[:2]))[:2] for cell in group]
            stacked = [np.stack(arrays) for arrays in zip(*each, strict=True)]
            return {"rows": (), "own": dict(zip(("mean", "deviation"), stacked, strict=True))}
        if group[0].arm == "classifier":
            return {"rows": {"images": self.images.train, "targets": self.targets.train}}
        return {"rows": self.images.train}

    def _recipe(self, group: Sequence[First | Prior]) -> tuple:
        """Objective, settings, rule, members and given of a group's program."""
        config, first, count = self.config, group[0], len(group)
        if isinstance(first, Prior):
            return self._prior_recipe(group)
        if first.arm == "classifier":
            objective = Objective(
                functools.partial(_init_classifier, self),
                functools.partial(_classifier_loss, self), self.images.dim,
            )  # fmt: skip
            settings = self._settings(config.classifier, group)
            members = stack_members([Member(cell.seed) for cell in group])
            return objective, settings, None, members, shared_given(self.mean, count)
        objective = gaussian_vae(self.model, self.images.decode)
        given, rule = shared_given(self.mean, count), None
        if first.arm == "adaptive":
            objective = objective._replace(init=lambda member, weights: weights)
            each = [self._weights(cell._replace(arm=OPENING)) for cell in group]
            given = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
            rule = gamma_arms.rule("settled", config, self.images.dim, 0)
        elif first.arm == OPENING:
            steps = self.schedule(group).epochs * self.schedule(group).steps
            rule = gamma_arms.rule("adaptive", config, self.images.dim, steps)
        else:
            objective = gaussian_vae(
                self.model, self.images.decode, lambda member: member.rule["variational"]
            )
            rule = _closed_form
        members = stack_members([self.member(cell) for cell in group])
        return objective, self._settings(config.train, group), rule, members, given

    def _settings(self, section: Any, group: Sequence[First | Prior]) -> Optimisation:
        train, schedule = self.config.train, self.schedule(group)
        settled = group[0].arm == "adaptive"
        whole = section is train
        return Optimisation(
            learning_rate=train.settled_learning_rate if settled else section.learning_rate,
            final_learning_rate=section.final_learning_rate,
            warmup_steps=train.warmup_steps,
            total_steps=schedule.epochs * schedule.steps,
            clip_norm=section.clip_norm,
            beta2=train.beta2 if whole else 0.999,
            jitter=train.jitter if group[0].arm == OPENING else 0.0,
            weight_decay=train.weight_decay if whole else 0.0,
        )

    def member(self, cell: First) -> Member:
        """An autoencoder's part of its program's inputs."""
        config = self.config
        if cell.arm in (OPENING, "adaptive"):
            opening = cell.arm == OPENING
            arm = gamma_arms.parse(
                "adaptive" if opening else "settled after adaptive", config.train.fastest
            )
            of = {} if opening else self.cells.row(cell._replace(arm=OPENING))
            return gamma_arms.member(config, arm, cell.seed, self.variance, of)
        given = numbers(config, cell.arm)
        gamma, latents = given.pop("gamma", self.variance), config.model.latents
        if cell.arm.endswith("adaptive"):
            latents = self.cells.row(First(OPENING, cell.seed)).get("open", latents)
        return Member(cell.seed, latents, gamma, rule=given)

    def _prior_recipe(self, group: Sequence[Prior]) -> tuple:
        settings = self.config.prior
        stage = self.prior(group[0].stage)
        given = [self.latents(First(*cell[:2]))[2]._asdict() for cell in group]
        given = jax.tree.map(lambda *leaves: np.stack(leaves), *given)
        members = stack_members([Member(cell.seed, self.model.latents) for cell in group])
        rule = (
            (lambda member: homotopy.closed_form(settings.gamma_rate)) if stage.has_gamma else None
        )
        optimisation = Optimisation(
            learning_rate=settings.learning_rate, final_learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps, total_steps=10**9, clip_norm=settings.clip_norm,
            average=settings.average,
        )  # fmt: skip
        return prior_objective(stage, self.model.latents), optimisation, rule, members, given

    # ------------------------------------------------------------ what is finished

    def keep(self, cell: First, params: Any) -> Any:
        """A finished autoencoder's or classifier's parameters, so that no other call reads them.

        Latents that were never opened are as training had them.
        """
        params = jax.device_get(params)
        if cell.arm not in ("classifier", OPENING):
            params = jax.device_get(self._closed(cell, params))
        self._params[cell] = params
        return params

    def _closed(self, cell: First, params: Any) -> Any:
        if not cell.arm.endswith("adaptive"):
            return params
        return collapse(params, slice(int(self.member(cell).latents), None))

    def stopped(self, cell: First) -> bool:
        """Whether its loss stopped being finite; so do then those that need it."""
        return "stopped" in self.cells.row(cell)

    def params(self, cell: First) -> Any:
        """A finished one's parameters, as NumPy arrays; zeros of one that stopped.

        Raises:
          InputError: it is not finished.
        """
        if cell not in self._params:
            name, group = next((n, g) for n, g in self.groups.items() if cell in g)
            shapes = state_shapes(*self._recipe(group))
            if self.stopped(cell):
                params = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:]), shapes.params)
            else:
                params = self.cells.params(cell, name, group.index(cell), shapes)
            self.keep(cell, params)
        return self._params[cell]

    def _weights(self, cell: First) -> Any:
        params = self.params(cell)
        return {name: leaf for name, leaf in params.items() if name != "log_gamma"}

    def latents(self, cell: First) -> tuple[np.ndarray, np.ndarray, priors.Latents]:
        """Posterior means and standard deviations of all training images, [N, K] each, and scale.

        Of a plain autoencoder the deviations are 0.
        """
        if cell not in self._latents:
            mean, deviation = self._encode(self.params(cell), self.images.train)
            if cell.arm == "none":
                deviation = jnp.zeros_like(deviation)
            scale = priors.latents_of(mean, deviation, 0.0 if cell.arm == "none" else 0.01)
            self._latents[cell] = jax.device_get((mean, deviation, scale))
        return self._latents[cell]

    @functools.cached_property
    def _encode(self):
        def one(params, row):
            x = self.images.decode(row[None])
            mean, log_var = self.model.apply({"params": params}, x, method="encode")
            return mean[0], jnp.exp(0.5 * log_var[0])

        block = self.config.eval.block
        return jax.jit(
            lambda params, rows: jax.lax.map(functools.partial(one, params), rows, batch_size=block)
        )


def _closed_form(member: Member) -> Homotopy:
    return homotopy.closed_form(member.rule["rate"])


def _init_classifier(session: Session, member: Member, mean: Any) -> Any:
    params = session.classifier.init(stream(member.seed, "classifier/init"), mean[None])["params"]
    if "centre" in params["body"]:
        params["body"]["centre"] = mean
    return params


def _classifier_loss(session: Session, params: Any, batch: Any, at: At) -> tuple[Any, Told]:
    x = session.images.decode(batch["images"])
    key = stream(at.member.seed, "classifier/turns", at.step)
    shown = classifier.posed(session.targets, session.images.image_shape, x, batch["targets"], key)
    value, metrics = classifier.loss(session.classifier, params, *shown)
    return value, Told(metrics)


def prior_objective(stage: priors.SecondStage, latents: int) -> Objective:
    """A second stage on z ~ q(z|x), drawn anew in every step.

    Rows are {"mean": [N, K], "deviation": [N, K]}, `given` the fields of `priors.Latents`. Priors
    of one seed see the same examples and the same noise, whatever the autoencoder.
    """

    def init(member: Member, given: Any) -> Any:
        return stage.init(stream(member.seed, "prior/init"), given["mask"])

    def loss(params: Any, batch: Any, at: At) -> tuple[Any, Told]:
        scale = priors.Latents(**at.given)
        to_z, to_loss = jax.random.split(stream(at.member.seed, "prior/noise", at.step))
        noise = jax.random.normal(to_z, batch["mean"].shape)
        z = scale.standardise(batch["mean"] + batch["deviation"] * noise)
        value, metrics = stage.loss(params, z, scale.mask, to_loss)
        return value, Told(metrics, metrics.get("mean_square", jnp.nan))

    return Objective(init, loss, latents)
