"""Measuring by turns, so that a ratio never mixes two moments of the machine."""

import functools
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vaebal.models.nets import Products, product

# Does n units of its work (epochs, products, passes), and returns when they are done.
Work = Callable[[int], None]
Name = TypeVar("Name", bound=Hashable)
PEAK = "matrix product"


class Spread(NamedTuple):
    """A quantity over the repeats."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, minimum and maximum."""
    return Spread(float(np.median(values)), float(np.min(values)), float(np.max(values)))


class Turns(NamedTuple):
    """How often and how long each contestant works."""

    repeats: int
    window: float  # seconds that one turn lasts at least

    def __call__(self, works: Mapping[Name, Work]) -> dict[Name, np.ndarray]:
        """`take_turns` so."""
        return take_turns(works, self.repeats, self.window)


def take_turns(works: Mapping[Name, Work], repeats: int, window: float) -> dict[Name, np.ndarray]:
    """Seconds per unit of every work, [repeats] each: A B A B ..., after a warm-up.

    A turn lasts `window` seconds or one unit, whichever is longer, so that the clock and
    the dispatch weigh nothing.
    """
    counts = {}
    for name, work in works.items():
        work(1)  # compiles, fills caches, starts threads
        counts[name] = max(1, math.ceil(window / seconds(work, 1)))
    turns = [
        {name: seconds(work, counts[name]) / counts[name] for name, work in works.items()}
        for _ in range(repeats)
    ]
    return {name: np.array([turn[name] for turn in turns]) for name in works}


def seconds(work: Work, count: int) -> float:
    """What `count` units take."""
    start = time.perf_counter()
    work(count)
    return time.perf_counter() - start


def repeated(once: Callable[[], Any]) -> Work:
    """The work of calling `once` and waiting for what it returns."""

    def work(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(once())

    return work


def growth_exponent(sizes: Sequence[float], taken: np.ndarray) -> Spread:
    """p of seconds ~ size^p, by least squares in the logarithms, over the turns.

    Args:
      sizes: [L], at least two different ones.
      taken: [L, repeats] seconds.
    """
    x = np.log(np.asarray(sizes, np.float64))
    x = x - x.mean()
    return spread(x @ np.log(np.asarray(taken, np.float64)) / (x @ x))


class Peak(NamedTuple):
    """The yardstick: a matrix product that goes on taking turns with what it is held against."""

    work: Work
    flops: int  # of one product

    def rate(self, taken: np.ndarray) -> np.ndarray:
        """FLOP/s, from the seconds of its turns."""
        return self.flops / taken


def jax_product(size: int, products: Products = jnp.float32) -> Work:
    """Products of two float32 matrices [size, size], taken as a network takes them.

    Args:
      products: of `nets.PRODUCTS`; by default as the device does float32 fastest.
    """
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
    return repeated(functools.partial(jax.jit(lambda a, b: product(a, b, products)), a, b))


def jax_peak(size: int, products: Products = jnp.float32) -> Peak:
    """The peak by JAX's product."""
    return Peak(jax_product(size, products), 2 * size**3)
