"""The affine VAE (eq. 3, Theorem 1): energy, optimum, and every stationary point.

    L = E_x E_z ||x - W_x z - b_x||^2 / gamma + d log gamma
        + sum_k (s_k^2 - log s_k^2) + E_x ||W_z x + b_z||^2,   z = W_z x + b_z + s eps.

Energies are in eq. 3's own units, L = 2(-ELBO) - d log 2pi + kappa; to nats of -ELBO
and back by `vaebal.units.eq3_to_negative_elbo` and `negative_elbo_to_eq3`. The data
enter by their mean and covariance (divided by N) alone. gamma is a variance.

Precision. Called with values, every function computes in float64 whatever JAX's
setting; where x64 is off it returns NumPy float64, because JAX would round its own
float64 arrays to float32 at their next use. Called with tracers (inside jit, grad,
vmap) it computes in the caller's precision: enter `jax.enable_x64(True)` around these.
Shapes are checked always, values only where there are values.

The landscape
-------------
With the encoder at its best, W = W_x leaves

    F(W) = tr(cov C^-1) + sum_k log d_k + (d - kappa) log gamma + kappa,

C = W W^T + gamma I, d_k = |w_k|^2 + gamma. dF/dW = 0 reads cov W = W M D^-1 M, with
M = W^T W + gamma I and D = diag(d_1..d_kappa) the diagonal of M. As W^T cov W is
symmetric, M commutes with D: columns of unequal norm are orthogonal. So the columns
fall into groups of equal norm, mutually orthogonal, and a group of m columns with
d_k = delta shares p <= m eigenvectors u_i of the covariance:

    W_g W_g^T = sum_i (mu_i - gamma) u_i u_i^T,   mu_i = sqrt(lambda_i delta) > gamma,
    sum_i mu_i + (m - p) gamma = m delta   (the trace of M's block).

This is a quadratic for sqrt(delta), and by Schur and Horn any such spectrum can be
spread over m columns of equal norm. p = m = 1 gives delta = lambda_i: one column along
one axis. p = 1 < m is one direction shared by m columns; p >= 2 mixes directions. These
are all the stationary points. Unused columns are the group p = 0, delta = gamma.

The Hessian of F falls apart under the reflections u_i -> -u_i. J the directions used,
g over all groups, the unused columns' among them, its negative eigenvalues number

    #{i in J, j not in J: lambda_j > lambda_i}
    + sum_g (m_g - p_g) (#{j not in J: lambda_j delta_g > gamma^2}
                         + #{l in J outside g: delta_l < delta_g})
    + #{i, l in different groups: (lambda_i - lambda_l)(delta_i - delta_l) < 0}
    + sum_{g used} (m_g - 1).

On the axes only the first two lines are left: (kappa - |J|)(a - |J|) with
a = #{lambda_i > gamma}, and the pairs out of order. Any group with m_g > 1 has a
direction of descent (turn two of its columns towards each other: C stays, sum log d_k
falls), any axis-aligned point but the top min(a, kappa) directions has one too:
Theorem 1. The encoder's block of the full Hessian is positive definite, so that the
full Hessian in (W_x, b_x, W_z, b_z, log s^2) has as many negative eigenvalues as F's.
The paper states the theorem; this list of all stationary points and this count are
derived here, and held against dense Hessians and root finders by the tests.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vaebal.models import Outputs
from vaebal.models.gaussians import reparameterise
from vaebal.models.objectives import gaussian_vae_terms
from vaebal.units import negative_elbo_to_eq3


class AffineVAE(NamedTuple):
    """q(z|x) = N(W_z x + b_z, diag exp(log_s2)), p(x|z) = N(W_x z + b_x, gamma I)."""

    W_x: Array  # [D, K]
    b_x: Array  # [D]
    W_z: Array  # [K, D]
    b_z: Array  # [K]
    log_s2: Array  # [K]


# ---------------------------------------------------------------- arguments


def _is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def _check_array(name: str, value: Any, symbols: str, shape: tuple[int, ...]) -> None:
    """`value` has exactly `shape` and, where it has values, finite real ones."""
    if np.shape(value) != shape:
        raise ValueError(f"{name} must be {symbols} = {shape}, but has shape {np.shape(value)}.")
    if _is_traced(value):
        return
    array = np.asarray(value)
    if np.iscomplexobj(array):
        raise ValueError(f"{name} must be real, but has dtype {array.dtype}.")
    if not np.isfinite(array.astype(np.float64)).all():
        raise ValueError(f"{name} has NaN or infinite entries; remove them first.")


def _rounding(array: np.ndarray) -> float:
    """What rounding may do to the entries and eigenvalues of a covariance [D, D]."""
    dtype = array.dtype if jnp.issubdtype(array.dtype, jnp.floating) else np.float64
    return 8 * len(array) * float(jnp.finfo(dtype).eps) * float(np.abs(array).max())


def _check_covariance(cov: Any) -> int:
    """`cov` is a covariance [D, D]; returns D."""
    shape = np.shape(cov)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
        raise ValueError(f"cov must be square, [D, D] with D >= 1, but has shape {shape}.")
    _check_array("cov", cov, "[D, D]", shape)
    if _is_traced(cov):
        return shape[0]
    array = np.asarray(cov)
    tolerance = _rounding(array)
    array = array.astype(np.float64)
    asymmetry = np.abs(array - array.T).max()
    if asymmetry > tolerance:
        raise ValueError(
            f"cov is not symmetric: it differs from cov.T by up to {asymmetry:.3g}; if that is "
            "rounding, pass (cov + cov.T) / 2."
        )
    try:  # a Cholesky factor costs a tenth of the eigenvalues, which only a refusal needs
        np.linalg.cholesky(array + tolerance * np.eye(len(array)))
    except np.linalg.LinAlgError:
        least = np.linalg.eigvalsh(array)[0]
        if least < -tolerance:
            raise ValueError(
                f"cov is indefinite: its least eigenvalue is {least:.6g}, and a covariance has "
                "none below 0; compute it in float64 or clip its eigenvalues at 0."
            ) from None
    return shape[0]


def _check_moments(mean: Any, cov: Any) -> int:
    """Mean [D] and covariance [D, D]; returns D."""
    dim = _check_covariance(cov)
    _check_array("mean", mean, "[D]", (dim,))
    return dim


def _check_gamma(gamma: Any) -> None:
    _check_array("gamma", gamma, "a scalar", ())
    if not _is_traced(gamma) and not gamma > 0:
        raise ValueError(f"gamma = {gamma} must be above 0: it is the decoder's variance.")


def _check_kappa(kappa: Any) -> int:
    """`kappa` is a Python or NumPy integer of at least 1; returns it as an int."""
    try:
        value = 0 if isinstance(kappa, bool | np.bool_) else operator.index(kappa)
    except TypeError:
        value = 0
    if value < 1:
        raise ValueError(f"kappa = {kappa!r} must be an integer of at least 1.")
    return value


def _check_decoder(name: str, W_x: Any) -> tuple[int, int]:
    """`W_x` is [D, K]; returns D and K."""
    shape = np.shape(W_x)
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{name} must be [D, K] with D, K >= 1, but has shape {shape}.")
    _check_array(name, W_x, "[D, K]", shape)
    return shape


def _check_params(params: Any, dim: int) -> AffineVAE:
    params = AffineVAE(*params)
    data, latents = _check_decoder("params.W_x", params.W_x)
    if data != dim:
        raise ValueError(f"params.W_x must be [D, K] with cov's D = {dim}, but has D = {data}.")
    _check_array("params.b_x", params.b_x, "[D]", (dim,))
    _check_array("params.W_z", params.W_z, "[K, D]", (latents, dim))
    _check_array("params.b_z", params.b_z, "[K]", (latents,))
    _check_array("params.log_s2", params.log_s2, "[K]", (latents,))
    return params


def _in_float64(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), in float64 unless an argument is traced. See the module's docstring."""
    if any(_is_traced(leaf) for leaf in jax.tree.leaves(args)):
        return function(*args)
    args = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), args)
    if jax.config.jax_enable_x64:
        return function(*args)
    with jax.enable_x64(True):
        return jax.tree.map(lambda leaf: leaf[()], jax.device_get(function(*args)))


