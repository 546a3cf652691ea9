"""The stages of the generation experiment: which there are, what each is trained on, how.

A seed is a whole pipeline: "ae"; for every space in which the first VAE's error is measured
"vae_SPACE" and "vae_plus_SPACE"; "wae". Each has a folder stages/NAME_seedK with its checkpoints,
and row.json written last, which says that it is finished and is never made again.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from vaebal.data import ImageSet, mean_image, steps_per_epoch
from vaebal.errors import InputError
from vaebal.generation import classifier, stages
from vaebal.models import conv_vae, init_params, latent_noise, mlp_vae
from vaebal.models.nets import ACTIVATIONS
from vaebal.training import devices
from vaebal.training.checkpoints import Checkpoints, load_arrays, save_arrays, write_atomically
from vaebal.training.devices import place
from vaebal.training.engine import Optimisation, mesh_for
from vaebal.training.fitting import Fitter, fit
from vaebal.training.progress import Progress

CLASSIFIER_SEED = 0  # one for all pipelines, so that their distances compare


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of the pipeline `seed`."""

    name: str  # "ae", "vae_pixels", "vae_plus_pixels", "vae_codes", ..., "wae", "classifier"
    seed: int

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return f"{self.name}_seed{self.seed}"

    @property
    def section(self) -> str:
        """The config's section for it."""
        for section in ("vae_plus", "vae"):
            if self.name.startswith(section):
                return section
        return self.name

    @property
    def space(self) -> str:
        """Where the error of the first VAE on its way is measured."""
        return self.name.rpartition("_")[2]

    @property
    def before(self) -> "Stage | None":
        """The stage whose outputs this one is trained on."""
        if self.section == "vae_plus":
            return Stage(f"vae_{self.space}", self.seed)
        return None if self.name in ("ae", "classifier") else Stage("ae", self.seed)


def pipeline(config: Any, seed: int) -> list[Stage]:
    """The stages of one seed, each after the one it needs."""
    names = ["ae"]
    for space in config.vae.spaces:
        names += [f"vae_{space}", f"vae_plus_{space}"]
    return [Stage(name, seed) for name in (*names, "wae")]


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


class StageProgress(Progress):
    """Its bar, for metrics in a dictionary."""

    def stage_reporter(self) -> Callable[[int, dict[str, float]], None]:
        """A `report` for `fitting.fit`."""

        def report(epoch: int, metrics: dict[str, float]) -> None:
            names = {"loss": "loss", "squared_error": "rec", "gamma": "γ", "wrong": "wrong"}
            self._text = "  ".join(
                f"{text} {metrics[name]:.3g}" for name, text in names.items() if name in metrics
            )
            self._show(epoch, [metrics])

        return report


