"""Learned against fixed gamma on images (Table 2, Figure 1), and the speed of gamma's descent.

A run is an arm (how gamma moves), a data set's true dimension r where it is known, and a seed.
The seeds of an arm and r train together, and one compiled program serves every arm and r: rates,
prescribed ends and fixed values of gamma are its inputs.
"""

import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vaebal.data import MANIFOLDS, Decode, ImageSet, mean_image, steps_per_epoch
from vaebal.errors import Diverged, InputError
from vaebal.experiments import checks, inputs, report
from vaebal.experiments.gamma import page as gamma_report
from vaebal.measures import evaluation, mmd
from vaebal.models import GaussianVAE, conv_vae, infogan_vae, mlp_vae, prior_samples
from vaebal.models.nets import ACTIVATIONS, PRODUCTS
from vaebal.streams import stream
from vaebal.theory.collapse import collapse
from vaebal.training import devices
from vaebal.training.checkpoints import (
    Checkpoints,
    load_arrays,
    save_arrays,
    write_atomically,
)
from vaebal.training.engine import Member, Optimisation, Trainer, fit, member_params, stack_members
from vaebal.training.progress import Progress
from vaebal.training.streaming import StreamingTrainer

NETWORKS = ("conv", "infogan", "mlp")


@dataclasses.dataclass(frozen=True)
class Arm:
    """How gamma moves.

    Attributes:
      name: as in the config: "adaptive", "guarded", "learned RATE", "adam RATE",
        "annealed RATE to ARM", "fixed at ARM".
      kind: its first word.
      rate: nats of log gamma a step, at most; 0 for a fixed gamma.
      of: the arm whose final gamma this one ends at; "" for a learned gamma.
    """

    name: str
    kind: str
    rate: float
    of: str = ""


class Run(NamedTuple):
    """One training run; r = 0 where the data's true dimension is not known."""

    arm: str
    rank: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.arm.replace(' ', '_')}_r{self.rank}_seed{self.seed}"


def parse_arm(text: str, fastest: float) -> Arm:
    """The arm that `text` spells; the adaptive homotopy moves at most `fastest` nats a step.

    Raises:
      InputError: it spells none.
    """
    match text.split():
        case ["adaptive" | "guarded"]:
            return Arm(text, text, fastest)
        case ["learned" | "adam" as kind, rate] if _is_rate(rate):
            return Arm(text, kind, float(rate))
        case ["annealed", rate, "to", *of] if of and _is_rate(rate):
            return Arm(text, "annealed", float(rate), " ".join(of))
        case ["fixed", "at", *of] if of:
            return Arm(text, "fixed", 0.0, " ".join(of))
    raise InputError(
        f"train.arms holds {text!r}: an arm is 'adaptive', 'guarded', 'learned RATE', 'adam "
        "RATE', 'annealed RATE to ARM' or 'fixed at ARM', with a RATE in nats of log γ a step."
    )


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def arms(config: Any) -> list[Arm]:
    """The config's arms, each after the arm whose final gamma it needs.

    Raises:
      InputError: an arm that none spells, or that needs the final gamma of one that is not run.
    """
    found: list[Arm] = []
    for text in checks.distinct(config, "train.arms"):
        arm = parse_arm(text, config.train.fastest)
        if arm.of.startswith("fixed"):
            raise InputError(
                f"train.arms holds {text!r}: {arm.of!r} has no γ of its own; name the arm that it "
                "is fixed at."
            )
        if arm.of and arm.of not in [other.name for other in found]:
            raise InputError(
                f"train.arms holds {text!r}, but {arm.of!r} is not run before it, so its final γ "
                "is not known: put it earlier in the list."
            )
        found.append(arm)
    return found


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
        *("eval.train_images", "eval.mmd_samples", "train.guard_memory"),
    )
    checks.positive_numbers(config, "train.learning_rate", "train.clip_norm", "train.fastest")
    checks.positive_numbers(
        config, "data.noise", "model.gamma", "train.final_learning_rate", "train.warmup_steps",
        "train.guard", "train.slowest", "train.patience", "train.jitter", zero=True,
    )  # fmt: skip
    if not 0 < config.train.beta2 < 1:
        raise InputError(f"train.beta2={config.train.beta2!r} must lie between 0 and 1.")
    checks.one_of(config, "model.network", NETWORKS)
    checks.one_of(config, "model.activation", tuple(ACTIVATIONS))
    checks.one_of(config, "model.products", tuple(PRODUCTS))
    if config.model.remat and config.model.network != "conv":
        raise InputError(
            f"model.remat=True does nothing for model.network={config.model.network!r}: set it to "
            "False, or the network to 'conv'."
        )
    for field, nothing in (("pool", 1), ("encoder_skip", False)):
        if config.model[field] != nothing and config.model.network != "mlp":
            raise InputError(
                f"model.{field}={config.model[field]} does nothing for model.network="
                f"{config.model.network!r}: set it to {nothing}, or the network to 'mlp'."
            )
    release = tuple(config.train.release)
    if len(release) != 2 or not 0 <= release[0] < release[1] <= 1:
        raise InputError(
            f"train.release={release!r} must be two shares of the steps, 0 <= start < end <= 1."
        )


