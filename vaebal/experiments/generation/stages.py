"""The stages of the generation experiment: what each is trained on, and how.

A seed is a whole pipeline: "ae"; for every space in which the first VAE's error is measured
"vae_SPACE", "vae_plus_SPACE" and, where asked for, "flow_SPACE"; "wae". Seeds of a small stage
train together.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from vaebal import homotopy
from vaebal.data import ImageSet, mean_image, steps_per_epoch
from vaebal.experiments.cells import Cells, Schedule, parameters, train, worth_stacking
from vaebal.experiments.gamma.evaluate import largest_variance
from vaebal.experiments.generation.pipeline import SECOND, Stage, pipeline
from vaebal.generation import classifier, priors, stages
from vaebal.homotopy.rules import RELEASED_RATE
from vaebal.models import GaussianVAE, conv_vae, init_params, latent_noise, mlp_vae
from vaebal.models.nets import ACTIVATIONS
from vaebal.streams import stream
from vaebal.theory.collapse import collapse
from vaebal.training import (
    At,
    Member,
    Objective,
    Optimisation,
    Program,
    State,
    Told,
    devices,
    gaussian_vae,
    mesh_for,
    stack_members,
    state_shapes,
)
from vaebal.training.devices import place
from vaebal.training.progress import Progress

CLASSIFIER_SEED = 0  # one for all pipelines, so that their distances compare
# What the networks have in which latents are opened one by one: see `gamma.fields.one_by_one`.
BALANCED = {"encoder_skip": True}
ACTIVE = 0.01  # variance of a latent's posterior means, above which it tells of x


def build_models(
    config: Any, image_shape: tuple[int, int, int], targets: classifier.Targets | None
) -> dict[str, nn.Module]:
    """The networks by config section; kappa of the small ones is the number of codes.

    Raises:
      ValueError: images that convolutions do not fit.
    """
    activation, settings = ACTIVATIONS[config.train.activation], config.ae
    shared = {"latents": settings.codes, "activation": activation, "residual": True}
    models: dict[str, nn.Module] = {
        "ae": _of_images(config, image_shape, shared | {"affine_skip": False, "gamma": 1.0}, {}),
        "vae_images": _of_images(config, image_shape, shared | {"affine_skip": True}, BALANCED),
    }
    for network in ("vae", "vae_balanced", "vae_plus", "wae"):
        small = config[network.removesuffix("_balanced")]
        model = mlp_vae(
            outputs=settings.codes, width=small.width, encoder_layers=small.layers,
            decoder_blocks=small.blocks, affine_skip=True,
            log_var_init=small.get("log_var_init", 0.0),
            gamma=1.0 if network == "wae" else None,
            **shared, **(BALANCED if network == "vae_balanced" else {}),
        )  # fmt: skip
        models[network] = model.clone(linear_variance=network == "vae_balanced")
    models["flow"] = priors.Velocity(settings.codes, config.flow.width, config.flow.blocks)
    if targets is not None:
        models["classifier"] = classifier.build(
            image_shape, targets.outputs, features=config.classifier.features,
            width=config.classifier.width, activation=activation,
        )  # fmt: skip
    return models


def _of_images(config: Any, image_shape: tuple, shared: dict, of_mlp: dict) -> GaussianVAE:
    settings = config.ae
    if settings.network == "conv":
        model = conv_vae(
            image_shape=image_shape, patch=settings.patch, width=settings.width,
            blocks=settings.blocks, **shared,
        )  # fmt: skip
    else:
        model = mlp_vae(
            outputs=int(np.prod(image_shape)), width=settings.width,
            encoder_layers=settings.layers, decoder_blocks=settings.blocks, **shared, **of_mlp,
        )  # fmt: skip
    return model.clone(linear_variance=bool(of_mlp))


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
        self._everywhere = NamedSharding(mesh_for(1), PartitionSpec())

    def _groups(self) -> dict[str, list[Stage]]:
        groups: dict[str, list[Stage]] = {}
        seeds = self.config.train.seeds
        for name in pipeline(self.config):
            stacked = worth_stacking(self._parameters(Stage(name, 0)))
            for group in [list(seeds)] if stacked else [[seed] for seed in seeds]:
                called = f"{name}_seed{'-'.join(map(str, group))}"
                groups[called] = [Stage(name, seed) for seed in group]
        if self.targets is not None:
            one = Stage("classifier", CLASSIFIER_SEED)
            groups[one.name] = [one]
        return groups

    def _parameters(self, stage: Stage) -> int:
        if stage.kind != "flow":
            return parameters(self.models[stage.network])
        shapes = jax.eval_shape(
            second_flow(self).init, jax.random.key(0), np.ones(self.config.ae.codes)
        )
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

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
        """A finished stage's parameters; latents that were never opened are as training had them.

        Raises:
          InputError: it is not finished.
        """
        # One of a seed that is none of the config's is a group of its own, never finished.
        groups = ((n, g) for n, g in self.groups.items() if stage in g)
        name, group = next(groups, (stage.name, [stage]))
        mean = np.zeros((len(group), self._inputs(stage)), np.float32)  # for its shape
        members = stack_members([Member(each.seed) for each in group])
        shapes = state_shapes(
            self.objective(stage), self.settings(stage), self.rule(stage), members,
            mean if stage.alone else {"mean": mean},
        )  # fmt: skip
        params = self.cells.params(stage, name, group.index(stage), shapes)
        if stage.balanced and stage.kind == "vae":
            params = collapse(params, slice(self.cells.row(stage.before)["open"], None))
        return params

    def _inputs(self, stage: Stage) -> int:
        return self.images.dim if stage.reads == ("images",) else self.config.ae.codes

    @functools.cached_property
    def classifier(self) -> Any:
        """The finished classifier's parameters, this process's own; all load them together."""
        return devices.local(self.params(Stage("classifier", CLASSIFIER_SEED)))

    def scale(self, seed: int) -> stages.Scale:
        """What standardises the codes of the pipeline `seed`."""
        return stages.Scale(**place(self.cells.arrays(Stage("ae", seed)), self._everywhere))

    def posterior_of_images(self, network: str, params: Any, rows: Array) -> tuple[Array, Array]:
        """Means and log variances [N, K] of stored rows, of a network that reads images."""

        def one(row):
            x = self.images.decode(row[None])
            return jax.tree.map(lambda a: a[0], stages.encode(self.models[network], params, x))

        return jax.lax.map(one, rows, batch_size=self.config.eval.block)

    def jitted(self, function: Callable, *arguments: Any) -> Any:
        """`function` of the arguments in one compiled call, its results on every device."""
        return jax.jit(function, out_shardings=self._everywhere)(*arguments)

    def codes(self, seed: int) -> Array:
        """The standardised codes of all training images, [N, C]."""
        if seed not in self._codes:
            encode = functools.partial(self.posterior_of_images, "ae")
            raw = self.jitted(encode, self.params(Stage("ae", seed)), self.train)[0]
            self._codes[seed] = self.scale(seed).standardise(raw)
        return self._codes[seed]

    def posterior(self, stage: Stage) -> tuple[Array, Array]:
        """A first VAE's posterior mean and log variance of all training images, [N, K] each."""
        if stage.reads == ("images",):
            encode = functools.partial(self.posterior_of_images, stage.network)
            return self.jitted(encode, self.params(stage), self.train)
        encode = functools.partial(stages.encode, self.models[stage.network])
        return self.jitted(encode, self.params(stage), self.codes(stage.seed))

    def own(self, stage: Stage) -> dict[str, Array]:
        """What a stage's batches are taken from, of its seed's own; () if it has none."""
        if stage.reads == ("latents",):
            return dict(zip(("mean", "log_var"), self.posterior(stage.before), strict=True))
        return {"codes": self.codes(stage.seed)} if "codes" in stage.reads else ()

    def shared(self, stage: Stage) -> dict[str, Array]:
        """The same, of all seeds."""
        if stage.kind == "classifier":
            return {"images": self.train, "targets": place(self.targets.train, self._everywhere)}
        return {"images": self.train} if "images" in stage.reads else {}

    def given(self, stage: Stage, own: Any) -> tuple[Any, Any]:
        """What does not change while a stage is trained, and the variance that its gamma is a
        share of where it starts.
        """
        if stage.kind in SECOND:
            latents = taking_part(own["mean"], own["log_var"])
            mean, mask = latents.centre * latents.mask, latents.mask
            spread = jnp.square(latents.scale) @ mask / mask.sum()
            return {"mean": mean, "latents": latents}, spread
        mean = jnp.zeros(self.config.ae.codes) if "codes" in stage.reads else self.mean
        if stage.alone:
            target = own["codes"].var() if own else self.variance
            return mean, self._largest(own) if stage.kind == "opening" else target
        if stage.before is None:
            return {"mean": mean}, 1.0
        frozen = {"ae": self.params(stage.before), "scale": self.scale(stage.seed)}
        return {"mean": mean, **frozen}, self.variance

    def _largest(self, own: Any) -> Any:
        """lambda_1 of the codes, or of the images: above it total collapse is a minimum."""
        if not own:
            return largest_variance(self.images)
        return jnp.linalg.eigvalsh(jnp.cov(own["codes"], rowvar=False))[-1]

    def objective(self, stage: Stage) -> Objective:
        """What a stage trains."""
        if stage.alone:
            return gaussian_vae(self.models[stage.network], functools.partial(_read, self, stage))
        return Objective(
            functools.partial(_init, self, stage.stage),
            functools.partial(_loss, self, stage.stage),
            self.config.ae.codes if stage.kind in SECOND else self.images.dim,
        )

    def schedule(self, stage: Stage) -> Schedule:
        """How long it trains, on batches of how many."""
        section, train = self.config[stage.section], self.config.train
        batch_size = section.get("batch_size", train.batch_size)
        return Schedule(
            section.settled_epochs if settles(stage) else section.epochs,
            1, train.epochs_per_checkpoint,
            steps_per_epoch(len(self.images.train), batch_size), batch_size,
        )  # fmt: skip

    def settings(self, stage: Stage) -> Optimisation:
        """Of its optimiser."""
        section, train = self.config[stage.section], self.config.train
        schedule = self.schedule(stage)
        rate = section.settled_learning_rate if settles(stage) else section.learning_rate
        own = {}
        if stage.balanced:
            own = {"beta2": section.beta2, "weight_decay": section.weight_decay}
        return Optimisation(
            learning_rate=rate,
            final_learning_rate=(section if stage.balanced else train).final_learning_rate,
            warmup_steps=train.warmup_steps,
            total_steps=schedule.epochs * schedule.steps,
            clip_norm=section.clip_norm,
            **own,
        )

    def rule(self, stage: Stage) -> Any:
        """How its gamma moves; None where it has none."""
        section = self.config[stage.section]
        if stage.kind == "opening":
            dim, steps = self._inputs(stage), self.settings(stage).total_steps
            return lambda member: homotopy.adaptive(
                dim, steps, rate=section.fastest, patience=section.patience
            )
        if stage.kind not in ("vae", "vae_plus"):
            return None
        rate = RELEASED_RATE if stage.balanced else section.gamma_rate
        return lambda member: homotopy.closed_form(rate)

    def program(self, group: Sequence[Stage]) -> Program:
        """The compiled program of a stage; groups of as many seeds share it."""
        first, objective = group[0], self.objective(group[0])
        owns = [self.own(stage) for stage in group]
        givens = [self.given(stage, own) for stage, own in zip(group, owns, strict=True)]
        share = self.config[first.section].get("gamma", 1.0)
        members = [
            Member(stage.seed, latents=self.config.ae.codes, gamma=share * float(variance))
            for stage, (_, variance) in zip(group, givens, strict=True)
        ]
        givens = [given for given, _ in givens]
        if settles(first):  # from where latents were opened, at their number
            objective = objective._replace(init=lambda member, weights: weights)
            givens = [self._weights(stage.before) for stage in group]
            ended = [self.cells.row(stage.before) for stage in group]
            members = [
                member._replace(latents=row["open"], gamma=row["gamma"])
                for member, row in zip(members, ended, strict=True)
            ]
        members, stack = stack_members(members), lambda *leaves: jnp.stack(leaves)
        data = {"rows": self.shared(first), "own": jax.tree.map(stack, *owns)}
        data |= {"given": jax.tree.map(stack, *givens)}
        key = first.stage, len(group)
        if key not in self._programs:
            self._programs[key] = Program(
                objective, self.settings(first), members,
                batch_size=self.schedule(first).batch_size, rule=self.rule(first), **data,
            )  # fmt: skip
            return self._programs[key]
        return self._programs[key].on(members, **data)

    def _weights(self, stage: Stage) -> Any:
        return {name: leaf for name, leaf in self.params(stage).items() if name != "log_gamma"}


