import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from vaebal.measures import evaluation
from vaebal.models import init_params, mlp_vae
from vaebal.streams import stream


def _affine_vae_at_its_optimum(data, kappa, gamma):
    """The Table 1 network in Theorem 1's regime: f_theta constant, all through eq. 5's skip."""
    mean, cov = data.mean(0), np.cov(data.T, bias=True)
    values, vectors = np.linalg.eigh(cov)
    top = np.argsort(values)[::-1][:kappa]
    w_x = vectors[:, top] * np.sqrt(np.maximum(values[top] - gamma, 0))  # [D, K]
    w_z = np.linalg.solve(w_x.T @ w_x + gamma * np.eye(kappa), w_x.T)  # [K, D]
    s2 = gamma / ((w_x**2).sum(0) + gamma)
    model = mlp_vae(
        outputs=data.shape[1], latents=kappa, width=8, encoder_layers=1, decoder_blocks=1,
        activation=jax.nn.relu, residual=True, affine_skip=True, gamma=gamma,
    )  # fmt: skip
    params = model.init(jax.random.key(0), jnp.asarray(data[:1]), jnp.zeros((1, kappa)))["params"]
    params["decoder"]["out"] = {"kernel": jnp.zeros((8, data.shape[1])), "bias": mean}
    params["affine"]["kernel"] = w_x.T
    params["encoder"] = {
        "mean": {"kernel": w_z.T, "bias": -w_z @ mean},
        "log_var": {"kernel": jnp.zeros((data.shape[1], kappa)), "bias": np.log(s2)},
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return model, params, stats.multivariate_normal(mean, w_x @ w_x.T + gamma * np.eye(len(mean)))


@pytest.fixture
def affine(pixels):
    return (pixels, *_affine_vae_at_its_optimum(np.float64(pixels), 4, 0.004))


def test_nll_is_exact_with_one_sample_where_the_bound_is_tight(affine):
    """Every importance weight is then p(x), the probabilistic-PCA likelihood."""
    data, model, params, ppca = affine
    options = {"seed": 0, "block": 40}
    nll, _ = evaluation.importance_weighted_nll(model, params, data, samples=1, **options)
    np.testing.assert_allclose(nll, -ppca.logpdf(data), rtol=1e-4, atol=1e-3)
    many, effective = evaluation.importance_weighted_nll(model, params, data, samples=7, **options)
    np.testing.assert_allclose(many, nll, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(effective, 7, rtol=1e-3)


def test_mean_negative_elbo_is_the_mean_nll_where_the_bound_is_tight(affine):
    """One draw of -ELBO is noisy around -log p(x): equal within 4 standard errors."""
    data, model, params, ppca = affine
    repeated = np.repeat(data, 50, axis=0)
    estimate = evaluation.mean_estimate(
        evaluation.posterior(model, params, repeated, seed=1, block=1000).negative_elbo
        + ppca.logpdf(repeated)
    )
    assert abs(estimate.value) < 4 * estimate.error


@pytest.fixture
def deep(small_vae, pixels):
    """A deep model of one latent, whose marginal likelihood is a one-dimensional integral."""
    model = small_vae(latents=1, branch_scale=1.0, gamma=0.3)
    params = init_params(model, stream(0, "init"), jnp.asarray(pixels.mean(0)))
    return model, params, pixels[:5]


def test_nll_converges_to_quadrature(deep):
    model, params, x = deep
    z = np.linspace(-9, 9, 4001)
    x_hat = np.float64(model.apply({"params": params}, jnp.float32(z)[:, None], method="decode"))
    for index, image in enumerate(x):
        log_p = -0.5 * (((image - x_hat) ** 2).sum(1) / 0.3 + 16 * np.log(2 * np.pi * 0.3))
        expected = -np.log(integrate.simpson(np.exp(log_p) * stats.norm.pdf(z), z))
        got, effective = evaluation.importance_weighted_nll(
            model, params, x[index : index + 1], samples=20_000, seed=0, block=1
        )
        # The delta method's error of a log mean of weights.
        error = np.sqrt(1 / effective - 1 / 20_000)
        assert abs(got[0] - expected) < 4 * error[0] + 1e-4


def test_more_samples_tighten_the_bound(deep):
    model, params, x = deep
    x = np.repeat(x, 400, axis=0)
    elbo = evaluation.posterior(model, params, x, seed=0, block=500).negative_elbo
    one, many = (
        evaluation.importance_weighted_nll(model, params, x, samples=s, seed=0, block=500)[0]
        for s in (1, 30)
    )
    gap = evaluation.mean_estimate(one - many)
    assert gap.value > 4 * gap.error
    # With one sample the bound is the ELBO with the KL sampled.
    same = evaluation.mean_estimate(one - elbo)
    assert abs(same.value) < 4 * same.error


@pytest.mark.parametrize("block", [1, 7, 96, 1000])
def test_every_example_is_counted_once_whatever_the_block(affine, block):
    data, model, params, _ = affine
    got = evaluation.posterior(model, params, data, seed=0, block=block)
    assert got.mean.shape == (96, 4)
    mean, log_var = model.apply({"params": params}, data, method="encode")
    np.testing.assert_allclose(got.mean, mean, atol=1e-4)
    np.testing.assert_allclose(got.variance, np.exp(log_var).mean(0), rtol=1e-5)
    at_mean = model.apply({"params": params}, mean, method="decode")
    np.testing.assert_allclose(got.squared_error_mean, ((data - at_mean) ** 2).sum(1), rtol=1e-3)
    assert got.squared_error_sampled.shape == got.negative_elbo.shape == (96,)


def test_padded_latents_do_not_count(small_vae, pixels):
    """The first two of five latents used: the others are the prior, never active, of no weight."""
    model = small_vae(gamma=0.1)
    params = init_params(model, stream(0, "init"), jnp.asarray(pixels.mean(0)), 2)
    got = evaluation.posterior(model, params, pixels, seed=0, block=50, kappa=2)
    np.testing.assert_array_equal(got.kl[2:], 0)
    np.testing.assert_array_equal(got.variance[2:], 1)
    assert evaluation.active_units(got.mean, 1e-9).value == 2
    alone = small_vae(gamma=0.1, latents=2)
    cut = init_params(alone, stream(0, "init"), jnp.asarray(pixels.mean(0)))
    options = {"samples": 5, "seed": 0, "block": 50}
    np.testing.assert_allclose(
        evaluation.importance_weighted_nll(model, params, pixels, kappa=2, **options)[0],
        evaluation.importance_weighted_nll(alone, cut, pixels, **options)[0],
        rtol=1e-5,
    )


def test_mean_estimate_covers():
    """The error is the standard error of the mean: z-scores over 2,000 repeats have unit spread."""
    rng = np.random.default_rng(0)
    estimates = [evaluation.mean_estimate(rng.exponential(size=100)) for _ in range(2000)]
    z = np.array([(e.value - 1) / e.error for e in estimates])
    assert 0.95 < z.std() < 1.15


def test_active_units_counts_variances_above_the_threshold():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(4000, 6)) * np.sqrt([1, 0.3, 0.02, 0.005, 1e-6, 0])
    assert evaluation.active_units(mean).value == 3
    assert evaluation.active_units(mean, 0.1).value == 2
    assert evaluation.active_units(mean).error < 1e-6
    assert evaluation.active_units(mean, 1e-9).value == 5
    assert evaluation.active_units(mean, 0.0) == (5, pytest.approx(0.0, abs=1e-6))


def test_active_units_error_matches_fresh_draws():
    """Near the threshold the count is random over draws of the examples, by as much as said."""
    rng = np.random.default_rng(1)
    scales = np.sqrt([0.0095, 0.01, 0.0102, 0.0108, 1.0])
    draws = [evaluation.active_units(rng.normal(size=(2000, 5)) * scales) for _ in range(600)]
    spread = np.std([draw.value for draw in draws])
    said = np.sqrt(np.mean([draw.error**2 for draw in draws]))
    assert said == pytest.approx(spread, rel=0.25)


def halve(rows):
    return (rows - 3) / 2


def test_rows_that_are_not_pixels_are_decoded(affine):
    """Every estimator on rows = 2 x + 3 with their decoder, against x itself."""
    data, model, params, _ = affine
    options = {"seed": 0, "block": 40}
    expected = evaluation.posterior(model, params, data, **options)
    got = evaluation.posterior(model, params, data * 2 + 3, decode=halve, **options)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    options |= {"samples": 2}
    expected, _ = evaluation.importance_weighted_nll(model, params, data, **options)
    got, _ = evaluation.importance_weighted_nll(
        model, params, data * 2 + 3, decode=halve, **options
    )
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_the_samples_are_draws_of_the_posterior_and_those_the_errors_are_of(affine):
    data, model, params, _ = affine
    repeated = np.repeat(data, 50, axis=0)
    got = evaluation.posterior(model, params, repeated, seed=0, block=1000)
    x_hat = model.apply({"params": params}, got.sample, method="decode")
    np.testing.assert_allclose(
        got.squared_error_sampled, ((repeated - x_hat) ** 2).sum(1), rtol=1e-3, atol=1e-5
    )
    # sigma^2 is the same for every x here: the draws whitened are standard normal.
    z = (got.sample - got.mean) / np.sqrt(got.variance)
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-4
    correlation = np.corrcoef(z.T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(z))


def test_unused_latents_are_drawn_as_zero(small_vae, pixels):
    model = small_vae(gamma=0.1)
    params = init_params(model, stream(0, "init"), jnp.asarray(pixels.mean(0)), 2)
    got = evaluation.posterior(model, params, pixels, seed=0, block=50, kappa=2)
    np.testing.assert_array_equal(got.sample[:, 2:], 0)
    assert (got.sample[:, :2] != got.mean[:, :2]).all()


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (np.full((5, 2), np.nan), r"not finite \(latent 0\)"),
        (np.array([[1.0, 2.0], [3.0, np.inf]]), r"not finite \(latent 1\)"),
        (np.zeros((0, 3)), r"mean has shape \(0, 3\)"),
        (np.zeros((4, 0)), r"mean has shape \(4, 0\)"),
        (np.zeros((1, 3)), r"mean has shape \(1, 3\)"),
        (np.zeros(7), r"mean has shape \(7,\)"),
    ],
)
def test_active_units_of_what_has_none_is_refused(mean, message):
    with pytest.raises(ValueError, match=message):
        evaluation.active_units(mean)