def open_data(config: Any, rank: int) -> ImageSet:
    """The images, on a manifold of dimension `rank` where that is not 0."""
    return inputs.open_data(config, rank)


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


def largest_variance(images: ImageSet, *, rows: int = 4096, steps: int = 50) -> float:
    """lambda_1 of the first `rows` training images, above which total collapse is a minimum."""
    used = jnp.asarray(images.train[:rows])

    @jax.jit
    def power(used):
        mean = mean_image(used, images.decode)
        v = jax.random.normal(stream(0, "largest variance"), mean.shape)

        def step(_, carry):
            v, _ = carry
            along = lambda row: (lambda x: x * (x @ v))(images.decode(row[None])[0] - mean)  # noqa: E731
            image = jax.lax.map(along, used, batch_size=256).mean(0)
            size = jnp.linalg.norm(image)
            return image / size, size

        return jax.lax.fori_loop(0, steps, step, (v / jnp.linalg.norm(v), jnp.zeros(())))[1]

    return float(power(used))


class Session:
    """What the runs of one workdir share: the path, the data by r, and compiled programs."""

    def __init__(self, config: Any, path: Path, opened: dict[int, ImageSet] | None = None):
        """`opened`: images by r that are loaded already."""
        self.config, self.path, self._opened = config, path, opened or {}
        self._data: tuple[int, ImageSet, float] | None = None
        self._programs: dict[tuple, Trainer | StreamingTrainer] = {}

    def data(self, rank: int) -> tuple[ImageSet, float]:
        """The images of `rank` and where gamma starts; the last ones asked for are kept."""
        if self._data is None or self._data[0] != rank:
            images = self._opened.pop(rank, None) or open_data(self.config, rank)
            self._data = (rank, images, self.config.model.gamma or largest_variance(images))
        return self._data[1:]

    def model(self, images: ImageSet) -> GaussianVAE:
        """The network."""
        return build_model(self.config, images.image_shape)

    def member(self, run: Run, arm: Arm) -> Member:
        """The run's part of the program's inputs."""
        _, gamma_start = self.data(run.rank)
        member = Member(run.seed, self.config.model.latents, gamma_start, arm.rate)
        if arm.of:
            # NaN of a run that stopped: gamma starts there, so that this one stops at once.
            gamma_end = self.row(run._replace(arm=arm.of)).get("gamma", math.nan)
            if arm.kind == "fixed" or math.isnan(gamma_end):
                return member._replace(gamma_start=gamma_end)
            return member._replace(gamma_end=gamma_end)
        if arm.kind in ("adaptive", "guarded"):
            released = float(arm.kind == "adaptive")
            return member._replace(
                gamma_guard=self.config.train.guard,
                gamma_release=released,
                jitter=self.config.train.jitter,
                patience=self.config.train.patience,
            )
        return member

    def trainer(self, runs: Sequence[Run], arm: Arm) -> Trainer | StreamingTrainer:
        """The compiled program of `runs`, an arm's seeds on one data set."""
        train, (images, _) = self.config.train, self.data(runs[0].rank)
        rule = "adam" if arm.kind == "adam" else "adaptive"
        members = stack_members([self.member(run, arm) for run in runs])
        key = rule, images.train.shape
        if key in self._programs:
            return self._programs[key].on(members, images.train)
        steps = steps_per_epoch(len(images.train), train.batch_size)
        settings = Optimisation(
            learning_rate=train.learning_rate,
            final_learning_rate=train.final_learning_rate,
            warmup_steps=train.warmup_steps,
            total_steps=train.epochs * steps,
            clip_norm=train.clip_norm,
            gamma_rule=rule,
            release=tuple(train.release),
            slowest=train.slowest,
            guard_memory=train.guard_memory,
            beta2=train.beta2,
        )
        build = StreamingTrainer if streams(self.config, images) else Trainer
        program = build(
            self.model(images), settings, members, images.train, train.batch_size, images.decode,
            shard_parameters=train.shard_parameters,
        )  # fmt: skip
        self._programs[key] = program
        return program

    def folder(self, run: Run) -> Path:
        """Where the run's row, history and pictures lie."""
        return self.path / "runs" / run.name

    def row(self, run: Run) -> dict[str, Any]:
        """The row of a run that has finished or stopped."""
        return json.loads((self.folder(run) / "row.json").read_text())

    def write_row(self, run: Run, row: dict[str, Any]) -> None:
        """Writes what `row` reads."""
        write_atomically(self.folder(run) / "row.json", json.dumps(row, indent=1) + "\n")

    def finished(self, run: Run) -> bool:
        """Whether the run's row is written."""
        return (self.folder(run) / "row.json").exists()

    def history(self, run: Run) -> list[dict[str, float]]:
        """Metrics at every chunk's end, up to the last checkpoint."""
        file = self.folder(run) / "history.jsonl"
        return list(map(json.loads, file.read_text().splitlines())) if file.exists() else []


