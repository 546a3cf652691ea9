"""What the generation experiment measures: every method's images, and their distances.

Shapes: N test images used, M training images that all are compared with, K latents, D pixels.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from sklearn.metrics import pairwise_distances_argmin

from vaebal.data import ImageSet, some_indices
from vaebal.errors import InputError
from vaebal.experiments.generation.pipeline import FLOW, kinds, method, methods, stage_of
from vaebal.experiments.generation.stages import ACTIVE, Session, networks
from vaebal.generation import classifier, priors, stages
from vaebal.measures import evaluation, inception, inception_weights, mmd
from vaebal.measures.frechet import frechet_estimate
from vaebal.measures.ndb import Bins, ndb_bins, ndb_compare
from vaebal.models import prior_samples
from vaebal.streams import stream
from vaebal.training import devices
from vaebal.training.workdir import read_json, save_arrays, write_atomically

INTERPOLATIONS, POINTS = 4, 9  # pairs of test images, and images on the way


def counts(config: Any, images: ImageSet) -> tuple[int, int]:
    """Training images that all are compared with, and images of every set compared."""
    reference = config.eval.reference_images or len(images.train)
    samples = config.eval.samples or len(images.test)
    return min(reference, len(images.train)), min(samples, len(images.test))


def to_bytes(x: Array) -> Array:
    """x -> uint8, as an image file would hold it: clipped to [0, 1], times 255, rounded."""
    return jnp.round(jnp.clip(x, 0.0, 1.0) * 255).astype(jnp.uint8)


def _in_blocks(function: Callable, arrays: Sequence[Any], block: int) -> Any:
    """function(*arrays), arrays [N, ...] and results cut along N; NumPy arrays."""
    size = len(arrays[0])
    parts = []
    for start in range(0, size, block):
        piece = [np.asarray(array[start : start + block]) for array in arrays]
        filled_by = min(block, size) - len(piece[0])
        filled = [np.concatenate([part, np.repeat(part[:1], filled_by, 0)]) for part in piece]
        got = jax.device_get(function(*filled))
        parts.append(got if not filled_by else jax.tree.map(lambda a: a[: size % block], got))
    return jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)


class First(NamedTuple):
    """The first VAE of a pipeline, from pixels to pixels."""

    encode: Callable[[Array], tuple[Array, Array]]  # x [B, D] -> posterior mean and log variance
    decode: Callable[[Array], Array]  # z [B, K] -> x_hat [B, D]


def first_vae(session: Session, nets: dict[str, Any], space: str) -> First:
    """Of a space; one that reads codes has the autoencoder around it."""
    stage, models = stage_of("vae", space, 0), session.models
    model, params = models[stage.network], nets[stage.stage]
    pixels, whole = stages.frozen_decoder(models["ae"], nets["ae"], nets["scale"]), ("images",)

    def encode(x: Array) -> tuple[Array, Array]:
        if stage.reads != whole:
            x = nets["scale"].standardise(stages.encode(models["ae"], nets["ae"], x)[0])
        return stages.encode(model, params, x)

    def decode(z: Array) -> Array:
        x_hat = stages.decode(model, params, z)
        return x_hat if stage.reads == whole else pixels(x_hat)

    return First(encode, decode)


def reconstruct(
    session: Session, nets: dict[str, Any], x: Array, eps: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """x [B, D] through every method, at posterior means.

    Args:
      eps: [2, B, K], for one draw from the posteriors.

    Returns:
      x_hat [B, D], and draws (VAE: of z, VAE+: of u) [B, K], by the tables' names.
    """
    models, config = session.models, session.config
    raw, x_hat = stages.mean_path(models["ae"], nets["ae"], x)
    codes = nets["scale"].standardise(raw)
    pixels = stages.frozen_decoder(models["ae"], nets["ae"], nets["scale"])
    images, latents = {"AE": x_hat}, {}
    z, codes_hat = stages.mean_path(models["wae"], nets["wae"], codes)
    images["WAE-MMD"], latents["WAE-MMD"] = pixels(codes_hat), z
    for space in config.vae.spaces:
        vae, (plus, told) = first_vae(session, nets, space), second_vae(nets, space)
        mask, (mean, log_var) = told.mask[None], vae.encode(x)
        _, z_hat = stages.mean_path(models["vae_plus"], plus, mean * mask)
        z = mean + jnp.exp(0.5 * log_var) * eps[0]
        u, log_var_u = stages.encode(models["vae_plus"], plus, z * mask)
        for kind, through, drawn in (
            ("VAE", mean, z),
            ("VAE+", jnp.where(mask > 0, z_hat, mean), u + jnp.exp(0.5 * log_var_u) * eps[1]),
        ):
            name = method(kind, space, config)
            images[name], latents[name] = vae.decode(through), drawn
        if config.flow.epochs:  # it leads back whence it came: what is reconstructed is the VAE's
            noise = transport(session, nets, space, told.standardise(z), back=True)
            latents[method(FLOW, space, config)] = jnp.where(mask > 0, noise, z)
    return images, latents


def second_vae(nets: dict[str, Any], space: str) -> tuple[Any, priors.Latents]:
    """The parameters of the VAE on a first one's latents, and which of these it models."""
    return tuple(nets[stage_of(kind, space, 0).stage] for kind in ("vae_plus", "latents"))


