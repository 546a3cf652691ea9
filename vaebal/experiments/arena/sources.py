"""The arena's data sets: manifolds of known dimension, all as standardised rows of one width.

Shapes: N examples, M test examples, D features.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vaebal.data import CurvedCube, FlatCube
from vaebal.data.rendered import draw_factors, linear_axes, render
from vaebal.estimator.rows import scale_of
from vaebal.streams import stream

KINDS = ("network", "linear", "rendered", "sphere", "union")
SIDE = 16  # pixels of a rendered scene
PIXELS = 3 * SIDE**2
# A union's manifolds, the dimension of each, and the space they lie in (VAEase's linear set).
PARTS, PART_RANK, AMBIENT = 3, 4, 40


class Source(NamedTuple):
    """A data set."""

    kind: str  # of `KINDS`
    rank: int  # r; of a union that of each of its manifolds, of a sphere its own, not its space's
    noise: float  # standard deviation, in the units of the images
    size: int  # N
    data_seed: int

    def group(self, whole: int) -> str:
        """What it is there to show: "known", "noise", "few" (than `whole` rows), or its kind."""
        if self.kind in ("sphere", "union"):
            return self.kind
        return "noise" if self.noise else "few" if self.size < whole else "known"


class Rows(NamedTuple):
    """A data set's rows, centred, with a variance of 1 along the direction where it is largest."""

    train: np.ndarray  # [N, D] float32
    test: np.ndarray  # [M, D]

    @property
    def variance(self) -> float:
        """Of a feature, on average: all that a method is told of the scale of its errors."""
        return float(np.square(self.train).mean())

    @property
    def test_variance(self) -> float:
        """The same of the test examples, of which errors are a share."""
        return float(np.square(self.test).mean())


@functools.lru_cache(maxsize=256)  # every method asks for every data set
def draw(source: Source, tests: int, dim: int) -> Rows:
    """The rows of a source, `tests` = M of them to test on, in D = `dim` dimensions."""
    size = source.size + tests
    x = np.asarray(_drawn(source.kind, source.rank, size, dim, source.data_seed))
    if source.noise:
        key = stream(source.data_seed, "observation noise")
        x = x + source.noise * np.asarray(jax.random.normal(key, x.shape))
    train, test = x[: source.size], x[source.size :]
    if x.shape[1] > dim:
        axes = principal_axes(train, dim)
        train, test = train @ axes, test @ axes
    scale = scale_of(train)
    return Rows(scale.standardise(train), scale.standardise(test))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _drawn(kind: str, rank: int, size: int, dim: int, seed: Array) -> Array:
    """[size, D]; of "rendered" [size, 3 SIDE^2]."""
    if kind == "sphere":
        normal = jax.random.normal(stream(seed, "sphere"), (size, rank + 1))
        points = normal / jnp.linalg.norm(normal, axis=1, keepdims=True)
        return _turned(points, seed, dim)
    if kind == "union":
        return _turned(_union(size, rank, seed), seed, dim)
    factors = draw_factors(seed, jnp.arange(size), rank)
    if kind == "rendered":
        scene = lambda row: render(row[None], SIDE).reshape(-1)  # noqa: E731
        return jax.lax.map(scene, factors, batch_size=256)
    return {"linear": FlatCube, "network": CurvedCube}[kind](dim, seed)(factors)


def _turned(points: Array, seed: Array, dim: int) -> Array:
    """[N, n] -> [N, D] by a random isometry, up to a scale."""
    frame = linear_axes(seed, jnp.ones(points.shape[1]), dim)
    return jnp.matmul(points, frame.T, precision="highest")


def _union(size: int, rank: int, seed: Array) -> Array:
    """Normal on `PARTS` random subspaces of dimension `rank` of R^`AMBIENT`, one a row."""
    bases = jax.random.normal(stream(seed, "union/bases"), (PARTS, rank, AMBIENT))
    part = jax.random.randint(stream(seed, "union/part"), (size,), 0, PARTS)
    z = jax.random.normal(stream(seed, "union/z"), (size, rank))
    return jnp.einsum("nr,nra->na", z, bases[part], precision="highest")


def principal_axes(x: np.ndarray, count: int) -> np.ndarray:
    """The `count` directions [D, count] along which x [N, D] varies most."""
    _, vectors = np.linalg.eigh(np.cov(x, rowvar=False, dtype=np.float64))
    return vectors[:, ::-1][:, :count].astype(np.float32)
