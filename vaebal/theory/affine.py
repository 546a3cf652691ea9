"""The affine VAE (eq. 3, Theorem 1): energy, best encoder, global minimum, best gamma.

    L = E_x E_z ||x - W_x z - b_x||^2 / gamma + d log gamma
        + sum_k (s_k^2 - log s_k^2) + E_x ||W_z x + b_z||^2,   z = W_z x + b_z + s eps.

Energies are in eq. 3's own units, L = 2(-ELBO) - d log 2pi + kappa; to nats of -ELBO
and back by `vaebal.units.eq3_to_negative_elbo` and `negative_elbo_to_eq3`. The data
enter by their mean and covariance (divided by N) alone. gamma is a variance.

Precision. Called with values, every function computes in float64 whatever JAX's
setting; where x64 is off it returns NumPy float64, because JAX would round its own
float64 arrays to float32 at their next use. Called with tracers (inside jit, grad,
vmap) it computes in the caller's precision: enter `jax.enable_x64(True)` around these.
Shapes are checked always, values only where there are values. At a small gamma
`affine_profile_energy` divides by it what rounding leaves of I - W_x W_z, and errs by about
eps lambda_1 / gamma, eps = 2e-16 in float64; `affine_energy` and the closed forms do not.
"""

import functools
import operator
from collections.abc import Callable
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


def check_moments(mean: Any, cov: Any) -> int:
    """Mean [D] and covariance [D, D]; returns D."""
    dim = _check_covariance(cov)
    _check_array("mean", mean, "[D]", (dim,))
    return dim


def check_gamma(gamma: Any) -> None:
    _check_array("gamma", gamma, "a scalar", ())
    if not _is_traced(gamma) and not gamma > 0:
        raise ValueError(f"gamma = {gamma} must be above 0: it is the decoder's variance.")


def check_kappa(kappa: Any) -> int:
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
    params = _check_params(params, check_moments(mean, cov))
    check_gamma(gamma)
    return _in_float64(_energy, params, mean, cov, gamma)


def affine_squared_error(params: AffineVAE, mean: Array, cov: Array) -> Array:
    """E ||x - x_hat||^2 with x_hat from sampled z, summed over the D dimensions; a scalar."""
    params = _check_params(params, check_moments(mean, cov))
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
    params = _check_params(params, check_moments(mean, cov))
    check_gamma(gamma)
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
    check_gamma(gamma)
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
    check_gamma(gamma)
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
    kappa = check_kappa(kappa)
    check_gamma(gamma)
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
    check_moments(mean, cov)
    kappa = check_kappa(kappa)
    check_gamma(gamma)
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
    kappa = check_kappa(kappa)
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
    kappa = check_kappa(kappa)
    shape = np.shape(gamma)
    if len(shape) != 1:
        raise ValueError(f"gamma must be [S], a path of variances, but has shape {shape}.")
    _check_array("gamma", gamma, "[S]", shape)
    if not _is_traced(gamma) and not (np.asarray(gamma) > 0).all():
        raise ValueError(
            f"gamma must be above 0 all along the path, but reaches {np.min(gamma):.6g}."
        )
    return _in_float64(lambda cov, gamma: _gamma_path(cov, kappa, gamma), cov, gamma)
