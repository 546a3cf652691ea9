"""The stages of the generation experiment: which there are, what each is trained on, how.

A seed is a whole pipeline: "ae"; for every space in which the first VAE's error is measured
"vae_SPACE" and "vae_plus_SPACE"; "wae". Seeds of a small stage train together.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from vaebal import homotopy
from vaebal.data import ImageSet, mean_image, steps_per_epoch
from vaebal.experiments.cells import Cells, Schedule, parameters, train, worth_stacking
from vaebal.generation import classifier, stages
from vaebal.models import conv_vae, init_params, latent_noise, mlp_vae
from vaebal.models.nets import ACTIVATIONS
from vaebal.streams import stream
from vaebal.training import (
    At,
    Member,
    Objective,
    Optimisation,
    Program,
    State,
    Told,
    devices,
    mesh_for,
    stack_members,
    state_shapes,
)
from vaebal.training.devices import place
from vaebal.training.progress import Progress

CLASSIFIER_SEED = 0  # one for all pipelines, so that their distances compare


class Stage(NamedTuple):
    """One training run of the pipeline `seed`; a cell."""

    stage: str  # "ae", "vae_pixels", "vae_plus_pixels", "vae_codes", ..., "wae", "classifier"
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.stage}_seed{self.seed}"

    @property
    def section(self) -> str:
        """The config's section for it."""
        for section in ("vae_plus", "vae"):
            if self.stage.startswith(section):
                return section
        return self.stage

    @property
    def space(self) -> str:
        """Where the error of the first VAE on its way is measured."""
        return self.stage.rpartition("_")[2]

    @property
    def before(self) -> "Stage | None":
        """The stage whose outputs this one is trained on."""
        if self.section == "vae_plus":
            return Stage(f"vae_{self.space}", self.seed)
        return None if self.stage in ("ae", "classifier") else Stage("ae", self.seed)


def pipeline(config: Any) -> list[str]:
    """The names of a pipeline's stages, each after the one it needs."""
    names = ["ae"]
    for space in config.vae.spaces:
        names += [f"vae_{space}", f"vae_plus_{space}"]
    return [*names, "wae"]


def method(kind: str, space: str, config: Any) -> str:
    """The name in the tables of "VAE" or "VAE+"; the first space listed is the plain one."""
    return kind if space == config.vae.spaces[0] else f"{kind} ({space})"


def methods(config: Any) -> list[str]:
    """The names of all methods with a model, in the tables' order."""
    spaces = config.vae.spaces
    small = [method(kind, space, config) for space in spaces for kind in ("VAE", "VAE+")]
    return ["AE", *small, "WAE-MMD"]


def build_models(
    config: Any, image_shape: tuple[int, int, int], targets: classifier.Targets | None
) -> dict[str, nn.Module]:
    """The networks by config section; kappa of the small ones is the number of codes.

    Raises:
      ValueError: images that convolutions do not fit.
    """
    activation, settings = ACTIVATIONS[config.train.activation], config.ae
    shared = {
        "latents": settings.codes, "activation": activation, "residual": True,
        "affine_skip": False, "gamma": 1.0,
    }  # fmt: skip
    if settings.network == "conv":
        autoencoder = conv_vae(
            image_shape=image_shape, patch=settings.patch, width=settings.width,
            blocks=settings.blocks, **shared,
        )  # fmt: skip
    else:
        autoencoder = mlp_vae(
            outputs=int(np.prod(image_shape)), width=settings.width,
            encoder_layers=settings.layers, decoder_blocks=settings.blocks, **shared,
        )  # fmt: skip
    models: dict[str, nn.Module] = {"ae": autoencoder}
    for section in ("vae", "vae_plus", "wae"):
        small = config[section]
        models[section] = mlp_vae(
            outputs=settings.codes, latents=settings.codes, width=small.width,
            encoder_layers=small.layers, decoder_blocks=small.blocks, activation=activation,
            residual=True, affine_skip=True,
            log_var_init=0.0 if section == "wae" else small.log_var_init,
            gamma=1.0 if section == "wae" else None,
        )  # fmt: skip
    if targets is not None:
        models["classifier"] = classifier.build(
            image_shape, targets.outputs, features=config.classifier.features,
            width=config.classifier.width, activation=activation,
        )  # fmt: skip
    return models


