"""Both ends of a Hessian's spectrum, and its density, from Krylov spaces; large models.

Losses, parameters and precision are as in `vaebal.theory.hessian`.

The iteration is written here. SciPy's ARPACK (`eigsh`) stops by residuals relative to each
eigenvalue, which float32 products do not reach for small ones, then returns nothing of what it
has; one start vector misses copies of a repeated eigenvalue, and a Hessian of zeros is an error.
matfree's `tridiag_sym` (0.6.3) divides by the next vector's norm whatever it is: where the Krylov
space ends early it returns NaN or eigenvalues far outside the spectrum. Collapsed VAEs have just
such Hessians, with exact zero and repeated modes. JAX's `lobpcg_standard` finds the upper end only,
and its test of convergence loosens in proportion to P.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array
from jax.flatten_util import ravel_pytree

from vaebal.streams import stream
from vaebal.theory.gradients import Params
from vaebal.theory.hessian import (
    Loss,
    check_at_least,
    check_positive,
    checked,
    dense,
    flat_products,
    on_host,
    rayleigh,
    symmetric_eigh,
)

# What a Krylov basis may take where its size is not given: nothing beside a Hessian's product.
_BASIS_BYTES = 64 * 2**20


# ---------------------------------------------------------------- Krylov spaces


def _append(
    basis: Array, vectors: Array, start: int | Array, drop: Array, key: Array
) -> tuple[Array, Array, Array]:
    """Orthonormalises `vectors` [b, P] against `basis` [R, P] and writes them at row `start`.

    Rows of `basis` before `start` are orthonormal, those from it on are zero. A vector of
    which no more than `drop` is left over lay in their span: the Krylov space ended, as
    it does on degenerate spectra. A random direction then takes its place, with coupling
    zero, where plain Lanczos would divide rounding noise by rounding noise.

    Returns:
      The basis; `overlap` [R, b] and `coupling` [b, b] with
      vectors = overlap^T basis + coupling^T (the new rows).
    """
    block, size = vectors.shape

    def project(vectors, on):
        """Twice, because once leaves rounding errors of the size of what was taken away."""
        total = 0.0
        for _ in range(2):
            overlap = on @ vectors.T
            vectors = vectors - overlap.T @ on
            total = total + overlap
        return vectors, total

    with jax.default_matmul_precision("highest"):
        vectors, overlap = project(vectors, basis)
        fresh = jnp.zeros_like(vectors)
        coupling = jnp.zeros((block, block), vectors.dtype)
        for i in range(block):
            vector, within = project(vectors[i : i + 1], fresh)
            norm = jnp.linalg.norm(vector)
            ended = norm <= drop

            def another(_, fresh=fresh, i=i):
                draw = jax.random.normal(jax.random.fold_in(key, i), (1, size), vectors.dtype)
                draw, _ = project(draw, basis)
                draw, _ = project(draw, fresh)
                return draw / jnp.linalg.norm(draw)

            vector = jax.lax.cond(ended, another, lambda v, norm=norm: v / norm, vector)
            fresh = fresh.at[i].set(vector[0])
            coupling = coupling.at[:, i].set(within[:, 0])
            coupling = coupling.at[i, i].set(jnp.where(ended, 0.0, norm))
        # Normalising a short vector magnified its rounding errors: clean once more.
        fresh, _ = project(fresh, basis)
        clean = jnp.zeros_like(fresh)
        for i in range(block):
            vector, _ = project(fresh[i : i + 1], clean)
            clean = clean.at[i].set(vector[0] / jnp.linalg.norm(vector))
    return jax.lax.dynamic_update_slice_in_dim(basis, clean, start, 0), overlap, coupling


_append_jit = jax.jit(_append, donate_argnums=0)


@functools.partial(jax.jit, static_argnames=("loss", "block"), donate_argnames="basis")
def _extend(
    loss: Loss, params: Params, args: tuple, basis: Array, start: Array, block: int, scale: Array,
    key: Array,
):  # fmt: skip
    """One step of block Lanczos: H times rows start..start+block, orthonormalised below them.

    `scale` is the largest |eigenvalue| known; what is left of a product below ten times
    its rounding counts as nothing.
    """
    rows = jax.lax.dynamic_slice_in_dim(basis, start, block)
    products = flat_products(loss, params, args, rows)
    scale = jnp.maximum(scale, jnp.linalg.norm(products, axis=1).max())
    drop = 10 * jnp.finfo(basis.dtype).eps * scale
    return _append(basis, products, start + block, drop, key)


def _over_columns(size: int, body: Callable, start: Array) -> Array:
    """Folds `body(carry, first column, width)` over chunks of `size` columns.

    Products of whole bases would be transposed, and so copied, whole.
    """
    chunk = min(size, 1 << 16)
    whole, rest = divmod(size, chunk)
    carry = jax.lax.fori_loop(0, whole, lambda i, c: body(c, i * chunk, chunk), start)
    return body(carry, whole * chunk, rest) if rest else carry


@functools.partial(jax.jit, donate_argnums=0)
def _rotate(basis: Array, rotation: Array) -> Array:
    """rotation [R, R] times basis [R, P], in the basis's own memory."""

    def one(basis, first, width):
        part = jax.lax.dynamic_slice_in_dim(basis, first, width, 1)
        return jax.lax.dynamic_update_slice_in_dim(basis, rotation @ part, first, 1)

    with jax.default_matmul_precision("highest"):
        return _over_columns(basis.shape[1], one, basis)


