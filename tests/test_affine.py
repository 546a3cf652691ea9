"""The affine VAE's landscape against oracles that share no code with it.

Likelihoods come from scipy, expectations from draws through the general objective,
derivatives from finite differences, Morse indices from dense Hessians of the energy.
"""

import functools
import itertools
import math
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import stats

from vaebal.models.objectives import gaussian_vae_terms
from vaebal.theory.affine import (
    AffineVAE,
    affine_energy,
    affine_energy_draws,
    affine_gamma_path,
    affine_global_gamma,
    affine_global_minimizer,
    affine_global_minimum,
    affine_optimal_encoder,
    affine_outputs,
    affine_profile_energy,
    affine_squared_error,
)
from vaebal.theory.landscape import affine_stationary_points
from vaebal.units import eq3_to_negative_elbo, negative_elbo_to_eq3

DISTINCT = "distinct"
REPEATED = "repeated eigenvalues"
AT_GAMMA = "gamma at an eigenvalue"
SINGULAR = "singular covariance"
REPEATED_AT_GAMMA = "gamma at a repeated eigenvalue"
KINDS = (DISTINCT, REPEATED, AT_GAMMA, SINGULAR, REPEATED_AT_GAMMA)


class Problem(NamedTuple):
    mean: np.ndarray  # [D]
    cov: np.ndarray  # [D, D]
    gamma: float
    eigenvalues: np.ndarray  # [D], largest first


def random_problem(rng: np.random.Generator, dim: int, kind: str = DISTINCT) -> Problem:
    # Ratios of at least 1.1 keep the eigenvalues of a Hessian away from accidental zeros.
    eigenvalues = np.exp(rng.uniform(-2, 0) + np.cumsum(rng.uniform(0.1, 1.0, dim)))[::-1].copy()
    gamma = float(np.exp(rng.uniform(-2.0, 0.5)))
    if kind in (REPEATED, REPEATED_AT_GAMMA):
        start = rng.integers(dim - 1)
        eigenvalues[start : start + rng.integers(2, dim - start + 1)] = eigenvalues[start]
        if kind == REPEATED_AT_GAMMA:
            gamma = float(eigenvalues[start])
    if kind == AT_GAMMA:
        gamma = float(rng.choice(eigenvalues))
    if kind == SINGULAR:
        eigenvalues[rng.integers(1, dim) :] = 0.0
    axes, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    cov = (axes * eigenvalues) @ axes.T
    return Problem(rng.standard_normal(dim), (cov + cov.T) / 2, gamma, eigenvalues)


def random_params(rng: np.random.Generator, dim: int, latents: int) -> AffineVAE:
    shapes = (dim, latents), (dim,), (latents, dim), (latents,), (latents,)
    return AffineVAE(*(0.7 * rng.standard_normal(shape) for shape in shapes))


def raveled_energy(dim: int, latents: int):
    """`affine_energy` as a function of all parameters in one vector [P]."""
    _, unravel = ravel_pytree(random_params(np.random.default_rng(0), dim, latents))

    def energy(flat, mean, cov, gamma):
        return affine_energy(unravel(flat), mean, cov, gamma)

    return energy


def dense_check(problems: list[Problem], points: list, block: int):
    """Largest gradient entry [B] and Hessian eigenvalues [B, P] of points [B], each in its problem.

    All problems have one shape; `block` points are differentiated at a time.
    """
    dim, latents = points[0].params.W_x.shape
    energy = raveled_energy(dim, latents)
    gradient, hessian = jax.jit(jax.vmap(jax.grad(energy))), jax.jit(jax.vmap(jax.hessian(energy)))
    flat = [np.concatenate([np.ravel(leaf) for leaf in point.params]) for point in points]
    arguments = [np.stack(field) for field in zip(*(p[:3] for p in problems), strict=True)]
    gradients, eigenvalues = [], []
    with jax.enable_x64(True):
        for start in range(0, len(flat), block):
            # The last block is filled up: one compilation for any number of points.
            rows = np.minimum(np.arange(start, start + block), len(flat) - 1)
            batch = (np.stack(flat)[rows], *(field[rows] for field in arguments))
            gradients.append(np.abs(np.asarray(gradient(*batch))).max(1))
            eigenvalues.append(np.linalg.eigvalsh(np.asarray(hessian(*batch))))
    return np.concatenate(gradients)[: len(flat)], np.concatenate(eigenvalues)[: len(flat)]


def inertia(eigenvalues: np.ndarray) -> tuple[int, int]:
    """Numbers of negative and of zero eigenvalues."""
    zero = 1e-11 * np.abs(eigenvalues).max()
    return int((eigenvalues < -zero).sum()), int((np.abs(eigenvalues) <= zero).sum())


# ------------------------------------------------------------------- energy