def settles(stage: Stage) -> bool:
    """Whether it goes on from where latents were opened one by one."""
    return stage.balanced and stage.kind == "vae"


def taking_part(mean: Array, log_var: Array) -> priors.Latents:
    """Which latents tell of x by their posteriors' means and log variances [N, K]; all if none
    does.
    """
    found = priors.latents_of(mean, jnp.exp(0.5 * log_var), ACTIVE)
    mask = jnp.where(found.mask.any(), found.mask, 1.0)
    whole = jnp.sqrt(mean.var(0) + jnp.exp(log_var).mean(0))
    return found._replace(mask=mask, scale=jnp.where(mask > 0, whole, 1.0))


def _read(session: Session, stage: Stage, batch: Any) -> Array:
    """What a VAE of its own input is given of a batch, [B, D]."""
    (name,) = stage.reads
    return batch["codes"] if name == "codes" else session.images.decode(batch["images"])


def _init(session: Session, name: str, member: Member, given: Any) -> dict[str, Any]:
    stage, key = Stage(name, 0), stream(member.seed, f"{name}/init")
    model = session.models[stage.network]
    if stage.kind == "flow":
        return second_flow(session).init(key, jnp.ones(model.latents))
    if name == "classifier":
        params = model.init(key, given["mean"][None])["params"]
        if "centre" in params["body"]:
            params["body"]["centre"] = given["mean"]
        return params
    params = init_params(model, key, given["mean"])
    return {leaf: value for leaf, value in params.items() if leaf != "log_gamma"}