def run(config: Any, workdir: str) -> list[dict[str, Any]]:
    """Trains, evaluates and reports every run; what `workdir` holds already is not done again.

    Raises:
      InputError: a field, the data or the workdir cannot be used; before any work.
      Diverged: some runs stopped; the others are reported.
    """
    check(config)
    ranks = tuple(config.data.ranks) if config.data.name in MANIFOLDS else (0,)
    images = open_data(config, ranks[0])
    check_against_data(config, images)
    path = inputs.open_run(config, workdir, images)
    session = Session(config, path, {ranks[0]: images})
    found = {arm.name: arm for arm in arms(config)}
    groups = [
        [Run(name, rank, seed) for seed in config.train.seeds] for rank in ranks for name in found
    ]
    runs = list(itertools.chain(*groups))
    print(
        f"{config.name}: {len(runs)} runs of {config.train.epochs} epochs on {images.name} "
        f"({len(images.train)} training and {len(images.test)} test images, {images.image_shape}), "
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s); workdir {path}",
        flush=True,
    )
    with Progress(len(groups), path / "tensorboard") as progress:
        for group in groups:
            if devices.agreed(devices.is_writer() and all(map(session.finished, group))):
                progress.skip(group_name(group))
            else:
                _train(session, group, found[group[0].arm], progress)
    devices.agreed(True)  # all wait until the first process has written the last rows
    rows = {each: session.row(each) for each in runs}
    finished = {each: row for each, row in rows.items() if "stopped" not in row}
    stopped = report.stopped(
        {each.name: row for each, row in rows.items()},
        "Lower train.learning_rate or the arm's rate (an arm that needs the γ* of a stopped run "
        "stops at step 0)",
    )
    if finished and devices.is_writer():
        gamma_report.write(
            config,
            path,
            list(finished.values()),
            stopped,
            {each: session.history(each) for each in finished},
            {each: load_arrays(session.folder(each) / "pictures.npz") for each in finished},
            images,
        )
    if stopped:
        raise Diverged(stopped)
    return list(rows.values())


def group_name(runs: Sequence[Run]) -> str:
    """The name of an arm's seeds on one data set."""
    return f"{runs[0]._replace(seed=0).name[:-1]}{'-'.join(str(run.seed) for run in runs)}"


