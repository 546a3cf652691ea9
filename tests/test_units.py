import jax
import jax.numpy as jnp
import numpy as np

from vaebal import units
from vaebal.models import Outputs
from vaebal.models.objectives import gaussian_vae_terms


def test_eq3_is_what_the_paper_writes():
    """For one draw of z, eq. 3's integrand written out equals the converted -ELBO."""
    rng = np.random.default_rng(0)
    n, d, k, gamma = 6, 9, 4, 0.2
    with jax.enable_x64(True):
        x, x_hat = rng.random((n, d)), rng.random((n, d))
        mean, log_var = rng.normal(size=(n, k)), rng.normal(size=(n, k))
        outputs = Outputs(*map(jnp.asarray, (x_hat, mean, log_var, np.log(gamma))))
        nats = gaussian_vae_terms(jnp.asarray(x), outputs).negative_elbo
        got = units.negative_elbo_to_eq3(nats, d, k)
        back = units.eq3_to_negative_elbo(got, d, k)
    expected = (
        ((x - x_hat) ** 2).sum(1) / gamma
        + d * np.log(gamma)
        + (np.exp(log_var) - log_var).sum(1)
        + (mean**2).sum(1)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(back, nats, rtol=1e-12)


def test_bytes_become_unit_pixels_and_floats_stay():
    stored = jnp.asarray(np.arange(256, dtype=np.uint8))
    pixels = units.to_unit_pixels(stored)
    assert pixels.dtype == jnp.float32
    assert (float(pixels[0]), float(pixels[-1])) == (0.0, 1.0)
    np.testing.assert_array_equal(units.to_unit_pixels(pixels), pixels)