class Session:
    """What the stages of one workdir share: data, networks, compiled programs, finished stages."""

    def __init__(
        self, config: Any, path: Path, images: ImageSet, targets: classifier.Targets | None
    ):
        self.config, self.path, self.images, self.targets = config, path, images, targets
        self.models = build_models(config, images.image_shape, targets)
        self.stages = [stage for seed in config.train.seeds for stage in pipeline(config, seed)]
        if self.targets is not None:
            self.stages.append(Stage("classifier", CLASSIFIER_SEED))
        self._codes: tuple[int, Array] | None = None
        self._fitters: dict[str, Fitter] = {}
        everywhere = self._everywhere = NamedSharding(mesh_for(1), PartitionSpec())
        self._encode = jax.jit(self._code_of, out_shardings=everywhere)
        self._posterior = jax.jit(
            functools.partial(stages.encode, self.models["vae"]), out_shardings=everywhere
        )

    def folder(self, stage: Stage) -> Path:
        """Where a stage lies."""
        return self.path / "stages" / stage.folder

    def finished(self, stage: Stage) -> bool:
        """Whether its row is written; of several processes all ask together."""
        return devices.agreed(devices.is_writer() and (self.folder(stage) / "row.json").exists())

    def row(self, stage: Stage) -> dict[str, Any]:
        """A finished stage's row."""
        return json.loads((self.folder(stage) / "row.json").read_text())

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
        if not self.finished(stage):
            raise InputError(
                f"Stage {stage.folder!r} is not finished in {self.path}: make it first, by running "
                "the experiment in this workdir."
            )
        with Checkpoints(self.folder(stage) / "checkpoints") as saved:
            dim = self.images.dim if stage.before is None else self.config.ae.codes
            given = {"mean": np.zeros(dim, np.float32), "variance": np.float32(1)}  # their shapes
            shapes = self.fitter(stage.name).shapes(stage.seed, given)
            return saved.restore(self.row(stage)["epochs"], shapes).params

    @functools.cached_property
    def classifier(self) -> Any:
        """The finished classifier's parameters, this process's own; all load them together."""
        return devices.local(self.params(Stage("classifier", CLASSIFIER_SEED)))

    def scale(self, seed: int) -> stages.Scale:
        """What standardises the codes of the pipeline `seed`."""
        saved = load_arrays(self.folder(Stage("ae", seed)) / "scale.npz")
        return stages.Scale(**place(saved, self._everywhere))

    def raw_codes(self, params: Any) -> Array:
        """The autoencoder's codes of all training images, [N, C], as they are."""
        return self._encode(params, self.train)

    def _code_of(self, params: Any, rows: Array) -> Array:
        def one(row):
            return stages.encode(self.models["ae"], params, self.images.decode(row[None]))[0][0]

        return jax.lax.map(one, rows, batch_size=self.config.eval.block)

    def codes(self, seed: int) -> Array:
        """The standardised codes of all training images, [N, C]; the last seed's are kept."""
        if self._codes is None or self._codes[0] != seed:
            raw = self.raw_codes(self.params(Stage("ae", seed)))
            self._codes = seed, self.scale(seed).standardise(raw)
        return self._codes[1]

    def given(self, stage: Stage) -> dict[str, Any]:
        """What does not change while a stage is trained, frozen parameters among it."""
        nowhere = np.zeros(self.config.ae.codes, np.float32)
        if stage.name in ("ae", "classifier"):
            return {"mean": self.mean}
        if stage.section == "vae_plus":
            mean, log_var = self.posterior(stage.before)
            variance = (mean.var(0) + jnp.exp(log_var).mean(0)).mean()
            return {"mean": mean.mean(0), "variance": variance}
        if stage.name == "vae_codes":
            return {"mean": nowhere, "variance": self.codes(stage.seed).var()}
        return {
            "mean": nowhere,
            "variance": self.variance,
            "ae": self.params(stage.before),
            "scale": self.scale(stage.seed),
        }

    def posterior(self, stage: Stage) -> tuple[Array, Array]:
        """The posterior mean and log variance of all training images, [N, K] each."""
        return self._posterior(self.params(stage), self.codes(stage.seed))

    def rows(self, stage: Stage) -> dict[str, Array]:
        """What a stage's batches are taken from."""
        if stage.name == "classifier":
            return {"images": self.train, "targets": place(self.targets.train, self._everywhere)}
        if stage.name == "ae":
            return {"images": self.train}
        if stage.section == "vae_plus":
            return dict(zip(("mean", "log_var"), self.posterior(stage.before), strict=True))
        if stage.name == "vae_codes":
            return {"codes": self.codes(stage.seed)}
        return {"images": self.train, "codes": self.codes(stage.seed)}

    def fitter(self, name: str) -> Fitter:
        """The compiled program of a stage, the same for every seed."""
        if name not in self._fitters:
            self._fitters[name] = self._fitter(Stage(name, 0))
        return self._fitters[name]

    def _fitter(self, stage: Stage) -> Fitter:
        section, train = self.config[stage.section], self.config.train
        steps = steps_per_epoch(len(self.images.train), train.batch_size)
        settings = Optimisation(
            learning_rate=section.learning_rate,
            final_learning_rate=train.final_learning_rate,
            warmup_steps=train.warmup_steps,
            total_steps=section.epochs * steps,
            clip_norm=section.clip_norm,
            gamma_rule="closed_form",
        )
        return Fitter(
            stage.name,
            functools.partial(_init, self, stage),
            functools.partial(_loss, self, stage),
            settings,
            train.batch_size,
            section.gamma_rate if stage.section in ("vae", "vae_plus") else 0.0,
        )