class Session:
    """What the stages of one workdir share: data, networks, compiled programs, finished stages.

    Attributes:
      groups: by name, the stages that train together, in the order in which they can.
    """

    def __init__(
        self, config: Any, path: Path, images: ImageSet, targets: classifier.Targets | None
    ):
        self.config, self.images, self.targets = config, images, targets
        self.cells = Cells(path, "stages")
        self.models = build_models(config, images.image_shape, targets)
        self.groups = self._groups()
        self._codes: dict[int, Array] = {}
        self._programs: dict[tuple[str, int], Program] = {}
        everywhere = self._everywhere = NamedSharding(mesh_for(1), PartitionSpec())
        self._encode = jax.jit(self._code_of, out_shardings=everywhere)
        self._posterior = jax.jit(
            functools.partial(stages.encode, self.models["vae"]), out_shardings=everywhere
        )

    def _groups(self) -> dict[str, list[Stage]]:
        groups: dict[str, list[Stage]] = {}
        seeds = self.config.train.seeds
        for name in pipeline(self.config):
            stacked = worth_stacking(parameters(self.models[Stage(name, 0).section]))
            for group in [list(seeds)] if stacked else [[seed] for seed in seeds]:
                called = f"{name}_seed{'-'.join(map(str, group))}"
                groups[called] = [Stage(name, seed) for seed in group]
        if self.targets is not None:
            one = Stage("classifier", CLASSIFIER_SEED)
            groups[one.name] = [one]
        return groups

    @property
    def path(self) -> Path:
        """The workdir."""
        return self.cells.path

    @functools.cached_property
    def train(self) -> Array:
        """The stored training images, on every device."""
        return place(self.images.train, self._everywhere)

    @functools.cached_property
    def mean(self) -> Array:
        """Their mean [D]."""
        return jax.jit(lambda rows: mean_image(rows, self.images.decode))(self.train)

    @functools.cached_property
    def variance(self) -> Array:
        """Their mean variance per pixel, []."""

        def spread(rows, mean):
            square = lambda row: jnp.square(self.images.decode(row[None])[0] - mean).mean()  # noqa: E731
            return jax.lax.map(square, rows, batch_size=256).mean()

        return jax.jit(spread)(self.train, self.mean)

    def params(self, stage: Stage) -> Any:
        """A finished stage's parameters.

        Raises:
          InputError: it is not finished.
        """
        # One of a seed that is none of the config's is a group of its own, never finished.
        groups = ((n, g) for n, g in self.groups.items() if stage in g)
        name, group = next(groups, (stage.name, [stage]))
        dim = self.images.dim if stage.before is None else self.config.ae.codes
        given = {"mean": np.zeros((len(group), dim), np.float32)}  # for its shape
        members = stack_members([Member(each.seed) for each in group])
        shapes = state_shapes(
            self.objective(stage), self.settings(stage), self.rule(stage), members, given
        )
        return self.cells.params(stage, name, group.index(stage), shapes)

    @functools.cached_property
    def classifier(self) -> Any:
        """The finished classifier's parameters, this process's own; all load them together."""
        return devices.local(self.params(Stage("classifier", CLASSIFIER_SEED)))

    def scale(self, seed: int) -> stages.Scale:
        """What standardises the codes of the pipeline `seed`."""
        return stages.Scale(**place(self.cells.arrays(Stage("ae", seed)), self._everywhere))

    def _code_of(self, params: Any, rows: Array) -> Array:
        def one(row):
            return stages.encode(self.models["ae"], params, self.images.decode(row[None]))[0][0]

        return jax.lax.map(one, rows, batch_size=self.config.eval.block)

    def codes(self, seed: int) -> Array:
        """The standardised codes of all training images, [N, C]."""
        if seed not in self._codes:
            raw = self._encode(self.params(Stage("ae", seed)), self.train)
            self._codes[seed] = self.scale(seed).standardise(raw)
        return self._codes[seed]

    def posterior(self, stage: Stage) -> tuple[Array, Array]:
        """The posterior mean and log variance of all training images, [N, K] each."""
        return self._posterior(self.params(stage), self.codes(stage.seed))

    def own(self, stage: Stage) -> dict[str, Array]:
        """What a stage's batches are taken from, of its seed's own; () if it has none."""
        if stage.before is None:
            return ()
        if stage.section == "vae_plus":
            return dict(zip(("mean", "log_var"), self.posterior(stage.before), strict=True))
        return {"codes": self.codes(stage.seed)}

    def shared(self, stage: Stage) -> dict[str, Array]:
        """The same, of all seeds."""
        if stage.stage == "classifier":
            return {"images": self.train, "targets": place(self.targets.train, self._everywhere)}
        if stage.section == "vae_plus" or stage.stage == "vae_codes":
            return {}
        return {"images": self.train}

    def given(self, stage: Stage, own: Any) -> tuple[dict[str, Any], Any]:
        """What does not change while a stage is trained, and the variance that its gamma is a
        share of where it starts.
        """
        if stage.before is None:
            return {"mean": self.mean}, 1.0
        nowhere = jnp.zeros(self.config.ae.codes)
        if stage.section == "vae_plus":
            mean, log_var = own["mean"], own["log_var"]
            return {"mean": mean.mean(0)}, (mean.var(0) + jnp.exp(log_var).mean(0)).mean()
        if stage.stage == "vae_codes":
            return {"mean": nowhere}, own["codes"].var()
        frozen = {"ae": self.params(stage.before), "scale": self.scale(stage.seed)}
        return {"mean": nowhere, **frozen}, self.variance

    def objective(self, stage: Stage) -> Objective:
        """What a stage trains."""
        to_pixels = stage.stage not in ("vae_codes",) and stage.section != "vae_plus"
        return Objective(
            functools.partial(_init, self, stage.stage),
            functools.partial(_loss, self, stage.stage),
            self.images.dim if to_pixels else self.config.ae.codes,
        )

    def settings(self, stage: Stage) -> Optimisation:
        """Of its optimiser."""
        section, train = self.config[stage.section], self.config.train
        return Optimisation(
            learning_rate=section.learning_rate,
            final_learning_rate=train.final_learning_rate,
            warmup_steps=train.warmup_steps,
            total_steps=section.epochs * steps_per_epoch(len(self.images.train), train.batch_size),
            clip_norm=section.clip_norm,
        )

    def rule(self, stage: Stage) -> Any:
        """How its gamma moves; None where it has none."""
        if stage.section not in ("vae", "vae_plus"):
            return None
        rate = self.config[stage.section].gamma_rate
        return lambda member: homotopy.closed_form(rate)

    def program(self, group: Sequence[Stage]) -> Program:
        """The compiled program of a stage; groups of as many seeds share it."""
        first = group[0]
        owns = [self.own(stage) for stage in group]
        givens = [self.given(stage, own) for stage, own in zip(group, owns, strict=True)]
        starts = [self.config[first.section].get("gamma", 1.0) * float(v) for _, v in givens]
        members = stack_members(
            [
                Member(stage.seed, latents=self.config.ae.codes, gamma=start)
                for stage, start in zip(group, starts, strict=True)
            ]
        )
        stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
        data = {"rows": self.shared(first), "own": jax.tree.map(stack, *owns)}
        data |= {"given": jax.tree.map(stack, *(given for given, _ in givens))}
        key = first.stage, len(group)
        if key not in self._programs:
            self._programs[key] = Program(
                self.objective(first), self.settings(first), members,
                batch_size=self.config.train.batch_size, rule=self.rule(first), **data,
            )  # fmt: skip
            return self._programs[key]
        return self._programs[key].on(members, **data)