# ------------------------------------------------------------------- energy


@jax.jit
def _squared_error(params: AffineVAE, mean: Array, cov: Array) -> Array:
    W_x, b_x, W_z, b_z, log_s2 = params
    # R cov R^T, R = I - W_x W_z, as it stands: expanding the square would subtract numbers
    # of the size of tr(cov) to leave one of the size of gamma.
    R_cov = cov - W_x @ (W_z @ cov)
    R = jnp.eye(len(mean), dtype=cov.dtype) - W_x @ W_z
    offset = mean - W_x @ (W_z @ mean + b_z) - b_x
    noise = jnp.exp(log_s2) * jnp.square(W_x).sum(0)
    return (R_cov * R).sum() + jnp.square(offset).sum() + noise.sum()


@jax.jit
def _energy(params: AffineVAE, mean: Array, cov: Array, gamma: Array) -> Array:
    W_z, log_s2 = params.W_z, params.log_s2
    return (
        _squared_error(params, mean, cov) / gamma
        + len(mean) * jnp.log(gamma)
        + (jnp.exp(log_s2) - log_s2).sum()
        + ((W_z @ cov) * W_z).sum()
        + jnp.square(W_z @ mean + params.b_z).sum()
    )


def affine_energy(params: AffineVAE, mean: Array, cov: Array, gamma: Array) -> Array:
    """Eq. 3 in closed form, in its own units; O(D^2 K).

    Args:
      params: the model; K is its number of columns.
      mean: x_bar [D].
      cov: covariance of the data [D, D], divided by N; may be singular.
      gamma: decoder variance, a scalar above 0.

    Returns:
      L, a scalar. `eq3_to_negative_elbo(L, D, K)` is -ELBO in nats per example.

    Raises:
      ValueError: naming the argument that is not what it must be.
    """
    params = _check_params(params, _check_moments(mean, cov))
    _check_gamma(gamma)
    return _in_float64(_energy, params, mean, cov, gamma)