def test_energy_is_the_expectation_of_the_general_objective():
    rng = np.random.default_rng(1)
    draws = 20_000
    for number in range(100):
        dim, latents = [(1, 1), (3, 2), (2, 4), (6, 3)][number % 4]
        kind = SINGULAR if number % 5 == 0 and dim > 1 else DISTINCT
        mean, cov, gamma, _ = random_problem(rng, dim, kind)
        params = random_params(rng, dim, latents)
        sampled = affine_energy_draws(
            params,
            mean,
            cov,
            gamma,
            rng.standard_normal((draws, dim)),
            rng.standard_normal((draws, latents)),
        )
        assert sampled.shape == (draws,)
        error = sampled.std(ddof=1) / math.sqrt(draws)
        assert abs(sampled.mean() - affine_energy(params, mean, cov, gamma)) < 4 * error


def test_bound_is_tight_at_probabilistic_pca():
    """-ELBO is -log-likelihood where W_x has orthogonal columns, and above it elsewhere."""
    rng = np.random.default_rng(2)
    for dim, latents in [(6, 4), (4, 4), (3, 1)]:
        x = rng.standard_normal((50, dim)) @ rng.standard_normal((dim, dim)) + 3.0
        mean, cov, gamma = x.mean(0), np.cov(x.T, bias=True).reshape(dim, dim), 0.3
        axes, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
        orthogonal = axes[:, :latents] * rng.uniform(0.5, 2, latents)
        oblique = rng.standard_normal((dim, latents))
        minimizer = affine_global_minimizer(mean, cov, latents, gamma).W_x
        for W_x, tight in [(orthogonal, True), (minimizer, True), (oblique, latents == 1)]:
            C = W_x @ W_x.T + gamma * np.eye(dim)
            nll = -stats.multivariate_normal(mean, C).logpdf(x).mean()
            params = affine_optimal_encoder(W_x, mean, gamma)
            for energy in (
                affine_energy(params, mean, cov, gamma),
                affine_profile_energy(W_x, cov, gamma),
            ):
                nats = eq3_to_negative_elbo(energy, dim, latents)
                assert negative_elbo_to_eq3(nats, dim, latents) == pytest.approx(energy, rel=1e-14)
                if tight:
                    assert nats == pytest.approx(nll, rel=1e-9)
                else:
                    assert nats > nll + 1e-3


def test_importance_weights_are_constant_where_the_bound_is_tight():
    rng = np.random.default_rng(3)
    mean, cov, gamma, _ = random_problem(rng, 5)
    params = affine_global_minimizer(mean, cov, 3, gamma)
    x, eps = rng.standard_normal((20, 5)), rng.standard_normal((20, 3))
    with jax.enable_x64(True):
        outputs = affine_outputs(params, x, eps, gamma)
        z = outputs.mean + np.exp(0.5 * outputs.log_var) * eps
        log_w = (
            -gaussian_vae_terms(x, outputs).reconstruction
            + jax.scipy.stats.norm.logpdf(z).sum(-1)
            - jax.scipy.stats.norm.logpdf(z, outputs.mean, jnp.exp(outputs.log_var / 2)).sum(-1)
        )
    C = params.W_x @ params.W_x.T + gamma * np.eye(5)
    np.testing.assert_allclose(log_w, stats.multivariate_normal(mean, C).logpdf(x), rtol=1e-12)


def test_gradients_match_finite_differences():
    rng = np.random.default_rng(4)
    mean, cov, gamma, _ = random_problem(rng, 4)
    params = random_params(rng, 4, 3)

    def energy_along(direction, t):
        moved = jax.tree.map(lambda leaf, step: leaf + t * step, (params, gamma), direction)
        return affine_energy(moved[0], mean, cov, moved[1])

    with jax.enable_x64(True):
        gradient = jax.grad(lambda p, g: affine_energy(p, mean, cov, g), (0, 1))(params, gamma)
    gradient = jax.device_get(gradient)
    for _ in range(20):
        direction = (random_params(rng, 4, 3), 0.1 * rng.standard_normal())
        h = 1e-3
        numeric = (
            8 * (energy_along(direction, h) - energy_along(direction, -h))
            - (energy_along(direction, 2 * h) - energy_along(direction, -2 * h))
        ) / (12 * h)
        exact = sum((g * d).sum() for g, d in zip(gradient[0], direction[0], strict=True))
        exact += gradient[1] * direction[1]
        assert numeric == pytest.approx(float(exact), rel=1e-8, abs=1e-8)


def test_energy_does_not_depend_on_the_frame():
    """Shifts of x, rotations of x, and signed permutations of the latents change nothing."""
    rng = np.random.default_rng(5)
    mean, cov, gamma, _ = random_problem(rng, 5)
    params = random_params(rng, 5, 3)
    energy = affine_energy(params, mean, cov, gamma)
    W_x, b_x, W_z, b_z, log_s2 = params

    shift = rng.standard_normal(5)
    moved = AffineVAE(W_x, b_x + shift, W_z, b_z - W_z @ shift, log_s2)
    assert affine_energy(moved, mean + shift, cov, gamma) == pytest.approx(energy, rel=1e-12)

    turn, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    turned = AffineVAE(turn @ W_x, turn @ b_x, W_z @ turn.T, b_z, log_s2)
    turned_cov = turn @ cov @ turn.T
    assert affine_energy(turned, turn @ mean, turned_cov, gamma) == pytest.approx(energy, rel=1e-12)

    order, sign = np.array([2, 0, 1]), np.array([1.0, -1.0, -1.0])
    relabelled = AffineVAE(
        (W_x * sign)[:, order],
        b_x,
        (sign[:, None] * W_z)[order],
        (sign * b_z)[order],
        log_s2[order],
    )
    assert affine_energy(relabelled, mean, cov, gamma) == pytest.approx(energy, rel=1e-12)