@jax.jit
def _gram(basis: Array) -> Array:
    """basis [R, P] times its transpose, [R, R]."""

    def one(total, first, width):
        part = jax.lax.dynamic_slice_in_dim(basis, first, width, 1)
        return total + part @ part.T

    with jax.default_matmul_precision("highest"):
        return _over_columns(basis.shape[1], one, jnp.zeros((len(basis),) * 2, basis.dtype))


@jax.jit
def _combine(weights: Array, basis: Array) -> Array:
    """weights [b, R] times basis [R, P], scaled to unit rows."""
    with jax.default_matmul_precision("highest"):
        vectors = weights @ basis
    return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)


# ---------------------------------------------------------------- both ends of the spectrum


class Eigenpairs(NamedTuple):
    """Eigenpairs of a Hessian, the most extreme first."""

    values: np.ndarray  # [c] Rayleigh quotients v^T H v
    residuals: np.ndarray  # [c] ||H v - value v||: an eigenvalue lies within it of the value
    vectors: Params  # pytree like params, each leaf with a leading [c]; unit norm over the tree
    converged: np.ndarray  # [c] bool: the residual met the tolerance


class Extremes(NamedTuple):
    """Both ends of a Hessian's spectrum.

    At least as many eigenvalues lie below (or above) any number as `ritz_values` do
    (Poincare's separation theorem): counts of them are certain lower bounds.
    """

    smallest: Eigenpairs  # the least eigenvalue (algebraically) first
    largest: Eigenpairs  # the greatest first
    ritz_values: np.ndarray  # [m] ascending: the Hessian's eigenvalues in the Krylov space
    asymmetry: float  # largest |u^T H v - v^T H u| seen between basis vectors: rounding
    products: int  # Hessian-vector products used

    @property
    def converged(self) -> bool:
        """Whether every pair's residual met the tolerance."""
        return bool(self.smallest.converged.all() and self.largest.converged.all())


class _Goal(NamedTuple):
    """When a residual is small enough."""

    tolerance: float
    floor: float

    def target(self, values: np.ndarray, scale: float) -> np.ndarray:
        """Residuals wanted of eigenvalues, of which the largest is `scale` in size."""
        return np.maximum(self.tolerance * np.abs(values), self.floor * scale)


def _asymmetry(matrix: np.ndarray) -> float:
    return float(np.abs(matrix - matrix.T).max())


def _ends(count: int, number: int) -> tuple[list[int], list[int]]:
    """Positions of the `count` smallest and largest of `number` ascending values."""
    return list(range(count)), list(range(number - 1, number - 1 - count, -1))


