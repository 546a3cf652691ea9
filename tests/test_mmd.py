import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import integrate

from vaebal.measures.mmd import (
    SCALES,
    expected_imq,
    imq_mmd2,
    imq_mmd2_to_normal,
)


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def _kernel(a, b, scales=SCALES):
    squared = ((a[:, None, :] - b[None, :, :]) ** 2).sum(-1)
    return sum(2 * a.shape[1] * s / (2 * a.shape[1] * s + squared) for s in scales)


def _between_gaussian_and_prior(k, variance):
    """MMD^2 between N(0, variance I) and N(0, I) of k latents."""
    none = np.zeros(k)
    within = expected_imq(none, np.full(k, 2 * variance)), expected_imq(none, np.full(k, 2.0))
    return sum(within) - 2 * expected_imq(none, np.full(k, variance + 1))


def _written_out(x, y):
    """The U-statistic with every pair held at once."""
    n, m = len(x), len(y)
    within_x = _kernel(x, x)[~np.eye(n, dtype=bool)].mean()
    within_y = _kernel(y, y)[~np.eye(m, dtype=bool)].mean()
    return within_x + within_y - 2 * _kernel(x, y).mean()


@pytest.mark.parametrize(
    ("n", "m", "k", "block"), [(37, 23, 3, 7), (32, 48, 1, 16), (9, 5, 4, 1000), (2, 2, 5, 1)]
)
def test_equals_the_u_statistic_written_out_in_any_block(n, m, k, block):
    x, y = 0.5 * _normal(0, n, k) + 0.3, _normal(1, m, k)
    with jax.enable_x64(True):
        got = imq_mmd2(x, y, block=block)
        np.testing.assert_allclose(got, _written_out(x, y), rtol=1e-10)
    small = imq_mmd2(np.float32(x), np.float32(y), block=block)
    assert small.dtype == jnp.float32
    np.testing.assert_allclose(small, _written_out(x, y), atol=2e-6)


def test_float32_keeps_its_digits_far_from_the_origin():
    x, y = _normal(0, 300, 8), _normal(1, 300, 8)
    shifted = imq_mmd2(np.float32(x + 100), np.float32(y + 100))
    np.testing.assert_allclose(shifted, _written_out(x, y), atol=3e-6)