@pytest.mark.parametrize("kind", [DISTINCT, SINGULAR])
def test_optimal_encoder_is_the_minimum_over_everything_but_the_decoder(kind):
    rng = np.random.default_rng(6)
    mean, cov, gamma, _ = random_problem(rng, 5, kind)
    W_x = rng.standard_normal((5, 3))
    best = affine_optimal_encoder(W_x, mean, gamma)
    energy = affine_energy(best, mean, cov, gamma)
    assert affine_profile_energy(W_x, cov, gamma) == pytest.approx(energy, rel=1e-12)
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(tuple(best[1:]))
        of_rest = lambda rest: affine_energy(AffineVAE(W_x, *unravel(rest)), mean, cov, gamma)  # noqa: E731
        assert np.abs(jax.grad(of_rest)(flat)).max() < 1e-10
        # Convex everywhere (quadratic in the means, e^u - u in log s^2): the one minimum.
        least = np.linalg.eigvalsh(np.asarray(jax.hessian(of_rest)(flat))).min()
    assert least > (1e-3 if kind == DISTINCT else -1e-10)
    for _ in range(50):
        other = AffineVAE(W_x, *(leaf + 0.1 * rng.standard_normal(leaf.shape) for leaf in best[1:]))
        assert affine_energy(other, mean, cov, gamma) > energy


# ----------------------------------------------------------- global minimum


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "kappa"), [(5, 2), (4, 4), (3, 6)])
def test_global_minimum_is_the_formula_and_is_attained(kind, dim, kappa):
    rng = np.random.default_rng(7)
    mean, cov, gamma, eigenvalues = random_problem(rng, dim, kind)
    q = int((eigenvalues[:kappa] > gamma * (1 + 1e-12)).sum())
    expected = (
        np.log(eigenvalues[:q]).sum()
        + (dim - q) * math.log(gamma)
        + q
        + eigenvalues[q:].sum() / gamma
        + kappa
    )
    assert affine_global_minimum(cov, kappa, gamma) == pytest.approx(expected, rel=1e-12)
    minimizer = affine_global_minimizer(mean, cov, kappa, gamma)
    assert minimizer.W_x.shape == (dim, kappa)
    assert affine_energy(minimizer, mean, cov, gamma) == pytest.approx(expected, rel=1e-11)


def random_start_ends(problems: list[Problem], latents: int, starts: int, seed: int):
    """Energies and largest gradient entries [problems, starts] where descents of eq. 3 end.

    Newton's method with the absolute values of the curvatures, damped until the energy
    falls: it goes downhill at saddles too, so that it stops at minima alone.
    """
    dim = len(problems[0].mean)
    rng = np.random.default_rng(seed)
    energy = raveled_energy(dim, latents)
    size = 2 * dim * latents + dim + 2 * latents
    scale = np.exp(rng.uniform(-3.0, 0.0, (len(problems), starts, 1)))
    start = scale * rng.standard_normal((len(problems), starts, size))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0, 0))
    @functools.partial(jax.vmap, in_axes=(0, None, None, None))
    def descend(flat, *data):
        def at(flat):
            return flat, *jax.value_and_grad(energy)(flat, *data)

        def go_on(carry):
            (_, _, slope), _, steps = carry
            return (steps < 200) & (jnp.abs(slope).max() > 1e-8)

        def step(carry):
            here, damping, steps = carry
            flat, value, slope = here
            curvatures, axes = jnp.linalg.eigh(jax.hessian(energy)(flat, *data))
            there = at(flat - axes @ ((axes.T @ slope) / (jnp.abs(curvatures) + damping)))
            falls = there[1] <= value
            here = jax.tree.map(lambda new, old: jnp.where(falls, new, old), there, here)
            damping = jnp.clip(jnp.where(falls, damping / 10, damping * 10), 1e-12, 1e6)
            return here, damping, steps + 1

        (_, value, slope), _, _ = jax.lax.while_loop(go_on, step, (at(flat), 1e-2, 0))
        return value, slope

    data = (np.stack(field) for field in zip(*(p[:3] for p in problems), strict=True))
    with jax.enable_x64(True):
        energies, slopes = jax.device_get(descend(start, *data))
    return energies, np.abs(slopes).max(-1)


@pytest.mark.slow
def test_no_random_start_ends_at_a_worse_minimum():
    """Theorem 1: 1,000 starts on 50 problems, all parameters free, gamma fixed."""
    rng = np.random.default_rng(8)
    for dim, latents, count in [(3, 2, 20), (4, 2, 10), (2, 3, 20)]:
        problems = [random_problem(rng, dim) for _ in range(count)]
        energies, gradients = random_start_ends(problems, latents, starts=20, seed=dim)
        assert energies.shape == (count, 20)
        assert gradients.max() < 1e-6
        for problem, ends in zip(problems, energies, strict=True):
            least = affine_global_minimum(problem.cov, latents, problem.gamma)
            np.testing.assert_allclose(ends, least, rtol=0, atol=1e-9)


