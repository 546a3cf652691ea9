"""Upper bounds on -log p(x), against likelihoods known in closed form and by quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from vaebal.measures import evaluation, likelihood
from vaebal.models import init_params, mlp_vae
from vaebal.streams import stream

OPTIONS = {"seed": 0, "block": 40}


@pytest.fixture
def affine(pixels):
    """An affine decoder of correlated columns, with an encoder that is not at its optimum."""
    rng = np.random.default_rng(3)
    dim, kappa, gamma = 16, 4, 0.02
    model = mlp_vae(
        outputs=dim, latents=kappa, width=8, encoder_layers=1, decoder_blocks=1,
        activation=jax.nn.relu, residual=True, affine_skip=True, gamma=gamma,
    )  # fmt: skip
    params = model.init(jax.random.key(0), jnp.asarray(pixels[:1]), jnp.zeros((1, kappa)))["params"]
    mixing = np.eye(kappa) + 0.5  # columns 60 degrees apart and closer
    w_x = rng.normal(size=(dim, kappa)) @ mixing / 4
    mean = pixels.mean(0)
    w_z = np.linalg.solve(w_x.T @ w_x + gamma * np.eye(kappa), w_x.T)
    precision = np.eye(kappa) + w_x.T @ w_x / gamma
    params["decoder"]["out"] = {"kernel": jnp.zeros((8, dim)), "bias": mean}
    params["affine"]["kernel"] = w_x.T
    params["encoder"] = {
        "mean": {"kernel": w_z.T, "bias": -w_z @ mean + 0.05},
        "log_var": {"kernel": jnp.zeros((dim, kappa)), "bias": -np.log(np.diag(precision))},
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    exact = -stats.multivariate_normal(mean, w_x @ w_x.T + gamma * np.eye(dim)).logpdf(pixels)
    return model, params, pixels, exact


def test_the_laplace_bound_is_exact_for_affine_decoders(affine):
    """One sample is enough, whatever the block and the encoder, whose own samples leave a gap."""
    model, params, x, exact = affine
    got, _ = likelihood.laplace_nll(model, params, x, samples=1, seed=0, block=7)
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-3)
    _, effective = likelihood.laplace_nll(model, params, x, samples=9, seed=0, block=200)
    np.testing.assert_allclose(effective, 9, rtol=1e-3)
    loose, few = evaluation.importance_weighted_nll(model, params, x, samples=50, **OPTIONS)
    gap = evaluation.mean_estimate(loose - exact)
    assert gap.value > 4 * gap.error
    assert np.median(few) < 25


def test_beside_another_bound_it_is_told_how_much_lower_it_lies(affine):
    """Of an affine decoder it is exact, so the gain is the other bound's whole gap."""
    model, params, pixels, exact = affine
    told = likelihood.laplace_beside(exact + 2.0, model, params, pixels, samples=5, seed=0)
    assert told["laplace_gain"] == pytest.approx(2.0, abs=1e-3)
    assert told["laplace_gain_se"] < 1e-3
    assert told["laplace_effective_sample_size"] == pytest.approx(5, rel=1e-3)


def test_without_used_latents_it_is_the_encoders_bound(affine):
    """Draws differ, so the means over images agree within their errors."""
    model, params, x, _ = affine
    x = np.repeat(x, 20, axis=0)
    theirs, _ = evaluation.importance_weighted_nll(model, params, x, samples=5, **OPTIONS)
    ours, effective = likelihood.laplace_nll(model, params, x, samples=5, used=(), **OPTIONS)
    difference = evaluation.mean_estimate(ours - theirs)
    assert abs(difference.value) < 4 * difference.error
    assert effective.min() >= 1
    assert effective.max() <= 5


@pytest.mark.slow
def test_annealing_closes_the_encoders_gap(affine):
    """exp(-result) is p(x) on average, and with many temperatures the bound is nearly tight."""
    model, params, x, exact = affine
    x, exact = x[:40], exact[:40]
    one, some, many = (
        likelihood.annealed_nll(model, params, x, temperatures=t, used=(), **OPTIONS) - exact
        for t in (1, 10, 100)
    )
    assert one.mean() > some.mean() > many.mean()
    assert abs(many.mean()) < 0.2 * one.mean()
    weights = evaluation.mean_estimate(np.exp(-many))
    assert abs(weights.value - 1) < 4 * weights.error


@pytest.fixture
def deep(small_vae, pixels):
    """A deep model of one latent, and -log p of its images by quadrature."""
    model = small_vae(latents=1, branch_scale=1.0, gamma=0.02)
    params = init_params(model, stream(0, "init"), jnp.asarray(pixels.mean(0)))
    rng = np.random.default_rng(0)
    params["affine"]["kernel"] = jnp.float32(0.3 * rng.normal(size=(1, 16)))
    z = np.linspace(-6, 6, 20001)
    x_hat = np.float64(model.apply({"params": params}, jnp.float32(z)[:, None], method="decode"))
    exact = [
        -np.log(
            integrate.simpson(
                np.exp(
                    -0.5 * (((x - x_hat) ** 2).sum(1) / 0.02 + 16 * np.log(2 * np.pi * 0.02)) - 60
                )
                * stats.norm.pdf(z),
                z,
            )
        )
        - 60
        for x in pixels[:12]
    ]
    return model, params, pixels[:12], np.array(exact)


@pytest.mark.slow
def test_bounds_of_a_deep_model_meet_quadrature(deep):
    """The encoder is untrained: its bound is loose, Gauss-Newton finds the mode nonetheless."""
    model, params, x, exact = deep
    options = {"used": (0,), "steps": 6, **OPTIONS}
    got, effective = likelihood.laplace_nll(model, params, x, samples=2000, **options)
    error = np.sqrt(1 / effective - 1 / 2000)
    assert (np.abs(got - exact) < 4 * error + 1e-3).all()
    assert np.median(effective) > 1000
    few, _ = likelihood.laplace_nll(model, params, x, samples=5, **options)
    loose, _ = evaluation.importance_weighted_nll(model, params, x, samples=50, **OPTIONS)
    assert (few - exact).mean() < 0.1 * (loose - exact).mean()
    annealed = likelihood.annealed_nll(model, params, x, temperatures=100, **options)
    assert abs((annealed - exact).mean()) < 0.05


def test_latents_beyond_kappa_do_not_count(small_vae, pixels):
    model = small_vae(gamma=0.1, branch_scale=1.0)
    params = init_params(model, stream(0, "init"), jnp.asarray(pixels.mean(0)), 2)
    alone = small_vae(gamma=0.1, latents=2, branch_scale=1.0)
    cut = init_params(alone, stream(0, "init"), jnp.asarray(pixels.mean(0)))
    seen = jax.tree.map(jnp.asarray, params)
    seen["encoder"]["log_var"]["bias"] = jnp.array([-2.0, 0.0, -2.0, -2.0, -2.0])
    assert likelihood.used_latents(model, seen, pixels, kappa=2) == (0,)
    assert likelihood.used_latents(model, seen, pixels) == (0, 2, 3, 4)
    options = {"samples": 3000, "used": (0, 1), **OPTIONS}
    padded, _ = likelihood.laplace_nll(model, params, pixels[:5], kappa=2, **options)
    expected, _ = likelihood.laplace_nll(alone, cut, pixels[:5], **options)
    np.testing.assert_allclose(padded, expected, atol=0.05)
