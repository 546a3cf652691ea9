"""Norms of gradients (or of any tree like the parameters) by group and by latent."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Params = Any  # a pytree of real floating arrays

# Where a latent's weights lie in the parameters of a `GaussianVAE`: the axis of the latents of
# every leaf that has one (Flax kernels are [in, out]). Models without a skip, and heads without
# biases, lack some. The biases stand apart: Theorem 2 does not name them, and needs them zero.
LATENT_WEIGHTS: dict[str, int] = {
    "decoder/first/kernel": 0,
    "affine/kernel": 0,
    "encoder/mean/kernel": 1,
    "encoder/affine/kernel": 1,
    "encoder/log_var/kernel": 1,
}
LATENT_BIASES: dict[str, int] = {"encoder/mean/bias": 0, "encoder/log_var/bias": 0}


def path_name(path: tuple) -> str:
    """A leaf's path in a pytree as "key/key"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


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
    if depth < 1:
        raise ValueError(f"depth is {depth}; give at least 1: keys of a path that name a group.")
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    if not leaves:
        raise ValueError("tree is empty: it has no groups.")
    squares: dict[str, Array] = {}
    for path, leaf in leaves:
        name = path_name(path[:depth])
        squares[name] = squares.get(name, 0.0) + jnp.square(leaf).sum()
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def norms_by_latent(tree: Params, axes: Mapping[str, int] | None = None) -> dict[str, Array]:
    """Euclidean norms of a gradient (or any pytree like the parameters) by latent dimension.

    Args:
      tree: pytree of arrays, such as `jax.grad(loss)(params)`.
      axes: {"path/of/leaf": the axis along which that leaf's latents lie}. None: those of
        `LATENT_WEIGHTS` and `LATENT_BIASES` that the tree has. An affine VAE (W_x [D, K], W_z
        [K, D], ...) is {"W_x": 1, "W_z": 0, ...}.

    Returns:
      {"path/of/leaf": [K]}; entry k is the norm of that leaf's slice for latent k.

    Raises:
      ValueError: a path that the tree lacks, an axis that its leaf lacks, or leaves that
        disagree about K.
    """
    leaves = {path_name(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    if axes is None:
        axes = {path: k for path, k in (LATENT_WEIGHTS | LATENT_BIASES).items() if path in leaves}
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