# -------------------------------------------------------- stationary points


@pytest.mark.parametrize(
    ("dim", "latents", "count"),
    [
        *((5, 3, 40), (3, 3, 40), (2, 4, 40)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((6, 4, 10), (4, 4, 40), (3, 4, 40))
        ),
    ],
)
def test_stationary_points_by_dense_gradients_and_hessians(dim, latents, count):
    """210 problems, every point of each: three in five with ties, one in five singular.

    Gradient, energy, Morse index and nullity.
    """
    rng = np.random.default_rng(9)
    problems, points = [], []
    for number in range(count):
        problem = random_problem(rng, dim, KINDS[number % len(KINDS)])
        points.extend(affine_stationary_points(problem.mean, problem.cov, latents, problem.gamma))
        problems.extend([problem] * (len(points) - len(problems)))
    assert not all(point.axis_aligned for point in points)
    gradients, eigenvalues = dense_check(problems, points, block=128)
    assert gradients.max() < 1e-8
    for problem, point, spectrum in zip(problems, points, eigenvalues, strict=True):
        assert (point.index, point.nullity) == inertia(spectrum), (point, problem)
        assert bool(point.degenerate) == (point.nullity > 0)
        energy = affine_energy(point.params, *problem[:3])
        assert point.energy == pytest.approx(energy, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_minima_are_the_global_ones(kind):
    """Index 0 and least energy are the same points, ties included: Theorem 1 again."""
    rng = np.random.default_rng(10)
    for dim, latents in [(5, 3), (4, 4), (2, 3)]:
        for _ in range(5):
            mean, cov, gamma, _ = random_problem(rng, dim, kind)
            least = affine_global_minimum(cov, latents, gamma)
            for point in affine_stationary_points(mean, cov, latents, gamma):
                assert (point.index == 0) == (point.energy < least + 1e-9 * max(1, abs(least)))


def test_indices_of_the_worked_example():
    eigenvalues = np.array([4.0, 2.0, 0.5, 0.1, 0.05])
    points = affine_stationary_points(np.zeros(5), np.diag(eigenvalues), 3, 0.2, off_axes=False)
    points = list(points)
    assert {point.directions: point.index for point in points} == {
        (): 9,
        (0,): 4,
        (1,): 5,
        (2,): 6,
        (0, 1): 1,
        (0, 2): 2,
        (1, 2): 3,
        (0, 1, 2): 0,
    }
    for point in points:
        J = point.directions
        rest = np.delete(eigenvalues, J)
        pairs = sum(int((rest > eigenvalues[i]).sum()) for i in J)
        assert point.index == (3 - len(J)) * (3 - len(J)) + pairs
        norms = np.square(np.asarray(point.params.W_x)).sum(0)
        np.testing.assert_allclose(norms[: len(J)], eigenvalues[list(J)] - 0.2, rtol=1e-12)
        assert not norms[len(J) :].any()


@pytest.mark.parametrize(("gamma", "negative", "least"), [(4.0, 4, -0.117728), (5.5, 0, 0.031997)])
def test_total_collapse_is_a_minimum_only_above_the_largest_eigenvalue(gamma, negative, least):
    problem = Problem(np.zeros(6), np.diag([5.0, 3.0, 1.5, 0.6, 0.3, 0.1]), gamma, np.zeros(6))
    collapse = next(affine_stationary_points(problem.mean, problem.cov, 4, gamma))
    assert collapse.directions == ()
    assert collapse.copies == 1
    assert collapse.index == negative
    _, (spectrum,) = dense_check([problem], [collapse], block=1)
    assert spectrum[0] == pytest.approx(least, abs=5e-7)
    assert inertia(spectrum) == (negative, 0)


def test_shared_directions_satisfy_their_condition():
    rng = np.random.default_rng(11)
    mean, cov, _, eigenvalues = random_problem(rng, 4)
    gamma = eigenvalues[3] / 2
    shared = 0
    for point in affine_stationary_points(mean, cov, 4, gamma):
        W_x = np.asarray(point.params.W_x)
        start = 0
        for group in point.groups:
            columns = W_x[:, start : start + group.columns]
            start += group.columns
            np.testing.assert_allclose(np.square(columns).sum(0) + gamma, group.delta, rtol=1e-12)
            if len(group.directions) == 1:
                m, square = group.columns, group.delta - gamma
                (eigenvalue,) = eigenvalues[list(group.directions)]
                condition = eigenvalue * (square + gamma)
                assert (m * square + gamma) ** 2 == pytest.approx(condition, rel=1e-10)
                shared += m > 1
                assert point.index >= m - 1
    assert shared > 10


def test_two_directions_can_share_two_columns_even_below_gamma():
    """Columns of equal norm that mix two axes, one of them with lambda < gamma."""
    eigenvalues, gamma = np.array([100.0, 0.9]), 1.0
    points = affine_stationary_points(np.zeros(2), np.diag(eigenvalues), 2, gamma)
    (point,) = (point for point in points if point.directions == (0, 1))
    assert not point.axis_aligned
    delta = np.square(np.sqrt(eigenvalues).mean())
    W_x = np.asarray(point.params.W_x)
    np.testing.assert_allclose(
        W_x @ W_x.T, np.diag(np.sqrt(eigenvalues * delta) - gamma), atol=1e-12
    )
    np.testing.assert_allclose(np.square(W_x).sum(0), delta - gamma, rtol=1e-12)
    assert point.copies == 8


def test_no_stationary_point_is_missing():
    """Wherever Newton's method for dF/dW = 0 ends, the energy is that of a listed point."""
    latents, starts = 3, 500
    rng = np.random.default_rng(12)
    for dim in (2, 3):
        mean, cov, gamma, _ = random_problem(rng, dim)
        gamma = gamma / 3

        def profile(flat, dim=dim, cov=cov, gamma=gamma):
            return affine_profile_energy(flat.reshape(dim, latents), cov, gamma)

        @jax.jit
        @jax.vmap
        def find_root(flat, profile=profile):
            def step(flat, _):
                # Plain Newton goes to roots of any index; its steps are kept short.
                slope, curvature = jax.grad(profile)(flat), jax.hessian(profile)(flat)
                move = jnp.linalg.solve(curvature, slope)
                length = jnp.linalg.norm(move)
                return flat - move * jnp.minimum(1, 0.5 / length), None

            flat, _ = jax.lax.scan(step, flat, None, length=150)
            return flat, *jax.value_and_grad(profile)(flat)

        scale = np.exp(rng.uniform(-1.5, 0.0, (starts, 1))) * math.sqrt(np.trace(cov) / dim)
        with jax.enable_x64(True):
            ends, found, slopes = jax.device_get(
                find_root(scale * rng.standard_normal((starts, dim * latents)))
            )
        # The slope vanishes at infinity, too.
        found = found[(np.abs(slopes).max(1) < 1e-10) & (np.abs(ends).max(1) < 1e3)]
        assert len(found) > starts / 5
        points = list(affine_stationary_points(mean, cov, latents, gamma))
        listed = np.array([point.energy for point in points])
        nearest = np.abs(found[:, None] - listed)
        assert nearest.min(1).max() < 1e-8
        hit = [points[n] for n in set(nearest.argmin(1))]
        assert any(point.axis_aligned for point in hit)
        assert any(len(group.directions) > 1 for point in hit for group in point.groups)
        assert len(hit) > len(points) / 2


def test_copies_are_the_orbit_under_signed_permutations():
    rng = np.random.default_rng(13)
    mean, cov, gamma, eigenvalues = random_problem(rng, 3)
    latents = 3
    count = int((eigenvalues > gamma).sum())
    for point in affine_stationary_points(mean, cov, latents, gamma):
        W_x = np.asarray(point.params.W_x)
        orbit = {
            tuple(np.round(W_x[:, order] * sign, 9).ravel() + 0.0)
            for order in itertools.permutations(range(latents))
            for sign in itertools.product([1.0, -1.0], repeat=latents)
        }
        assert len(orbit) == point.copies
        if point.index == 0:  # kappa! / (kappa - r)! assignments, 2^r signs
            assert point.copies == math.perm(latents, count) * 2**count


def test_degenerate_points_say_why():
    def reasons(eigenvalues, gamma, kappa=2):
        cov = np.diag(np.asarray(eigenvalues, float))
        points = affine_stationary_points(np.zeros(len(cov)), cov, kappa, gamma, off_axes=False)
        return {point.directions: point.degenerate for point in points}

    assert not any(reasons([3.0, 2.0, 0.5], 1.0).values())
    at_gamma = reasons([3.0, 1.0, 0.5], 1.0)
    assert set(at_gamma) == {(), (0,)}
    assert all("gamma equals" in reason for reason in at_gamma.values())
    # Without an unused column nothing can move along the direction at gamma.
    assert reasons([3.0, 1.0, 0.5], 1.0, kappa=1)[(0,)] == ""
    repeated = reasons([3.0, 3.0, 0.5], 1.0)
    assert repeated[()] == ""
    assert "repeated" in repeated[(0,)]
    assert "repeated" in repeated[(0, 1)]
    assert all("singular" in reason for reason in reasons([3.0, 0.0], 1.0).values())


def test_stationary_points_are_lazy():
    """The first thousand of a number with hundreds of digits, none of their matrices built."""
    rng = np.random.default_rng(14)
    dim = 200
    mean, cov, gamma = rng.standard_normal(dim), np.diag(np.linspace(9.0, 1.0, dim)), 0.5
    start = time.perf_counter()
    points = list(itertools.islice(affine_stationary_points(mean, cov, dim, gamma), 1000))
    assert time.perf_counter() - start < 10
    assert len({point.directions for point in points}) == 1000
    assert [len(point.directions) for point in points[:202]] == [0, *[1] * dim, 2]
    last = points[-1]
    energy = affine_energy(last.params, mean, cov, gamma)
    assert last.energy == pytest.approx(energy, rel=1e-12)


# --------------------------------------------------------------- gamma free


def test_optimal_gamma_is_the_mean_squared_error():
    rng = np.random.default_rng(15)
    mean, cov, _, _ = random_problem(rng, 5)
    params = random_params(rng, 5, 3)
    gamma = affine_squared_error(params, mean, cov) / 5
    energies = [affine_energy(params, mean, cov, gamma * t) for t in (0.9, 0.999, 1, 1.001, 1.1)]
    assert np.argmin(energies) == 2
    with jax.enable_x64(True):
        slope = float(jax.grad(affine_energy, 3)(params, mean, cov, gamma))
    assert abs(slope) < 1e-12


def test_global_gamma_is_a_fixed_point_and_the_best():
    rng = np.random.default_rng(16)
    mean, cov, _, eigenvalues = random_problem(rng, 6)
    gamma = affine_global_gamma(cov, 2)
    assert gamma == pytest.approx(eigenvalues[2:].mean(), rel=1e-12)
    minimizer = affine_global_minimizer(mean, cov, 2, gamma)
    assert affine_squared_error(minimizer, mean, cov) / 6 == pytest.approx(gamma, rel=1e-12)
    path = affine_gamma_path(cov, 2, gamma * np.exp(np.linspace(-3, 3, 601)))
    assert path.energy.argmin() == 300
    # With all axes in use L* no longer depends on gamma.
    largest = affine_global_gamma(cov, 6)
    assert largest == pytest.approx(eigenvalues[-1], rel=1e-12)
    flat = affine_gamma_path(cov, 6, largest * np.array([1e-3, 0.1, 1.0, 1.1]))
    np.testing.assert_allclose(flat.energy[:3], flat.energy[0], rtol=1e-12)
    assert flat.energy[3] > flat.energy[0]


def test_path_is_that_of_the_minimizers():
    rng = np.random.default_rng(17)
    mean, cov, _, eigenvalues = random_problem(rng, 5)
    path = affine_gamma_path(cov, 3, np.geomspace(2 * eigenvalues[0], 1e-3, 20))
    for gamma, active, energy, sampled, at_mean in zip(*path, strict=True):
        params = affine_global_minimizer(mean, cov, 3, gamma)
        assert active == (np.square(params.W_x).sum(0) > 0).sum()
        assert energy == pytest.approx(affine_energy(params, mean, cov, gamma), rel=1e-10)
        assert sampled == pytest.approx(affine_squared_error(params, mean, cov), rel=1e-9)
        shrunk = np.eye(5) - params.W_x @ params.W_z
        assert at_mean == pytest.approx(np.trace(shrunk @ cov @ shrunk.T), rel=1e-9)
    assert (np.diff(path.active) >= 0).all()
    assert (path.active[0], path.active[-1]) == (0, 3)


@pytest.mark.parametrize("kappa", [3, 5, 12])
def test_rank_r_data_end_at_r_active_columns_and_no_error(kappa):
    rng = np.random.default_rng(18)
    dim, rank = 8, 3
    basis, _ = np.linalg.qr(rng.standard_normal((dim, rank)))
    cov = (basis * [3.0, 1.0, 0.2]) @ basis.T
    cov = (cov + cov.T) / 2
    path = affine_gamma_path(cov, kappa, np.geomspace(10.0, 1e-8, 200))
    assert (np.diff(path.active) >= 0).all()
    assert (path.active[0], path.active[-1]) == (0, rank)
    assert (np.diff(path.squared_error_sampled) <= 1e-15).all()
    assert path.squared_error_sampled[-1] == pytest.approx(rank * 1e-8, rel=1e-4)
    assert path.squared_error_mean[-1] < 1e-14
    slope = np.diff(path.energy[-20:]) / np.diff(np.log(path.gamma[-20:]))
    np.testing.assert_allclose(slope, dim - rank, rtol=1e-4)
    assert affine_global_gamma(cov, kappa) == pytest.approx(0.0, abs=1e-14)


# ------------------------------------------------------- precision and speed


def test_a_caller_without_x64_gets_float64():
    rng = np.random.default_rng(19)
    mean, cov, gamma, _ = random_problem(rng, 5)
    assert not jax.config.jax_enable_x64
    minimizer = affine_global_minimizer(mean, cov, 3, gamma)
    energy = affine_energy(minimizer, mean, cov, gamma)
    results = [
        minimizer,
        energy,
        affine_profile_energy(minimizer.W_x, cov, gamma),
        affine_global_minimum(cov, 3, gamma),
        affine_gamma_path(cov, 3, np.array([gamma]))._replace(active=0.0),
        affine_global_gamma(cov, 3),
        next(affine_stationary_points(mean, cov, 3, gamma)).params,
    ]
    for leaf in jax.tree.leaves(results):
        assert isinstance(leaf, float | np.ndarray)
        assert np.asarray(leaf).dtype == np.float64
    assert abs(energy - affine_global_minimum(cov, 3, gamma)) < 1e-12
    # float32 arrays are widened before anything is computed.
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (minimizer, mean, cov))
    assert affine_energy(*single, gamma).dtype == np.float64
    with jax.enable_x64(True):
        assert affine_energy(minimizer, mean, cov, gamma) == pytest.approx(energy, rel=1e-14)
        assert isinstance(affine_energy(minimizer, mean, cov, gamma), jax.Array)