def affine_squared_error(params: AffineVAE, mean: Array, cov: Array) -> Array:
    """E ||x - x_hat||^2 with x_hat from sampled z, summed over the D dimensions; a scalar."""
    params = _check_params(params, _check_moments(mean, cov))
    return _in_float64(_squared_error, params, mean, cov)


def affine_outputs(params: AffineVAE, x: Array, eps: Array, gamma: Array) -> Outputs:
    """The affine VAE as a Gaussian VAE: x [B, D], eps [B, K] -> what an objective sees."""
    posterior_mean = x @ params.W_z.T + params.b_z[None, :]
    log_var = jnp.broadcast_to(params.log_s2[None, :], posterior_mean.shape)
    z = reparameterise(posterior_mean, log_var, eps)
    return Outputs(z @ params.W_x.T + params.b_x[None, :], posterior_mean, log_var, jnp.log(gamma))


@jax.jit
def _energy_draws(params, mean, cov, gamma, noise_x, noise_z):
    # A root of cov by eigh, as Cholesky refuses the singular ones.
    eigenvalues, eigenvectors = jnp.linalg.eigh(cov)
    root = eigenvectors * jnp.sqrt(jnp.maximum(eigenvalues, 0.0))[None, :]
    x = mean[None, :] + noise_x @ root.T
    terms = gaussian_vae_terms(x, affine_outputs(params, x, noise_z, gamma))
    return negative_elbo_to_eq3(terms.negative_elbo, len(mean), len(params.log_s2))


def affine_energy_draws(
    params: AffineVAE, mean: Array, cov: Array, gamma: Array, noise_x: Array, noise_z: Array
) -> Array:
    """Eq. 3 by Monte Carlo, through the objective of the general Gaussian VAE.

    Nothing here is shared with `affine_energy`: x is drawn from N(mean, cov), z from
    q(z|x), and `gaussian_vae_terms` says what they cost.

    Args:
      params, mean, cov, gamma: as for `affine_energy`.
      noise_x: standard normal [S, D].
      noise_z: standard normal [S, K].

    Returns:
      [S] independent draws, in eq. 3's units; their expectation is `affine_energy`.
    """
    params = _check_params(params, _check_moments(mean, cov))
    _check_gamma(gamma)
    samples = np.shape(noise_x)[:1]
    _check_array("noise_x", noise_x, "[S, D]", (*samples, np.shape(mean)[0]))
    _check_array("noise_z", noise_z, "[S, K]", (*samples, np.shape(params.b_z)[0]))
    return _in_float64(_energy_draws, params, mean, cov, gamma, noise_x, noise_z)


