"""The gamma that a loss implies, against gradients of -ELBO."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaebal.diagnosis import implied_beta, implied_gamma
from vaebal.models import Outputs
from vaebal.models.objectives import gaussian_vae_terms

B, D, K = 6, 5, 3


def network(weights, x, eps):
    """A VAE in four lines: x_hat, mean, log_var."""
    mean, log_var = jnp.tanh(x @ weights["mean"]), x @ weights["log_var"]
    z = mean + jnp.exp(0.5 * log_var) * eps
    return jnp.tanh(z @ weights["out"]), mean, log_var


def draw(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"mean": (D, K), "log_var": (D, K), "out": (K, D)}
    weights = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    return weights, jax.random.normal(keys[3], (B, D)), jax.random.normal(keys[4], (B, K))


def written_out(weights, x, eps, kl_weight, factor, pixels, latents, batch_error, batch_kl):
    """The loss as somebody would write it, in the reductions of jnp."""
    x_hat, mean, log_var = network(weights, x, eps)
    reduce = {"sum": jnp.sum, "mean": jnp.mean}
    error = reduce[batch_error](reduce[pixels](jnp.square(x - x_hat), axis=1))
    kl = -0.5 * (1 + log_var - mean**2 - jnp.exp(log_var))
    return factor * error + kl_weight * reduce[batch_kl](reduce[latents](kl, axis=1))


def negative_elbo(weights, x, eps, gamma):
    x_hat, mean, log_var = network(weights, x, eps)
    outputs = Outputs(x_hat, mean, log_var, jnp.log(gamma))
    return gaussian_vae_terms(x, outputs).negative_elbo.mean()


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


SUM_OR_MEAN = ("sum", "mean")
# Every reduction over pixels and latents under every weight; those over the batch once.
WRITTEN = [
    *itertools.product(
        ((1.0, 1.0), (0.5, 0.01), (3.0, 4.0)), SUM_OR_MEAN, SUM_OR_MEAN, [("mean",) * 2]
    ),
    *itertools.product(
        [(0.5, 0.3)], ["mean"], ["sum"], itertools.product(SUM_OR_MEAN, SUM_OR_MEAN)
    ),
]


@pytest.mark.parametrize(("weights_of_terms", "pixels", "latents", "batch"), WRITTEN)
def test_the_losss_gradient_is_proportional_to_that_of_the_elbo(
    weights_of_terms, pixels, latents, batch
):
    (factor, kl_weight), (batch_error, batch_kl) = weights_of_terms, batch
    terms = {
        "factor": factor, "pixels": pixels, "latents": latents, "batch_error": batch_error,
        "batch_kl": batch_kl,
    }  # fmt: skip
    gamma = implied_gamma(kl_weight, **terms, dim=D, latent_dim=K, batch_size=B)
    weights, x, eps = draw()
    loss = flat(jax.grad(written_out)(weights, x, eps, kl_weight, **terms))
    elbo = flat(jax.grad(negative_elbo)(weights, x, eps, gamma))
    scale = loss @ elbo / (elbo @ elbo)
    np.testing.assert_allclose(loss, scale * elbo, rtol=1e-3, atol=1e-5 * np.abs(loss).max())
    # At another gamma it is not.
    others = [flat(jax.grad(negative_elbo)(weights, x, eps, f * gamma)) for f in (0.1, 10.0)]
    left = [np.abs(loss - loss @ other / (other @ other) * other).max() for other in others]
    assert max(left) > 1e-3 * np.abs(loss).max()
    sizes = {"dim": D, "latent_dim": K, "batch_size": B}
    assert implied_beta(gamma, **terms, **sizes) == pytest.approx(kl_weight, rel=1e-12)


def test_popular_settings():
    assert implied_gamma() == 0.5  # sum of squares + KL
    assert implied_gamma(factor=0.5) == 1.0
    assert implied_gamma(4.0, factor=0.5) == 4.0  # a beta-VAE's beta is its gamma
    assert implied_gamma(1e-6) == pytest.approx(5e-7)
    assert implied_gamma(1e-6, pixels="mean", dim=256 * 256 * 3) == pytest.approx(0.098304)
    assert implied_beta(1.0, factor=0.5) == 1.0


def test_the_last_weight_of_a_schedule_counts():
    assert implied_gamma(np.linspace(0, 2, 11), factor=0.5) == 2.0
    with pytest.raises(ValueError, match="ends at 0"):
        implied_gamma([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"error": "bce"}, "Bernoulli likelihood"),
        ({"error": "L1"}, "Laplace likelihood"),
        ({"error": "LPIPS"}, "network's features"),
        ({"error": "huber"}, "error='huber' must be 'squared'"),
        ({"pixels": "mean"}, "dim is missing"),
        ({"latents": "mean"}, "latent_dim is missing"),
        ({"batch_kl": "sum"}, "batch_size is missing"),
        ({"pixels": "average"}, "must be 'sum' or 'mean'"),
        ({"factor": 0.0}, "factor=0.0 must be a positive"),
        ({"kl_weight": -1.0}, r"kl_weight=-1\.0 must be"),
        ({"kl_weight": float("nan")}, "must be a positive, finite"),
        ({"kl_weight": []}, "kl_weight must be a number"),
    ],
)
def test_what_implies_no_gamma_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        implied_gamma(**arguments)


def test_gamma_must_be_positive():
    with pytest.raises(ValueError, match=r"gamma=0\.0 must be"):
        implied_beta(0.0)