def _init(session: Session, name: str, member: Member, given: Any) -> dict[str, Any]:
    stage, key = Stage(name, 0), stream(member.seed, f"{name}/init")
    model = session.models[stage.section]
    if name == "classifier":
        params = model.init(key, given["mean"][None])["params"]
        if "centre" in params["body"]:
            params["body"]["centre"] = given["mean"]
        return params
    params = init_params(model, key, given["mean"])
    return {leaf: value for leaf, value in params.items() if leaf != "log_gamma"}


def _loss(session: Session, name: str, params: Any, batch: Any, at: At) -> tuple[Array, Told]:
    key = stream(at.member.seed, f"{name}/noise", at.step)
    value, metrics = _stage_loss(session, Stage(name, 0), params, batch, key, at.given)
    return value, Told(metrics, metrics.get("mean_square", jnp.nan))


def _stage_loss(
    session: Session, stage: Stage, params: Any, batch: Any, key: Array, given: Any
) -> stages.Loss:
    model, models = session.models[stage.section], session.models
    if stage.section == "vae_plus":
        to_z, to_eps = jax.random.split(key)
        z = stages.draw_latents(batch["mean"], batch["log_var"], to_z)
        return stages.vae_loss(model, params, z, latent_noise(to_eps, *z.shape), target=z)
    if stage.stage == "vae_codes":
        codes = batch["codes"]
        eps = latent_noise(key, *codes.shape)
        return stages.vae_loss(model, params, codes, eps, target=codes)
    x = session.images.decode(batch["images"])
    if stage.stage == "classifier":
        return classifier.loss(model, params, x, batch["targets"])
    if stage.stage == "ae":
        return stages.autoencoder_loss(model, params, x)
    codes, noise = batch["codes"], latent_noise(key, *batch["codes"].shape)
    decoder = stages.frozen_decoder(models["ae"], given["ae"], given["scale"])
    if stage.stage == "wae":
        weight = session.config.wae.weight
        return stages.wae_loss(
            model, params, codes, noise, target=x, decoder=decoder, weight=weight
        )
    return stages.vae_loss(model, params, codes, noise, target=x, decoder=decoder)