def test_largest_eigenvalue_is_the_dense_ones():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)) * np.array([3.0, 1.0, 1.0, 0.5, 0.1, 0.0])
    cov = jnp.asarray(x.T @ x / 50, jnp.float32)
    mode, got = evaluation.largest_mode(lambda v: cov @ v, jnp.ones(6), 30)
    assert got == pytest.approx(np.linalg.eigvalsh(x.T @ x / 50)[-1], rel=1e-5)
    np.testing.assert_allclose(cov @ mode, got * mode, rtol=1e-3, atol=1e-5)
    assert evaluation.largest_mode(lambda v: 0 * v, jnp.ones(6), 5)[1] == 0


def test_intervals_of_independent_trials_are_wilsons():
    for hits in (0, 3, 10):
        got = evaluation.clustered_interval(np.arange(10) < hits, 1)
        wilson = stats.binomtest(hits, 10).proportion_ci(method="wilson")
        np.testing.assert_allclose(got, (hits / 10, *wilson), atol=1e-12)
    # Clusters that all agree say no more than one trial each would.
    whole = evaluation.clustered_interval(np.full(10, 14), 14)
    assert whole == evaluation.clustered_interval(np.ones(10), 1)


def test_intervals_of_clusters_are_students_on_their_fractions():
    """SciPy's t interval of the ten means; a chance model of seeds is covered as often as said."""
    hits = np.array([6, 11, 5, 6, 12, 9, 10, 14, 8, 5])
    sem = stats.sem(hits / 14)
    expected = stats.t.interval(0.95, 9, (hits / 14).mean(), sem)
    got = evaluation.clustered_interval(hits, 14)
    np.testing.assert_allclose(got, (hits.sum() / 140, *expected), rtol=1e-12)
    np.testing.assert_allclose(got, (0.614, 0.454, 0.774), atol=1e-3)

    rng = np.random.default_rng(0)
    covered, pooled = 0, 0
    for _ in range(1000):
        hits = rng.binomial(14, rng.beta(1, 1, size=10))  # a chance of its own for every seed
        _, low, high = evaluation.clustered_interval(hits, 14)
        covered += low <= 0.5 <= high
        wilson = stats.binomtest(int(hits.sum()), 140).proportion_ci(method="wilson")
        pooled += wilson.low <= 0.5 <= wilson.high
    assert 930 <= covered <= 970
    assert pooled < 800  # what counting every trial as independent would give


@pytest.mark.parametrize(("hits", "trials"), [([3], 4), ([5, 1], 4), ([-1, 1], 4), ([0, 0], 0)])
def test_bad_clusters_are_refused(hits, trials):
    with pytest.raises(ValueError, match="successes"):
        evaluation.clustered_interval(hits, trials)
