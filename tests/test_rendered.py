import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import pdist

from vaebal.data.rendered import (
    FACTORS,
    MAX_FACTORS,
    NEUTRAL,
    draw_factors,
    linear_axes,
    linear_manifold,
    network_manifold,
    render,
)

COUNTS = range(1, MAX_FACTORS + 1)


@pytest.fixture(scope="module")
def factors():
    """Twenty points inside the cube, and twelve of its corners, float64 [32, 12]."""
    rng = np.random.default_rng(0)
    inside, corners = rng.random((20, MAX_FACTORS)), rng.integers(0, 2, (12, MAX_FACTORS))
    return np.concatenate([inside, corners])


def grams(decode, factors):
    """J^T J [B, r, r] in float64, with J = d x / d factors at each row of `factors` [B, r]."""

    one = jax.jacfwd(lambda row: decode(row[None, :]).ravel())
    with jax.enable_x64(True):
        jacobian = np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(factors)))
    return jacobian.mT @ jacobian


def render_64(factors):
    return render(factors, 64)


def average(images, by):
    """Means over by x by blocks of pixels."""
    batch, side = images.shape[:2]
    return images.reshape(batch, side // by, by, side // by, by, 3).mean((2, 4))


def test_twelve_factors_have_names():
    assert len(set(FACTORS)) == MAX_FACTORS == 12


# ---------------------------------------------------------------- draws


def test_a_draw_depends_on_seed_and_index_alone():
    whole = draw_factors(3, jnp.arange(40), 12)
    np.testing.assert_array_equal(
        draw_factors(3, jnp.array([17, 4, 17]), 12), np.asarray(whole)[[17, 4, 17]]
    )
    drawn = jax.jit(draw_factors, static_argnums=2)(jnp.uint32(3), jnp.arange(20, 40), 12)
    np.testing.assert_array_equal(drawn, whole[20:])
    assert not np.isin(draw_factors(4, jnp.arange(40), 12), whole).any()
    assert len(np.unique(whole)) == whole.size


@pytest.mark.parametrize("count", [1, 5, 11])
def test_fewer_factors_are_a_prefix(count):
    draws = functools.partial(draw_factors, 0, jnp.arange(9))
    np.testing.assert_array_equal(draws(count), draws(12)[:, :count])


def test_draws_are_uniform_on_the_cube():
    draws = np.asarray(draw_factors(0, jnp.arange(8000), 12))
    assert draws.dtype == np.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    # Means, variances and correlations within five standard errors of 1/2, 1/12 and 0.
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=5 / np.sqrt(12 * 8000))
    np.testing.assert_allclose(draws.var(0), 1 / 12, atol=5 / np.sqrt(180 * 8000))
    np.testing.assert_allclose(np.corrcoef(draws.T), np.eye(12), atol=5 / np.sqrt(8000))


# ---------------------------------------------------------------- scenes


def test_scenes_have_exactly_count_dimensions_everywhere(factors):
    points = factors[18:22]  # two inside, two corners
    filled = np.tile(NEUTRAL, (MAX_FACTORS, len(points), 1))
    for count in COUNTS:
        filled[count - 1, :, :count] = points[:, :count]
    gram = grams(lambda rows: render(rows, 32), filled.reshape(-1, MAX_FACTORS))
    gram = gram.reshape(*filled.shape, MAX_FACTORS)
    for count in COUNTS:
        squares = np.linalg.eigvalsh(gram[count - 1, :, :count, :count])
        # The 3,072 pixels' joint change per unit of a factor, in any direction.
        assert np.sqrt(squares[:, 0].min()) > 2
        assert np.sqrt((squares[:, -1] / squares[:, 0]).max()) < 20


@pytest.mark.parametrize("factor", FACTORS)
def test_no_factor_closes_on_itself(factor):
    path = np.tile(NEUTRAL, (9, 1))
    path[:, FACTORS.index(factor)] = np.linspace(0, 1, 9)
    images = np.asarray(render(path, 32)).reshape(9, -1)
    covered = np.linalg.norm(images - images[0], axis=1)
    assert covered[-1] > 0.8 * covered.max()