class _Search:
    """Thick-restarted block Lanczos (Wu & Simon, 2000; Stewart's Krylov-Schur) on both ends.

    Fully reorthogonalised. Blocks of `count` vectors find eigenvalues of any multiplicity, exact
    zero modes included.

    The basis's first `filled` rows span the Krylov space, the `count` rows after them come next.
    """

    def __init__(
        self, loss: Loss, params: Params, args: tuple, count: int, rows: int,
        goal: _Goal, key: Array,
    ):  # fmt: skip
        """`rows`: of the space at most."""
        self._problem, self._key = (loss, params, args), key
        self.count, self.rows, self._goal = count, rows, goal
        flat, _ = ravel_pytree(params)
        self._dtype = flat.dtype
        start = jax.random.normal(jax.random.fold_in(key, 0), (count, flat.size), flat.dtype)
        empty = jnp.zeros((rows + count, flat.size), flat.dtype)
        self.space, _, _ = _append_jit(empty, start, 0, jnp.zeros((), flat.dtype), key)
        # Below the diagonal what the recurrence says of basis H basis^T, above it what the
        # products say: equal but for rounding.
        self.projected = np.zeros((rows + count, rows + count))
        self.filled = self.products = self._looked = 0
        self.scale = self.asymmetry = 0.0

    def advance(self, most: int) -> bool:
        """One block more, restarted if there is no room; whether both ends are met, or `most`."""
        count = self.count
        self.space, overlap, coupling = _extend(
            *self._problem, self.space, self.filled, count, jnp.asarray(self.scale, self._dtype),
            jax.random.fold_in(self._key, 1 + self.products),
        )  # fmt: skip
        below = self.filled + count
        self.projected[:below, self.filled : below] = on_host(overlap)[:below]
        self.projected[below : below + count, self.filled : below] = on_host(coupling)
        self.filled, self.products = below, self.products + count

        last = self.products + count > most
        full = self.filled >= self.rows
        # Looking costs filled^3: not at every step of a large basis.
        if not (last or full) and self.filled < self._looked + self.filled // 16:
            return False
        self._looked = self.filled
        low, high = self._met()
        if last or (low and high):
            return True
        if full:
            self._restart(low, high)
        return False

    def _met(self) -> tuple[bool, bool]:
        """Whether the residuals at the lower and the upper end are small enough."""
        count, filled = self.count, self.filled
        inner = self.projected[:filled, :filled]
        self.asymmetry = max(self.asymmetry, _asymmetry(inner))
        ritz, coordinates = symmetric_eigh(inner)
        self.scale = max(self.scale, float(np.abs(ritz).max()))
        residuals = np.linalg.norm(
            self.projected[filled : filled + count, :filled] @ coordinates, axis=0
        )
        met = residuals <= 0.5 * self._goal.target(ritz, self.scale)  # half: rounding adds to it
        return filled >= 2 * count and bool(met[:count].all()), bool(met[-count:].all())

    def _ritz(self) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values and their coordinates in the basis, whose drift from orthonormal counts."""
        inner = self.projected[: self.filled, : self.filled]
        gram = np.asarray(_gram(self.space), np.float64)[: self.filled, : self.filled]
        return scipy.linalg.eigh((inner + inner.T) / 2, gram)

    def found(self) -> tuple[np.ndarray, list[Array]]:
        """All Ritz values, and the unit vectors [count, P] of the smallest and the largest."""
        ritz, coordinates = self._ritz()
        vectors = []
        for order in _ends(self.count, self.filled):
            weights = np.zeros((self.count, len(self.projected)))
            weights[:, : self.filled] = coordinates.T[order]
            vectors.append(_combine(jnp.asarray(weights, self._dtype), self.space))
        return ritz, vectors

    def _restart(self, low: bool, high: bool) -> None:
        """Keeps half of the space, most of it for the end that still needs it."""
        count, filled = self.count, self.filled
        ritz, coordinates = self._ritz()
        kept = max(2 * count, self.rows // 2 // count * count)
        fewest = min(count + 1, kept - count)
        least = kept // 2
        if low != high:
            least = fewest if low else kept - fewest
        order = [*range(least), *range(filled - (kept - least), filled)]
        rotation = np.zeros_like(self.projected)
        rotation[:kept, :filled] = coordinates.T[order]
        rotation[kept : kept + count, filled : filled + count] = np.eye(count)
        self.space = _rotate(self.space, jnp.asarray(rotation, self._dtype))
        coupled = self.projected[filled : filled + count, :filled] @ coordinates[:, order]
        self.projected[:] = 0
        self.projected[:kept, :kept] = np.diag(ritz[order])
        self.projected[kept : kept + count, :kept] = coupled
        self.filled = self._looked = kept


def _pairs(
    loss: Loss, params: Params, args: tuple, vectors: Array, goal: _Goal, scale: float
) -> Eigenpairs:
    """What unit rows [c, P] are as eigenvectors, by Hessian-vector products anew."""
    values, residuals = jax.device_get(rayleigh(loss, params, args, vectors))
    met = residuals <= goal.target(values, scale)
    return Eigenpairs(values, residuals, jax.vmap(ravel_pytree(params)[1])(vectors), met)


def extreme_eigenvalues(
    loss: Loss,
    params: Params,
    *,
    args: tuple = (),
    count: int = 1,
    tolerance: float = 1e-6,
    floor: float = 0.0,
    basis: int | None = None,
    max_products: int = 2000,
    seed: int = 0,
) -> Extremes:
    """The `count` smallest and the `count` largest eigenvalues of a Hessian, with residuals.

    Where the basis would be as large as the parameters, the Hessian is diagonalised. That
    a value is an eigenvalue is certified by its residual. That none lies beyond it is not:
    it rests on a random starting block.

    Args:
      count: eigenvalues wanted at each end, and the block size.
      tolerance: a pair has converged when its residual is at most `tolerance` |value|, or
        `floor` times the largest |value|, or 50 roundings of it.
      floor: see `tolerance`. An eigenvalue zero cannot be found to a relative tolerance;
        raise this where its exact size does not matter.
      basis: vectors of length P that are kept, at least 4 `count`; `count` more stand
        beside them, and a step needs about 8 `count` for a moment. More converge in fewer
        products. None: 24, or as many as 64 MB hold if they are more, up to 400 (24 from
        700,000 parameters in float32).
      max_products: products after which to stop, converged or not; at least 4 `count`.
      seed: of the random starting block.

    Raises:
      ValueError: a bad argument, by name; a Hessian that is not finite.
    """
    params, size = checked(loss, params, args)
    check_positive(tolerance=tolerance)
    if not (math.isfinite(floor) and floor >= 0):
        raise ValueError(f"floor must be finite and not negative, but is {floor}.")
    check_at_least(1, count=count)
    if count > size:
        raise ValueError(f"count is {count}, but there are only {size} parameters.")
    flat, _ = ravel_pytree(params)
    if basis is None:
        basis = max(24, 4 * count, min(400, _BASIS_BYTES // flat.nbytes))
    check_at_least(4 * count, basis=basis, max_products=max_products)
    goal = _Goal(tolerance, max(floor, 50 * float(jnp.finfo(flat.dtype).eps)))
    rows = basis - basis % count
    if size < rows + count:
        hessian = on_host(dense(loss, params, args, min(64, size)))
        ritz, vectors = symmetric_eigh(hessian)
        scale, asymmetry, products = float(np.abs(ritz).max()), _asymmetry(hessian), size
        ends = [jnp.asarray(vectors.T[end], flat.dtype) for end in _ends(count, size)]
    else:
        search = _Search(loss, params, args, count, rows, goal, stream(seed, "probing/lanczos"))
        while not search.advance(max_products - 2 * count):
            pass
        ritz, ends = search.found()
        scale, asymmetry, products = search.scale, search.asymmetry, search.products
    pairs = (_pairs(loss, params, args, vectors, goal, scale) for vectors in ends)
    return Extremes(*pairs, ritz, asymmetry, products + 2 * count)


# ---------------------------------------------------------------- spectral density


class SpectralDensity(NamedTuple):
    """A Hessian's eigenvalue density, smoothed: times P it counts eigenvalues per unit."""

    grid: np.ndarray  # [G]
    density: np.ndarray  # [G] integrates to 1 over the line
    error: np.ndarray  # [G] its Monte-Carlo standard error over probes
    width: float  # standard deviation of the Gaussian that smooths
    nodes: np.ndarray  # [S, M] quadrature nodes of each probe
    weights: np.ndarray  # [S, M] and weights, which sum to 1 over M


