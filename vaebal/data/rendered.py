"""Data whose intrinsic dimension r is known: drawn scenes, linear and random-network manifolds.

A scene is a face under a sun, a smooth function of up to twelve factors, each on [0, 1]:

==========  =====================================================
x           the face stands left ... right
y           low ... high
tilt        the head leans left ... right
background  the sky's hue: mint ... blue ... rose
hue         the face's hue: pink ... orange ... green ... teal
size        the face is small ... large
gaze        looks left ... right
light       the sun, and with it the shading: left ... right
shape       the head is a tall disc ... a wide, rounded square
ears        short, a bear's ... long, a rabbit's
eyes        narrow ... wide open
mouth       sad ... happy
==========  =====================================================

Their order is about that of the variance they cause. The first r are free and the others
neutral, so the images form a cube of dimension r, bent: hues run over arcs, not circles, and no
factor's effect ever vanishes. Every shape is a signed distance made into a soft mask, and masks
are laid one over the other, so that no pixel jumps where one shape passes behind another.
Every pixel is a mean of colours, so it lies in [0, 1] without clipping.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vaebal.streams import stream

_NEUTRAL_OF = {
    "x": 0.5,
    "y": 0.5,
    "tilt": 0.4,
    "background": 0.45,
    "hue": 0.35,
    "size": 0.5,
    "gaze": 0.5,
    "light": 0.25,
    "shape": 0.5,
    "ears": 0.5,
    "eyes": 0.6,
    "mouth": 0.75,
}
FACTORS: tuple[str, ...] = tuple(_NEUTRAL_OF)
NEUTRAL: tuple[float, ...] = tuple(_NEUTRAL_OF.values())
MAX_FACTORS = len(FACTORS)

# Half the width of an edge; the image is 2 wide, so an edge takes 4 % of it.
_EDGE = 0.04


def draw_factors(seed: int | Array, indices: Array, count: int) -> Array:
    """Factors of the examples `indices` [N], uniform on the cube: [N, count], float32.

    A row is a function of (seed, index) alone; a smaller `count` cuts it short.

    Raises:
      ValueError: count outside 1..12.
    """
    _check_count(count)

    def row(index):
        return jax.random.uniform(stream(seed, "factors", index), (MAX_FACTORS,), jnp.float32)

    return jax.vmap(row)(jnp.asarray(indices))[:, :count]


def render(factors: Array, resolution: int) -> Array:
    """The scenes of `factors` [B, r]: [B, resolution, resolution, 3] in [0, 1].

    Every resolution shows the same picture: a pixel is about its area's average.

    Args:
      factors: the first r = 1..12 of `FACTORS`, on [0, 1]; images have their float type.
      resolution: pixels per side, at least 8; static under jit.

    Raises:
      ValueError: r or resolution out of range; where values are known, so outside jit
        only, a factor outside [0, 1].
    """
    factors = _checked(factors)
    _check_count(factors.shape[1])
    if resolution < 8:
        raise ValueError(f"resolution must be at least 8 pixels; got {resolution}.")
    return _render(factors, resolution)


def linear_axes(seed: int | Array, variances: Array, dim: int) -> Array:
    """Orthogonal axes A [D, r] of `linear_manifold`, whose covariance is A A^T.

    The squared norms of the columns are proportional to `variances` [r], and as large as
    [0, 1] allows.

    Raises:
      ValueError: fewer dimensions `dim` = D than variances, or (outside jit) a variance
        that is not positive.
    """
    variances = jnp.asarray(variances)
    count = len(variances)
    _check_dim("dim", dim, count)
    if not isinstance(variances, jax.core.Tracer) and not (variances > 0).all():
        raise ValueError(f"variances must be positive; got {variances}.")
    axes, _ = jnp.linalg.qr(jax.random.normal(stream(seed, "linear"), (dim, count)))
    axes = axes * jnp.sqrt(variances)[None, :]
    reach = math.sqrt(3) * jnp.abs(axes).sum(1).max()  # of sqrt(12) (factor - 1/2)
    return axes * (0.5 / reach)


def linear_manifold(factors: Array, seed: int | Array, variances: Array, dim: int) -> Array:
    """A flat cube in [0, 1]^D: 1/2 + A sqrt(12) (factors - 1/2), [B, r] -> [B, D].

    Args:
      factors: [B, r] on [0, 1]; uniform ones give covariance A A^T of rank r.
      seed: of the axes A, see `linear_axes`.
      variances: [r], positive, of which only the ratios count.
      dim: D, at least r.

    Raises:
      ValueError: factors that are not [B, r] or not on the cube, another number of
        variances, a variance that is not positive, D < r.
    """
    factors = _checked(factors)
    if jnp.shape(variances) != factors.shape[1:]:
        raise ValueError(
            f"variances must be one for each of {factors.shape[1]} factors; "
            f"got shape {jnp.shape(variances)}."
        )
    return 0.5 + _matmul(_standardised(factors), linear_axes(seed, variances, dim).T)


def network_manifold(factors: Array, seed: int | Array, width: int, dim: int) -> Array:
    """A random curved cube in [0, 1]^D: two tanh layers and a sigmoid, [B, r] -> [B, D].

    Smooth, and with random weights an embedding where width and D are well above 2 r.

    Args:
      factors: [B, r] on [0, 1].
      seed: of the weights and biases, all Gaussian; pre-activations are of order 1.
      width: of both hidden layers, at least r.
      dim: D, at least r.

    Raises:
      ValueError: factors that are not [B, r] or not on the cube, width < r, D < r.
    """
    factors = _checked(factors)
    count = factors.shape[1]
    _check_dim("width", width, count)
    _check_dim("dim", dim, count)

    def affine(x, layer, outputs):
        weights = jax.random.normal(stream(seed, "network", layer), (x.shape[1] + 1, outputs))
        return _matmul(x, weights[1:]) / math.sqrt(x.shape[1]) + 0.5 * weights[:1]

    hidden = jnp.tanh(affine(_standardised(factors), 0, width))
    hidden = jnp.tanh(affine(hidden, 1, width))
    return jax.nn.sigmoid(2 * affine(hidden, 2, dim))


@functools.partial(jax.jit, static_argnames="resolution")
def _render(factors: Array, resolution: int) -> Array:
    batch, count = factors.shape
    neutral = jnp.asarray(NEUTRAL[count:], factors.dtype)
    neutral = jnp.broadcast_to(neutral[None, :], (batch, MAX_FACTORS - count))
    pixel = 2 / resolution
    x = (jnp.arange(resolution, dtype=factors.dtype) + 0.5) * pixel - 1
    # Averaging over a pixel adds its variance, pixel^2 / 12, to that of an edge, edge^2 / 7.
    edge = math.sqrt(_EDGE**2 + pixel**2 * 7 / 12)
    scene = functools.partial(_scene, across=x[None, :], up=-x[:, None], edge=edge)
    return jax.vmap(scene)(jnp.concatenate([factors, neutral], axis=1))


def _scene(factors: Array, across: Array, up: Array, edge: float) -> Array:
    """One scene [H, W, 3] where x is `across` [1, W] and y is `up` [H, 1], from -1 to 1."""
    value = dict(zip(FACTORS, factors, strict=True))

    def between(name, low, high):
        return low + (high - low) * value[name]

    # Lengths on the face are in units of its size.
    size = between("size", 0.42, 0.58)
    soft = edge / size
    east = (across - between("x", -0.17, 0.17)) / size
    north = (up - between("y", -0.33, -0.03)) / size
    tilt = between("tilt", 0.4, -0.4)
    stretch = between("shape", 0.88, 1.12)
    sun_angle = between("light", -1.0, 1.0)
    sun_x, sun_y = jnp.sin(sun_angle), jnp.cos(sun_angle)

    def tilted(x, y):
        cos, sin = jnp.cos(tilt), jnp.sin(tilt)
        return cos * x + sin * y, cos * y - sin * x

    head = functools.partial(_head, stretch=stretch, squareness=between("shape", 0.0, 1.1))
    x, y = tilted(east, north)
    side = jnp.sqrt(x * x + 0.01)  # |x|, smooth: one ear and one cheek stand for two
    shadow = head(*tilted(east + 0.3 * sun_x, north + 0.3 * sun_y))
    sun = _length(across - 0.75 * sun_x, up - 0.15 - 0.6 * sun_y) - 0.22
    slope = sun_x * east + sun_y * north
    lit = 0.5 + 0.5 * slope / jnp.sqrt(1 + slope * slope)

    ear = _ear(side - 0.5 * stretch, y - 0.75 / stretch, between("ears", 0.2, 0.85))

    openness = between("eyes", 0.45, 1.25)
    eyes = _inside((_length(side - 0.42, (y - 0.2) / openness) - 0.32) * openness, soft)
    gaze = between("gaze", -0.15, 0.15)
    pupils = sum(_inside(_length(x - gaze - at, y - 0.2) - 0.19, soft) for at in (-0.41, 0.41))

    lips = y + 0.45 - between("mouth", -0.9, 1.6) * (x * x - 0.08)
    mouth = _within(lips, 0.14, soft) * _within(x, 0.54, soft)

    skin = _hue(between("hue", -0.9, 2.9), 0.64, 0.30)
    sky = _hue(between("background", 2.6, 5.4), 0.80, 0.13)
    ground = _hue(between("background", 2.2, 5.0), 0.70, 0.15)

    return _paint(
        ground,
        (0.5 + 0.5 * up, sky),
        (_inside(sun, 2 * edge), (0.98, 0.93, 0.72)),
        (0.35 * _inside(shadow, 4 * soft), (0.25, 0.22, 0.38)),
        (_inside(ear, soft), 0.85 * skin),
        (_inside(ear + 0.15, soft), 0.5 * skin + 0.45),
        (_inside(head(x, y), soft), 0.72 * skin),
        (_inside(head(x, y), soft) * lit, 0.65 * skin + 0.34),
        (0.45 * _inside(_length(side - 0.7, y + 0.22) - 0.2, 2 * soft), (0.95, 0.42, 0.45)),
        (eyes, (0.98, 0.98, 0.98)),
        (eyes * pupils, (0.13, 0.11, 0.20)),
        (mouth, (0.34, 0.07, 0.12)),
    )


def _head(x: Array, y: Array, *, stretch: Array, squareness: Array) -> Array:
    """Distance to a head: by the Euclidean norm where squareness is 0, the 4-norm where it is 1."""
    xx, yy = jnp.square(x / stretch), jnp.square(y * stretch)
    fourth = jnp.square(xx + yy) - 2 * squareness * (xx * yy)
    return jnp.sqrt(jnp.sqrt(fourth + 1e-4)) - 1


def _ear(x: Array, y: Array, length: Array) -> Array:
    """Distance to a capsule from its root at (0, 0) upwards and a little outwards."""
    along = jnp.clip(0.25 * x + 0.97 * y, 0, length)
    return _length(x - 0.25 * along, y - 0.97 * along) - 0.3


def _paint(ground: Array, *layers: tuple[Array, Array]) -> Array:
    """Lays (mask [H, W], colour [3]) over one another, from back to front: [H, W, 3]."""

    def channel(k):
        image = ground[k]
        for mask, colour in layers:
            image = image + mask * (colour[k] - image)
        return image

    # Channel by channel, XLA makes one loop of it and stores no mask.
    return jnp.stack([channel(k) for k in range(3)], axis=-1)


def _length(x: Array, y: Array) -> Array:
    return jnp.sqrt(x * x + y * y + 1e-3)  # smooth at 0


def _inside(distance: Array, soft: Array) -> Array:
    """1 where distance < -soft, 0 where it exceeds soft, twice differentiable between."""
    t = jnp.clip(0.5 - distance / (2 * soft), 0, 1)
    return t * t * t * (t * (6 * t - 15) + 10)


def _within(offset: Array, half_width: float, soft: Array) -> Array:
    """A band: 1 where |offset| is below half_width, but smooth however thin."""
    return _inside(offset - half_width, soft) - _inside(offset + half_width, soft)


def _hue(angle: Array, mean: float, amplitude: float) -> Array:
    """Red, green and blue [3] at an angle on the colour wheel, 0 for red."""
    thirds = jnp.arange(3, dtype=angle.dtype) * (2 * math.pi / 3)
    return mean + amplitude * jnp.cos(angle - thirds)


# Shortened products, an accelerator's default, would add what no factor explains.
_matmul = functools.partial(jnp.matmul, precision="highest")


def _standardised(factors: Array) -> Array:
    return math.sqrt(12) * (factors - 0.5)


def _checked(factors: Array) -> Array:
    factors = jnp.asarray(factors, jnp.result_type(factors, float))
    if factors.ndim != 2:
        raise ValueError(f"factors must be [B, r]; got shape {factors.shape}.")
    if not isinstance(factors, jax.core.Tracer):
        values = np.asarray(factors)
        inside = (values >= 0) & (values <= 1)  # NaN compares false
        if not inside.all():
            raise ValueError(f"factors must lie in [0, 1]; got {values[~inside][0]}.")
    return factors


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_FACTORS:
        raise ValueError(f"factors must number 1 to {MAX_FACTORS}; got {count}.")


def _check_dim(name: str, value: int, count: int) -> None:
    if value < count:
        raise ValueError(f"{name} must be at least the number of factors, {count}; got {value}.")
