"""Random streams by name: every draw is a pure function of (seed, name, indices)."""

import zlib

import jax
from jax import Array


def stream(seed: int | Array, name: str, *indices: int | Array) -> Array:
    """The key of the draw `name` at `indices` (epoch, step, ...) under `seed`.

    Args:
      seed: integer, possibly traced (so that members of a sweep can be vmapped).
      name: what is drawn: "init", "order", "noise", "evaluation/nll", ...
      *indices: integers, possibly traced, folded in one after the other.

    Returns:
      A JAX key. Equal arguments give equal keys, and nothing else is remembered,
      so any batch of any epoch can be asked for again.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key