def test_energies_can_be_jitted_differentiated_and_vmapped():
    rng = np.random.default_rng(20)
    mean, cov, gamma, _ = random_problem(rng, 4)
    params = random_params(rng, 4, 3)
    energy = affine_energy(params, mean, cov, gamma)
    gammas = gamma * np.array([0.5, 1.0, 2.0])
    with warnings.catch_warnings(), jax.enable_x64(True):
        warnings.simplefilter("error")
        assert jax.jit(affine_energy)(params, mean, cov, gamma) == pytest.approx(energy, rel=1e-14)
        many = jax.vmap(affine_energy, (None, None, None, 0))(params, mean, cov, gammas)
        assert many[1] == pytest.approx(energy, rel=1e-14)
        profile = jax.grad(lambda W: affine_profile_energy(W, cov, gamma))(params.W_x)
        full = jax.grad(affine_energy)(
            affine_optimal_encoder(params.W_x, mean, gamma), mean, cov, gamma
        )
        np.testing.assert_allclose(profile, full.W_x, atol=1e-12)  # the envelope theorem
        least = jax.jit(jax.vmap(lambda g: affine_global_minimum(cov, 2, g)))(gammas)
        path = affine_gamma_path(cov, 2, gammas)
        np.testing.assert_allclose(least, path.energy, rtol=1e-14)
        assert jax.jit(lambda g: affine_global_minimizer(mean, cov, 2, g).W_x)(gamma).shape == (
            4,
            2,
        )
    # Without x64 a caller's tracers are float32, and stay so without a warning.
    gradient = jax.jit(jax.grad(affine_energy))(params, mean, cov, gamma)
    assert gradient.W_x.dtype == jnp.float32