# ------------------------------------------------------------- best encoder


@jax.jit
def _optimal_encoder(W_x: Array, mean: Array, gamma: Array) -> AffineVAE:
    M = W_x.T @ W_x + gamma * jnp.eye(W_x.shape[1], dtype=W_x.dtype)
    W_z = jnp.linalg.solve(M, W_x.T)
    return AffineVAE(
        W_x=W_x,
        b_x=jnp.asarray(mean, W_x.dtype),
        W_z=W_z,
        b_z=-W_z @ mean,
        log_s2=jnp.log(gamma) - jnp.log(jnp.diag(M)),
    )


def affine_optimal_encoder(W_x: Array, mean: Array, gamma: Array) -> AffineVAE:
    """The model with decoder W_x [D, K] and everything else at its best.

    b_x = mean, W_z = (W_x^T W_x + gamma I)^-1 W_x^T, b_z = -W_z b_x and
    s_k^2 = gamma / (|w_k|^2 + gamma): the one minimum of eq. 3 for this W_x, whatever the
    covariance (where that is singular, W_z is free on its null space).
    """
    dim, _ = _check_decoder("W_x", W_x)
    _check_array("mean", mean, "[D]", (dim,))
    _check_gamma(gamma)
    return _in_float64(_optimal_encoder, W_x, mean, gamma)


@jax.jit
def _profile_energy(W_x: Array, cov: Array, gamma: Array) -> Array:
    dim, latents = W_x.shape
    M = W_x.T @ W_x + gamma * jnp.eye(latents, dtype=W_x.dtype)
    R = jnp.eye(dim, dtype=W_x.dtype) - W_x @ jnp.linalg.solve(M, W_x.T)  # gamma C^-1
    return (
        (cov * R).sum() / gamma
        + jnp.log(jnp.diag(M)).sum()
        + (dim - latents) * jnp.log(gamma)
        + latents
    )


def affine_profile_energy(W_x: Array, cov: Array, gamma: Array) -> Array:
    """Eq. 3 with the encoder and b_x at their best for W_x [D, K]; a scalar, O(D^2 K).

    tr(cov C^-1) + sum_k log(|w_k|^2 + gamma) + (d - kappa) log gamma + kappa. At least
    tr(cov C^-1) + log|C| + kappa (Hadamard), probabilistic PCA's 2(-log-likelihood)
    - d log 2pi + kappa, with equality exactly where W_x^T W_x is diagonal.
    """
    dim = _check_covariance(cov)
    data, _ = _check_decoder("W_x", W_x)
    if data != dim:
        raise ValueError(f"W_x must be [D, K] with cov's D = {dim}, but has D = {data}.")
    _check_gamma(gamma)
    return _in_float64(_profile_energy, W_x, cov, gamma)


# ----------------------------------------------------------- global minimum


def _spectrum(cov: Array) -> Array:
    """Eigenvalues [D], largest first; those that rounding left below 0 are 0."""
    return jnp.maximum(jnp.linalg.eigvalsh(cov)[::-1], 0.0)


def _model_variances(eigenvalues: Array, kappa: int, gamma: Array) -> Array:
    """Eigenvalues of C at the global minimum: max(lambda_i, gamma) for i <= kappa, else gamma."""
    active = jnp.arange(len(eigenvalues)) < kappa
    return jnp.where(active, jnp.maximum(eigenvalues, gamma), gamma)


def _minimum(eigenvalues: Array, kappa: int, gamma: Array) -> Array:
    variances = _model_variances(eigenvalues, kappa, gamma)
    return (jnp.log(variances) + eigenvalues / variances).sum() + kappa


@functools.partial(jax.jit, static_argnums=1)
def _global_minimum(cov: Array, kappa: int, gamma: Array) -> Array:
    return _minimum(_spectrum(cov), kappa, gamma)


def affine_global_minimum(cov: Array, kappa: int, gamma: Array) -> Array:
    """The least value of eq. 3 at fixed gamma; a scalar, in eq. 3's units.

    sum_{i<=q} log lambda_i + (d - q) log gamma + q + sum_{i>q} lambda_i / gamma + kappa,
    with q = #{i <= kappa: lambda_i > gamma}.

    Args:
      cov: [D, D].
      kappa: number of latents, at least 1; may exceed D.
      gamma: decoder variance, a scalar above 0.
    """
    _check_covariance(cov)
    kappa = _check_kappa(kappa)
    _check_gamma(gamma)
    return _in_float64(lambda cov, gamma: _global_minimum(cov, kappa, gamma), cov, gamma)