def _quadrature(
    loss: Loss, params: Params, args: tuple, steps: int, key: Array
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights, each [M], of v^T f(H) v for one random v of signs / sqrt(P)."""
    flat, _ = ravel_pytree(params)
    signs = jax.random.rademacher(jax.random.fold_in(key, 0), (1, flat.size), flat.dtype)
    space = jnp.zeros((steps + 1, flat.size), flat.dtype).at[0].set(signs[0] / math.sqrt(flat.size))
    projected, scale = np.zeros((steps, steps)), 0.0
    for step in range(steps):
        space, overlap, coupling = _extend(
            loss, params, args, space, step, 1, jnp.asarray(scale, flat.dtype),
            jax.random.fold_in(key, 1 + step),
        )  # fmt: skip
        projected[step, step] = on_host(overlap)[step, 0]
        scale = max(scale, float(np.abs(projected).max()))
        if step + 1 < steps:
            projected[step, step + 1] = projected[step + 1, step] = coupling[0, 0]
    nodes, vectors = np.linalg.eigh(projected)
    return nodes, vectors[0] ** 2


def spectral_density(
    loss: Loss,
    params: Params,
    *,
    args: tuple = (),
    grid: np.ndarray | None = None,
    width: float | None = None,
    probes: int = 10,
    steps: int = 60,
    seed: int = 0,
) -> SpectralDensity:
    """The density of a Hessian's eigenvalues by stochastic Lanczos quadrature.

    Random signs v / sqrt(P) give E v^T f(H) v = tr f(H) / P; `steps` of Lanczos from v,
    fully reorthogonalised, give v^T f(H) v exactly for polynomials f of degree below
    2 `steps` (Ubaru, Chen & Saad, 2017; Ghorbani, Krishnan & Xiao, 2019).

    The standard error holds the noise of the probes alone. A width below the distance of
    neighbouring nodes resolves the quadrature rather than the spectrum.

    Args:
      grid: where to give the density, [G]. None: 400 points from end to end.
      width: None: a hundredth of the distance between the outermost nodes.
      probes: S, at least 2.
      steps: M; `steps` + 1 vectors of length P are kept.
      seed: of the probes.

    Raises:
      ValueError: a bad argument, by name; a Hessian that is not finite.
    """
    params, size = checked(loss, params, args)
    check_at_least(2, probes=probes)
    check_at_least(1, steps=steps)
    if width is not None:
        check_positive(width=width)
    if grid is not None and (np.ndim(grid) != 1 or not len(grid) or not np.isfinite(grid).all()):
        raise ValueError(f"grid must be a finite vector [G], but has shape {np.shape(grid)}.")
    steps = min(steps, size)
    rules = [
        _quadrature(loss, params, args, steps, stream(seed, "probing/density", probe))
        for probe in range(probes)
    ]
    nodes, weights = (np.stack(parts) for parts in zip(*rules, strict=True))
    low, high = nodes.min(), nodes.max()
    if width is None:
        # A spectrum of one point still needs a width.
        width = (high - low) / 100 or float(abs(high)) / 100 or 1.0
    if grid is None:
        grid = np.linspace(low - 4 * width, high + 4 * width, 400)
    grid = np.asarray(grid, np.float64)
    each = np.empty((probes, len(grid)))
    for probe in range(probes):  # [G, M] at a time
        z = (grid[:, None] - nodes[probe]) / width
        each[probe] = np.exp(-0.5 * z**2) @ weights[probe] / (width * math.sqrt(2 * math.pi))
    error = each.std(0, ddof=1) / math.sqrt(probes)
    return SpectralDensity(grid, each.mean(0), error, float(width), nodes, weights)
