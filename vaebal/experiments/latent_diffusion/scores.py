"""What latent diffusion in miniature measures: of an autoencoder, of a prior over its latents."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaebal.data import some_indices
from vaebal.experiments.generation.scores import to_bytes
from vaebal.experiments.latent_diffusion.stages import CLASSIFIER, OPENING, First, Prior, Session
from vaebal.experiments.report import Row
from vaebal.generation import classifier
from vaebal.measures import evaluation
from vaebal.measures.frechet import Moments, frechet_distance, frechet_estimate
from vaebal.measures.ndb import Bins, ndb_bins, ndb_compare
from vaebal.measures.neighbours import copying, manifolds, nearest
from vaebal.models import latent_noise, prior_samples
from vaebal.streams import stream
from vaebal.training import State

COPIES = 2000  # images of each set, whose nearest training images are looked for


def effective_rank(latents: np.ndarray) -> float:
    """exp of the entropy of the covariance's eigenvalues as shares (Roy & Vetterli, 2007), [N, K].

    Of latents of K equal, uncorrelated variances it is K, and where one holds all of it, 1.
    """
    covariance = np.atleast_2d(np.cov(np.asarray(latents, np.float64), rowvar=False))
    shares = np.maximum(np.linalg.eigvalsh(covariance), 0.0)
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


class Scorer:
    """Distances of sets of images from the training images, in the classifier's features."""

    def __init__(self, session: Session):
        self._session, self._images = session, session.images
        self._settings = session.config.eval
        self.size = min(self._settings.samples, len(session.images.test))

    def as_bytes(self, rows: np.ndarray) -> np.ndarray:
        """Stored rows -> uint8 pixels [N, D]."""
        decode = jax.jit(lambda rows: to_bytes(self._images.decode(rows)))
        block = self._settings.block
        parts = [decode(rows[start : start + block]) for start in range(0, len(rows), block)]
        return np.concatenate([np.asarray(part) for part in parts])

    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, D] -> [N, F]."""
        params = self._session.params(CLASSIFIER)
        return classifier.features_and_outputs(
            self._session.classifier, params, images, self._settings.block
        )[0]

    @functools.cached_property
    def train(self) -> np.ndarray:
        """Every training image, uint8 [N, D]."""
        return self.as_bytes(self._images.train)

    @functools.cached_property
    def test_rows(self) -> np.ndarray:
        """The test images used, as they are stored."""
        return self._images.test[some_indices(len(self._images.test), self.size, "test images")]

    @functools.cached_property
    def test(self) -> np.ndarray:
        """The same, uint8."""
        return self.as_bytes(self.test_rows)

    def nearest(self, images: np.ndarray) -> np.ndarray:
        """The distance of uint8 images [N, D] from the nearest training image, in pixels."""
        return nearest(*(np.float32(rows) / 255 for rows in (self.train, images)))

    @functools.cached_property
    def held_out(self) -> np.ndarray:
        """The same of test images."""
        return self.nearest(self.test[some_indices(len(self.test), COPIES, "copies")])

    @functools.cached_property
    def bins(self) -> Bins:
        """The training images' bins, in pixels."""
        return ndb_bins(np.float32(self.train) / 255, self._settings.bins, seed=0)

    @functools.cached_property
    def reference(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The training images' features, their mean and their covariance."""
        features = self.features(self.train)
        moments = Moments.empty(features.shape[1]).update(features)
        return features, moments.mean, moments.covariance

    def distance(self, images: np.ndarray) -> float:
        """The Fréchet distance of uint8 images [N, D]."""
        features = self.features(images)
        moments = Moments.empty(features.shape[1]).update(features)
        return frechet_distance(moments.mean, moments.covariance, *self.reference[1:])

    def all_of(self, images: np.ndarray) -> Row:
        """Every measure of uint8 images [N, D]."""
        features, reference = self.features(images), self.reference[0]
        fd = frechet_estimate(features, reference, seed=0, parts=self._settings.parts)
        beside = some_indices(len(reference), len(images), "neighbours")
        near = manifolds(reference[beside], features, self._settings.neighbours)
        copied = copying(self.held_out, self.nearest(images[: len(self.held_out)]))
        ndb = ndb_compare(self.bins, np.float32(images) / 255).ndb
        return {
            "ndb": ndb, "ndb_held_out": ndb_compare(self.bins, np.float32(self.test) / 255).ndb,
            "fd_se": fd.error, "fd_extrapolated": fd.extrapolated, "fd_warning": fd.warning,
            **near._asdict(), **{f"copying_{k}": v for k, v in copied._asdict().items()},
        }  # fmt: skip

    @functools.cached_property
    def decode(self):
        """(parameters, z [B, K]) -> uint8 [B, D]."""
        model = self._session.model
        return jax.jit(
            lambda params, z: to_bytes(model.apply({"params": params}, z, method="decode"))
        )

    @functools.cache  # noqa: B019 (a scorer lives as long as its run)
    def _sampler(self, stage: str):
        second, size = self._session.prior(stage), self.size

        def sample(params, scale, seed, plain):
            z = second.sample(params, scale.mask, stream(seed, "evaluation/prior"), size)
            others = latent_noise(stream(seed, "evaluation/others"), *z.shape)
            # A plain autoencoder's decoder has seen a latent that does not vary at one value alone.
            return scale.restore(z, jnp.where(plain, scale.centre[None], others))

        return jax.jit(sample)

    def samples(self, cell: Prior, params: Any) -> np.ndarray:
        """Images drawn from a prior, uint8 [N, D].

        Latents that it leaves out are drawn from N(0, I); of a plain autoencoder they stay.
        """
        first = First(cell.arm, cell.seed)
        scale, plain = self._session.latents(first)[2], cell.arm == "none"
        z = self._sampler(cell.stage)(params, scale, cell.seed, plain)
        return np.asarray(self.decode(self._session.params(first), z))


def evaluate(
    session: Session, scorer: Scorer, cell: First | Prior, params: Any, state: State
) -> tuple[Row, dict[str, np.ndarray]]:
    """A finished cell's row, and pictures."""
    if isinstance(cell, Prior):
        return _prior_row(session, scorer, cell, params)
    params = session.keep(cell, params)
    if cell == CLASSIFIER:
        wrong = classifier.share_wrong(
            session.classifier, params, scorer.as_bytes(session.images.test), session.targets,
            session.images.image_shape, session.config.eval.block,
        )  # fmt: skip
        return {"wrong": wrong}, {}
    if cell.arm == OPENING:
        return {"gamma": float(jnp.exp(params["log_gamma"])), "open": int(state.homotopy.open)}, {}
    return _first_row(session, scorer, cell, params)


def _first_row(
    session: Session, scorer: Scorer, cell: First, params: Any
) -> tuple[Row, dict[str, np.ndarray]]:
    options = {"seed": cell.seed, "block": session.config.eval.block}
    options["decode"] = session.images.decode
    plain = cell.arm == "none"
    test = evaluation.posterior(session.model, params, scorer.test_rows, **options)
    shown = some_indices(len(session.images.train), 5000, "evaluation/train")
    train = evaluation.posterior(session.model, params, session.images.train[shown], **options)
    gamma = float(jnp.exp(params["log_gamma"]))
    mean, deviation, scale = session.latents(cell)
    whole = np.sqrt(mean.var() + np.square(deviation).mean())
    recs = {"rec": test.mean} | ({} if plain else {"rec_sampled": test.sample})
    drawn = prior_samples(
        stream(cell.seed, "evaluation/normal"), scorer.size, session.model.latents
    )
    images = {name: np.asarray(scorer.decode(params, z)) for name, z in recs.items()}
    images |= {} if plain else {"normal": np.asarray(scorer.decode(params, drawn))}
    row = {
        "gamma": gamma,
        # E|x - x_hat|^2 / (D gamma) on training images, 1 where gamma is stationary.
        "over_gamma": float(train.squared_error_sampled.mean() / session.images.dim / gamma),
        "latents": int(scale.mask.sum()),
        "effective_rank": effective_rank(mean),
        "scaling_factor": float(1 / whole),
        "error": float(test.squared_error_mean.mean()),
        "error_train": float(train.squared_error_mean.mean()),
        "error_sampled": float(
            (test.squared_error_mean if plain else test.squared_error_sampled).mean()
        ),
        "negative_elbo": float("nan") if plain else float(test.negative_elbo.mean()),
        "fd_held_out": scorer.distance(scorer.test),
        **{f"fd_{name}": scorer.distance(each) for name, each in images.items()},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    row = {name: None if value != value else value for name, value in row.items()}
    few = session.config.eval.pictures
    return row, {"images": scorer.test[:few]} | {name: each[:few] for name, each in images.items()}


def _prior_row(
    session: Session, scorer: Scorer, cell: Prior, params: Any
) -> tuple[Row, dict[str, np.ndarray]]:
    if session.stopped(First(cell.arm, cell.seed)):
        return {"stopped": 0}, {}
    images = scorer.samples(cell, params)
    row = {"fd": scorer.distance(images)}
    row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    row |= {"loss": session.cells.history(cell)[-1]["loss"]} if session.cells.history(cell) else {}
    if cell.after < max(session.config.prior.epochs):
        return row, {}
    if cell.stage == session.config.prior.stages[0]:
        row |= scorer.all_of(images)
    return row, {"samples": images[: session.config.eval.pictures]}