def test_energy_and_gradient_at_784_dimensions_take_well_under_a_second():
    rng = np.random.default_rng(21)
    dim = 784
    mean = rng.standard_normal(dim)
    cov = np.diag(np.linspace(2.0, 0.1, dim))
    params = AffineVAE(
        0.05 * rng.standard_normal((dim, dim)),
        mean,
        0.05 * rng.standard_normal((dim, dim)),
        np.zeros(dim),
        np.zeros(dim),
    )
    with jax.enable_x64(True):
        evaluate = jax.jit(jax.value_and_grad(affine_energy))
        jax.block_until_ready(evaluate(params, mean, cov, 0.3))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(evaluate(params, mean, cov, 0.3))
            seconds.append(time.perf_counter() - start)
    # About .1 s on two idle cores; the bound leaves room for busy ones.
    assert min(seconds) < 1.0


# ---------------------------------------------------------------- bad input

EYE = np.eye(3)
NOT_SQUARE = np.zeros((3, 2))
ASYMMETRIC = np.eye(3) + np.triu(np.full((3, 3), 0.1), 1)
INDEFINITE = np.diag([1.0, 1.0, -0.5])
NOT_FINITE = np.diag([1.0, 1.0, np.nan])
GOOD = random_params(np.random.default_rng(22), 3, 2)