def transport(
    session: Session, nets: dict[str, Any], space: str, z: Array, *, back: bool = False
) -> Array:
    """Noise z [B, K] to a first VAE's latents, standardised, by flow matching; or `back`."""
    params, told = (nets[stage_of(kind, space, 0).stage] for kind in ("flow", "latents"))
    return priors.transported(session.models["flow"], params, z, told.mask, back=back)


def generate(session: Session, nets: dict[str, Any], u: Array, eps: Array) -> dict[str, Array]:
    """Samples x [B, D] of every method from the same u [B, K] ~ N(0, I).

    VAE and WAE-MMD decode u itself, VAE+ what its second stage makes of it, decoder noise
    sqrt(gamma) eps [B, K] included, and flow matching where it leads; latents that these leave
    out are eps. No noise is added to codes or pixels.
    """
    models, config = session.models, session.config
    pixels = stages.frozen_decoder(models["ae"], nets["ae"], nets["scale"])
    images = {"WAE-MMD": pixels(stages.decode(models["wae"], nets["wae"], u))}
    for space in config.vae.spaces:
        vae, (plus, told) = first_vae(session, nets, space), second_vae(nets, space)
        z = stages.sample_observed(models["vae_plus"], plus, u, eps)
        images[method("VAE", space, config)] = vae.decode(u)
        z = jnp.where(told.mask[None] > 0, z, eps)
        images[method("VAE+", space, config)] = vae.decode(z)
        if config.flow.epochs:
            z = told.restore(transport(session, nets, space, u), eps)
            images[method(FLOW, space, config)] = vae.decode(z)
    return images


def interpolate(session: Session, nets: dict[str, Any], x: Array) -> Array:
    """x [2 P, D] in pairs -> P rows of POINTS images [P, POINTS, D], through the second stage.

    Great circles between the posterior means u of each pair, decoded without noise; between those
    of the first VAE where the second one has collapsed, as all u are the same there.
    """
    model, space = session.models["vae_plus"], session.config.vae.spaces[0]
    vae, (plus, told) = first_vae(session, nets, space), second_vae(nets, space)
    mean, mask = vae.encode(x)[0], told.mask[None]
    u = stages.encode(model, plus, mean * mask)[0]
    collapsed = u.var(0).max() < ACTIVE
    ends = jnp.where(collapsed, mean, u)
    path = stages.great_circle(ends[::2], ends[1::2], POINTS)  # [POINTS, P, K]
    flat = path.reshape(-1, path.shape[-1])
    z = jnp.where(collapsed, flat, stages.decode(model, plus, flat) * mask)
    return vae.decode(z).reshape(*path.shape[:2], -1).swapaxes(0, 1)


def _some(rows: np.ndarray, count: int, name: str) -> np.ndarray:
    if count >= len(rows):
        return rows
    return rows[some_indices(len(rows), count, f"evaluation/{name}")]


