"""The penalties against formulas in NumPy, finite differences and their own definitions."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaebal.theory.penalties import (
    CURVATURES,
    identity,
    indicator,
    log,
    log1p,
    named,
    power,
    ratio,
    smooth,
    sqrt,
)

# formula: (penalty, h, h', h'(0)) with h and h' in NumPy.
FAMILY = {
    "u": (identity(), lambda u: u, lambda u: u**0, 1.0),
    "log(1+u)": (log1p(), np.log1p, lambda u: 1 / (1 + u), 1.0),
    "u/(u+0.2)": (ratio(0.2), lambda u: u / (u + 0.2), lambda u: 0.2 / (u + 0.2) ** 2, 5.0),
    "sqrt(u)": (sqrt(), np.sqrt, lambda u: 0.5 / np.sqrt(u), math.inf),
    "u^0.25": (power(0.25), lambda u: u**0.25, lambda u: 0.25 * u**-0.75, math.inf),
    "u^0.75": (power(0.75), lambda u: u**0.75, lambda u: 0.75 * u**-0.25, math.inf),
    "u^1": (power(1.0), lambda u: u, lambda u: u**0, 1.0),
    "log(u+1e-6)": (log(1e-6), lambda u: np.log(u + 1e-6), lambda u: 1 / (u + 1e-6), 1e6),
    "I[u>0]": (indicator(), lambda u: 1.0 * (u > 0), lambda u: 0 * u, math.inf),
    "I[u>2e-9]": (indicator(2e-9), lambda u: 1.0 * (u > 2e-9), lambda u: 0 * u, 0.0),
}
SMOOTHABLE = [formula for formula in FAMILY if not formula.startswith("I")]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("formula", FAMILY)
def test_values_and_slopes_are_their_formulas(formula):
    penalty, value, slope, slope_at_zero = FAMILY[formula]
    u = np.concatenate([np.geomspace(1e-12, 1e3, 61).reshape(61, 1), np.ones((61, 1))], 1)
    np.testing.assert_allclose(penalty.value(jnp.asarray(u)), value(u), rtol=1e-13)
    np.testing.assert_allclose(penalty.slope(jnp.asarray(u)), slope(u), rtol=1e-13)
    assert penalty.slope_at_zero == pytest.approx(slope_at_zero, rel=1e-14)
    assert penalty.bounded == math.isfinite(slope_at_zero)
    assert penalty.name == formula


@pytest.mark.parametrize("formula", SMOOTHABLE)
def test_slopes_are_derivatives(formula):
    """Against central differences, and against what differentiating the value gives."""
    penalty = FAMILY[formula][0]
    u = np.geomspace(1e-4, 1e2, 25)
    step = 1e-5 * u
    difference = (penalty.value(jnp.asarray(u + step)) - penalty.value(jnp.asarray(u - step))) / (
        2 * step
    )
    np.testing.assert_allclose(penalty.slope(jnp.asarray(u)), difference, rtol=1e-7)
    gradient = jax.vmap(jax.grad(penalty.value))(jnp.asarray(u))
    np.testing.assert_allclose(penalty.slope(jnp.asarray(u)), gradient, rtol=1e-12)


@pytest.mark.parametrize("formula", FAMILY)
def test_slope_at_zero_is_the_limit_of_difference_quotients(formula):
    penalty = FAMILY[formula][0]
    u = 10.0 ** -np.arange(8, 17)
    zero = penalty.value(jnp.zeros(()))
    quotients = np.asarray(penalty.value(jnp.asarray(u)) - zero) / u
    if penalty.bounded:
        # Two digits of the quotient are left at u = 1e-16 beside log(1e-6) = -14.
        assert quotients[4] == pytest.approx(penalty.slope_at_zero, rel=1e-3)
    else:
        assert (np.diff(quotients) > 0.7 * quotients[:-1]).all()  # at least u^-1/4
        assert quotients[-1] > 5e3


@pytest.mark.parametrize("formula", SMOOTHABLE)
def test_differentiable_ones_are_concave_and_increasing(formula):
    """So that every tangent lies above, which the minimiser's steps rest on."""
    penalty = FAMILY[formula][0]
    rng = np.random.default_rng(0)
    u, at = np.exp(rng.uniform(-20, 5, (2, 1000)))
    tangent = penalty.value(jnp.asarray(at)) + penalty.slope(jnp.asarray(at)) * (u - at)
    value = np.asarray(penalty.value(jnp.asarray(u)))
    assert (np.asarray(tangent) - value >= -1e-12 * (1 + np.abs(value))).all()
    assert (np.asarray(penalty.slope(jnp.asarray(u))) > 0).all()