@functools.partial(jax.jit, static_argnums=2)
def _global_minimizer(mean: Array, cov: Array, kappa: int, gamma: Array) -> AffineVAE:
    eigenvalues, eigenvectors = jnp.linalg.eigh(cov)
    W = eigenvectors * jnp.sqrt(jnp.maximum(eigenvalues - gamma, 0.0))[None, :]
    W_x = jnp.pad(W[:, ::-1][:, :kappa], ((0, 0), (0, max(kappa - len(mean), 0))))
    return _optimal_encoder(W_x, mean, gamma)


def affine_global_minimizer(mean: Array, cov: Array, kappa: int, gamma: Array) -> AffineVAE:
    """One global minimum: columns sqrt(lambda_i - gamma) u_i, largest first, the rest zero.

    The others are its permutations of columns and changes of sign (and rotations among
    equal eigenvalues).
    """
    _check_moments(mean, cov)
    kappa = _check_kappa(kappa)
    _check_gamma(gamma)
    return _in_float64(
        lambda mean, cov, gamma: _global_minimizer(mean, cov, kappa, gamma), mean, cov, gamma
    )


# --------------------------------------------------------------- gamma free


@functools.partial(jax.jit, static_argnums=1)
def _global_gamma(cov: Array, kappa: int) -> Array:
    eigenvalues = _spectrum(cov)
    # kappa >= d takes all axes, and L* is then the same for every gamma up to lambda_d.
    return eigenvalues[kappa:].mean() if kappa < len(cov) else eigenvalues[-1]


def affine_global_gamma(cov: Array, kappa: int) -> Array:
    """The gamma whose global minimum is least: the mean of the eigenvalues beyond kappa.

    Probabilistic PCA's noise variance. It is 0 (to rounding) where kappa reaches the rank
    of a singular covariance: an infimum, L* -> -infinity like (d - r) log gamma. With
    kappa >= d, L* does not depend on gamma <= lambda_d, and lambda_d is returned.
    """
    _check_covariance(cov)
    kappa = _check_kappa(kappa)
    return _in_float64(lambda cov: _global_gamma(cov, kappa), cov)


class GammaPath(NamedTuple):
    """Global minima along a path of gamma, each [S]."""

    gamma: Array  # decoder variance
    active: Array  # nonzero columns of W_x, #{i <= kappa: lambda_i > gamma}
    energy: Array  # L*, eq. 3's units
    squared_error_sampled: Array  # E||x - x_hat||^2 at sampled z
    squared_error_mean: Array  # E||x - x_hat||^2 at the posterior mean


@functools.partial(jax.jit, static_argnums=1)
def _gamma_path(cov: Array, kappa: int, gamma: Array) -> GammaPath:
    eigenvalues = _spectrum(cov)

    def at(gamma):
        variances = _model_variances(eigenvalues, kappa, gamma)
        active = variances > gamma
        return GammaPath(
            gamma=gamma,
            active=active.sum(),
            energy=_minimum(eigenvalues, kappa, gamma),
            # An active axis errs by gamma: gamma^2 / lambda of shrinkage, the rest noise.
            squared_error_sampled=jnp.where(active, gamma, eigenvalues).sum(),
            squared_error_mean=jnp.where(active, gamma**2 / variances, eigenvalues).sum(),
        )

    return jax.vmap(at)(gamma)


def affine_gamma_path(cov: Array, kappa: int, gamma: Array) -> GammaPath:
    """The global minima for each gamma [S], in closed form.

    For data of rank r <= kappa the path ends, as gamma -> 0, at r active columns and
    zero error; each column appears as gamma falls through its eigenvalue.
    """
    _check_covariance(cov)
    kappa = _check_kappa(kappa)
    shape = np.shape(gamma)
    if len(shape) != 1:
        raise ValueError(f"gamma must be [S], a path of variances, but has shape {shape}.")
    _check_array("gamma", gamma, "[S]", shape)
    if not _is_traced(gamma) and not (np.asarray(gamma) > 0).all():
        raise ValueError(
            f"gamma must be above 0 all along the path, but reaches {np.min(gamma):.6g}."
        )
    return _in_float64(lambda cov, gamma: _gamma_path(cov, kappa, gamma), cov, gamma)


