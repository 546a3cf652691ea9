"""Eq. 6 against loops, its exact minima, and what Theorem 3 says of them."""

import dataclasses
import functools
import itertools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaebal.models.nets import ACTIVATIONS
from vaebal.theory.penalties import Penalty, indicator, named, power, smooth
from vaebal.theory.regularized_ae import (
    DeepAE,
    LinearAE,
    Statistics,
    UnitFanOut,
    active_rows,
    balanced_solution,
    balanced_statistics,
    best_shrinkage,
    deep_statistics,
    energy,
    fit_deep,
    homotopy,
    isotropic_data,
    linear_global_minimum,
    linear_statistics,
    low_rank_data,
    majorised_step,
    minimise_linear,
    random_columns,
    shrink,
    split,
    splitting_pays_from,
    statistics,
    sufficient_examples,
    unit_columns,
)

EVERY = (
    *("u", "log(1+u)", "u/(u+0.3)", "u^0.75", "sqrt(u)", "u^0.25", "log(u+1e-6)", "I[u>1e-9]"),
)
MINIMISED = EVERY[:-1]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def random_model(seed: int, examples: int = 20, dim: int = 7, latents: int = 5) -> LinearAE:
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(dim, latents))
    return LinearAE(
        jnp.asarray(W / np.linalg.norm(W, axis=0)),
        jnp.asarray(rng.normal(size=(examples, latents))),
    )


def random_data(seed: int, examples: int = 20, dim: int = 7, rank: int = 3) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(examples, rank)) @ rng.normal(size=(rank, dim)))


def of(penalty: Penalty, model: LinearAE, x: jax.Array) -> float:
    return float(energy(penalty, linear_statistics(model, x)))


# ------------------------------------------------------------ statistics and energy


@pytest.mark.parametrize("formula", EVERY)
def test_energy_is_eq_6_by_loops(float64, formula):
    rng = np.random.default_rng(3)
    x, x_hat, z = rng.random((6, 4)), rng.random((6, 4)), rng.normal(size=(6, 3))
    z[:, 1] = 0.0
    penalty = named(formula)

    def h(u: float) -> float:
        return float(penalty.value(jnp.asarray(u)))

    error = sum((x[i, j] - x_hat[i, j]) ** 2 for i in range(6) for j in range(4)) / (4 * 6)
    expected = h(error)
    for k in range(3):
        expected += h(sum(z[i, k] ** 2 for i in range(6)) / 6) / 4
    got = statistics(jnp.asarray(x), jnp.asarray(x_hat), jnp.asarray(z))
    assert float(got.error) == pytest.approx(error, rel=1e-14)
    assert float(energy(penalty, got)) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("formula", EVERY)
def test_what_the_energy_does_not_see(float64, formula):
    """Order of latents, of examples; rotations of pixels and of examples; signs of latents."""
    rng = np.random.default_rng(0)
    x, model, penalty = random_data(0), random_model(1), named(formula)
    before = of(penalty, model, x)
    pixels, examples = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (7, 20))
    order = rng.permutation(5)
    signs = jnp.asarray(rng.choice([-1.0, 1.0], 5))[None, :]
    for other, data in (
        (LinearAE(model.W_x[:, order], model.z[:, order]), x),
        (LinearAE(model.W_x * signs, model.z * signs), x),
        (LinearAE(pixels.T @ model.W_x, model.z), x @ pixels),
        (LinearAE(model.W_x, examples @ model.z), examples @ x),
        (LinearAE(model.W_x, jnp.tile(model.z, (3, 1))), jnp.tile(x, (3, 1))),
    ):
        assert of(penalty, other, data) == pytest.approx(before, rel=1e-12)
    latents = np.linalg.qr(rng.normal(size=(5, 5)))[0]  # but it does see these, for all but u
    mixed = statistics(x, model.z @ model.W_x.T, model.z @ latents)
    assert (float(energy(penalty, mixed)) == pytest.approx(before, rel=1e-12)) == (
        formula in ("u", "I[u>1e-9]")
    )