@pytest.mark.parametrize("formula", FAMILY)
def test_curvature_in_the_norm(formula):
    """Second differences of s -> h(s^2), down to norms far below any constant in h."""
    penalty = FAMILY[formula][0]
    assert penalty.norm_curvature in CURVATURES
    signs = set()
    for reach in (1e-4, 1.0, 10.0):
        s = np.linspace(0, reach, 200)
        h = np.asarray(penalty.value(jnp.asarray(s**2)))
        bends = np.diff(h, 2) / np.ptp(h)
        signs |= {int(np.sign(b)) for b in bends[np.abs(bends) > 1e-9]}
    assert (
        signs
        == {"concave": {-1}, "linear": set(), "convex": {1}, "mixed": {-1, 1}}[
            penalty.norm_curvature
        ]
    )


@pytest.mark.parametrize("formula", SMOOTHABLE)
def test_smoothed_gradients_are_finite_at_an_exactly_zero_row(formula):
    """h(||z||^2) at z = 0: the plain one is NaN where the slope is infinite."""
    penalty = FAMILY[formula][0]
    zero = jnp.zeros(3)
    plain = jax.grad(lambda z: penalty.value(jnp.square(z).sum()))(zero)
    assert bool(jnp.isnan(plain).all()) == (not penalty.bounded)

    @jax.jit
    def gradient(z, eps):
        return jax.grad(lambda z: smooth(penalty, eps).value(jnp.square(z).sum()))(z)

    np.testing.assert_array_equal(gradient(zero, 1e-10), 0.0)
    smoothed = smooth(penalty, 1e-3)
    assert smoothed.bounded
    assert smoothed.slope_at_zero == pytest.approx(float(penalty.slope(jnp.asarray(1e-3))))
    u = jnp.geomspace(1e-3, 1e2, 9)
    np.testing.assert_allclose(smoothed.value(u), penalty.value(u + 1e-3), rtol=1e-14)
    assert smooth(penalty, 0) is penalty


def test_smoothing_leaves_the_stated_curvature():
    for formula in SMOOTHABLE:
        smoothed = smooth(FAMILY[formula][0], 0.01)
        s = np.linspace(0, 3, 300)
        bends = np.diff(np.asarray(smoothed.value(jnp.asarray(s**2))), 2)
        if smoothed.norm_curvature == "convex":
            assert (bends > -1e-14).all()
        else:
            assert smoothed.norm_curvature == "mixed"
            assert bends.min() < -1e-7 < 1e-7 < bends.max()


def test_a_traced_power_is_the_same_function():
    exponents = np.array([0.1, 0.5, 0.8, 1.0])
    u = np.geomspace(1e-6, 10, 7)
    together = jax.vmap(lambda p: jnp.stack([power(p).value(u), power(p).slope(u)]))(exponents)
    for p, (value, slope) in zip(exponents, together, strict=True):
        np.testing.assert_allclose(value, power(p).value(u), rtol=1e-14)
        np.testing.assert_allclose(slope, power(p).slope(u), rtol=1e-14)


def test_the_indicator_counts():
    u = jnp.array([0.0, 1e-12, 1e-3, 5.0])
    np.testing.assert_array_equal(indicator().value(u), [0, 1, 1, 1])
    np.testing.assert_array_equal(indicator(1e-6).value(u), [0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"I\[u>0\] cannot be smoothed"):
        smooth(indicator(), 1e-3)


@pytest.mark.parametrize("formula", [*FAMILY, "u/(u+0.0025)", "log(u+0.5)", "I[u>1e-8]"])
def test_names_are_read_back(formula):
    assert named(formula).name == formula
    assert named(formula.replace("u", " u ")).name == formula


@pytest.mark.parametrize(
    ("formula", "said"),
    [
        ("v", "'v' is no penalty: use u, log"),
        ("log(u)", "is no penalty"),
        ("u^", "is no penalty"),
        ("u^1.5", "p = 1.5 must lie in"),
        ("u^0", "p = 0.0 must lie in"),
        ("u/(u+0)", "eps = 0.0 must be a finite number above 0"),
        ("log(u+0)", "eps = 0.0"),
        ("log(u+1e999)", "eps = inf"),
    ],
)
def test_bad_formulas_are_named(formula, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        named(formula)


@pytest.mark.parametrize(
    "make", [lambda: log(-1.0), lambda: ratio(math.nan), lambda: power(-0.5),
             lambda: power(math.nan), lambda: indicator(-1.0), lambda: smooth(sqrt(), -1e-3)]
)  # fmt: skip
def test_bad_constants_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()