# -------------------------------------------------------- stationary points


class Group(NamedTuple):
    """Columns of equal norm that share directions of the covariance."""

    directions: tuple[int, ...]  # which eigenvectors, 0 for the largest eigenvalue
    columns: int  # m, at least the number of directions
    delta: float  # |w|^2 + gamma of each of its columns


@dataclasses.dataclass(frozen=True)
class _Landscape:
    """The problem whose stationary points are listed; NumPy float64."""

    mean: np.ndarray  # [D]
    eigenvalues: np.ndarray  # [D], largest first, none below 0
    eigenvectors: np.ndarray  # [D, D]
    kappa: int
    gamma: float

    @functools.cached_property
    def tie(self) -> float:
        """Eigenvalues (and gamma) closer than this cannot be told apart after rounding."""
        scale = max(self.eigenvalues[0], self.gamma)
        return 32 * len(self.mean) * float(np.finfo(np.float64).eps) * scale

    def group(self, directions: tuple[int, ...], columns: int) -> Group | None:
        """The group of `columns` columns that share `directions`; None if there is none."""
        eigenvalues = self.eigenvalues[list(directions)]
        share, unused = len(directions), columns - len(directions)
        if share > 1 and unused == 0 and np.ptp(eigenvalues) <= self.tie:
            return None  # equal eigenvalues, a column each: these are separate groups
        if columns == 1:
            delta = float(eigenvalues[0])
        else:
            root = np.sqrt(eigenvalues).sum()
            root += math.sqrt(root**2 + 4 * columns * unused * self.gamma)
            delta = float(root / (2 * columns)) ** 2
        if math.sqrt(eigenvalues[-1] * delta) <= self.gamma + self.tie:
            return None
        return Group(directions, columns, delta)


@dataclasses.dataclass(frozen=True)
class StationaryPoint:
    """A stationary point of eq. 3 at fixed gamma, one of `copies` equivalent ones.

    `params` is built when asked for (and again when asked again): a thousand points
    of a large model can be held at once.

    Attributes:
      groups: the nonzero columns, left to right: which share which directions.
      energy: L, eq. 3's units.
      index: Morse index, the number of strictly negative eigenvalues of the Hessian in
        all of (W_x, b_x, W_z, b_z, log_s2); by the counting rule of the module's
        docstring, not by a Hessian. 0 exactly at the global minima, ties included.
      nullity: the number of zero eigenvalues of that Hessian.
      copies: points that permutations of columns and changes of their signs make of
        this one, itself included.
      degenerate: why there are zero eigenvalues, in words; "" where there are none. Along
        a continuum of stationary points of one energy nothing hides in them; where gamma
        equals an eigenvalue the energy is flat to second order, and the index says
        nothing about the higher ones.
    """

    groups: tuple[Group, ...]
    energy: float
    index: int
    nullity: int
    copies: int
    degenerate: str
    _landscape: _Landscape = dataclasses.field(repr=False, compare=False)

    @property
    def directions(self) -> tuple[int, ...]:
        """Which eigenvectors the columns span, 0 for the largest eigenvalue.

        On the axes one for each nonzero column, left to right; else group by group.
        """
        return tuple(itertools.chain.from_iterable(group.directions for group in self.groups))

    @property
    def axis_aligned(self) -> bool:
        """Every nonzero column lies along an eigenvector of its own."""
        return all(group.columns == 1 for group in self.groups)

    @property
    def params(self) -> AffineVAE:
        """The parameters; the gradient there is 0 to rounding, which grows with lambda / gamma."""
        of = self._landscape
        W_x = np.zeros((len(of.mean), of.kappa))
        start = 0
        for group in self.groups:
            axes = list(group.directions)
            squares = np.sqrt(of.eigenvalues[axes] * group.delta) - of.gamma  # mu_i - gamma
            frame = _equal_norm_frame(squares, group.columns)
            W_x[:, start : start + group.columns] = of.eigenvectors[:, axes] @ frame
            start += group.columns
        return affine_optimal_encoder(W_x, of.mean, of.gamma)