def test_a_minibatch_estimate_is_biased(float64):
    """The mean over all minibatches of L_h(minibatch): exact for u, too low for every other h.

    A latent in use by few examples is dead in most batches, which log punishes hardest.
    """
    rng = np.random.default_rng(2)
    x, z = rng.normal(size=(60, 8)), rng.normal(size=(60, 3))
    z[:, 2] *= rng.random(60) < 0.1
    x_hat = x + 0.3 * rng.normal(size=x.shape)
    bias = {}
    for formula in ("u", "u^0.75", "sqrt(u)", "u^0.25", "log(u+1e-6)"):
        penalty = named(formula)
        whole = float(energy(penalty, statistics(x, x_hat, z)))
        batches = np.split(np.arange(60), 12)  # each equally likely to be drawn
        mean = np.mean([float(energy(penalty, statistics(x[b], x_hat[b], z[b]))) for b in batches])
        bias[formula] = mean - whole
    assert abs(bias["u"]) < 1e-13
    # The steeper at zero, the worse.
    values = list(bias.values())
    assert all(b < a for a, b in itertools.pairwise(values))
    assert bias["log(u+1e-6)"] < -0.5


def test_statistics_are_a_pytree_and_refuse_broadcasting():
    x, z = jnp.ones((4, 3)), jnp.ones((4, 2))
    mapped = jax.jit(jax.vmap(statistics))(x[None], x[None], z[None])
    assert (mapped.error.shape, mapped.rows.shape, mapped.dim) == ((1,), (1, 2), 3)
    for bad in ((x, x[:, :1], z), (x, x[:1], z), (x[0], x[0], z)):
        with pytest.raises(ValueError, match=r"x_hat must be \[N, D\]"):
            statistics(*bad)
    for bad_z in (z[:1], z[:, 0]):
        with pytest.raises(ValueError, match=r"z must be \[N, K\]"):
            statistics(x, x, bad_z)


def test_active_rows():
    rows = np.array([[3.0, 1e-5, 0.0], [1e-9, 1e-9, 1e-9]])
    np.testing.assert_array_equal(active_rows(rows, 1e-6), [2, 0])