def test_gradient_equals_finite_differences():
    x, y = _normal(0, 9, 3), _normal(1, 7, 3)
    with jax.enable_x64(True):
        check_grads(jax.jit(lambda x, y: imq_mmd2(x, y, block=4)), (x, y), 1, ["rev"])
        check_grads(jax.jit(lambda x: imq_mmd2_to_normal(x, block=4).value), (x,), 1, ["rev"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_coincident_points_have_the_exact_value_and_gradient(dtype):
    """All points equal: distances 0, so MMD^2 = 0 and the gradient is 0, not NaN."""
    x = np.full((6, 4), 0.1, dtype) * np.arange(1, 5, dtype=dtype)[None, :]
    with jax.enable_x64(dtype == np.float64):
        value, gradient = jax.value_and_grad(imq_mmd2)(x, x)
        assert value.dtype == dtype
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_squared_distances_stay_above_zero_where_rounding_would_take_them_below():
    """Isolated points against themselves: only k(x_i, x_i) <= S counts, and MMD^2 = -2 k / N."""
    for seed in range(8):
        x = np.float32(3000 * _normal(seed, 8, 4))
        assert -2 * len(SCALES) / 8 - 1e-4 < imq_mmd2(x, x) < 1e-4


@pytest.mark.parametrize("function", [imq_mmd2, jax.value_and_grad(imq_mmd2, (0, 1))])
def test_memory_grows_with_the_points_and_not_with_their_pairs(function):
    def bytes_for(n):
        points = jax.ShapeDtypeStruct((n, 4), jnp.float32)
        return jax.jit(function).lower(points, points).compile().memory_analysis()

    small, large = (bytes_for(n).temp_size_in_bytes for n in (4096, 65536))
    assert large - small < 200 * 65536  # bytes a point; all pairs would take 17 GB
    assert small < 64 * 1024**2  # a few arrays of block x block


@pytest.mark.parametrize("k", [1, 8, 64])
def test_expected_kernel_equals_adaptive_quadrature(k):
    rng = np.random.default_rng(k)
    for mean, variance in (
        (np.zeros(k), np.full(k, 2.0)),
        (rng.normal(size=k), rng.random(k) + 1),
        (100 * rng.normal(size=k), np.linspace(0, 9, k)),
    ):
        expected = 0.0
        for scale in (2 * k * s for s in SCALES):

            def integrand(u, scale=scale):
                spread = 1 + 2 * u * variance / scale  # noqa: B023
                decay = (u * mean**2 / (scale * spread)).sum()  # noqa: B023
                return np.exp(-u - decay - 0.5 * np.log(spread).sum())

            edges = [0, *np.logspace(-7, 1, 9), np.inf]
            expected += sum(
                integrate.quad(integrand, a, b, epsabs=1e-11, epsrel=1e-11)[0]
                for a, b in itertools.pairwise(edges)
            )
        np.testing.assert_allclose(expected_imq(mean, variance), expected, atol=1e-8)


def test_known_values():
    """Computed elsewhere: E k of two normal points at s = 1, and MMD^2 of narrow Gaussians."""
    for k, kernel, quarter in ((8, 0.5292523, 0.427091), (64, 0.5038755, 0.446771)):
        got = expected_imq(np.zeros(k), np.full(k, 2.0), (1.0,))
        np.testing.assert_allclose(got, kernel, atol=5e-8)
        np.testing.assert_allclose(_between_gaussian_and_prior(k, 0.25), quarter, atol=5e-7)
        np.testing.assert_allclose(_between_gaussian_and_prior(k, 1.0), 0, atol=1e-9)
    np.testing.assert_allclose(_between_gaussian_and_prior(64, 0.0), 1.925386, atol=5e-7)


@pytest.fixture
def optimised():
    """For tests that compute more than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("k", [8, 64])
def test_ten_thousand_points_agree_with_the_closed_form(k):
    expected = _between_gaussian_and_prior(k, 0.25)
    value, error = imq_mmd2_to_normal(np.float32(0.5 * _normal(2, 10_000, k)))
    assert abs(value - expected) < 3 * error
    assert error < 0.02 * expected


def test_to_normal_is_the_mean_over_draws_of_the_prior():
    x = 0.7 * _normal(0, 12, 3) + 0.2
    with jax.enable_x64(True):
        value = float(imq_mmd2_to_normal(x, block=5).value)
        draws = jnp.asarray(_normal(1, 400, 100, 3))
        sampled = np.asarray(jax.lax.map(lambda y: imq_mmd2(x, y), draws))
    assert abs(sampled.mean() - value) < 3 * sampled.std() / 20
    assert sampled.std() / 20 < 0.02 * value


@pytest.mark.parametrize(("width", "n"), [(1.0, 100), (0.85, 100), (0.5, 80)])
def test_error_is_the_spread_over_replicates(width, n):
    """Under the null (width 1), near it, and far from it.

    The variance is unbiased but for its floor, which is felt under the null only. The spread of
    400 replicates is itself known to 4 per cent (more under the null, whose law is skewed).
    """
    k = 8

    def replicate(key):
        return imq_mmd2_to_normal(width * jax.random.normal(key, (n, k)))

    value, error = jax.jit(jax.vmap(replicate))(jax.random.split(jax.random.key(5), 400))
    spread = value.std(ddof=1)
    assert abs(value.mean() - _between_gaussian_and_prior(k, width**2)) < 3 * spread / 20
    ratio = jnp.sqrt(jnp.square(error).mean()) / spread
    assert 0.88 < ratio < (1.35 if width == 1 else 1.12)


def test_error_is_never_nan_where_nothing_varies():
    x = np.ones((5, 2), np.float32)
    assert imq_mmd2_to_normal(x).error == 0


def test_bad_points_are_refused_by_name():
    good, bad = np.zeros((4, 2)), np.array([[0.0, 1], [np.nan, 1], [1, 1], [2, 1]])
    for x, y, message in (
        (good[:1], good, "x has 1 points"),
        (good, good[:1], "y has 1 points"),
        (good, good[:, :1], "y has 1 latents where x has 2"),
        (bad, good, "x has values that are not finite"),
        (good, bad, "y has values that are not finite"),
        (good[:, 0], good, r"x has shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            imq_mmd2(x, y)
    with pytest.raises(ValueError, match="x has 3 points; give at least 4"):
        imq_mmd2_to_normal(good[:3])
    with pytest.raises(ValueError, match="y has 1 latents"):
        jax.jit(imq_mmd2)(good, good[:, :1])