def _equal_norm_frame(squares: np.ndarray, columns: int) -> np.ndarray:
    """A [p, m] with A A^T = diag(squares [p]) and columns of one norm (Schur and Horn).

    Starts from a turned diag(sqrt(squares)) and sets one column's norm at a time by a
    plane rotation (Bendel and Mickey, 1978).
    """
    share = len(squares)
    A = np.zeros((share, columns))
    A[:, :share] = np.diag(np.sqrt(squares))
    if share > 1 and columns > 2:
        # There is a continuum of such A. From a turned start the rotations end at a generic
        # one; from the axes they could end where the columns fall into smaller groups.
        turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((columns, columns)))
        A = A @ turn
    target = squares.sum() / columns
    open_columns = list(range(columns))
    while len(open_columns) > 1:
        norms = np.square(A[:, open_columns]).sum(0)
        low, high = open_columns[norms.argmin()], open_columns[norms.argmax()]
        x, y, xy = A[:, low] @ A[:, low], A[:, high] @ A[:, high], A[:, low] @ A[:, high]
        if y > target:
            t = (-xy + math.sqrt(xy**2 + max(target - x, 0.0) * (y - target))) / (y - target)
            cos, sin = 1 / math.hypot(1, t), t / math.hypot(1, t)
            A[:, [low, high]] = A[:, [low, high]] @ np.array([[cos, -sin], [sin, cos]])
        open_columns.remove(low)
    return A