def test_energy_at_the_size_of_mnist_is_fast():
    """Statistics, energy and gradient at D = kappa = N = 784: a few matrix products."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (784, 784))
    model = LinearAE(unit_columns(jax.random.normal(key, (784, 784))), x)

    @jax.jit
    def both(model):
        return jax.value_and_grad(
            lambda model: energy(smooth(named("sqrt(u)"), 1e-6), linear_statistics(model, x))
        )(model)

    jax.block_until_ready(both(model))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(both(model))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


# ------------------------------------------------------------ reductions


@pytest.mark.parametrize("formula", ["u", "sqrt(u)", "log(u+1e-6)"])
def test_few_examples_stand_for_many(float64, formula):
    """A linear encoder has the same energy on x and on its r sufficient examples."""
    x = random_data(5, examples=50)
    small = sufficient_examples(x, 3)
    assert small.shape == (3, 7)
    np.testing.assert_allclose(small.T @ small / 3, x.T @ x / 50, atol=1e-12)
    whole = sufficient_examples(x, 10)  # more than x has columns
    assert whole.shape == (7, 7)
    np.testing.assert_allclose(whole.T @ whole / 7, x.T @ x / 50, atol=1e-12)
    W_z = np.random.default_rng(0).normal(size=(4, 7))
    W_x = random_model(0, latents=4).W_x
    values = [of(named(formula), LinearAE(W_x, data @ W_z.T), data) for data in (x, small)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize("formula", EVERY)
def test_free_codes_gain_nothing_over_a_linear_encoder(float64, formula):
    x, penalty = random_data(1), named(formula)
    for seed in range(10):
        model = random_model(seed)
        W_z = (jnp.linalg.pinv(x) @ model.z).T  # the codes' projection on x's columns
        encoded = LinearAE(model.W_x, x @ W_z.T)
        assert W_z.shape == (5, 7)
        assert of(penalty, encoded, x) <= of(penalty, model, x) + 1e-12


def test_unit_columns_keep_missing_latents():
    W = unit_columns(jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]]))
    np.testing.assert_allclose(W, [[0.6, 0.0, 1.0], [0.8, 0.0, 0.0]], rtol=1e-6)
    columns = random_columns(jax.random.key(0), 5, 2, 4)
    np.testing.assert_allclose(jnp.square(columns).sum(0), [1, 1, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(columns[:, :2], random_columns(jax.random.key(0), 5, 4, 4)[:, :2])


def test_data_have_the_rank_they_promise(float64):
    x = np.asarray(low_rank_data(jax.random.key(0), 40, 9, 4))
    assert x.shape == (40, 9)
    assert np.linalg.matrix_rank(x) == 4
    even = isotropic_data(6, 3, 2.0)
    np.testing.assert_allclose(np.linalg.svd(even, compute_uv=False) ** 2 / 3, 2.0, rtol=1e-14)


# ------------------------------------------------------------ balanced, shrunk, split


def test_the_balanced_solution(float64):
    x = random_data(0)
    model = balanced_solution(x, 5, 3)
    np.testing.assert_allclose(jnp.square(model.W_x).sum(0), 1.0, rtol=1e-14)
    at = linear_statistics(model, x)
    assert float(at.error) < 1e-30
    sigma = np.linalg.svd(x, compute_uv=False)[:3]
    np.testing.assert_allclose(at.rows, [*(sigma**2 / 20), 0, 0], atol=1e-14)
    exact = balanced_statistics(x, 5, 3)
    assert float(exact.error) == 0.0
    np.testing.assert_array_equal(exact.rows, at.rows)
    with pytest.raises(ValueError, match="kappa = 2 latents cannot hold data of rank 3"):
        balanced_solution(x, 2, 3)


@pytest.mark.parametrize("formula", EVERY)
def test_shrinking_and_splitting_cost_what_the_scaling_argument_says(float64, formula):
    penalty, x = named(formula), random_data(0)
    model = balanced_solution(x, 3, 3)
    rows, mean_square = linear_statistics(model, x).rows, float(jnp.square(x).mean())
    h = penalty.value
    for t in (0.9, 0.1, 1e-3):
        expected = h(jnp.asarray(t**2 * mean_square)) + h((1 - t) ** 2 * rows).sum() / 7
        assert of(penalty, shrink(model, t), x) == pytest.approx(float(expected), rel=1e-10)
    for parts in (2, 5):
        parted = split(model, parts)
        assert parted.W_x.shape == (7, 3 * parts)
        np.testing.assert_allclose(parted.z @ parted.W_x.T, x, atol=1e-13)
        at = dataclasses.replace(linear_statistics(parted, x), error=jnp.zeros(()))
        expected = h(jnp.zeros(())) + parts * h(rows / parts**2).sum() / 7
        assert float(energy(penalty, at)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("formula", [*MINIMISED, "I[u>0]"])
def test_a_bounded_slope_has_both_counter_examples(float64, formula):
    """Theorem 3 on data whose balanced solutions are known: below them with an error, and below
    them with more rows, wherever the slope is bounded; u^0.75 is unbounded and has both too."""
    penalty = named(formula)
    x = isotropic_data(10, 3, 1.0)
    balanced = balanced_statistics(x, 3, 3)
    t = best_shrinkage(penalty, balanced, 0.3)
    parts = splitting_pays_from(penalty, 1.0)
    undercut = penalty.bounded or formula == "u^0.75"
    assert (t > 0) == undercut
    assert (parts is not None) == undercut
    if not undercut:
        return
    shrunk = Statistics(jnp.asarray(0.3 * t**2), (1 - t) ** 2 * balanced.rows, 10)
    assert float(energy(penalty, shrunk)) < float(energy(penalty, balanced))
    if parts < 1000:  # as a model, not only as statistics
        dead = jnp.zeros(3 * parts - 3)
        whole = Statistics(jnp.zeros(()), jnp.concatenate([balanced.rows, dead]), 10)
        parted = linear_statistics(split(balanced_solution(x, 3, 3), parts), x)
        assert float(parted.error) < 1e-30
        assert len(parted.rows) == 3 * parts > 3
        assert (np.asarray(parted.rows) > 1e-6).all()
        parted = dataclasses.replace(parted, error=jnp.zeros(()))
        assert float(energy(penalty, parted)) < float(energy(penalty, whole))


def test_no_balanced_solution_of_isotropic_data_is_below_the_one_shown(float64):
    """Every zero-error solution with r rows has rows of at least the data's variance."""
    x = np.asarray(isotropic_data(6, 3, 2.0))
    rng = np.random.default_rng(0)
    for _ in range(200):
        mixing = rng.normal(size=(3, 3))
        mixing /= np.linalg.norm(mixing, axis=0)  # unit columns in the data's span
        z = x[:, :3] @ np.linalg.inv(mixing).T
        np.testing.assert_allclose(z @ mixing.T, x[:, :3], atol=1e-8)
        assert (np.square(z).mean(0) >= 2.0 - 1e-9).all()