def _train(session: Session, runs: Sequence[Run], arm: Arm, progress: Progress) -> None:
    config, name = session.config, group_name(runs)
    progress.start(name, [run.name for run in runs], config.train.epochs)
    start = time.perf_counter()
    trainer, (images, _) = session.trainer(runs, arm), session.data(runs[0].rank)
    steps = steps_per_epoch(len(images.train), config.train.batch_size)
    bar = progress.reporter(steps * config.train.batch_size)
    # By epoch, as a killed run may have written more than it goes on from.
    lines = {run: {e["epoch"]: json.dumps(e) for e in session.history(run)} for run in runs}

    def record(epoch, epochs, metrics, seconds):
        for index, run in enumerate(runs if devices.is_writer() else ()):
            if metrics.stopped[index] >= 0:
                continue
            entry = {"epoch": epoch, "step": epoch * steps}
            entry |= {field: float(value[index]) for field, value in metrics._asdict().items()}
            lines[run][epoch] = json.dumps(entry)
        bar(epoch, epochs, metrics, seconds)

    def write_histories():
        for run, written in lines.items() if devices.is_writer() else ():
            if written:
                # Whole: a full disk would leave half a line, and buckets let nothing be appended.
                text = "".join(f"{line}\n" for line in written.values())
                write_atomically(session.folder(run) / "history.jsonl", text)

    with Checkpoints(session.path / "checkpoints" / name, write_histories) as checkpoints:
        state = fit(
            trainer,
            epochs=config.train.epochs,
            epochs_per_chunk=config.train.epochs_per_chunk,
            epochs_per_checkpoint=config.train.epochs_per_checkpoint,
            checkpoints=checkpoints,
            report=record,
        )
    seconds = (time.perf_counter() - start) / len(runs)
    state = devices.local(state._replace(opt_state=()))
    gamma_starts = devices.local(trainer.members.gamma_start)
    if not devices.is_writer():
        return
    model = session.model(images)
    for index, run in enumerate(runs):
        progress.note(f"evaluating {run.name}")
        row, step = run._asdict(), int(state.stopped[index])
        if step >= 0:
            session.write_row(run, row | {"stopped": step})
            continue
        params = member_params(state, index)
        number = int(state.open[index])
        for latent in range(number, model.latents):
            params = collapse(params, latent)  # what was never opened, as training had it
        row |= {
            "open": number,
            **evaluate(config, model, params, run.seed, images),
            "gamma_start": float(gamma_starts[index]),
            "kappa": config.model.latents,
            "epochs": config.train.epochs,
            "steps": config.train.epochs * steps,
            "batch_size": config.train.batch_size,
            "data": images.name,
            "noise": config.data.noise,
            "test_images": len(images.test),
            "train_seconds": seconds,
        }
        pictures = draw_pictures(config, model, params, run.seed, images)
        save_arrays(session.folder(run) / "pictures.npz", **pictures)
        # The row last: its presence says that the run is finished.
        session.write_row(run, row)
    progress.done()


def evaluate(
    config: Any, model: GaussianVAE, params: Any, seed: int, images: ImageSet
) -> dict[str, Any]:
    """Every number of one run's row; `x` with its standard error `x_se` over the test images."""
    options = {"seed": seed, "block": config.eval.block, "decode": images.decode}
    test = evaluation.posterior(model, params, jnp.asarray(images.test), **options)
    train = evaluation.posterior(
        model, params, jnp.asarray(images.train[: config.eval.train_images]), **options
    )
    gamma = float(jnp.exp(model.apply({"params": params}, method="log_gamma")))
    z = jnp.asarray(test.sample[: config.eval.mmd_samples])
    active = test.mean.var(0) > 0.01
    residual = evaluation.mean_estimate(gamma - train.squared_error_sampled / images.dim)
    whole = mmd.imq_mmd2_to_normal(z)
    used = mmd.imq_mmd2_to_normal(z[:, active]) if active.any() else (0.0, 0.0)
    estimates = {
        "error_mean": evaluation.mean_estimate(test.squared_error_mean),
        "error_sampled": evaluation.mean_estimate(test.squared_error_sampled),
        "negative_elbo": evaluation.mean_estimate(test.negative_elbo),
        "gamma_residual_train": residual,
        "active_0.01": evaluation.active_units(test.mean),
        "active_0.1": evaluation.active_units(test.mean, 0.1),
        "mmd": whole,
        "mmd_active": used,
    }
    row: dict[str, Any] = {"gamma": gamma}
    for name, (value, error) in estimates.items():
        row[name], row[f"{name}_se"] = float(value), float(error)
    factors, shares = [], []
    if images.test_factors is not None:
        factors = factor_r2(
            train.mean[:, active], images.train_factors[: len(train.mean)],
            test.mean[:, active], images.test_factors,
        )  # fmt: skip
        shares = factor_shares(test.mean, images.test_factors).tolist()
    return row | {
        "gamma_residual_relative": float(residual.value / gamma),
        "kl": float(test.kl.sum()),
        "active_latents": np.flatnonzero(active).tolist(),
        "informative": int((test.variance < 0.5).sum()),
        "residual_over_gamma": residual_variance(model, params, images, config.eval.block) / gamma,
        "factor_r2": factors,
        "factor_shares": shares,
        "kl_per_dimension": test.kl.tolist(),
        "variance_per_dimension": test.variance.tolist(),
    }