def second_flow(session: Session) -> priors.SecondStage:
    """Flow matching over the latents of a first VAE."""
    model = session.models["flow"]
    return priors.flow_matching(model.latents, model.width, model.blocks)


def _loss(session: Session, name: str, params: Any, batch: Any, at: At) -> tuple[Array, Told]:
    key = stream(at.member.seed, f"{name}/noise", at.step)
    value, metrics = _stage_loss(session, Stage(name, 0), params, batch, key, at.given)
    return value, Told(metrics, metrics.get("mean_square", jnp.nan))


def _stage_loss(
    session: Session, stage: Stage, params: Any, batch: Any, key: Array, given: Any
) -> stages.Loss:
    model, models = session.models[stage.network], session.models
    if stage.kind in SECOND:
        to_z, to_eps = jax.random.split(key)
        z, mask = stages.draw_latents(batch["mean"], batch["log_var"], to_z), given["latents"].mask
        if stage.kind == "flow":
            z = given["latents"].standardise(z)
            return second_flow(session).loss(params, z, mask, to_eps)
        z *= mask[None]
        eps = latent_noise(to_eps, *z.shape)
        return stages.vae_loss(model, params, z, eps, target=z, mask=mask)
    x = session.images.decode(batch["images"])
    if stage.kind == "classifier":
        shown = classifier.posed(
            session.targets, session.images.image_shape, x, batch["targets"], key
        )
        return classifier.loss(model, params, *shown)
    if stage.kind == "ae":
        return stages.autoencoder_loss(model, params, x)
    codes, noise = batch["codes"], latent_noise(key, *batch["codes"].shape)
    decoder = stages.frozen_decoder(models["ae"], given["ae"], given["scale"])
    if stage.kind == "wae":
        weight = session.config.wae.weight
        return stages.wae_loss(
            model, params, codes, noise, target=x, decoder=decoder, weight=weight
        )
    return stages.vae_loss(model, params, codes, noise, target=x, decoder=decoder)