def _close(a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
    """Equal up to what rounding of the eigenvalues does to the norms of a group."""
    return np.abs(a - b) <= 1e-9 * np.maximum(a, b)


def _stationary_point(of: _Landscape, groups: tuple[Group, ...]) -> StationaryPoint:
    """Energy, index, nullity and copies from the eigenvalues alone; see the module's docstring."""
    dim, kappa, gamma = len(of.mean), of.kappa, of.gamma
    axes = [axis for group in groups for axis in group.directions]
    owner = np.array([g for g, group in enumerate(groups) for _ in group.directions], int)
    delta = np.array([group.delta for group in groups])[owner]  # [|J|]
    used = of.eigenvalues[axes]  # [|J|]
    unused = np.delete(of.eigenvalues, axes)  # [D - |J|]
    columns = sum(group.columns for group in groups)

    energy = (
        np.sqrt(used / delta).sum()  # lambda_i / mu_i
        + unused.sum() / gamma
        + sum(group.columns * math.log(group.delta) for group in groups)
        + (dim - columns) * math.log(gamma)
        + kappa
    )

    gap = unused[None, :] - used[:, None]  # moving u_i's column towards u_j
    index = int((gap > of.tie).sum())
    repeated = int((np.abs(gap) <= of.tie).sum())
    coincident = at_gamma = turning = 0

    # Combinations of a group's columns that vanish; the unused columns are such a group.
    for g, group in enumerate((*groups, Group((), kappa - columns, gamma))):
        vanishing = group.columns - len(group.directions)
        if vanishing:
            others = delta[owner != g]
            gain = unused - gamma * (gamma / group.delta)
            tied = vanishing * int((np.abs(gain) <= of.tie).sum())
            same = _close(others, group.delta)
            index += vanishing * int((gain > of.tie).sum() + ((others < group.delta) & ~same).sum())
            coincident += vanishing * int(same.sum()) + (tied if g < len(groups) else 0)
            at_gamma += tied if g == len(groups) else 0

    # Pairs of directions of different groups. On the axes delta = lambda: none is out of order.
    row, column = np.triu_indices(len(axes), 1)
    apart = owner[row] != owner[column]
    row, column = row[apart], column[apart]
    step = used[row] - used[column]
    same_eigenvalue = np.abs(step) <= of.tie
    same_delta = ~same_eigenvalue & _close(delta[row], delta[column])
    out_of_order = step * (delta[row] - delta[column]) < 0
    index += int((out_of_order & ~same_eigenvalue & ~same_delta).sum())
    repeated += int(same_eigenvalue.sum())
    coincident += int(same_delta.sum())

    copies = 2**columns * math.perm(kappa, columns)
    for group in groups:
        share, wide = len(group.directions), group.columns
        index += wide - 1
        if share == 1:
            copies //= math.factorial(wide)  # its columns are one vector, up to sign
        else:  # the frames of `_equal_norm_frame` with A A^T fixed
            turning += share * wide - share * (share + 1) // 2 - (wide - 1)

    null_space = kappa * int((of.eigenvalues <= of.tie).sum())
    reasons = {
        "gamma equals an eigenvalue: flat to second order": at_gamma,
        "an eigenvalue is repeated: its eigenvectors turn freely": repeated,
        "columns that share directions turn freely": turning,
        "two groups coincide by chance": coincident,
        "the covariance is singular: W_z is free on its null space": null_space,
    }
    return StationaryPoint(
        groups=groups,
        energy=float(energy),
        index=index,
        nullity=sum(reasons.values()),
        copies=copies,
        degenerate="; ".join(reason for reason, count in reasons.items() if count),
        _landscape=of,
    )


def _set_partitions(items: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to part `items` into non-empty blocks."""
    if not items:
        yield ()
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            remaining = tuple(item for item in rest if item not in others)
            for blocks in _set_partitions(remaining):
                yield ((first, *others), *blocks)


def _allotments(least: tuple[int, ...], total: int) -> Iterator[tuple[int, ...]]:
    """All integer tuples of sum `total`, no entry below its entry in `least`."""
    if len(least) == 1:
        yield (total,)
        return
    for first in range(least[0], total - sum(least[1:]) + 1):
        for rest in _allotments(least[1:], total - first):
            yield (first, *rest)


def _on_axes(of: _Landscape, columns: int) -> Iterator[tuple[Group, ...]]:
    """Axis-aligned points with that many nonzero columns."""
    above = int((of.eigenvalues > of.gamma + of.tie).sum())
    for axes in itertools.combinations(range(above), columns):
        yield tuple(Group((axis,), 1, float(of.eigenvalues[axis])) for axis in axes)


def _off_axes(of: _Landscape, columns: int) -> Iterator[tuple[Group, ...]]:
    """All other stationary points with that many nonzero columns."""
    # delta <= lambda_1 bounds mu_i, which must exceed gamma; lambda_i itself need not.
    reach = int((of.eigenvalues * of.eigenvalues[0] > of.gamma**2).sum())
    for share in range(min(columns, reach), 0, -1):
        for axes in itertools.combinations(range(reach), share):
            for blocks in _set_partitions(axes):
                for wide in _allotments(tuple(map(len, blocks)), columns):
                    if max(wide) == 1:
                        continue
                    groups = tuple(map(of.group, blocks, wide))
                    if None not in groups:
                        yield groups


def affine_stationary_points(
    mean: Array, cov: Array, kappa: int, gamma: float, *, off_axes: bool = True
) -> Iterator[StationaryPoint]:
    """Every stationary point of eq. 3 at fixed gamma, one of each set of equivalent ones.

    A lazy iterator, by the number of nonzero columns, from total collapse on; for each
    number first the axis-aligned points, then those where columns share directions.
    There are combinatorially many: take what you need (`itertools.islice`).

    Equivalent are permutations of columns and changes of sign. Repeated eigenvalues and
    groups of three or more columns with two or more directions come in continua, of
    which one point stands for all; `degenerate` says so. Eigenvalues are told apart, and
    from gamma, down to rounding: an eigenvalue equal to gamma bears no column.

    Args:
      mean: x_bar [D].
      cov: [D, D].
      kappa: number of latents K, at least 1; may exceed D.
      gamma: decoder variance, above 0.
      off_axes: False leaves out the points where columns share directions.

    Raises:
      ValueError: at the call, not at the first point.
    """
    _check_moments(mean, cov)
    kappa = _check_kappa(kappa)
    _check_gamma(gamma)
    eigenvalues, eigenvectors = np.linalg.eigh(np.asarray(cov, np.float64))
    of = _Landscape(
        np.asarray(mean, np.float64),
        np.maximum(eigenvalues[::-1], 0.0),
        eigenvectors[:, ::-1],
        kappa,
        float(gamma),
    )

    def points():
        for columns in range(kappa + 1):
            for groups in _on_axes(of, columns):
                yield _stationary_point(of, groups)
            if off_axes and columns > 1:
                for groups in _off_axes(of, columns):
                    yield _stationary_point(of, groups)

    return points()