def make(session: Session, name: str, group: Sequence[Stage], progress: Progress) -> None:
    """Trains a group of stages; those that it needs are finished."""
    config, section = session.config, session.config[group[0].section]
    schedule = Schedule(
        section.epochs, 1, config.train.epochs_per_checkpoint,
        steps_per_epoch(len(session.images.train), config.train.batch_size),
        config.train.batch_size,
    )  # fmt: skip
    train(
        session.cells, name, group, lambda: session.program(group), schedule,
        functools.partial(_evaluate, session), progress, diverged_goes_on=False,
    )  # fmt: skip


# What a history tells beside the stage's own metrics.
NOT_IN_ROWS = ("epoch", "step", "seconds", "stopped", "open", "residual_variance")


def _evaluate(
    session: Session, stage: Stage, params: Any, state: State
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    told = session.cells.history(stage)[-1]
    row = {name: value for name, value in told.items() if name not in NOT_IN_ROWS}
    row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    if stage.stage != "ae":
        return row, {}
    codes = jax.jit(session._code_of)(params, devices.local(session.train))
    return row, jax.device_get(stages.code_scale(codes)._asdict())


def networks(session: Session, seed: int) -> dict[str, Any]:
    """The finished parameters of a pipeline by stage name, and "scale"."""
    found = {name: session.params(Stage(name, seed)) for name in pipeline(session.config)}
    return found | {"scale": session.scale(seed)}
