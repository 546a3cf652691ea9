"""Probing any loss at any point: gradients by group and latent, curvature, certificates.

A loss is `loss(params, *args) -> scalar`: deterministic, twice differentiable, params a
pytree of real floating arrays. P is their number; where a vector or matrix is flat, its
order is `jax.flatten_util.ravel_pytree`'s. Hand data over in `args`: what a loss closes
over becomes a constant of the compiled program, is kept with it, and must not change.

Everything runs in the parameters' precision, matrix products at JAX's highest (no
TensorFloat-32 or bfloat16 passes). Curvature near zero wants float64: convert params and
args to float64 and call under `with jax.enable_x64(True)`.

The iterative parts are written here. matfree's `tridiag_sym` (0.6.3), which would have
served, divides by the next vector's norm whatever it is: on a Hessian with exact zero or
identical modes, where the Krylov space ends early, it returns NaN or eigenvalues far
outside the spectrum, and collapsed VAEs have just such Hessians. JAX's `lobpcg_standard`
finds the upper end only, and its test of convergence loosens in proportion to P.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array
from jax.flatten_util import ravel_pytree

from vaebal.streams import stream

Params = Any  # a pytree of real floating arrays
Loss = Callable[..., Array]  # loss(params, *args) -> scalar

# What a Krylov basis may take where its size is not given: nothing beside a Hessian's product.
_BASIS_BYTES = 64 * 2**20

# Axis of the latents in every leaf of a `GaussianVAE`'s parameters that has one: the
# decoder's first layer by rows, the encoder's two heads by columns, eq. 5's W_x by rows
# (Flax kernels are [in, out]). Heads without biases and models without skip lack some.
GAUSSIAN_VAE_LATENT_AXES: Mapping[str, int] = {
    "decoder/first/kernel": 0,
    "encoder/mean/kernel": 1,
    "encoder/mean/bias": 0,
    "encoder/log_var/kernel": 1,
    "encoder/log_var/bias": 0,
    "affine/kernel": 0,
}


# ---------------------------------------------------------------- arguments


def _path_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _as_arrays(name: str, tree: Params) -> Params:
    """The pytree as JAX arrays: real, floating, not empty, finite where they have values."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    if not sum(np.size(leaf) for _, leaf in leaves):
        raise ValueError(f"{name} is empty: there is nothing to differentiate by.")
    for path, leaf in leaves:
        where = f"{name} at {_path_name(path)!r}" if path else name
        dtype = getattr(leaf, "dtype", jnp.result_type(leaf))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{where} must be real floats, but has dtype {dtype}.")
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"{where} has dtype {dtype}, which JAX would round: call this under "
                "`with jax.enable_x64(True)`, or convert it to float32."
            )
        # NumPy, not JAX: inside someone's jit JAX would trace this.
        if not isinstance(leaf, jax.core.Tracer) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f"{where} has NaN or infinite entries.")
    return jax.tree.map(jnp.asarray, tree)


def _checked(loss: Loss, params: Params, args: tuple) -> tuple[Params, int]:
    """`params` as JAX arrays and their number P, for a scalar `loss(params, *args)`."""
    if not isinstance(args, tuple):
        raise ValueError(f"args must be a tuple, but is a {type(args).__name__}.")
    params = _as_arrays("params", params)
    value = jax.eval_shape(loss, params, *args)
    shape = getattr(value, "shape", None)
    if shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        got = f"a {type(value).__name__}" if shape is None else f"{value.dtype}{list(shape)}"
        raise ValueError(f"loss must return one real float, a scalar, but returns {got}.")
    return params, sum(leaf.size for leaf in jax.tree.leaves(params))


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, but is {value}.")


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, but is {value}.")


# ---------------------------------------------------------------- norms