def test_distant_factors_never_give_close_images():
    draws = draw_factors(1, jnp.arange(200), 12)
    images = np.asarray(render(draws, 32)).reshape(200, -1)
    assert (pdist(images) / pdist(draws)).min() > 2.5


def test_factors_are_of_comparable_strength_the_strong_first():
    rng = np.random.default_rng(0)
    strength = []
    for k in range(MAX_FACTORS):
        scenes = np.repeat(rng.random((12, 1, MAX_FACTORS)), 8, axis=1)
        scenes[:, :, k] = (np.arange(8) + 0.5) / 8
        images = np.asarray(render(scenes.reshape(-1, MAX_FACTORS), 32)).reshape(12, 8, -1)
        strength.append(images.var(1).mean())
    assert max(strength) / min(strength) < 20
    assert np.mean(strength[:4]) > np.mean(strength[4:8]) > np.mean(strength[8:])


@pytest.mark.parametrize("count", [1, 6, 11])
def test_absent_factors_are_neutral(count, factors):
    given = factors[:3, :count]
    filled = np.concatenate([given, np.tile(NEUTRAL[count:], (3, 1))], axis=1)
    np.testing.assert_allclose(render(given, 16), render(filled, 16), rtol=0, atol=2e-6)


@pytest.mark.parametrize("resolution", [8, 17, 64])
def test_pixels_lie_in_the_unit_interval(resolution, factors):
    images = np.asarray(render(factors, resolution))
    assert images.shape == (32, resolution, resolution, 3)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_rendering_is_the_same_alone_in_a_batch_and_under_jit(factors):
    whole = render(factors, 32)
    np.testing.assert_allclose(render(factors[5:6], 32), whole[5:6], rtol=0, atol=2e-6)
    jitted = jax.jit(render, static_argnums=1)(factors, 32)
    np.testing.assert_allclose(jitted, whole, rtol=0, atol=2e-6)


def test_derivatives_equal_finite_differences_and_do_not_jump(factors):
    step = 1e-5
    inside = 0.1 + 0.8 * factors[16:24]
    direction = np.random.default_rng(1).uniform(-1, 1, inside.shape)
    with jax.enable_x64(True):
        derivative = jax.jit(lambda at: jax.jvp(render_64, (at,), (jnp.asarray(direction),))[1])
        got = derivative(jnp.asarray(inside))
        ahead = render_64(inside + step * direction)
        behind = render_64(inside - step * direction)
        np.testing.assert_allclose(got, (ahead - behind) / (2 * step), rtol=0, atol=1e-5)
        # Were there a kink, a derivative would move by about its own size, however small the step.
        moved = derivative(jnp.asarray(inside + step * direction)) - got
    assert np.abs(got).max() > 1
    assert np.abs(moved).max() < 0.02