def test_shrinkage_and_parts_by_hand():
    x_rows = Statistics(np.zeros(()), np.full(3, 1.0), 10)
    # u: t^2 E_0 + (1-t)^2 P is least at t = P / (E_0 + P) = 1/2.
    assert best_shrinkage(named("u"), x_rows, 0.3) == pytest.approx(0.5, rel=2e-3)
    # log(u+eps): error (r/d)^2 eps^2 / E_0, as long as that is far below eps.
    for eps in (1e-4, 1e-6):
        t = best_shrinkage(named(f"log(u+{eps})"), x_rows, 0.3)
        assert 0.3 * t**2 == pytest.approx(0.3**2 * eps**2 / 0.3, rel=5e-3)
    # m h(1/m^2) < h(1): 1/m < 1; 2 log(5/4) < log 2; 2 (1/4)/(5/4) < 1/2.
    for formula in ("u", "log(1+u)", "u/(u+1)"):
        assert splitting_pays_from(named(formula), 1.0) == 2
    # m log(1 + 1/(m^2 eps)) < log(1 + 1/eps), by counting up.
    m = next(m for m in range(2, 10_000) if m * np.log1p(1e3 / m**2) < np.log1p(1e3))
    assert splitting_pays_from(named("log(u+1e-3)"), 1.0) == m > 100
    # Parts of mean square 1 / m^2, none above the tolerance.
    assert splitting_pays_from(indicator(1e-4), 1.0) == 100
    with pytest.raises(ValueError, match="no m <= 100 pays"):
        splitting_pays_from(named("log(u+1e-6)"), 1.0, limit=100)


# ------------------------------------------------------------ exact minima


@pytest.mark.parametrize("formula", ["u", "u^0.9", "u^0.75", "u^0.6", "sqrt(u)", "u^0.25", "u^0.1"])
def test_nothing_is_below_the_exact_minimum(float64, formula):
    """Neither random models, nor random exact factorisations, nor where descent ends."""
    penalty, x = named(formula), random_data(4, examples=12)
    exact = linear_global_minimum(penalty, x, 5)
    rng = np.random.default_rng(0)
    for seed in range(100):
        model = random_model(seed, examples=12)
        least = x @ jnp.linalg.pinv(model.W_x).T  # the shortest codes that give x, if any do
        for z in (model.z, least, float(np.exp(rng.uniform(-3, 0))) * least):
            assert of(penalty, LinearAE(model.W_x, z), x) > exact.energy - 1e-9