class Scorer:
    """Every distance of a set of images from the training images; made when first asked."""

    def __init__(self, session: Session):
        self._session, self._config, self._images = session, session.config, session.images
        self.size = counts(session.config, session.images)

    def as_bytes(self, rows: np.ndarray) -> np.ndarray:
        """Stored rows [N, ...] -> uint8 pixels [N, D]."""
        decode = jax.jit(lambda rows: to_bytes(self._images.decode(rows)))
        return _in_blocks(decode, [rows], self._config.eval.block)

    @functools.cached_property
    def reference(self) -> np.ndarray:
        """The training images that all are compared with, uint8 [M, D]."""
        return self.as_bytes(_some(self._images.train, self.size[0], "reference"))

    @functools.cached_property
    def stored(self) -> np.ndarray:
        """The test images used, as they are stored."""
        return _some(self._images.test, self.size[1], "test images")

    @functools.cached_property
    def test(self) -> np.ndarray:
        """The same, uint8 [N, D]."""
        return self.as_bytes(self.stored)

    @functools.cached_property
    def bins(self) -> dict[int, Bins]:
        """NDB's bins by K."""
        pixels = self.reference.astype(np.float32) / 255
        settings = self._config.eval
        return {k: ndb_bins(pixels, k, seed=0, whiten=settings.whiten) for k in settings.bins}

    @functools.cached_property
    def features(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """By the name of the distance, uint8 [N, D] -> features."""
        session, block, found = self._session, self._config.eval.block, {}
        if session.targets is not None:
            params, model = session.classifier, session.models["classifier"]
            found["fd"] = lambda images: classifier.features_and_outputs(
                model, params, images, block
            )[0]
        if not self.without_fid:
            weights = inception_weights.load_params(self._config.eval.inception_weights)
            shape = self._images.image_shape
            found["fid"] = lambda images: inception.inception_features(
                weights, images.reshape(-1, *shape), min(block, 50)
            )
        return found

    @functools.cached_property
    def without_fid(self) -> str:
        """Why there is no FID; empty if there is."""
        if not self._config.eval.fid:
            return "not asked for (eval.fid)"
        try:
            inception_weights.load_params(self._config.eval.inception_weights)
        except InputError as error:
            return str(error)
        return ""

    @functools.cached_property
    def reference_features(self) -> dict[str, np.ndarray]:
        """The reference's, by the name of the distance."""
        return {name: features(self.reference) for name, features in self.features.items()}

    def __call__(self, images: np.ndarray, prefix: str) -> dict[str, Any]:
        """Every distance of uint8 images [N, D], names beginning with `prefix`."""
        row = {}
        for name, features in self.features.items():
            got = frechet_estimate(
                features(images), self.reference_features[name],
                seed=0, parts=self._config.eval.parts,
            )  # fmt: skip
            row |= {
                f"{prefix}{name}": got.value,
                f"{prefix}{name}_se": got.error,
                f"{prefix}{name}_extrapolated": got.extrapolated,
                f"{prefix}{name}_warning": got.warning,
            }
        pixels = images.astype(np.float32) / 255
        for k, bins in self.bins.items():
            got = ndb_compare(bins, pixels)
            row |= {f"{prefix}ndb_{k}": got.ndb, f"{prefix}js_{k}": got.js}
        return row

    @functools.cached_property
    def reconstructed(self) -> Callable:
        """(nets, stored rows, two [B, K] of noise) -> uint8 images, errors, draws of latents."""

        def program(nets, rows, first, second):
            x = self._images.decode(rows)
            x_hat, z = reconstruct(self._session, nets, x, jnp.stack([first, second]))
            errors = {name: jnp.square(x - each).sum(-1) for name, each in x_hat.items()}
            return jax.tree.map(to_bytes, x_hat), errors, z

        return jax.jit(program)

    @functools.cached_property
    def generated(self) -> Callable:
        """(nets, u, eps) -> uint8 images."""
        return jax.jit(lambda *args: jax.tree.map(to_bytes, generate(self._session, *args)))

    @functools.cached_property
    def interpolated(self) -> Callable:
        """(nets, x) -> uint8 images."""
        return jax.jit(lambda *args: to_bytes(interpolate(self._session, *args)))

    def about(self) -> dict[str, Any]:
        """What belongs to every row: counts, split, resize and rounding."""
        classes = self._session.targets
        about = {
            "images": self.size[1],
            "reference_images": self.size[0],
            "reference_split": "train",
            "rounding": "clipped to [0, 1], to uint8, half to even",
            "whiten": self._config.eval.whiten,
            "without_fid": self.without_fid,
            "fid_protocol": "" if self.without_fid else inception.PROTOCOL,
            "without_fd": ""
            if classes is not None
            else "the data has no labels or factors, and is not square",
        }
        if classes is not None:
            about |= {"fd_features": self._config.classifier.features, "fd_targets": classes.kind}
        return about


def _evaluated(
    session: Session, name: str, load: Callable[[], Any], evaluate: Callable[[Any], list]
) -> list[dict[str, Any]]:
    """evaluate(load()), or what it once gave. All processes load, and the first one evaluates."""
    path = session.path / "evaluation" / f"{name}.json"
    if not devices.agreed(devices.is_writer() and path.exists()):
        loaded = load()
        if session.targets is not None:
            _ = session.classifier  # which the scores will ask for
        if devices.is_writer():
            write_atomically(path, json.dumps(evaluate(devices.local(loaded)), indent=1) + "\n")
        devices.agreed(True)  # all wait until it is written
    return read_json(path)


def evaluate_images(session: Session, scorer: Scorer) -> list[dict[str, Any]]:
    """The rows that need no model: held-out images, and Downsample."""
    return _evaluated(session, "images", dict, lambda _: _image_rows(session, scorer))


def _image_rows(session: Session, scorer: Scorer) -> list[dict[str, Any]]:
    test = scorer.test
    halved = jax.jit(lambda x: to_bytes(stages.downsample(x / 255.0)))
    shape = session.images.image_shape
    down = _in_blocks(halved, [test.reshape(-1, *shape)], session.config.eval.block)
    down = down.reshape(len(test), -1)
    about = {"seed": None, **scorer.about()}
    if session.targets is not None:
        about["classifier_wrong"] = classifier.share_wrong(
            session.models["classifier"], session.classifier, session_test_bytes(session, scorer),
            session.targets, session.images.image_shape, session.config.eval.block,
        )  # fmt: skip
    error = evaluation.mean_estimate(_squared(test, down))
    return [
        {"method": "held-out images", **about, **scorer(test, "gen_")},
        {
            "method": "Downsample", **about,
            "error": error.value, "error_se": error.error,
            **scorer(down, "rec_"), **scorer(down, "gen_"),
        },
    ]  # fmt: skip


def session_test_bytes(session: Session, scorer: Scorer) -> np.ndarray:
    """All test images, uint8 [N, D]: the classifier's are not cut to eval.samples."""
    if len(scorer.test) == len(session.images.test):
        return scorer.test
    return scorer.as_bytes(session.images.test)


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Per-image squared error of uint8 images [N, D], in pixels on [0, 1]."""
    return np.square((a.astype(np.float32) - b) / 255).sum(1)


def pictures_path(session: Session, seed: int) -> Path:
    return session.path / "evaluation" / f"seed{seed}.npz"


def evaluate_pipeline(session: Session, scorer: Scorer, seed: int) -> list[dict[str, Any]]:
    """A row for every method of one seed."""
    return _evaluated(
        session,
        f"seed{seed}",
        lambda: networks(session, seed),
        lambda nets: _pipeline_rows(session, scorer, seed, nets),
    )


def _pipeline_rows(
    session: Session, scorer: Scorer, seed: int, nets: dict[str, Any]
) -> list[dict[str, Any]]:
    config, images = session.config, session.images
    size, latents, stored = scorer.size[1], config.ae.codes, scorer.stored

    def draw(name: str) -> np.ndarray:
        return np.asarray(prior_samples(stream(seed, f"evaluation/{name}"), size, latents))

    block = config.eval.block
    recs, errors, z = _in_blocks(
        functools.partial(scorer.reconstructed, nets), [stored, draw("z"), draw("u")], block
    )
    gens = _in_blocks(
        functools.partial(scorer.generated, nets), [draw("prior"), draw("decoder noise")], block
    )
    many = config.eval.pictures
    pictures = {"images": scorer.test[:many]}
    for kind, sets in (("rec", recs), ("gen", gens)):
        pictures |= {f"{kind} {n}": sets[n][:many] for n in methods(config) if n in sets}
    rows, used = [], {"AE": latents, "WAE-MMD": latents}
    for space in config.vae.spaces:
        count = int(second_vae(nets, space)[1].mask.sum())
        used |= {method(kind, space, config): count for kind in kinds(config)}
        for found in (recs, errors) if config.flow.epochs else ():
            found[method(FLOW, space, config)] = found[method("VAE", space, config)]
    for name in methods(config):
        error = evaluation.mean_estimate(errors[name])
        row = {"method": name, "seed": seed, "latents": used[name], **scorer.about()}
        row |= {"error": error.value, "error_se": error.error, **scorer(recs[name], "rec_")}
        if name in gens:
            row |= scorer(gens[name], "gen_")
            got = mmd.imq_mmd2_to_normal(jnp.asarray(z[name]))
            row |= {"mmd": float(got.value), "mmd_se": float(got.error)}
        rows.append(row)
    pixels = scorer.reference.astype(np.float32)
    for name in ("VAE", "VAE+"):
        nearest = pairwise_distances_argmin(gens[name][:many].astype(np.float32), pixels)
        pictures[f"nearest {name}"] = scorer.reference[nearest]
    pairs = images.decode(jnp.asarray(stored[: 2 * INTERPOLATIONS]))
    pictures["ends"] = scorer.test[: 2 * INTERPOLATIONS]
    pictures["interpolations"] = np.asarray(scorer.interpolated(nets, pairs))
    bins = scorer.bins[min(config.eval.bins)]
    pictures["centres"] = bins.centres
    for name in ("held-out images", *methods(config)[1:]):
        got = ndb_compare(bins, gens.get(name, scorer.test).astype(np.float32) / 255)
        pictures["bins train"] = got.train
        pictures[f"bins {name}"] = got.query
        pictures[f"different {name}"] = got.different
    save_arrays(pictures_path(session, seed), **pictures)
    return rows
