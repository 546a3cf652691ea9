import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from vaebal.models.gaussians import isotropic_nll, kl_to_standard_normal, reparameterise


@pytest.mark.parametrize(("mean", "log_var"), [(0.3, -2.0), (-1.5, 0.7), (0.0, 0.0), (4.0, -12.0)])
def test_kl_equals_quadrature(mean, log_var):
    sigma = np.exp(log_var / 2)
    q, p = stats.norm(mean, sigma), stats.norm()
    expected, _ = integrate.quad(
        lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), mean - 12 * sigma, mean + 12 * sigma
    )
    got = kl_to_standard_normal(jnp.float32(mean), jnp.float32(log_var))
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-7)


def test_kl_of_the_prior_is_exactly_zero_with_zero_gradient():
    assert float(kl_to_standard_normal(jnp.zeros(()), jnp.zeros(()))) == 0
    assert [float(g) for g in jax.grad(kl_to_standard_normal, (0, 1))(0.0, 0.0)] == [0, 0]


def test_kl_keeps_its_digits_near_the_prior():
    v = np.float64(1e-3)
    expected = 0.5 * (np.expm1(v) - v)
    np.testing.assert_allclose(
        kl_to_standard_normal(jnp.float32(0), jnp.float32(v)), expected, rtol=1e-3
    )


def test_isotropic_nll_equals_scipy():
    rng = np.random.default_rng(1)
    x, x_hat, gamma = rng.random(7), rng.random(7), 0.03
    expected = -stats.multivariate_normal.logpdf(x, x_hat, gamma * np.eye(7))
    got = isotropic_nll(jnp.float32(((x - x_hat) ** 2).sum()), jnp.log(jnp.float32(gamma)), 7)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_isotropic_nll_is_least_at_gamma_equal_to_the_error_per_dimension():
    squared_error, dim = 0.8, 5
    gammas = np.exp(np.linspace(-5, 1, 2001))
    values = isotropic_nll(jnp.float32(squared_error), jnp.log(jnp.asarray(gammas)), dim)
    assert gammas[int(np.argmin(values))] == pytest.approx(squared_error / dim, rel=4e-3)


def test_antithetic_draws_average_to_the_mean():
    mean, log_var, eps = (
        jnp.float32([0.25, -1.0]),
        jnp.float32([0.5, -2.0]),
        jnp.float32([1.5, -0.75]),
    )
    pair = reparameterise(mean, log_var, eps) + reparameterise(mean, log_var, -eps)
    np.testing.assert_allclose(pair / 2, mean, rtol=1e-6)
