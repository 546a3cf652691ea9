"""The methods: what trains each, with which numbers, and how it counts latents.

Shapes: M examples, D features, K latents.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vaebal import homotopy
from vaebal.diagnosis import data_dimension
from vaebal.errors import InputError
from vaebal.experiments import checks
from vaebal.experiments.arena import rules
from vaebal.homotopy import Homotopy
from vaebal.models import GaussianVAE
from vaebal.training import Member

# Name -> the family, of which one program trains all, and whether a number belongs to it.
METHODS = {
    "adaptive": ("adaptive", False),
    "fixed at adaptive": ("vae", False),
    "learned": ("vae", True),
    "gradient": ("vae", True),
    "beta-VAE": ("vae", True),
    "sigma-VAE": ("vae", False),
    "moving average": ("vae", False),
    "GECO": ("vae", True),
    "ARD-VAE": ("vae", True),
    "IRMAE": ("autoencoder", True),
    "Least Volume": ("autoencoder", True),
    "log autoencoder": ("autoencoder", True),
    "TwoNN": ("neighbours", False),
    "maximum likelihood": ("neighbours", False),
    "local PCA": ("neighbours", False),
    "calibrated neighbours": ("neighbours", False),
}
FULL_SPEED = 100.0  # nats a step: gamma is the batch's E|x - x_hat|^2 / D


class Method(NamedTuple):
    """One way to find the number of latents."""

    name: str
    family: str
    setting: float | None  # its number: None where it has none, or is to be tuned
    tuned: bool


def parse(text: str) -> Method:
    """The method that `text` spells: a name, and a number where it is not to be tuned.

    Raises:
      InputError: it spells none.
    """
    name, _, number = text.rpartition(" ")
    if text in METHODS:
        family, takes = METHODS[text]
        if text != "learned":
            return Method(text, family, None, takes)
    elif name in METHODS and METHODS[name][1] and checks.is_positive(number):
        return Method(name, METHODS[name][0], float(number), False)
    raise InputError(
        f"methods holds {text!r}: use one of {', '.join(map(repr, METHODS))}, with a number above "
        "0 after those that have one ('learned 1e-3'), or without to have it tuned."
    )


def vae_rule(dim: int, member: Member) -> Homotopy:
    """The rule of any method of family "vae"."""
    numbers = member.rule
    known = [
        homotopy.fixed(),
        homotopy.closed_form(numbers["rate"]),
        homotopy.gradient(numbers["rate"], dim),
        rules.moving_average(),
        rules.geco(numbers["tolerance"]),
    ]
    return rules.chosen(known, numbers["kind"])


def vae_member(
    method: str, setting: float, seed: int, latents: int, variance: float, found: float
) -> Member:
    """A run of family "vae".

    Args:
      setting: the method's number.
      variance: the data's, of a feature on average.
      found: the gamma that the adaptive homotopy ended with on this data.
    """
    numbers = {"kind": 0.0, "rate": 0.0, "tolerance": 1.0, "ard": 0.0}
    gamma = 1.0  # the data's largest variance, where collapse is no minimum any more (Theorem 1)
    match method:
        case "fixed at adaptive":
            gamma = found
        case "learned":
            numbers |= {"kind": 1.0, "rate": setting}
        case "sigma-VAE":
            numbers |= {"kind": 1.0, "rate": FULL_SPEED}
        case "gradient":
            numbers |= {"kind": 2.0, "rate": setting}
        case "moving average":
            numbers |= {"kind": 3.0}
        case "GECO":
            numbers |= {"kind": 4.0, "tolerance": setting * variance}
        case "beta-VAE":
            gamma = setting * variance
        case "ARD-VAE":
            gamma, numbers["ard"] = setting * variance, 1.0
    return Member(seed, latents, gamma, rule=numbers)


def autoencoder_member(
    method: str, setting: float, seed: int, latents: int, variance: float
) -> Member:
    """A run of family "autoencoder"; the arguments are those of `vae_member`."""
    numbers = {"layers": 0.0, "bounded": 0.0, "volume": 0.0, "log": 0.0, "variance": variance}
    match method:
        case "IRMAE":
            numbers |= {"layers": setting}
        case "Least Volume":
            numbers |= {"bounded": 1.0, "volume": setting}
        case "log autoencoder":
            numbers |= {"bounded": 1.0, "log": setting}
    return Member(seed, latents, rule=numbers)


# ---------------------------------------------------------------- counts, by each paper's rule

ACTIVE = 0.01  # Burda et al.: Var_x(E[z|x]) above it
RELEVANT = 0.99  # ARD-VAE: the axes that explain so much of the output's variance
SINGULAR = 0.01  # IRMAE: singular values of the codes' covariance above so much of the largest
EXPLAINED = 0.99  # Least Volume: latents, by spread, that explain so much of the reconstruction


def active(mean: np.ndarray) -> int:
    """Of posterior means [M, K]."""
    return int((mean.var(0) > ACTIVE).sum())


def singular(z: np.ndarray) -> int:
    """Of codes [M, K], IRMAE's way."""
    values = np.linalg.svd(np.cov(z, rowvar=False), compute_uv=False)
    return int((values > SINGULAR * values[0]).sum())