def _init(session: Session, stage: Stage, key: Array, given: Any) -> dict[str, Any]:
    model = session.models[stage.section]
    if stage.name == "classifier":
        params = model.init(key, given["mean"][None])["params"]
        if "centre" in params["body"]:
            params["body"]["centre"] = given["mean"]
        return params
    params = init_params(model, key, given["mean"])
    if "log_gamma" in params:
        params["log_gamma"] = jnp.log(session.config[stage.section].gamma * given["variance"])
    return params


def _loss(session: Session, stage: Stage, params, batch, key: Array, given) -> stages.Loss:
    model, models = session.models[stage.section], session.models
    if stage.section == "vae_plus":
        to_z, to_eps = jax.random.split(key)
        z = stages.draw_latents(batch["mean"], batch["log_var"], to_z)
        return stages.vae_loss(model, params, z, latent_noise(to_eps, *z.shape), target=z)
    if stage.name == "vae_codes":
        codes = batch["codes"]
        eps = latent_noise(key, *codes.shape)
        return stages.vae_loss(model, params, codes, eps, target=codes)
    x = session.images.decode(batch["images"])
    if stage.name == "classifier":
        return classifier.loss(model, params, x, batch["targets"])
    if stage.name == "ae":
        return stages.autoencoder_loss(model, params, x)
    codes, noise = batch["codes"], latent_noise(key, *batch["codes"].shape)
    decoder = stages.frozen_decoder(models["ae"], given["ae"], given["scale"])
    if stage.name == "wae":
        weight = session.config.wae.weight
        return stages.wae_loss(
            model, params, codes, noise, target=x, decoder=decoder, weight=weight
        )
    return stages.vae_loss(model, params, codes, noise, target=x, decoder=decoder)


def make(session: Session, stage: Stage, progress: StageProgress) -> None:
    """Trains a stage, and before it the stage that it needs; what is finished stays as it is."""
    if session.finished(stage):
        progress.skip(stage.folder)
        return
    if stage.before is not None and not session.finished(stage.before):
        make(session, stage.before, progress)
    config, section = session.config, session.config[stage.section]
    progress.start(stage.folder, [stage.folder], section.epochs)
    folder, bar = session.folder(stage), progress.stage_reporter()

    def report(epoch: int, metrics: dict[str, float]) -> None:
        # In a file: the run may be killed before its row is written.
        if epoch == section.epochs and devices.is_writer():
            write_atomically(folder / "metrics.json", json.dumps(metrics))
        bar(epoch, metrics)

    with Checkpoints(folder / "checkpoints") as checkpoints:
        state, seconds = fit(
            session.fitter(stage.name),
            seed=stage.seed,
            rows=session.rows(stage),
            given=session.given(stage),
            epochs=section.epochs,
            epochs_per_checkpoint=config.train.epochs_per_checkpoint,
            checkpoints=checkpoints,
            report=report,
        )
    scale = stages.code_scale(session.raw_codes(state.params)) if stage.name == "ae" else None
    if devices.is_writer():
        if scale is not None:
            save_arrays(folder / "scale.npz", **scale._asdict())
        row = {
            "stage": stage.name,
            "seed": stage.seed,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "epochs": section.epochs,
            "steps": int(state.step),
            "train_seconds": seconds,
            **json.loads((folder / "metrics.json").read_text()),
        }
        # The row last: its presence says that the stage is finished.
        write_atomically(folder / "row.json", json.dumps(row, indent=1) + "\n")
    devices.agreed(True)  # all wait until it is written: the next stage may need it
    progress.done()


def networks(session: Session, seed: int) -> dict[str, Any]:
    """The finished parameters of a pipeline by stage name, and "scale"."""
    found = {stage.name: session.params(stage) for stage in pipeline(session.config, seed)}
    return found | {"scale": session.scale(seed)}
