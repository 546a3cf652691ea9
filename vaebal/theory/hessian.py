"""A loss's Hessian at any point: products with vectors, and the dense matrix of small models.

A loss is `loss(params, *args) -> scalar`: deterministic, twice differentiable, params a
pytree of real floating arrays. P is their number; where a vector or matrix is flat, its
order is `jax.flatten_util.ravel_pytree`'s. Hand data over in `args`: what a loss closes
over becomes a constant of the compiled program, is kept with it, and must not change.

Everything runs in the parameters' precision, matrix products at JAX's highest (no
TensorFloat-32 or bfloat16 passes). Curvature near zero wants float64: convert params and
args to float64 and call under `with jax.enable_x64(True)`.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from vaebal.theory.gradients import Params, path_name

Loss = Callable[..., Array]  # loss(params, *args) -> scalar


def as_arrays(name: str, tree: Params) -> Params:
    """The pytree as JAX arrays: real, floating, not empty, finite where they have values."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    if not sum(np.size(leaf) for _, leaf in leaves):
        raise ValueError(f"{name} is empty: there is nothing to differentiate by.")
    for path, leaf in leaves:
        where = f"{name} at {path_name(path)!r}" if path else name
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


def checked(loss: Loss, params: Params, args: tuple) -> tuple[Params, int]:
    """`params` as JAX arrays and their number P, for a scalar `loss(params, *args)`."""
    if not isinstance(args, tuple):
        raise ValueError(f"args must be a tuple, but is a {type(args).__name__}.")
    params = as_arrays("params", params)
    value = jax.eval_shape(loss, params, *args)
    shape = getattr(value, "shape", None)
    if shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        got = f"a {type(value).__name__}" if shape is None else f"{value.dtype}{list(shape)}"
        raise ValueError(f"loss must return one real float, a scalar, but returns {got}.")
    return params, sum(leaf.size for leaf in jax.tree.leaves(params))


def check_positive(**values: float) -> None:
    """Each value is positive and finite; ValueError by its name."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, but is {value}.")


def check_at_least(least: int, **values: int) -> None:
    """Each value is an integer of at least `least`; ValueError by its name."""
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, but is {value}.")


def _layout(tree: Params) -> Params:
    """Shapes and dtypes alone: whether a dtype is weak, as a Python number's, does not matter."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


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
    params, _ = checked(loss, params, args)
    vector = as_arrays("vector", vector)
    if _layout(params) != _layout(vector):
        raise ValueError("vector must have the structure, shapes and dtypes of params.")
    return _product(loss, params, args, vector)


def flat_products(loss: Loss, params: Params, args: tuple, vectors: Array) -> Array:
    """vectors [b, P] -> [b, P], H times each row; the gradient itself is computed once."""
    _, unravel = ravel_pytree(params)
    return jax.vmap(lambda v: ravel_pytree(_product(loss, params, args, unravel(v)))[0])(vectors)


@functools.partial(jax.jit, static_argnames=("loss", "block"))
def dense(loss: Loss, params: Params, args: tuple, block: int) -> Array:
    """`dense_hessian` without its checks."""
    flat, _ = ravel_pytree(params)
    columns = jnp.arange(flat.size)

    def row(index):
        unit = (columns == index).astype(flat.dtype)
        return flat_products(loss, params, args, unit[None])[0]

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
    params, size = checked(loss, params, args)
    check_at_least(1, block=block)
    return dense(loss, params, args, min(block, size))


@functools.partial(jax.jit, static_argnames="loss")
def rayleigh(loss: Loss, params: Params, args: tuple, vectors: Array):
    """Rayleigh quotients [b] and residual norms ||H v - theta v|| [b] of unit rows [b, P]."""
    products = flat_products(loss, params, args, vectors)
    values = (vectors * products).sum(1)
    return values, jnp.linalg.norm(products - values[:, None] * vectors, axis=1)


def on_host(array: Array) -> np.ndarray:
    """What a product gave, in NumPy's float64; refuses a Hessian that is not finite."""
    array = np.asarray(jax.device_get(array), np.float64)
    if not np.isfinite(array).all():
        raise ValueError("loss has a Hessian with NaN or infinite entries at params.")
    return array


def symmetric_eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and eigenvectors of the symmetric part of a matrix."""
    return np.linalg.eigh((matrix + matrix.T) / 2)