def in_use(z: np.ndarray) -> int:
    """Of codes [M, K]: rows of eq. 6 whose mean square is above a hundredth of the largest."""
    square = np.square(z).mean(0)
    return int((square > 0.01 * square.max()).sum())


@functools.partial(jax.jit, static_argnames="model")
def _slopes(model: GaussianVAE, params: Any, z: jax.Array) -> jax.Array:
    """The decoder's derivatives at z [n, K]: [n, D, K]."""
    decode = lambda one: model.apply({"params": params}, one[None], method="decode")[0]  # noqa: E731
    return jax.vmap(jax.jacrev(decode))(z)


def relevant(model: GaussianVAE, params: Any, z: np.ndarray, *, points: int = 100) -> int:
    """ARD-VAE's relevant axes: the prior's variance times the decoder's mean absolute slope."""
    slopes = _slopes(model, params, jnp.asarray(z[:points]))
    weight = np.square(np.abs(np.asarray(slopes)).mean(0)).sum(0) * np.square(z).mean(0)
    share = np.cumsum(np.sort(weight)[::-1]) / weight.sum()
    return int((share <= RELEVANT).sum()) + 1


def explaining(decode: Callable[[np.ndarray], np.ndarray], x: np.ndarray, z: np.ndarray) -> int:
    """Least Volume's count: codes are set to their mean, those of smallest spread first."""
    error = lambda z: np.square(x - decode(z)).mean()  # noqa: E731
    order, mean = np.argsort(-z.std(0)), z.mean(0)
    whole, none = error(z), error(np.broadcast_to(mean, z.shape))
    for count in range(z.shape[1]):
        kept = mean + np.where(np.isin(np.arange(z.shape[1]), order[:count]), z - mean, 0.0)
        if error(kept) - whole <= (1 - EXPLAINED) * (none - whole):
            return count
    return z.shape[1]


def local_pca(x: np.ndarray, *, points: int = 200, neighbours: int = 100, least: float = 0.05):
    """Fukunaga & Olsen (1971): directions of a neighbourhood with 5 % of the largest variance."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=min(neighbours, len(x) - 1)).fit(x)
    _, found = search.kneighbors(x[:points])
    counts = []
    for each in found:
        values = np.linalg.svd(x[each] - x[each].mean(0), compute_uv=False) ** 2
        counts.append((values > least * values[0]).sum())
    return float(np.mean(counts))


def neighbours(x: np.ndarray) -> dict[str, float]:
    """Estimates of the dimension of x [N, D] from distances, by method."""
    found = data_dimension(x)
    return {
        "TwoNN": found.two_nn.value,
        "maximum likelihood": found.maximum_likelihood.value,
        "local PCA": local_pca(x),
        "calibrated neighbours": found.value.value,
    }