def make(session: Session, name: str, group: Sequence[Stage], progress: Progress) -> None:
    """Trains a group of stages; those that it needs are finished."""
    train(
        session.cells, name, group, lambda: session.program(group), session.schedule(group[0]),
        functools.partial(_evaluate, session), progress, diverged_goes_on=False,
    )  # fmt: skip


# What a history tells beside the stage's own metrics.
NOT_IN_ROWS = (
    *("epoch", "step", "seconds", "stopped", "open", "residual_variance"),
    *("gradient_norm", "latent_gradient", "active", "informative"),
)


def _evaluate(
    session: Session, stage: Stage, params: Any, state: State
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    told = session.cells.history(stage)[-1]
    row = {name: value for name, value in told.items() if name not in NOT_IN_ROWS}
    row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    if stage.kind == "opening":
        row["open"] = int(state.homotopy.open)
    if stage.kind != "ae":
        return row, {}
    encode = jax.jit(functools.partial(session.posterior_of_images, "ae"))
    codes = encode(params, devices.local(session.train))[0]
    return row, jax.device_get(stages.code_scale(codes)._asdict())


def networks(session: Session, seed: int) -> dict[str, Any]:
    """The finished parameters of a pipeline by stage name, "scale", and by "latents_SPACE" which of
    a first VAE's latents its second stages model, and what standardises them.
    """
    made = [Stage(name, seed) for name in pipeline(session.config)]
    found = {stage.stage: session.params(stage) for stage in made if stage.kind != "opening"}
    for stage in made:
        if stage.kind == "vae":
            name = stage.stage.replace("vae", "latents", 1)
            found[name] = session.jitted(taking_part, *session.posterior(stage))
    return found | {"scale": session.scale(seed)}