@pytest.mark.parametrize(
    ("cov", "message"),
    [
        (NOT_SQUARE, r"cov must be square, \[D, D\]"),
        (np.ones(3), r"cov must be square, \[D, D\]"),
        (np.ones((1, 3, 3)), r"cov must be square, \[D, D\]"),
        (ASYMMETRIC, r"cov is not symmetric: .* 0\.1;"),
        (INDEFINITE, r"cov is indefinite: its least eigenvalue is -0\.5,"),
        (NOT_FINITE, r"cov has NaN or infinite entries"),
        (np.diag([1.0, 1.0, np.inf]), r"cov has NaN or infinite entries"),
        (EYE * 1j, r"cov must be real"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda cov: affine_energy(GOOD, np.zeros(3), cov, 0.5),
        lambda cov: affine_squared_error(GOOD, np.zeros(3), cov),
        lambda cov: affine_energy_draws(
            GOOD, np.zeros(3), cov, 0.5, np.zeros((4, 3)), np.zeros((4, 2))
        ),
        lambda cov: affine_profile_energy(GOOD.W_x, cov, 0.5),
        lambda cov: affine_global_minimum(cov, 2, 0.5),
        lambda cov: affine_global_minimizer(np.zeros(3), cov, 2, 0.5),
        lambda cov: affine_global_gamma(cov, 2),
        lambda cov: affine_gamma_path(cov, 2, np.array([0.5])),
        lambda cov: affine_stationary_points(np.zeros(3), cov, 2, 0.5),  # not at the first next()
    ],
)
def test_bad_covariances_are_refused(call, cov, message):
    with pytest.raises(ValueError, match=message):
        call(cov)


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        (0.0, r"gamma = 0\.0 must be above 0"),
        (-1.0, r"gamma = -1\.0 must be above 0"),
        (np.nan, r"gamma has NaN"),
        (np.inf, r"gamma has NaN or infinite"),
        (np.ones(1), r"gamma must be a scalar = \(\), but has shape \(1,\)"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda gamma: affine_energy(GOOD, np.zeros(3), EYE, gamma),
        lambda gamma: affine_profile_energy(GOOD.W_x, EYE, gamma),
        lambda gamma: affine_optimal_encoder(GOOD.W_x, np.zeros(3), gamma),
        lambda gamma: affine_global_minimum(EYE, 2, gamma),
        lambda gamma: affine_global_minimizer(np.zeros(3), EYE, 2, gamma),
        lambda gamma: affine_stationary_points(np.zeros(3), EYE, 2, gamma),
    ],
)
def test_bad_gammas_are_refused(call, gamma, message):
    with pytest.raises(ValueError, match=message):
        call(gamma)