@pytest.mark.parametrize("p", [0.55, 0.6, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("kappa", [3, 7])
def test_the_exact_minimum_of_powers_above_a_half_by_calculus(float64, p, kappa):
    """Setting the derivative in the threshold t to zero gives t = c S / (kappa + c r), with S
    the sum of singular values and c = (r/d)^((1-p)/(2p-1)), as long as t is below them all."""
    x = isotropic_data(10, 3, 1.0) * jnp.array([1.0, 1.3, 1.6])[:, None]
    sigma = np.array([1.0, 1.3, 1.6])
    c = 0.3 ** ((1 - p) / (2 * p - 1))
    t = c * sigma.sum() / (kappa + 3 * c)
    assert t < 1
    exact = linear_global_minimum(power(p), x, kappa)
    assert exact.error == pytest.approx(3 * t**2 / 10, rel=1e-4)
    penalty = kappa * ((sigma - t).sum() / kappa) ** (2 * p) / 10
    assert exact.energy == pytest.approx((3 * t**2 / 10) ** p + penalty, rel=1e-12)


def test_exact_minima_are_refused_where_none_is_known(float64):
    x = random_data(0)
    with pytest.raises(ValueError, match="neither concave nor convex"):
        linear_global_minimum(named("log(1+u)"), x, 5)
    with pytest.raises(ValueError, match="x has rank 3"):
        linear_global_minimum(named("u"), x, 2)
    with pytest.raises(ValueError, match="rank < d"):
        linear_global_minimum(named("u"), np.eye(4), 5)


# ------------------------------------------------------------ descent


@pytest.mark.parametrize("formula", MINIMISED)
def test_a_step_never_raises_the_energy(float64, formula):
    x = random_data(2)

    @jax.jit
    def path(model, eps):
        penalty = smooth(named(formula), eps)

        def step(model, _):
            at = energy(penalty, linear_statistics(model, x))
            return majorised_step(penalty, model, x), (at, jnp.square(model.W_x).sum(0))

        return jax.lax.scan(step, model, length=25)[1]

    for eps in (1.0, 1e-6):
        for seed in range(3):
            energies, norms = jax.device_get(path(random_model(seed), eps))
            assert (np.diff(energies) <= 1e-10 * np.abs(energies[1:])).all()
            assert energies[-1] < energies[0]
            np.testing.assert_allclose(norms, 1.0, rtol=1e-9)


def test_scale_and_translation_of_h_change_nothing(float64):
    x, start = random_data(2), random_model(0).W_x
    h = named("log(1+u)")
    moved = dataclasses.replace(
        h, value=lambda u: 7 * h.value(u) - 3, slope=lambda u: 7 * h.slope(u)
    )
    smoothing = homotopy(1.0, 1e-8, 50)
    for a, b in zip(
        minimise_linear(h, x, start, smoothing),
        minimise_linear(moved, x, start, smoothing),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("formula", ["sqrt(u)", "u^0.25"])
def test_powers_do_not_care_for_units(float64, formula):
    """Data a thousand times larger take the same path, scaled."""
    x, start, smoothing = random_data(2), random_model(0).W_x, homotopy(1.0, 1e-8, 50)
    small = minimise_linear(named(formula), x, start, smoothing)
    large = minimise_linear(named(formula), 1000 * x, start, smoothing)
    np.testing.assert_allclose(1000 * small.z, large.z, rtol=1e-7, atol=1e-7)


def test_a_padded_problem_is_the_small_one(float64):
    x, smoothing = random_data(2), homotopy(1.0, 1e-8, 50)
    key = jax.random.key(0)
    small_start, padded_start = random_columns(key, 7, 8, 8)[:, :4], random_columns(key, 7, 4, 8)
    for formula in ("log(1+u)", "u^0.25"):
        small = minimise_linear(named(formula), x, small_start, smoothing)
        padded = minimise_linear(named(formula), x, padded_start, smoothing)
        np.testing.assert_allclose(padded.z[:, :4], small.z, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(padded.z[:, 4:], 0.0)


def test_the_homotopy_falls_and_stays():
    path = np.asarray(homotopy(1.0, 1e-4, 9, share=0.5))
    np.testing.assert_allclose(path[:5], 10.0 ** -np.arange(5), rtol=1e-5)
    np.testing.assert_allclose(path[4:], 1e-4, rtol=1e-5)
    np.testing.assert_allclose(homotopy(1e-3, 1e-3, 4), 1e-3, rtol=1e-6)
    assert homotopy(1.0, 0.5, 1).shape == (1,)


def test_what_cannot_be_minimised_is_refused():
    x, start = jnp.ones((3, 4)), jnp.ones((4, 2))
    with pytest.raises(ValueError, match="evaluated, not minimised"):
        minimise_linear(indicator(), x, start, homotopy(1, 1e-3, 3))
    with pytest.raises(ValueError, match=r"W_x must be \[D, K\]"):
        minimise_linear(named("u"), x, start.T, homotopy(1, 1e-3, 3))
    model = DeepAE(2, 4, 3, 2, 2, ACTIVATIONS["silu"])
    with pytest.raises(ValueError, match="evaluated, not minimised"):
        fit_deep(indicator(), model, jax.random.key(0), x, homotopy(1, 1e-3, 3), 1e-3)


# ------------------------------------------------------------ Theorem 3, numerically


class Seen(NamedTuple):
    """Rank 3, kappa = 6, unit columns, 6 starts."""

    error: float  # of the best start
    rows: np.ndarray  # active ones of every start, the best first
    energy: float
    energy_svd: float  # of zero error with 3 rows


@functools.cache
def notes_setting(formula: str, anneal: bool) -> Seen:
    penalty = named(formula)
    with jax.enable_x64(True):
        x = sufficient_examples(low_rank_data(jax.random.key(1), 60, 10, 3), 3)
        keys = jax.random.split(jax.random.key(2), 6)
        starts = jax.vmap(lambda key: random_columns(key, 10, 6, 6))(keys)
        smoothing = homotopy(1.0 if anneal else 1e-14, 1e-14, 3000)

        @jax.jit
        @jax.vmap
        def solve(start):
            at = linear_statistics(minimise_linear(penalty, x, start, smoothing), x)
            return at, energy(penalty, at)

        at, energies = jax.device_get(solve(starts))
        svd = float(energy(penalty, balanced_statistics(x, 6, 3)))
    order = np.argsort(energies)
    rows = active_rows(at.rows[order], 1e-5)
    return Seen(float(at.error[order[0]]), rows, float(energies[order[0]]), svd)


@pytest.mark.parametrize(
    ("formula", "least", "most"), [("u", 0.1, 0.5), ("log(1+u)", 0.01, 0.2), ("u^0.75", 0.03, 0.3)]
)
def test_an_error_and_all_six_rows_are_left(formula, least, most):
    """u and log(1+u), whose slopes are bounded; u^0.75, whose slope is not: p > 1/2."""
    seen = notes_setting(formula, True)
    assert least < seen.error < most
    assert seen.rows[0] == 6
    assert seen.energy < seen.energy_svd - 0.01  # no local minimum: h prefers it to balance


def test_the_square_root_reaches_zero_error_with_rows_to_spare():
    """And these are not local minima: at p = 1/2 they tie with the balanced solution."""
    seen = notes_setting("sqrt(u)", True)
    assert seen.error < 1e-10
    assert seen.rows[0] >= 5
    assert seen.energy == pytest.approx(seen.energy_svd, rel=1e-5)


@pytest.mark.parametrize("formula", ["u^0.25", "log(u+1e-6)"])
def test_steep_penalties_are_balanced_by_the_homotopy(formula):
    """From every start. Without it, most end at local minima with more rows."""
    seen = notes_setting(formula, True)
    assert seen.error < 1e-10
    assert (seen.rows == 3).all()
    assert seen.energy == pytest.approx(seen.energy_svd, abs=1e-3)
    scratch = notes_setting(formula, False)
    assert scratch.error < 1e-10
    assert (scratch.rows > 3).sum() >= 3


def test_concave_in_the_norm_suffices(float64):
    """log(1 + sqrt(u)), no power: balanced from every start, at the energy of the SVD."""
    penalty = Penalty(
        "log(1+sqrt(u))",
        lambda u: jnp.log1p(jnp.sqrt(u)),
        lambda u: 0.5 / (jnp.sqrt(u) + u),
        float("inf"),
        "concave",
    )
    x = sufficient_examples(random_data(0), 3)
    starts = jax.vmap(lambda key: random_columns(key, 7, 5, 5))(
        jax.random.split(jax.random.key(0), 4)
    )

    @jax.jit
    @jax.vmap
    def solve(start):
        model = minimise_linear(penalty, x, start, homotopy(1.0, 1e-14, 2500))
        at = linear_statistics(model, x)
        return at, energy(penalty, at)

    at, energies = jax.device_get(solve(starts))
    assert (at.error < 1e-10).all()
    assert (active_rows(at.rows, 1e-5) == 3).all()
    exact = linear_global_minimum(penalty, x, 5)
    np.testing.assert_allclose(energies, exact.energy, atol=1e-3)
    assert (energies > exact.energy - 1e-9).all()


def test_descent_finds_the_exact_minima_over_p(float64):
    """The threshold: zero error up to p = 1/2, the exact error above, r rows strictly below."""
    exponents = jnp.array([0.2, 0.4, 0.5, 0.6, 0.8])
    x = sufficient_examples(random_data(0, dim=8), 3)
    smoothing = homotopy(1.0, 1e-14, 2500)
    starts = jnp.stack(
        [random_columns(key, 8, 5, 5) for key in jax.random.split(jax.random.key(0), 4)]
    )

    def solve(p, start):
        at = linear_statistics(minimise_linear(power(p), x, start, smoothing), x)
        return at, energy(power(p), at)

    at, energies = jax.jit(jax.vmap(jax.vmap(solve, (None, 0)), (0, None)))(exponents, starts)
    for index, p in enumerate(np.asarray(exponents)):
        best = int(np.argmin(energies[index]))
        exact = linear_global_minimum(power(float(p)), x, 5)
        error, rows = float(at.error[index, best]), np.asarray(at.rows[index, best])
        if p <= 0.5:
            assert exact.error == 0.0
            assert error < 1e-10
        else:
            assert error == pytest.approx(exact.error, rel=1e-3)
        assert (active_rows(rows, 1e-6) == 3) == (p < 0.5)
        assert float(energies[index, best]) == pytest.approx(
            exact.energy, abs=2e-2 if p < 0.5 else 1e-5
        )


# ------------------------------------------------------------ deep


def test_a_unit_cannot_be_turned_down_in_the_decoder():
    layer = UnitFanOut(5)
    params = layer.init(jax.random.key(0), jnp.ones((1, 3)))
    one_at_a_time = layer.apply(params, jnp.eye(3)) - params["params"]["bias"][None, :]
    np.testing.assert_allclose(jnp.square(one_at_a_time).sum(1), 1.0, rtol=1e-5)
    scaled = jax.tree.map(lambda leaf: 100 * leaf, params)
    again = layer.apply(scaled, jnp.eye(3)) - scaled["params"]["bias"][None, :]
    np.testing.assert_allclose(again, one_at_a_time, rtol=1e-4, atol=1e-5)


def test_a_deep_autoencoder_with_one_decoder_layer_is_the_linear_one(pixels):
    model = DeepAE(4, 16, 8, 2, 1, ACTIVATIONS["tanh"])
    params = jax.jit(model.init)(jax.random.key(0), pixels)["params"]
    x_hat, z = model.apply({"params": params}, pixels)
    W_x = unit_columns(params["decoder_0"]["kernel"].T)
    np.testing.assert_allclose(x_hat, z @ W_x.T, atol=1e-5)
    at, expected = (
        deep_statistics(model, params, pixels),
        linear_statistics(LinearAE(W_x, z), pixels),
    )
    np.testing.assert_allclose(at.error, expected.error, rtol=1e-4)
    np.testing.assert_allclose(at.rows, expected.rows, rtol=1e-5)


def test_gradients_are_finite_where_every_code_is_zero(pixels):
    model = DeepAE(4, 16, 8, 2, 2, ACTIVATIONS["silu"])
    params = jax.jit(model.init)(jax.random.key(0), pixels)["params"]
    params["encoder"] = jax.tree.map(jnp.zeros_like, params["encoder"])

    @jax.jit
    def gradients(params):
        def loss(params, formula):
            return energy(smooth(named(formula), 1e-6), deep_statistics(model, params, pixels))

        return [jax.grad(loss)(params, formula) for formula in ("sqrt(u)", "log(u+1e-6)")]

    assert not deep_statistics(model, params, pixels).rows.any()
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients(params)))


@pytest.mark.slow
def test_a_deep_autoencoder_is_balanced_by_the_homotopy_alone():
    """Data of rank 2, 6 latents: two rows with the homotopy, fewer without, six for u."""
    with jax.enable_x64(True):
        x = jnp.asarray(low_rank_data(jax.random.key(3), 80, 8, 2), jnp.float32) / 3
    model = DeepAE(6, 8, 24, 2, 2, ACTIVATIONS["silu"])

    def rows(formula: str, start: float) -> int:
        @jax.jit
        def fit(key):
            smoothing = homotopy(start, 1e-6, 3000, share=0.7)
            params, energies = fit_deep(named(formula), model, key, x, smoothing, 5e-3)
            return deep_statistics(model, params, x), energies

        at, energies = jax.device_get(fit(jax.random.key(0)))
        assert np.isfinite(energies).all()
        return int(active_rows(at.rows, 1e-4))

    assert rows("log(u+1e-6)", 1.0) == 2
    assert rows("u", 1.0) == 6
    assert rows("log(u+1e-6)", 1e-6) < 2