def norms_by_group(tree: Params, depth: int = 1) -> dict[str, Array]:
    """Euclidean norms of a gradient (or any pytree like the parameters) by group.

    Args:
      tree: pytree of arrays, such as `jax.grad(loss)(params)`.
      depth: leaves whose paths agree in their first `depth` keys are one group; 1 gives
        the top level (encoder, decoder, ...), a large number each leaf alone.

    Returns:
      {"key/key": norm, a scalar}, in the tree's order. Their squares add up to the
      squared norm of the whole.

    Raises:
      ValueError: depth below 1, or a tree without leaves.
    """
    _check_at_least(1, depth=depth)
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    if not leaves:
        raise ValueError("tree is empty: it has no groups.")
    squares: dict[str, Array] = {}
    for path, leaf in leaves:
        name = _path_name(path[:depth])
        squares[name] = squares.get(name, 0.0) + jnp.square(leaf).sum()
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def norms_by_latent(tree: Params, axes: Mapping[str, int] | None = None) -> dict[str, Array]:
    """Euclidean norms of a gradient (or any pytree like the parameters) by latent dimension.

    Args:
      tree: pytree of arrays, such as `jax.grad(loss)(params)`.
      axes: {"path/of/leaf": the axis along which that leaf's latents lie}. None: those of
        `GAUSSIAN_VAE_LATENT_AXES` that the tree has. An affine VAE (W_x [D, K], W_z
        [K, D], ...) is {"W_x": 1, "W_z": 0, ...}.

    Returns:
      {"path/of/leaf": [K]}; entry k is the norm of that leaf's slice for latent k.

    Raises:
      ValueError: a path that the tree lacks, an axis that its leaf lacks, or leaves that
        disagree about K.
    """
    leaves = {_path_name(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    if axes is None:
        axes = {path: k for path, k in GAUSSIAN_VAE_LATENT_AXES.items() if path in leaves}
    if not axes:
        raise ValueError(f"axes: none of the tree's leaves {sorted(leaves)} has a latent axis.")
    norms = {}
    for path, axis in axes.items():
        if path not in leaves:
            raise ValueError(f"axes names {path!r}, but the tree has {sorted(leaves)}.")
        leaf = leaves[path]
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(f"axes: {path!r} has shape {leaf.shape}, and no axis {axis}.")
        others = tuple(i for i in range(leaf.ndim) if i != axis % leaf.ndim)
        norms[path] = jnp.sqrt(jnp.square(leaf).sum(others))
    if len({norm.shape for norm in norms.values()}) > 1:
        found = {path: len(norm) for path, norm in norms.items()}
        raise ValueError(f"axes: leaves disagree about the number of latents: {found}.")
    return norms


# ---------------------------------------------------------------- products and dense Hessians


def _product(loss: Loss, params: Params, args: tuple, vector: Params) -> Params:
    # Rounding of a single bfloat16 pass would drown every curvature of interest.
    with jax.default_matmul_precision("highest"):
        return jax.jvp(lambda p: jax.grad(loss)(p, *args), (params,), (vector,))[1]


def hessian_vector_product(
    loss: Loss, params: Params, vector: Params, *, args: tuple = ()
) -> Params:
    """H v, H the Hessian of `loss(params, *args)`, by forward over reverse differentiation.

    Costs about two gradients in time and memory. Can be jitted, vmapped over `vector`
    (the gradient is then computed once) and differentiated.

    Args:
      vector: a pytree of the shapes and dtypes of `params`.

    Returns:
      A pytree like `params`.

    Raises:
      ValueError: a bad loss or params, or a vector of other structure or shapes.
    """
    params, _ = _checked(loss, params, args)
    vector = _as_arrays("vector", vector)
    if jax.tree.map(jax.typeof, params) != jax.tree.map(jax.typeof, vector):
        raise ValueError("vector must have the structure, shapes and dtypes of params.")
    return _product(loss, params, args, vector)


def _flat_products(loss: Loss, params: Params, args: tuple, vectors: Array) -> Array:
    """vectors [b, P] -> [b, P], H times each row; the gradient itself is computed once."""
    _, unravel = ravel_pytree(params)
    return jax.vmap(lambda v: ravel_pytree(_product(loss, params, args, unravel(v)))[0])(vectors)


@functools.partial(jax.jit, static_argnames=("loss", "block"))
def _dense(loss: Loss, params: Params, args: tuple, block: int) -> Array:
    flat, _ = ravel_pytree(params)
    columns = jnp.arange(flat.size)

    def row(index):
        unit = (columns == index).astype(flat.dtype)
        return _flat_products(loss, params, args, unit[None])[0]

    return jax.lax.map(row, columns, batch_size=block)


def dense_hessian(loss: Loss, params: Params, *, args: tuple = (), block: int = 64) -> Array:
    """The Hessian [P, P] of `loss(params, *args)`, for small models.

    It is returned as computed: its asymmetry is a measure of rounding. Memory: P^2
    numbers and `block` times what a gradient takes. Time: P Hessian-vector products.

    Args:
      block: rows computed at a time.

    Raises:
      ValueError: a bad loss, params or block.
    """
    params, size = _checked(loss, params, args)
    _check_at_least(1, block=block)
    return _dense(loss, params, args, min(block, size))


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
    products = _flat_products(loss, params, args, rows)
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


@functools.partial(jax.jit, static_argnames="loss")
def _certified(loss: Loss, params: Params, args: tuple, vectors: Array):
    """Rayleigh quotients [b] and residual norms ||H v - theta v|| [b] of unit rows [b, P]."""
    products = _flat_products(loss, params, args, vectors)
    values = (vectors * products).sum(1)
    return values, jnp.linalg.norm(products - values[:, None] * vectors, axis=1)


def _host(array: Array) -> np.ndarray:
    """What a product gave, in NumPy's float64; refuses a Hessian that is not finite."""
    array = np.asarray(jax.device_get(array), np.float64)
    if not np.isfinite(array).all():
        raise ValueError("loss has a Hessian with NaN or infinite entries at params.")
    return array


def _asymmetry(matrix: np.ndarray) -> float:
    return float(np.abs(matrix - matrix.T).max())


def _symmetric_eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.linalg.eigh((matrix + matrix.T) / 2)


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

    Thick-restarted block Lanczos (Wu & Simon, 2000; Stewart's Krylov-Schur) with full
    reorthogonalisation, on both ends at once. Blocks of `count` vectors find eigenvalues
    of any multiplicity, exact zero modes included. A basis as large as the parameters is
    not iterated on: the Hessian is then diagonalised.

    Args:
      count: eigenvalues wanted at each end, and the block size.
      tolerance: a pair has converged when its residual is at most `tolerance` |value|, or
        `floor` times the largest |value|, or 50 roundings of it. The eigenvalue's own
        error is of the order of the residual's square over the gap.
      floor: see `tolerance`. An eigenvalue zero cannot be found to a relative tolerance;
        raise this where its exact size does not matter.
      basis: vectors of length P that are kept, at least 4 `count`; `count` more stand
        beside them, and a step needs about 8 `count` for a moment. More converge in fewer
        products. None: 24, or as many as 64 MB hold if they are more, up to 400 (24 from
        700,000 parameters in float32).
      max_products: Hessian-vector products after which to stop, converged or not; at
        least 4 `count`.
      seed: of the random starting block.

    Returns:
      `Extremes`. That a value is an eigenvalue is certified by its residual. That none
      lies beyond it is not: a starting block orthogonal to its eigenvector would miss it,
      which for a random block has probability zero.

    Raises:
      ValueError: a bad argument, by name; a Hessian that is not finite.
    """
    params, size = _checked(loss, params, args)
    _check_positive(tolerance=tolerance)
    if not (math.isfinite(floor) and floor >= 0):
        raise ValueError(f"floor must be finite and not negative, but is {floor}.")
    _check_at_least(1, count=count)
    if count > size:
        raise ValueError(f"count is {count}, but there are only {size} parameters.")
    flat, unravel = ravel_pytree(params)
    if basis is None:
        basis = max(24, 4 * count, min(400, _BASIS_BYTES // flat.nbytes))
    _check_at_least(4 * count, basis=basis, max_products=max_products)
    epsilon = float(jnp.finfo(flat.dtype).eps)
    rows = basis - basis % count

    def target(values: np.ndarray, scale: float) -> np.ndarray:
        return np.maximum(tolerance * np.abs(values), max(floor, 50 * epsilon) * scale)

    def pairs(vectors: Array, scale: float) -> Eigenpairs:
        """What unit rows [count, P] are as eigenvectors, by Hessian-vector products anew."""
        values, residuals = jax.device_get(_certified(loss, params, args, vectors))
        met = residuals <= target(values, scale)
        return Eigenpairs(values, residuals, jax.vmap(unravel)(vectors), met)

    def most_extreme(number: int) -> tuple[list[int], list[int]]:
        """Positions of the `count` smallest and largest of `number` ascending values."""
        return list(range(count)), list(range(number - 1, number - 1 - count, -1))

    if size < rows + count:
        hessian = _host(_dense(loss, params, args, min(64, size)))
        ritz, vectors = _symmetric_eigh(hessian)
        smallest, largest = (
            pairs(jnp.asarray(vectors.T[end], flat.dtype), float(np.abs(ritz).max()))
            for end in most_extreme(size)
        )
        return Extremes(smallest, largest, ritz, _asymmetry(hessian), size + 2 * count)

    key = stream(seed, "probing/lanczos")
    space = jnp.zeros((rows + count, size), flat.dtype)
    start = jax.random.normal(jax.random.fold_in(key, 0), (count, size), flat.dtype)
    space, _, _ = _append_jit(space, start, 0, jnp.zeros((), flat.dtype), key)
    # Below the diagonal what the recurrence says of basis H basis^T, above it what the
    # products say: equal but for rounding.
    projected = np.zeros((rows + count, rows + count))
    filled, products, scale, asymmetry, looked = 0, 0, 0.0, 0.0, 0

    while True:
        space, overlap, coupling = _extend(
            loss, params, args, space, filled, count, jnp.asarray(scale, flat.dtype),
            jax.random.fold_in(key, 1 + products),
        )  # fmt: skip
        overlap, coupling = _host(overlap), _host(coupling)
        below = filled + count
        projected[:below, filled:below] = overlap[:below]
        projected[below : below + count, filled:below] = coupling
        filled, products = below, products + count

        last = products + count > max_products - 2 * count
        # Looking costs filled^3: not at every step of a large basis.
        if not last and filled < rows and filled < looked + filled // 16:
            continue
        looked = filled
        inner = projected[:filled, :filled]
        asymmetry = max(asymmetry, _asymmetry(inner))
        ritz, coordinates = _symmetric_eigh(inner)
        scale = max(scale, float(np.abs(ritz).max()))
        residuals = np.linalg.norm(
            projected[filled : filled + count, :filled] @ coordinates, axis=0
        )
        met = residuals <= 0.5 * target(ritz, scale)  # half: rounding adds to the residual
        low, high = filled >= 2 * count and met[:count].all(), met[-count:].all()
        stop = last or (low and high)
        if not stop and filled < rows:
            continue

        # Over many restarts the basis drifts from orthonormal: let the small problem know.
        gram = np.asarray(_gram(space), np.float64)[:filled, :filled]
        ritz, coordinates = scipy.linalg.eigh((inner + inner.T) / 2, gram)
        if stop:
            weights = np.zeros((2, count, len(projected)))
            for end, order in enumerate(most_extreme(filled)):
                weights[end, :, :filled] = coordinates.T[order]
            smallest, largest = (
                pairs(_combine(jnp.asarray(end, flat.dtype), space), scale) for end in weights
            )
            return Extremes(smallest, largest, ritz, asymmetry, products + 2 * count)
        # Keep half of the space, most of it for the end that still needs it.
        kept = max(2 * count, rows // 2 // count * count)
        fewest = min(count + 1, kept - count)
        least = kept // 2
        if low != high:
            least = fewest if low else kept - fewest
        order = [*range(least), *range(filled - (kept - least), filled)]
        rotation = np.zeros_like(projected)
        rotation[:kept, :filled] = coordinates.T[order]
        rotation[kept : kept + count, filled : filled + count] = np.eye(count)
        space = _rotate(space, jnp.asarray(rotation, flat.dtype))
        coupled = projected[filled : filled + count, :filled] @ coordinates[:, order]
        projected[:] = 0
        projected[:kept, :kept] = np.diag(ritz[order])
        projected[kept : kept + count, :kept] = coupled
        filled = looked = kept


# ---------------------------------------------------------------- spectral density


class SpectralDensity(NamedTuple):
    """A Hessian's eigenvalue density, smoothed: times P it counts eigenvalues per unit."""

    grid: np.ndarray  # [G]
    density: np.ndarray  # [G] integrates to 1 over the line
    error: np.ndarray  # [G] its Monte-Carlo standard error over probes
    width: float  # standard deviation of the Gaussian that smooths
    nodes: np.ndarray  # [S, M] quadrature nodes of each probe
    weights: np.ndarray  # [S, M] and weights, which sum to 1 over M


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
    params, size = _checked(loss, params, args)
    _check_at_least(2, probes=probes)
    _check_at_least(1, steps=steps)
    if width is not None:
        _check_positive(width=width)
    if grid is not None and (np.ndim(grid) != 1 or not len(grid) or not np.isfinite(grid).all()):
        raise ValueError(f"grid must be a finite vector [G], but has shape {np.shape(grid)}.")
    flat, _ = ravel_pytree(params)
    steps = min(steps, size)
    nodes, weights = np.zeros((probes, steps)), np.zeros((probes, steps))
    for probe in range(probes):
        key = stream(seed, "probing/density", probe)
        signs = jax.random.rademacher(jax.random.fold_in(key, 0), (1, size), flat.dtype)
        space = jnp.zeros((steps + 1, size), flat.dtype).at[0].set(signs[0] / math.sqrt(size))
        projected, scale = np.zeros((steps, steps)), 0.0
        for step in range(steps):
            space, overlap, coupling = _extend(
                loss, params, args, space, step, 1, jnp.asarray(scale, flat.dtype),
                jax.random.fold_in(key, 1 + step),
            )  # fmt: skip
            projected[step, step] = _host(overlap)[step, 0]
            scale = max(scale, float(np.abs(projected).max()))
            if step + 1 < steps:
                projected[step, step + 1] = projected[step + 1, step] = coupling[0, 0]
        nodes[probe], vectors = np.linalg.eigh(projected)
        weights[probe] = vectors[0] ** 2
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


# ---------------------------------------------------------------- certificates


@functools.partial(jax.jit, static_argnames="loss")
def _gradient_norm(loss: Loss, params: Params, args: tuple) -> tuple[Array, Array]:
    with jax.default_matmul_precision("highest"):
        value, gradient = jax.value_and_grad(loss)(params, *args)
    return value, jnp.linalg.norm(ravel_pytree(gradient)[0])


def _value_and_gradient_norm(loss: Loss, params: Params, args: tuple) -> tuple[float, float]:
    value, norm = (float(x) for x in _gradient_norm(loss, params, args))
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise ValueError(
            f"loss is {value} with a gradient of norm {norm} at params; both must be finite."
        )
    return value, norm


Verdict = Literal["minimum", "strict saddle", "degenerate", "not stationary", "undecided"]

_MEANING: Mapping[str, str] = {
    "minimum": "every eigenvalue of the Hessian is positive: a strict local minimum",
    "strict saddle": "a direction of negative curvature leads down (a maximum counts as one)",
    "degenerate": "no negative eigenvalue, but zero ones: second order cannot tell a minimum "
    "from a saddle here",
    "not stationary": "the gradient is above the tolerance; the Hessian was not looked at",
    "undecided": "no negative curvature found, but the smallest eigenvalue did not converge",
}

_EXPECTATION: Mapping[str, str] = {
    "exact": "The loss holds its expectation over noise exactly; the caller says so.",
    "sampled": "The loss is a sample of an expectation over noise: all of this is about that "
    "sample, and another draw moves gradient and eigenvalues.",
    "not stated": "The loss is deterministic. If it holds draws of noise, all of this is about "
    "those draws.",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What `certify` found at a point, and what that rests on. Print it."""

    verdict: Verdict
    loss: float
    gradient_norm: float
    tolerance: float  # of the gradient norm
    parameters: int  # P
    smallest: float  # least eigenvalue found (NaN where not stationary)
    smallest_residual: float  # an eigenvalue lies within it of `smallest`
    largest: float
    largest_residual: float
    zero_band: float  # |eigenvalue| up to this counts as zero
    index: int | None  # eigenvalues below -zero_band, where all were computed
    index_bounds: tuple[int, int] | None  # of negative eigenvalues: certainly, and possibly
    zero_modes: int | None  # eigenvalues within the band, where all were computed
    direction: Params | None  # unit eigenvector of `smallest`, like params
    method: str
    assumptions: tuple[str, ...]

    def __str__(self) -> str:
        relation = "<=" if self.gradient_norm <= self.tolerance else ">"
        lines = [
            f"{self.verdict}: {_MEANING[self.verdict]}.",
            f"  loss {self.loss:.10g}, {self.parameters:,} parameters",
            f"  gradient norm {self.gradient_norm:.3g} {relation} tolerance {self.tolerance:.3g}",
        ]
        if self.index_bounds is not None:
            for end in ("smallest", "largest"):
                found, residual = getattr(self, end), getattr(self, f"{end}_residual")
                lines.append(f"  {end} eigenvalue {found:.8g} (residual {residual:.1g})")
            if self.index is not None:
                lines.append(f"  index {self.index}, zero modes {self.zero_modes}")
            else:
                low, high = self.index_bounds
                lines.append(f"  index at least {low} and at most {high}")
        return "\n".join([*lines, "assumed:", *(f"  - {line}" for line in self.assumptions)])


def certify(
    loss: Loss,
    params: Params,
    tolerance: float,
    *,
    args: tuple = (),
    zero_tolerance: float | None = None,
    dense_limit: int = 3000,
    count: int = 2,
    basis: int | None = None,
    max_products: int = 2000,
    seed: int = 0,
    expectation: Literal["exact", "sampled", "not stated"] = "not stated",
) -> Certificate:
    """Is `params` a stationary point of `loss(params, *args)`, and of what kind?

    - "not stationary": the gradient's norm is above `tolerance`.
    - "strict saddle": some direction has negative curvature. One is enough, so that this
      holds whether or not anything else converged. Maxima are included.
    - "minimum": all eigenvalues are positive.
    - "degenerate": none is negative, some are zero, and second order is silent: a flat
      valley, x^4 and a monkey saddle look alike.
    - "undecided": above `dense_limit` only, no negative curvature was found before
      `max_products`, and the smallest eigenvalue had not converged.

    Args:
      tolerance: gradient norm up to which the point is stationary.
      zero_tolerance: an eigenvalue counts as zero up to this times the largest
        |eigenvalue| (and never below the Hessian's measured asymmetry). None: the square
        root of the precision's epsilon, 1.5e-8 in float64 and 3.5e-4 in float32.
      dense_limit: up to so many parameters the Hessian is built and diagonalised and the
        index is exact (3,000 take 72 MB and some ten seconds in float64); above,
        `extreme_eigenvalues` bounds it.
      count, basis, max_products, seed: of `extreme_eigenvalues`.
      expectation: what the loss holds of an expectation over noise. Only the caller
        knows; it is repeated in the assumptions.

    Raises:
      ValueError: a bad argument, by name; a loss, gradient or Hessian that is not finite.
    """
    params, size = _checked(loss, params, args)
    _check_positive(tolerance=tolerance)
    if zero_tolerance is not None:
        _check_positive(zero_tolerance=zero_tolerance)
    _check_at_least(0, dense_limit=dense_limit)
    if expectation not in _EXPECTATION:
        raise ValueError(f"expectation must be one of {[*_EXPECTATION]}, but is {expectation!r}.")
    value, gradient_norm = _value_and_gradient_norm(loss, params, args)
    flat, unravel = ravel_pytree(params)
    if zero_tolerance is None:
        zero_tolerance = math.sqrt(float(jnp.finfo(flat.dtype).eps))
    found = {
        "loss": value, "gradient_norm": gradient_norm, "tolerance": tolerance,
        "parameters": size,
    }  # fmt: skip
    assumptions = [
        _EXPECTATION[expectation],
        f"Computed in {flat.dtype}, matrix products at JAX's highest precision.",
    ]
    if gradient_norm > tolerance:
        return Certificate(
            verdict="not stationary", **found, smallest=math.nan, smallest_residual=math.nan,
            largest=math.nan, largest_residual=math.nan, zero_band=math.nan, index=None,
            index_bounds=None, zero_modes=None, direction=None, method="gradient",
            assumptions=tuple(assumptions),
        )  # fmt: skip

    if size <= dense_limit:
        hessian = _host(_dense(loss, params, args, min(64, size)))
        eigenvalues, vectors = _symmetric_eigh(hessian)
        ends = jnp.asarray(vectors.T[[0, -1]], flat.dtype)
        (smallest, largest), residuals = jax.device_get(_certified(loss, params, args, ends))
        direction, settled = unravel(ends[0]), True
        rounding = float(np.linalg.norm(hessian - hessian.T))
    else:
        extremes = extreme_eigenvalues(
            loss, params, args=args, count=count, tolerance=1e-3, floor=0.1 * zero_tolerance,
            basis=basis, max_products=max_products, seed=seed,
        )  # fmt: skip
        eigenvalues = extremes.ritz_values
        smallest, largest = extremes.smallest.values[0], extremes.largest.values[0]
        residuals = extremes.smallest.residuals[0], extremes.largest.residuals[0]
        direction = jax.tree.map(lambda leaf: leaf[0], extremes.smallest.vectors)
        settled = bool(extremes.smallest.converged[0])
        rounding = extremes.asymmetry
    band = max(zero_tolerance * float(np.abs(eigenvalues).max()), rounding)
    negative = max(int((eigenvalues < -band).sum()), int(smallest < -band))
    positive = int((eigenvalues > band).sum())
    exact = len(eigenvalues) == size
    method = f"dense Hessian, all {size} eigenvalues"
    if not exact:
        method = f"block Lanczos, {extremes.products} Hessian-vector products"
    verdict: Verdict
    if negative:
        verdict = "strict saddle"
    elif not settled:
        verdict = "undecided"
    elif smallest - residuals[0] > band:
        verdict = "minimum"
    else:
        verdict = "degenerate"
    assumptions += [
        f"A gradient norm up to {tolerance:.3g} counts as zero: a stationary point is taken to "
        "lie close by, with eigenvalues of the same signs.",
        f"Eigenvalues within {band:.3g} of zero count as zero.",
        "The loss is twice differentiable at the point: kinks, such as a ReLU's, are not seen.",
        f"Method: {method}.",
    ]
    if not exact:
        assumptions += [
            "Counts are those of a subspace, and so bounds: of negative eigenvalues there are "
            "at least as many as found, and at most as many as were not found positive.",
        ]
        if verdict != "strict saddle":
            assumptions += [
                "That no eigenvalue lies below the smallest one found rests on a random "
                f"starting block (seed {seed}), not on a certificate.",
            ]
    return Certificate(
        verdict=verdict,
        **found,
        smallest=float(smallest),
        smallest_residual=float(residuals[0]),
        largest=float(largest),
        largest_residual=float(residuals[1]),
        zero_band=band,
        index=negative if exact else None,
        index_bounds=(negative, size - positive),
        zero_modes=size - negative - positive if exact else None,
        direction=direction,
        method=method,
        assumptions=tuple(assumptions),
    )