@pytest.mark.parametrize("kappa", [0, -1, 2.0, True, None, "2"])
@pytest.mark.parametrize(
    "call",
    [
        lambda kappa: affine_global_minimum(EYE, kappa, 0.5),
        lambda kappa: affine_global_minimizer(np.zeros(3), EYE, kappa, 0.5),
        lambda kappa: affine_global_gamma(EYE, kappa),
        lambda kappa: affine_gamma_path(EYE, kappa, np.array([0.5])),
        lambda kappa: affine_stationary_points(np.zeros(3), EYE, kappa, 0.5),
    ],
)
def test_bad_kappas_are_refused(call, kappa):
    with pytest.raises(ValueError, match=r"kappa = .* must be an integer of at least 1"):
        call(kappa)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("W_x", np.zeros((1, 2)), r"params\.W_x must be \[D, K\] with cov's D = 3, but has D = 1"),
        ("W_x", np.zeros((3, 0)), r"params\.W_x must be \[D, K\] with D, K >= 1"),
        ("W_x", np.full((3, 2), np.nan), r"params\.W_x has NaN"),
        ("b_x", np.zeros(1), r"params\.b_x must be \[D\] = \(3,\), but has shape \(1,\)"),
        ("b_x", np.zeros((3, 1)), r"params\.b_x must be \[D\] = \(3,\), but has shape \(3, 1\)"),
        ("W_z", np.zeros((3, 2)), r"params\.W_z must be \[K, D\] = \(2, 3\)"),
        ("W_z", np.zeros((1, 3)), r"params\.W_z must be \[K, D\] = \(2, 3\)"),
        ("b_z", np.zeros(()), r"params\.b_z must be \[K\] = \(2,\)"),
        ("log_s2", np.zeros(1), r"params\.log_s2 must be \[K\] = \(2,\)"),
        ("log_s2", np.array([0.0, -np.inf]), r"params\.log_s2 has NaN or infinite entries"),
    ],
)
def test_bad_parameters_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        affine_energy(GOOD._replace(**{field: value}), np.zeros(3), EYE, 0.5)


def test_other_shapes_that_would_broadcast_are_refused():
    message = r"mean must be \[D\] = \(3,\), but has shape \(1,\)"
    with pytest.raises(ValueError, match=message):
        affine_energy(GOOD, np.zeros(1), EYE, 0.5)
    with pytest.raises(ValueError, match=message):
        affine_global_minimizer(np.zeros(1), EYE, 2, 0.5)
    with pytest.raises(ValueError, match=message):
        affine_optimal_encoder(GOOD.W_x, np.zeros(1), 0.5)
    with pytest.raises(ValueError, match=r"W_x must be \[D, K\] with cov's D = 3, but has D = 1"):
        affine_profile_energy(np.zeros((1, 2)), EYE, 0.5)
    with pytest.raises(ValueError, match=r"noise_z must be \[S, K\] = \(4, 2\)"):
        affine_energy_draws(GOOD, np.zeros(3), EYE, 0.5, np.zeros((4, 3)), np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"gamma must be \[S\]"):
        affine_gamma_path(EYE, 2, 0.5)
    with pytest.raises(ValueError, match=r"gamma must be above 0 all along the path, .* -1"):
        affine_gamma_path(EYE, 2, np.array([0.5, -1.0]))
    # Shapes are known under tracing too.
    with pytest.raises(ValueError, match=message):
        jax.jit(affine_energy)(GOOD, np.zeros(1), EYE, 0.5)


def test_covariances_that_are_only_rounded_are_accepted():
    rng = np.random.default_rng(23)
    x = rng.standard_normal((20, 30)).astype(np.float32)  # fewer examples than dimensions
    centred = x - x.mean(0)
    cov = centred.T @ centred / np.float32(20)
    assert np.linalg.eigvalsh(cov.astype(np.float64))[0] < 1e-6
    assert np.isfinite(affine_global_minimum(cov, 4, 0.5))
    assert affine_global_minimum(np.zeros((3, 3)), 2, 1.0) == pytest.approx(2.0)
