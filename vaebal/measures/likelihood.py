"""Upper bounds on a Gaussian VAE's -log p(x), tighter than the encoder's samples give.

The posterior of a decoder whose variance gamma is small is narrow and correlated where q(z|x) is
diagonal: a handful of latents then leaves one sample of fifty with all the weight. Here the
proposal is the Laplace approximation instead, per image: a few Gauss-Newton steps on
-log p(x, z) from the encoder's mean, and the covariance (I + J^T J / gamma)^-1 there, J the
decoder's Jacobian. It is the posterior itself where the decoder is affine. Latents that the model
does not use keep the encoder's q: their columns of J vanish, and cost as much as others'.

A proposal is z = centre + root u, u standard normal; importance weights and annealing are in u.

Shapes: N images, D pixels, K latents, A <= K latents with the Laplace approximation, S samples,
T temperatures.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vaebal.data import Decode
from vaebal.measures import importance
from vaebal.measures.evaluation import mean_estimate
from vaebal.models import GaussianVAE
from vaebal.models.gaussians import isotropic_nll
from vaebal.streams import stream
from vaebal.units import LOG_2PI, to_unit_pixels

UNUSED = 0.9  # mean posterior variance from which a latent counts as unused
LENGTHS = (1.0, 0.5, 0.25, 0.0)  # of a Gauss-Newton step: the best of them is taken


class _Proposal(NamedTuple):
    """N(centre, root root^T), block diagonal: `used` latents correlated, the others not."""

    centre: Array  # [K]
    root: Array  # [A, A] of the used latents
    scale: Array  # [K] of the others
    log_det: Array  # [] of all of root

    def place(self, u: Array, used: np.ndarray) -> Array:
        """u [K] -> z [K]."""
        return (self.centre + self.scale * u).at[used].set(self.centre[used] + self.root @ u[used])


class _Model(NamedTuple):
    """log p(x, z) of one image, and what the encoder says of it."""

    model: GaussianVAE
    params: Any
    kappa: Array

    def decode(self, z: Array) -> Array:
        z = jnp.where(self.model.latent_mask(self.kappa), z, 0.0)
        return self.model.apply({"params": self.params}, z[None], method="decode")[0]

    def log_gamma(self) -> Array:
        return self.model.apply({"params": self.params}, method="log_gamma")

    def encode(self, x: Array) -> tuple[Array, Array]:
        mean, log_var = self.model.apply(
            {"params": self.params}, x[None], self.kappa, method="encode"
        )
        return mean[0], log_var[0]

    def log_joint(self, x: Array, z: Array) -> Array:
        """log p(x|z) + log p(z), nats."""
        nll = isotropic_nll(jnp.square(x - self.decode(z)).sum(), self.log_gamma(), x.size)
        return -nll - 0.5 * (jnp.square(z) + LOG_2PI).sum()


def _laplace(of: _Model, x: Array, used: np.ndarray, steps: int) -> _Proposal:
    """The proposal for one image x [D]; `used` [A], indices."""
    mean, log_var = of.encode(x)
    scale, gamma = jnp.exp(0.5 * log_var), jnp.exp(of.log_gamma())

    def curvature(z):
        """The Jacobian [D, A], and minus the Gauss-Newton Hessian of log p(x, z), [A, A]."""
        # Reverse mode twice: the networks' matrix products define no forward mode.
        _, pull = jax.vjp(of.decode, z)
        _, push = jax.vjp(lambda w: pull(w)[0], jnp.zeros_like(x))
        J = jax.vmap(lambda v: push(v)[0])(jnp.eye(len(z), dtype=z.dtype)[used]).T
        return J, jnp.eye(len(used), dtype=z.dtype) + J.T @ J / gamma

    def step(z, _):
        J, precision = curvature(z)
        ascent = J.T @ (x - of.decode(z)) / gamma - z[used]
        move = jnp.zeros_like(z).at[used].set(jnp.linalg.solve(precision, ascent))
        tries = z[None, :] + jnp.asarray(LENGTHS, z.dtype)[:, None] * move[None, :]
        values = jax.vmap(lambda z: of.log_joint(x, z))(tries)
        # A step too long may overflow, and NaN would count as the largest.
        return tries[jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values))], None

    with jax.default_matmul_precision("highest"):
        centre, _ = jax.lax.scan(step, mean, length=steps)
        factor = jnp.linalg.cholesky(curvature(centre)[1])
    root = jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(used)), lower=True).T
    log_det = log_var.at[used].set(0.0).sum() / 2 - jnp.log(jnp.diag(factor)).sum()
    return _Proposal(centre, root, scale, log_det)


def _log_weight(of: _Model, x: Array, at: _Proposal, used: np.ndarray, u: Array) -> Array:
    """log p(x, z) - log q(z) at z(u); 2 pi once for every latent in either."""
    z = at.place(u, used)
    return of.log_joint(x, z) + at.log_det + 0.5 * (jnp.square(u) + LOG_2PI).sum()


def _over_images(function, images: Array, block: int, seed: Array):
    """function(stored row, key) of every image, `block` of them at a time."""
    keys = jax.vmap(lambda index: stream(seed, "evaluation/likelihood", index))(
        jnp.arange(len(images))
    )
    return jax.lax.map(lambda each: function(*each), (images, keys), batch_size=block)


@functools.partial(
    jax.jit, static_argnames=("model", "used", "samples", "steps", "block", "decode")
)
def _laplace_sums(model, params, kappa, images, seed, used, samples, steps, block, decode):
    of, used = _Model(model, params, kappa), np.array(used, int)

    def one(stored, key):
        x = decode(stored[None])[0]
        at = _laplace(of, x, used, steps)
        weight = functools.partial(_log_weight, of, x, at, used)

        def add(sums, index):
            u = jax.random.normal(jax.random.fold_in(key, index), (model.latents,), x.dtype)
            return importance.add(sums, weight(u), index), None

        start = importance.empty(jnp.zeros((), x.dtype))
        return jax.lax.scan(add, start, jnp.arange(samples))[0]

    return _over_images(one, images, block, seed)


def used_latents(
    model: GaussianVAE,
    params: Any,
    images: Array,
    *,
    kappa: int | None = None,
    decode: Decode = to_unit_pixels,
) -> tuple[int, ...]:
    """Latents whose posterior variance, the mean over at most 256 `images`, is below .9."""
    kappa = model.latents if kappa is None else kappa
    x = decode(jnp.asarray(images[:256]))
    _, log_var = model.apply({"params": params}, x, kappa, method="encode")
    return tuple(np.flatnonzero(np.exp(np.asarray(log_var)).mean(0) < UNUSED).tolist())


def laplace_nll(
    model: GaussianVAE,
    params: Any,
    images: Array,
    *,
    samples: int,
    seed: int,
    block: int,
    kappa: int | None = None,
    decode: Decode = to_unit_pixels,
    steps: int = 2,
    used: tuple[int, ...] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """An upper bound on -log p(x) by S importance samples from the Laplace approximation.

    Its expectation lies above -log p(x), as with any proposal, and by less the larger the
    effective sample size. An image costs about A (`steps` + 1) + S decodes, where
    `evaluation.importance_weighted_nll` costs S.

    Args:
      images: [N, ...], stored rows of `decode`.
      samples: S, independent of other images' and of `block`.
      block: images at a time; D A numbers each are held.
      steps: of Gauss-Newton from the encoder's mean.
      used: latents that get the Laplace approximation; None: `used_latents`; (): none, which
        leaves the encoder's posterior.

    Returns:
      -(logsumexp_s log w_s - log S) [N] in nats, and the effective sample size
      (sum w)^2 / sum w^2 [N], between 1 and S.
    """
    kappa = model.latents if kappa is None else kappa
    if used is None:
        used = used_latents(model, params, images, kappa=kappa, decode=decode)
    sums = _laplace_sums(
        model, params, kappa, jnp.asarray(images), seed, used, samples, steps, block, decode
    )
    return importance.bound(sums, samples)


def laplace_beside(
    nll: np.ndarray, model: GaussianVAE, params: Any, images: Array, **options: Any
) -> dict[str, float]:
    """How much lower the bound of the Laplace approximation lies, for a row of an experiment.

    Args:
      nll: another bound on each of `images` [N] (`evaluation.importance_weighted_nll`).
      options: those of `laplace_nll`, but for `block`.

    Returns:
      "laplace_gain" with its standard error "laplace_gain_se" (nats, over images), and the median
      "laplace_effective_sample_size".
    """
    tighter, effective = laplace_nll(model, params, images, block=64, **options)
    gain, error = mean_estimate(nll - tighter)
    return {
        "laplace_gain": gain,
        "laplace_gain_se": error,
        "laplace_effective_sample_size": float(np.median(effective)),
    }


@functools.partial(
    jax.jit, static_argnames=("model", "used", "temperatures", "steps", "block", "decode")
)
def _annealed(model, params, kappa, images, seed, used, temperatures, steps, block, decode, size):
    of, used = _Model(model, params, kappa), np.array(used, int)

    def one(stored, key):
        x = decode(stored[None])[0]
        at = _laplace(of, x, used, steps)
        weight = functools.partial(_log_weight, of, x, at, used)

        def energy(u, beta):  # minus the log density of u at this temperature
            return 0.5 * jnp.square(u).sum() - beta * weight(u)

        def anneal(carry, index):
            u, total = carry
            beta = index / temperatures
            u = _hamiltonian(energy, u, beta, size, jax.random.fold_in(key, index))
            return (u, total + weight(u) / temperatures), None

        first = jax.random.normal(jax.random.fold_in(key, 0), (model.latents,), x.dtype)
        start = first, weight(first) / temperatures
        return -jax.lax.scan(anneal, start, jnp.arange(1, temperatures))[0][1]

    return _over_images(one, images, block, seed)


def _hamiltonian(energy, u: Array, beta: Array, size: float, key: Array, leaps: int = 5) -> Array:
    """One step of Hamiltonian Monte Carlo, which leaves exp(-energy(u, beta)) as it is."""
    velocity_key, accept_key = jax.random.split(key)
    height = jax.value_and_grad(energy)
    velocity = jax.random.normal(velocity_key, u.shape, u.dtype)

    def leap(carry, _):
        u, v, (_, slope) = carry
        v = v - 0.5 * size * slope
        u = u + size * v
        at = height(u, beta)
        return (u, v - 0.5 * size * at[1], at), None

    start = height(u, beta)
    (moved, v, end), _ = jax.lax.scan(leap, (u, velocity, start), length=leaps)
    gained = start[0] - end[0] + 0.5 * (jnp.square(velocity) - jnp.square(v)).sum()
    return jnp.where(jnp.log(jax.random.uniform(accept_key)) < gained, moved, u)


def annealed_nll(
    model: GaussianVAE,
    params: Any,
    images: Array,
    *,
    temperatures: int,
    seed: int,
    block: int,
    kappa: int | None = None,
    decode: Decode = to_unit_pixels,
    steps: int = 2,
    used: tuple[int, ...] | None = None,
    step_size: float = 0.3,
) -> np.ndarray:
    """An upper bound on -log p(x) by one annealed importance sample an image (Neal, 2001).

    From the proposal of `laplace_nll` to the posterior over T temperatures, five leapfrog steps
    each: dear (six gradients a temperature), for a subset, to see how far other bounds lie above.

    Args:
      temperatures: T; 1 is `laplace_nll` with one sample.
      step_size: of the leapfrog, in units of the proposal's standard deviations.

    Returns:
      [N] nats; E exp(-result) = p(x).
    """
    kappa = model.latents if kappa is None else kappa
    if used is None:
        used = used_latents(model, params, images, kappa=kappa, decode=decode)
    return np.asarray(
        _annealed(
            model, params, kappa, jnp.asarray(images), seed, used, temperatures, steps, block,
            decode, step_size,
        )
    )  # fmt: skip