def residual_variance(
    model: GaussianVAE, params: Any, images: ImageSet, block: int, *, steps: int = 30
) -> float:
    """The largest variance of x - x_hat(mean) along any direction, over the first test images.

    Of whole blocks of them, and at most 4,096: the residuals are held together.
    """
    rows = min(len(images.test), 4096)
    size = rows // block * block or rows
    blocks = jnp.asarray(images.test[:size]).reshape(-1, min(block, size), *images.test.shape[1:])
    return float(_residual_variance(model, params, blocks, images.decode, steps))


@functools.partial(jax.jit, static_argnames=("model", "decode", "steps"))
def _residual_variance(model: GaussianVAE, params, blocks, decode: Decode, steps: int):
    apply = functools.partial(model.apply, {"params": params})

    def residual(rows):
        x = decode(rows)
        return x - apply(apply(x, method="encode")[0], method="decode")

    residuals = jax.lax.map(residual, blocks).reshape(-1, model.outputs)
    residuals = residuals - residuals.mean(0)[None, :]
    v = jax.random.normal(stream(0, "evaluation/residual"), (model.outputs,))

    def step(_, carry):
        v, _ = carry
        image = (residuals @ v) @ residuals / len(residuals)
        length = jnp.linalg.norm(image)
        return image / length, length

    return jax.lax.fori_loop(0, steps, step, (v / jnp.linalg.norm(v), jnp.zeros(())))[1]


def factor_r2(
    train_z: np.ndarray, train_factors: np.ndarray, test_z: np.ndarray, test_factors: np.ndarray
) -> list[float]:
    """R^2 of every true factor, predicted from latents [N, K] by their 10 nearest neighbours.

    1: the active latents determine the factor, smoothly; about -0.1, the noise of ten
    neighbours' mean, where they know nothing of it.
    """
    from sklearn.neighbors import KNeighborsRegressor

    if train_z.shape[1] == 0:
        return [0.0] * test_factors.shape[1]
    found = KNeighborsRegressor(10, weights="distance").fit(train_z, train_factors)
    errors = np.square(found.predict(test_z) - test_factors).mean(0)
    return (1 - errors / test_factors.var(0)).tolist()


def factor_shares(z: np.ndarray, factors: np.ndarray, *, bins: int = 10) -> np.ndarray:
    """The share of a latent's variance that one factor alone explains: [N, K], [N, r] -> [K, r].

    The first-order Sobol index, Var(E[z_k | factor]) / Var(z_k), by the variance between `bins`
    bins of as many examples each, less what chance alone puts there (Kelley's epsilon squared), so
    about 0, and now and then below, where they are independent. 0 for a constant latent.
    """
    size = len(z) // bins * bins
    shares = np.zeros((z.shape[1], factors.shape[1]))
    for index, factor in enumerate(factors.T):
        held = z[np.argsort(factor)[:size]].reshape(bins, -1, z.shape[1]).astype(np.float64)
        within = held.var(1, ddof=1).mean(0)
        whole = held.reshape(size, -1).var(0, ddof=1)
        shares[:, index] = 1 - within / np.where(whole > 0, whole, 1.0)
        shares[whole == 0, index] = 0.0
    return shares


def draw_pictures(
    config: Any, model: GaussianVAE, params: Any, seed: int, images: ImageSet
) -> dict[str, np.ndarray]:
    """The first test images, their reconstructions, and samples from the prior."""
    x = images.decode(jnp.asarray(images.test[: config.eval.pictures]))
    mean, _ = model.apply({"params": params}, x, method="encode")
    z = prior_samples(stream(seed, "evaluation/pictures"), len(x), model.latents)
    decode: Callable = lambda z: model.apply({"params": params}, z, method="decode")  # noqa: E731
    pictures = {"images": x, "reconstructions": decode(mean), "samples": decode(z)}
    return jax.tree.map(np.asarray, pictures)
