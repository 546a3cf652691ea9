"""`BalancedVAE`: a VAE in balance as a scikit-learn estimator, and `fit`, which is one call."""

import functools
import io
import json
import math
import numbers
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from rich.console import Console
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from vaebal.data import digests
from vaebal.diagnosis import Certificate, diagnose
from vaebal.errors import InputError
from vaebal.estimator import rows as rows_of
from vaebal.estimator.kept import Kept
from vaebal.estimator.plan import HELD_OUT, LEAST_ROWS, Plan, plan
from vaebal.estimator.rows import Scale
from vaebal.estimator.train import BLOCK, Fitted, build
from vaebal.estimator.train import fit as train_vae
from vaebal.models import GaussianVAE, latent_noise, prior_samples
from vaebal.models.objectives import gaussian_vae_terms
from vaebal.streams import stream
from vaebal.training.workdir import write_atomically

FORMAT = 1
JUDGED, JUDGED_AT_MOST = 100, 5000  # samples that a verdict needs, and is content with
PAIRS = 4  # of draws of z, for a score


class BalancedVAE(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A VAE that ends with as many active latents as its data have dimensions.

    The adaptive homotopy finds the count, with no knowledge of it; training then goes on at that
    count until the held-out bound has settled. Data of any scale and sign, [N, D] or images
    [N, H, W, C]; all features share one scale, so features of different units want scaling before.

    Args:
      max_latents: at most so many latents; None: 32, and twice as many where all come into use.
      budget: minutes that `fit` may take, about; None: until it is done.
      seed: of the held-out rows, the start, the batches and the noise.
      path: a folder in which an interrupted fit is kept, for the same call to go on from it to the
        same end; None: nothing is kept.
      verbose: whether `fit` says what it chose and how it is getting on.

    Attributes:
      dimension_: the count, latents in use. All methods speak of these alone.
      gamma_: decoder variance, in the data's own units squared.
      error_: held-out E|x - x_hat|^2 at the posterior mean, summed over features, in their units
        squared.
      plan_: what was chosen.
      settled_: whether the count was found well before the steps ended; if not, a longer fit may
        find more.
      history_: what training told, a dictionary a chunk: "phase" 0 finds the count and 1 settles.
      certificate_: `vaebal.diagnose` of the held-out samples (some 5,000 at most), or of all where
        fewer than 100 are held out; None where there are fewer than 100, or fewer than 50 that
        differ.
      n_features_in_: D of the data.
      image_shape_: (H, W, C) of it, or None.
    """

    def __init__(
        self,
        max_latents: int | None = None,
        budget: float | None = None,
        seed: int = 0,
        path: str | Path | None = None,
        verbose: bool = False,
    ):
        self.max_latents = max_latents
        self.budget = budget
        self.seed = seed
        self.path = path
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> "BalancedVAE":
        """Fits X; y is not read.

        Raises:
          InputError: an argument cannot be meant; X is no real array of at least 8 samples, has NaN
            or infinity, or does not vary; names what and what to do.
          Diverged: training did; another seed may not.
        """
        self._check_params()
        vars(self).pop("dimension_", None)  # a fit that ends early leaves nothing half new
        begun = time.monotonic()
        deadline = np.inf if self.budget is None else begun + 60 * self.budget
        X = self._rows(X, reset=True)
        self._scale = rows_of.scale_of(X)
        seed = int(self.seed)
        order = np.random.default_rng(seed).permutation(len(X))
        held = max(2, round(HELD_OUT * len(X)))
        order = np.concatenate([np.sort(order[held:]), np.sort(order[:held])])
        rows = self._scale.standardise_in(X, order)
        train, held_out = rows[:-held], rows[-held:]
        latents, before = self.max_latents and int(self.max_latents), None
        while True:
            chosen = plan(len(train), X.shape[1], latents)
            self._say(f"{len(train):,} samples of {X.shape[1]}, {held:,} held out: {chosen}")
            got = train_vae(
                chosen, train, held_out, seed, self._tell, deadline, self._kept(chosen, rows)
            )
            if before and not got.whole:
                self._say("The budget ended it: the fit before is kept")
                chosen, got = before
                break
            full = got.open == chosen.latents < X.shape[1] and self.max_latents is None
            if not full or time.monotonic() > deadline:
                break
            latents, before = min(2 * chosen.latents, X.shape[1]), (chosen, got)
            self._say(f"All {chosen.latents} latents are in use: again with {latents}")
        self._keep(chosen, got)
        self.error_ = float(self._errors(held_out).mean()) * self._scale.scale**2
        self.certificate_ = self._certified(held_out if held >= JUDGED else rows)
        self._say(
            f"{self.dimension_} latents in use; held-out error {self.error_:.4g}, "
            f"{time.monotonic() - begun:.0f} s"
            + ("" if self.settled_ else "; the last opened late: a longer fit may find more")
        )
        return self

    def _check_params(self) -> None:
        most, budget, seed = self.max_latents, self.budget, self.seed
        if most is not None and not (isinstance(most, numbers.Integral) and most >= 1):
            raise InputError(f"max_latents={most!r} must be an integer of at least 1, or None.")
        if budget is not None and not (isinstance(budget, numbers.Real) and budget > 0):
            raise InputError(f"budget={budget!r} must be minutes above 0, or None.")
        if not (isinstance(seed, numbers.Integral) and 0 <= seed < 2**31):
            raise InputError(f"seed={seed!r} must be an integer from 0 to {2**31 - 1}.")

    def _rows(self, X: Any, reset: bool) -> np.ndarray:
        """X [N, D] or [N, H, W, C] as checked rows [N, D].

        Raises:
          InputError: in scikit-learn's words, where it refuses it.
        """
        if np.ma.is_masked(X):
            raise InputError("X has masked values: leave those samples out, or fill them.")
        try:
            X = np.asarray(X) if isinstance(X, (list, tuple)) else X
            shape = getattr(X, "shape", ())
            images = len(shape) == 4
            if images and not reset and self.image_shape_ not in (None, tuple(shape[1:])):
                raise InputError(
                    f"X has images of shape {tuple(shape[1:])}: give {self.image_shape_}, as in "
                    "`fit` (height, width, channels)."
                )
            X = validate_data(
                self, np.reshape(X, (len(X), math.prod(shape[1:]))) if images else X, reset=reset,
                ensure_min_samples=LEAST_ROWS if reset else 1, dtype="numeric",
            )  # fmt: skip
        except InputError:
            raise
        except (ValueError, RuntimeError) as error:  # PyTorch's, of a tensor with a gradient
            said = str(error).strip()
            if "NaN" in said or "infinity" in said:
                said = f"{said.splitlines()[0]} Leave those samples out, or fill them."
            raise InputError(" ".join(said.split())) from error
        if reset:
            self.image_shape_ = tuple(shape[1:]) if images else None
        return np.asarray(X)

    def _keep(self, chosen: Plan, got: Fitted) -> None:
        self.plan_, self.history_, self.settled_ = chosen, got.history, got.settled
        self.dimension_ = got.open
        self._params = jax.tree.map(np.asarray, got.params)
        self.gamma_ = float(np.exp(self._params["log_gamma"])) * self._scale.scale**2

    def _kept(self, chosen: Plan, rows: np.ndarray) -> Kept:
        """Where this fit is kept; one of more latents has a folder of its own."""
        if self.path is None:
            return Kept(None, {})
        folder = Path(self.path) / f"{chosen.latents}_latents"
        about = {"plan": list(chosen), "seed": int(self.seed), "rows": digests.of_array(rows)}
        return Kept(folder, about)

    def _errors(self, rows: np.ndarray) -> np.ndarray:
        """|x - x_hat|^2 at the posterior mean of standardised rows, [N], a few at a time."""
        parts = np.split(rows, range(16 * BLOCK, len(rows), 16 * BLOCK))
        error = lambda x: np.square(x - self._decode(self._encode(x)[0])).sum(1)  # noqa: E731
        return np.concatenate([error(part) for part in parts])

    def _certified(self, rows: np.ndarray) -> Certificate | None:
        """The verdict on standardised rows; of many, on every second, third …"""
        if len(rows) < JUDGED:
            return None
        rows, restore = rows[:: -(-len(rows) // JUDGED_AT_MOST)], self._scale.restore
        mean, log_var = self._encode(rows)
        eps = np.asarray(latent_noise(stream(0, "certificate"), *mean.shape))
        idle = ((0, 0), (0, self.plan_.latents - self.dimension_))
        try:
            return diagnose(
                restore(rows), restore(self._decode(mean)), np.pad(mean, idle),
                np.pad(log_var, idle), gamma=self.gamma_,
                x_hat_sampled=restore(self._decode(mean + np.exp(log_var / 2) * eps)),
            )  # fmt: skip
        except InputError as error:  # of data whose rows repeat: the fit is none the worse for it
            self._say(f"No verdict: {error}")
            return None

    @property
    def _model(self):
        return build(self.plan_, self.n_features_in_)

    def _tell(self, phase: str, share: float, told: dict[str, float]) -> None:
        if self.verbose and sys.stderr.isatty():
            print(
                f"\r{'finding the count' if phase == 'count' else 'settling'} {share:4.0%}  "
                f"open {told['open']:.0f}  γ {told['gamma']:.2g}  held-out bound "
                f"{told['held_out_bound']:.1f}   ",
                end="", file=sys.stderr, flush=True,
            )  # fmt: skip

    def _say(self, text: str) -> None:
        if self.verbose:
            Console(stderr=True).print(f"\r{text}", markup=False, highlight=False, soft_wrap=True)

    def _apply(self, function: Any, *arrays: np.ndarray) -> Any:
        """function of blocks of rows, always as large, so that a row's result is its own."""
        size, parts = len(arrays[0]), []
        for start in range(0, size, BLOCK):
            pieces = [array[start : start + BLOCK] for array in arrays]
            fill = BLOCK - len(pieces[0])
            filled = [np.pad(p, ((0, fill), *[(0, 0)] * (p.ndim - 1))) for p in pieces]
            got = jax.device_get(function(self._model, self._params, self.dimension_, *filled))
            parts.append(jax.tree.map(lambda leaf, fill=fill: leaf[: BLOCK - fill], got))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def _encode(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Standardised rows -> mean and log variance of latents in use, [N, dimension_] each."""
        mean, log_var = self._apply(_encoded, rows)
        return mean[:, : self.dimension_], log_var[:, : self.dimension_]

    def _decode(self, z: np.ndarray) -> np.ndarray:
        """Latents in use [N, dimension_] -> standardised rows."""
        idle = self.plan_.latents - self.dimension_
        return self._apply(_decoded, np.pad(z, ((0, 0), (0, idle))))

    def transform(self, X: Any, return_variance: bool = False) -> Any:
        """The posterior means of the latents in use, [N, dimension_].

        Args:
          return_variance: returns (means, posterior variances) instead.
        """
        check_is_fitted(self, "dimension_")
        X = self._rows(X, reset=False)
        kind = X.dtype if X.dtype == np.float64 else np.float32
        mean, log_var = (part.astype(kind) for part in self._encode(self._scale.standardise(X)))
        return (mean, np.exp(log_var)) if return_variance else mean

    @property
    def _n_features_out(self) -> int:
        return self.dimension_

    def inverse_transform(self, Z: Any) -> np.ndarray:
        """Latents [N, dimension_] -> data in their own units, [N, D] or [N, H, W, C].

        Raises:
          InputError: another number of latents, none, or values that are not finite.
        """
        check_is_fitted(self, "dimension_")
        Z = np.asarray(Z, np.float32)
        if Z.ndim != 2 or not len(Z) or Z.shape[1] != self.dimension_:
            raise InputError(
                f"Z has shape {Z.shape}: give [N, {self.dimension_}], as `transform` does."
            )
        if not np.isfinite(Z).all():
            raise InputError("Z has values that are not finite: leave those rows out.")
        return self._shaped(self._scale.restore(self._decode(Z)))

    def sample(self, n: int = 1, seed: int = 0, noise: bool = False) -> np.ndarray:
        """n samples from the prior, decoded: [n, D] or [n, H, W, C], in the data's own units.

        Args:
          noise: adds the decoder's, of variance gamma_.
        """
        check_is_fitted(self, "dimension_")
        if not (isinstance(n, numbers.Integral) and n >= 1):
            raise InputError(f"n={n!r} must be an integer of at least 1.")
        z = prior_samples(stream(seed, "samples"), int(n), self.dimension_)
        rows = self._scale.restore(self._decode(np.asarray(z)))
        if noise:
            rows += np.sqrt(self.gamma_) * np.random.default_rng(seed).normal(size=rows.shape)
        return self._shaped(rows)

    def score_samples(self, X: Any) -> np.ndarray:
        """ELBO of each sample [N]: a lower bound of its log density, nats, in its own units.

        The mean over four antithetic pairs of draws of z, the same ones for every sample.
        """
        check_is_fitted(self, "dimension_")
        rows = self._scale.standardise(self._rows(X, reset=False))
        negative_elbo = self._apply(_negative_elbo, rows)
        return -negative_elbo - rows.shape[1] * np.log(self._scale.scale)

    def score(self, X: Any, y: Any = None) -> float:
        """The mean of `score_samples`: higher is better."""
        return float(self.score_samples(X).mean())

    def _shaped(self, rows: np.ndarray) -> np.ndarray:
        return rows.reshape(-1, *self.image_shape_) if self.image_shape_ else rows

    def save(self, path: str | Path) -> None:
        """Writes all but the certificate into one .npz file, atomically; `load` reads it."""
        check_is_fitted(self, "dimension_")
        about = {
            "format": FORMAT,
            "arguments": self.get_params() | {"path": str(self.path) if self.path else None},
            "feature_names": list(getattr(self, "feature_names_in_", ())),
            "plan": self.plan_._asdict(),
            "scale": self._scale.scale,
            "open": self.dimension_,
            "error": self.error_,
            "settled": self.settled_,
            "image_shape": self.image_shape_,
            "history": self.history_,
        }
        octets = io.BytesIO()
        weights = {f"params/{k}": v for k, v in flatten_dict(self._params, sep="/").items()}
        told = json.dumps(about, default=lambda number: number.item())  # NumPy's
        np.savez(octets, about=told, mean=self._scale.mean, **weights)
        write_atomically(Path(path).expanduser(), octets.getvalue())


@functools.partial(jax.jit, static_argnames="model")
def _encoded(model: GaussianVAE, params: Any, number: Array, x: Array) -> tuple[Array, Array]:
    return model.apply({"params": params}, x, number, method="encode")


@functools.partial(jax.jit, static_argnames="model")
def _decoded(model: GaussianVAE, params: Any, number: Array, z: Array) -> Array:
    return model.apply({"params": params}, z, method="decode")


@functools.partial(jax.jit, static_argnames="model")
def _negative_elbo(model: GaussianVAE, params: Any, number: Array, x: Array) -> Array:
    eps = latent_noise(stream(0, "score"), PAIRS, model.latents)

    def one(eps):
        drawn = jnp.broadcast_to(eps, (len(x), model.latents))
        outputs = model.apply({"params": params}, x, drawn, number)
        return gaussian_vae_terms(x, outputs).negative_elbo

    return jax.vmap(one)(jnp.concatenate([eps, -eps])).mean(0)


def load(path: str | Path) -> BalancedVAE:
    """What `BalancedVAE.save` wrote.

    Raises:
      InputError: it is not there, or no such file.
    """
    path = Path(path).expanduser()
    held = rows_of.from_archive(path)
    try:
        about = json.loads(str(held["about"]))
        if about["format"] != FORMAT:
            raise InputError(f"{path} has format {about['format']}: this version reads {FORMAT}.")
        return _loaded(about, held)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not what BalancedVAE.save writes ({error}).") from error


def _loaded(about: dict[str, Any], held: dict[str, np.ndarray]) -> BalancedVAE:
    vae = BalancedVAE(**about["arguments"])
    vae._scale = Scale(held["mean"], about["scale"])
    vae.n_features_in_, shape = len(held["mean"]), about["image_shape"]
    vae.image_shape_ = tuple(shape) if shape else None
    if about.get("feature_names"):
        vae.feature_names_in_ = np.array(about["feature_names"], object)
    prefix = "params/"
    params = {k.removeprefix(prefix): v for k, v in held.items() if k.startswith(prefix)}
    params, settled = unflatten_dict(params, sep="/"), about["settled"]
    got = Fitted(params, about["open"], about["history"], whole=settled, settled=settled)
    vae._keep(Plan(**about["plan"]), got)
    vae.error_, vae.certificate_ = about["error"], None
    return vae


def fit(X: Any, **arguments: Any) -> BalancedVAE:
    """Fits a `BalancedVAE` to X and says how it is getting on.

    Args:
      X: an array [N, D] or images [N, H, W, C] of any scale; or the path of a .npy, .npz or .csv
        file, or of a folder of images.
      arguments: those of `BalancedVAE`.

    Raises:
      ValueError: X cannot be used, or read.
    """
    if isinstance(X, str | Path):
        X = rows_of.read(X)
    return BalancedVAE(**{"verbose": True, **arguments}).fit(X)