@pytest.mark.parametrize(("fine", "coarse", "rms"), [(128, 64, 0.003), (64, 32, 0.008)])
def test_resolutions_show_the_same_picture(fine, coarse, rms, factors):
    averaged = average(np.asarray(render(factors, fine)), fine // coarse)
    error = averaged - np.asarray(render(factors, coarse))
    assert np.sqrt(np.square(error).mean()) < rms
    assert np.abs(error).max() < 0.15


# ---------------------------------------------------------------- linear and network manifolds


def test_the_linear_manifold_has_the_promised_covariance():
    variances = np.array([4.0, 2.0, 1.0, 0.5])
    corners = np.stack(np.meshgrid(*[[0.0, 1.0]] * 4), -1).reshape(-1, 4)
    with jax.enable_x64(True):
        axes = np.asarray(linear_axes(0, variances, 30))
        x = np.asarray(linear_manifold(corners, 0, variances, 30))
    norms = axes.T @ axes
    np.testing.assert_allclose(norms / norms[0, 0], np.diag(variances / 4), atol=1e-12)
    # Corners have covariance I / 4, the uniform cube I / 12.
    covariance = np.cov(x.T, bias=True) / 3
    np.testing.assert_allclose(covariance, axes @ axes.T, atol=1e-12)
    assert np.linalg.matrix_rank(covariance, tol=1e-10) == 4
    np.testing.assert_allclose(x.mean(0), 0.5, atol=1e-12)
    # It fills [0, 1] and no more: some corner touches both ends.
    np.testing.assert_allclose([x.min(), x.max()], [0, 1], atol=1e-12)


def test_the_linear_manifold_is_linear_and_of_its_seed():
    factors = draw_factors(0, jnp.arange(50), 6)
    x = linear_manifold(factors, 1, jnp.ones(6), 20)
    middle = linear_manifold((factors[:25] + factors[25:]) / 2, 1, jnp.ones(6), 20)
    np.testing.assert_allclose(middle, (x[:25] + x[25:]) / 2, atol=1e-6)
    np.testing.assert_array_equal(x, linear_manifold(factors, 1, jnp.ones(6), 20))
    assert np.abs(x - linear_manifold(factors, 2, jnp.ones(6), 20)).max() > 0.05


@pytest.mark.parametrize("count", [1, 12])
def test_the_network_manifold_has_exactly_count_dimensions_everywhere(count, factors):
    def decode(factors):
        return network_manifold(factors, 0, 64, 100)

    gram = grams(decode, factors[:, :count])
    x = np.asarray(decode(factors[:, :count]))
    assert np.linalg.eigvalsh(gram).min() > 0.05**2
    assert x.min() > 0
    assert x.max() < 1


def test_the_network_manifold_is_curved():
    ends = jnp.array([[0.0] * 5, [1.0] * 5])
    x = network_manifold(ends, 0, 64, 100)
    middle = network_manifold(ends.mean(0, keepdims=True), 0, 64, 100)
    assert np.abs(middle[0] - x.mean(0)).max() > 0.05


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("count", [0, 13])
def test_the_number_of_factors_is_checked(count):
    with pytest.raises(ValueError, match=f"1 to 12; got {count}"):
        draw_factors(0, jnp.arange(2), count)
    with pytest.raises(ValueError, match=f"1 to 12; got {count}"):
        render(jnp.zeros((2, count)), 16)


@pytest.mark.parametrize("bad", [-0.1, 1.5, np.nan])
def test_factors_must_lie_on_the_cube(bad):
    factors = np.full((3, 4), 0.5, np.float32)
    factors[1, 2] = bad
    for decode in (
        lambda f: render(f, 16),
        lambda f: linear_manifold(f, 0, jnp.ones(4), 9),
        lambda f: network_manifold(f, 0, 16, 9),
    ):
        with pytest.raises(ValueError, match=r"factors must lie in \[0, 1\]; got"):
            decode(factors)


def test_other_bad_input():
    half = jnp.full((2, 4), 0.5)
    with pytest.raises(ValueError, match="resolution must be at least 8 pixels; got 7"):
        render(half, 7)
    with pytest.raises(ValueError, match=r"\[B, r\]; got shape \(4,\)"):
        render(half[0], 16)
    with pytest.raises(ValueError, match="one for each of 4 factors"):
        linear_manifold(half, 0, jnp.ones(3), 9)
    with pytest.raises(ValueError, match="variances must be positive"):
        linear_manifold(half, 0, jnp.array([1.0, 1.0, 0.0, 1.0]), 9)
    with pytest.raises(ValueError, match="dim must be at least the number of factors, 4; got 3"):
        linear_manifold(half, 0, jnp.ones(4), 3)
    with pytest.raises(ValueError, match="width must be at least the number of factors, 4; got 2"):
        network_manifold(half, 0, 2, 9)
