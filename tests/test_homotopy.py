"""Rules of gamma and the opener of latents by themselves: no network, no data, no optimiser."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaebal import homotopy
from vaebal.homotopy import Seen
from vaebal.homotopy.opener import Plateau, follow, grown
from vaebal.homotopy.residual import Mode
from vaebal.homotopy.residual import follow as follow_residual
from vaebal.homotopy.rules import released_share

KEY = jax.random.key(0)


def moved(rule, start, seen, *, latents=5):
    """gamma after one step of `rule` from `start`."""
    state = rule.init(start, latents, KEY)
    return float(jnp.exp(rule.update(seen, state).log_gamma))


# ---- Rules ----


@pytest.mark.parametrize("ratio", [0.2, 0.99, 1.0, 1.01, 30.0])
def test_gamma_jumps_to_its_stationary_value_or_by_its_rate(ratio):
    """gamma = E|x - x_hat|^2 / (ratio d): unlimited, one step lands where the gradient is zero."""
    dim, error = 7, 0.9
    start = error / dim / ratio
    loss = lambda v: 0.5 * (error * jnp.exp(-v) + dim * v)  # noqa: E731
    landed = moved(homotopy.closed_form(1e9), start, Seen(0, jnp.float32(error / dim)))
    assert float(jax.grad(loss)(jnp.log(landed))) == pytest.approx(0, abs=1e-5)
    limited = moved(homotopy.closed_form(1e-3), start, Seen(0, jnp.float32(error / dim)))
    expected = np.clip(np.log(ratio), -1e-3, 1e-3)
    assert np.log(limited / start) == pytest.approx(expected, abs=1e-6)


def test_gamma_can_be_fixed_held_and_prescribed():
    seen = Seen(0, jnp.float32(0.2))
    assert moved(homotopy.fixed(), 0.5, seen) == pytest.approx(0.5, rel=1e-6)
    assert moved(homotopy.held(0.03), 0.5, seen) == pytest.approx(0.03, rel=1e-6)
    assert moved(homotopy.prescribed(1e9, 0.01), 0.5, seen) == pytest.approx(0.01, rel=1e-5)
    down, up = (moved(homotopy.prescribed(0.1, end), 0.5, seen) for end in (0.01, 7.0))
    np.testing.assert_allclose(np.log([down / 0.5, up / 0.5]), [-0.1, 0.1], rtol=1e-5)


def test_the_gradient_rule_is_optaxs_adam_on_the_gradient_of_the_negative_elbo():
    """To float64 rounding, over 60 steps on errors that jump about."""
    dim, errors = 7, np.random.default_rng(0).lognormal(size=60)

    def negative_elbo(log_gamma, error):
        return 0.5 * (error * jnp.exp(-log_gamma) + dim * (log_gamma + jnp.log(2 * jnp.pi)))

    with jax.enable_x64(True):
        rule, adam = homotopy.gradient(0.03, dim), optax.adam(0.03)
        state, update = rule.init(0.5, 5, KEY), jax.jit(rule.update)
        value = jnp.log(jnp.float64(0.5))
        moments, slope = adam.init(value), jax.jit(jax.grad(negative_elbo))
        path = []
        for step, error in enumerate(errors):
            state = update(Seen(jnp.int32(step), jnp.float64(error / dim)), state)
            change, moments = adam.update(slope(value, error), moments)
            value = value + change
            path.append((float(state.log_gamma), float(value)))
    ours, theirs = np.array(path).T
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert np.ptp(theirs) > 0.1


@pytest.mark.parametrize(
    "rule",
    [
        homotopy.closed_form(1e-3),
        homotopy.prescribed(1e-3, 0.1),
        homotopy.gradient(1e-3, 7),
        homotopy.guarded(1e-3, dim=3),
    ],
    ids=["closed_form", "prescribed", "gradient", "guarded"],
)
def test_an_error_that_is_not_finite_is_not_hidden(rule):
    assert np.isnan(moved(rule, 0.5, Seen(0, jnp.float32(np.nan), jnp.ones((4, 3)))))


def guarded_from(start, mean_square, variance, *, rate=1e9, guard=0.5, **options):
    """gamma after a step whose residuals all vary by `variance` along the direction followed."""
    rule = homotopy.guarded(rate, dim=3, guard=guard, memory=1, **options)
    state = rule.init(start, 5, KEY)
    assert float(state.residual_variance) == pytest.approx(start)
    residual = jnp.sqrt(variance) * jnp.tile(state.memory.direction, (4, 1))
    state = rule.update(Seen(jnp.int32(0), jnp.float32(mean_square), residual), state)
    assert float(state.residual_variance) == pytest.approx(variance, rel=1e-5)
    assert not state.released
    return float(jnp.exp(state.log_gamma))


def test_a_guard_holds_gamma_and_never_lifts_it():
    assert guarded_from(0.5, 0.2, 0.6) == pytest.approx(0.3, rel=1e-5)  # half of .6
    assert guarded_from(0.5, 0.2, 0.3) == pytest.approx(0.2, rel=1e-5)  # stationary, above .15
    assert guarded_from(0.5, 0.2, 14.0) == pytest.approx(0.5, rel=1e-6)
    # A gamma below its stationary value is free to rise.
    assert guarded_from(0.5, 0.9, 14.0) == pytest.approx(0.9, rel=1e-5)
    assert guarded_from(0.5, 0.2, 0.6, guard=0.0) == pytest.approx(0.2, rel=1e-5)
    assert guarded_from(0.5, 0.2, 0.6, rate=0.01) == pytest.approx(0.5 * np.exp(-0.01), rel=1e-5)


def test_the_slowest_fall_passes_a_guard():
    """What no training explains cannot hold gamma for ever."""
    got = guarded_from(0.5, 1e-3, 14.0, rate=0.02, slowest=1e-3)
    assert np.log(got / 0.5) == pytest.approx(-1e-3, rel=1e-3)


def test_the_guard_is_whole_before_its_release_and_gone_after():
    factor = np.asarray(released_share(jnp.arange(601), (360, 480)))
    assert (factor[:361] == 1).all()
    assert (factor[480:] == 0).all()
    assert factor[420] == pytest.approx(1e-2, rel=1e-3)
    assert (np.diff(factor) <= 0).all()


def trajectory(rule, steps, *, mean_square=1e-3, variance=0.5, latents=5, mean=None):
    """States after every step, all residuals along one axis."""
    residual = jnp.sqrt(variance) * jnp.eye(3)[:1].repeat(4, 0)

    def step(state, at):
        state = rule.update(Seen(at, jnp.float32(mean_square), residual, mean), state)
        return state, state

    return jax.lax.scan(step, rule.init(1.0, latents, KEY), jnp.arange(steps))[1]


def test_only_a_released_guard_lets_gamma_become_stationary():
    """Held at half of the variance until step 200, gone at 300, each change within its rate."""
    kept = trajectory(homotopy.guarded(0.02, dim=3, guard=0.5, memory=10), 700)
    freed = trajectory(
        homotopy.guarded(0.002, dim=3, guard=0.5, memory=10, release=(200, 300)), 700
    )
    np.testing.assert_allclose(kept.residual_variance[-1], 0.5, rtol=1e-3)
    np.testing.assert_allclose(jnp.exp(kept.log_gamma[-1]), 0.25, rtol=0.01)
    assert not kept.released.any()
    assert np.flatnonzero(freed.released)[0] == 201
    np.testing.assert_allclose(jnp.exp(freed.log_gamma[-1]), 1e-3, rtol=1e-4)
    falls = -np.diff(freed.log_gamma)
    assert falls[:200].max() == pytest.approx(0.002, rel=1e-3)
    assert falls[200:].max() == pytest.approx(0.02, rel=1e-3)


def test_numbers_of_rules_may_be_vmapped():
    """[M] rates, guards and starts in one program: each as its own rule alone."""
    rates, guards, starts = jnp.array([0.01, 0.02]), jnp.array([0.0, 0.9]), jnp.array([1.0, 2.0])
    mean = jax.random.normal(KEY, (8, 5))
    residual = jax.random.normal(KEY, (4, 3))

    def end(rate, guard, start, build):
        rule = build(rate, guard)
        state = rule.init(start, 5, KEY)
        for step in range(4):
            state = rule.update(Seen(jnp.int32(step), jnp.float32(0.1), residual, mean), state)
        return state

    def adaptive(rate, guard):
        rule = homotopy.guarded(rate, dim=3, guard=guard, memory=5, release=(2, 4))
        return homotopy.one_by_one(rule, patience=100 * guard, memory=5)

    for build in (
        adaptive,
        lambda rate, guard: homotopy.closed_form(rate),
        lambda rate, guard: homotopy.prescribed(rate, guard + 0.1),
        lambda rate, guard: homotopy.gradient(rate, 3),
        lambda rate, guard: homotopy.held(guard + 0.1),
    ):
        one = jax.jit(functools.partial(end, build=build))
        both = jax.vmap(one)(rates, guards, starts)
        for index in (0, 1):
            alone = one(rates[index], guards[index], starts[index])
            jax.tree.map(
                lambda a, b, index=index: np.testing.assert_allclose(a[index], b, rtol=1e-5),
                both,
                alone,
            )
        assert both.log_gamma[0] != both.log_gamma[1]


# ---- The residual's largest variance ----


def test_the_residuals_leading_direction_and_variance_are_found():
    """Against eigh of the covariance the residuals are drawn from; noise does not bias it."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    variances = np.r_[2.0, 0.7, np.full(38, 0.3)]
    covariance = basis @ np.diag(variances) @ basis.T
    values, vectors = np.linalg.eigh(covariance)
    draw = lambda: jnp.asarray(  # noqa: E731
        (rng.normal(size=(16, 40)) * np.sqrt(variances)) @ basis.T, jnp.float32
    )
    mode = Mode(jnp.asarray(basis[:, 5], jnp.float32), jnp.float32(50.0))
    step, found = jax.jit(follow_residual, static_argnums=2), []
    for i in range(600):
        mode = step(mode, draw(), 10)
        found += [float(mode.variance)] if i >= 200 else []
    assert abs(float(mode.direction @ vectors[:, -1].astype(np.float32))) > 0.9
    assert float(jnp.linalg.norm(mode.direction)) == pytest.approx(1, rel=1e-5)
    # Without the top direction the sample covariance of 16 draws would still say about 1.2.
    assert np.mean(found) == pytest.approx(values[-1], rel=0.12)


# ---- Opening latents ----


def plateau_after(variances, memory=1):
    start = Plateau(jnp.log(variances[0]), jnp.log(variances[0]), jnp.zeros((), jnp.int32))

    def step(plateau, at):
        return follow(plateau, at[0], at[1], memory), None

    at = (jnp.asarray(variances, jnp.float32), jnp.arange(len(variances)))
    return jax.lax.scan(step, start, at)[0]


def test_a_plateau_begins_where_a_variance_stops_falling():
    falling = np.exp(-0.004 * np.arange(1000))
    standing = np.r_[falling, np.full(1000, falling[-1])]
    assert plateau_after(falling).since > 970  # 25 steps a fall of .1 nats
    assert 970 < plateau_after(standing).since < 1000
    # A mean over 100 steps follows a ramp 100 steps late, and noise makes no plateau of it.
    late = plateau_after(standing, 100)
    assert 1100 < late.since < 1400
    assert float(late.level) == pytest.approx(np.log(standing[-1]), abs=1e-3)
    noise = np.random.default_rng(0).normal(size=2000)
    assert plateau_after(standing * np.exp(0.1 * noise), 100).since < 1700
    assert plateau_after(falling * np.exp(0.1 * noise[:1000]), 100).since > 950
    assert plateau_after(1 / falling).since == 0


def opened(step, since, number, spread, released):
    """`grown` of five latents whose posterior means have this `spread`, after a plateau."""
    mean = np.random.default_rng(0).normal(size=(200, 5)) * np.array(spread) + 3.0
    plateau = Plateau(jnp.float32(-1.0), jnp.float32(-0.98), jnp.int32(since))
    seen = Seen(jnp.int32(step), jnp.float32(0.1), mean=jnp.asarray(mean))
    got = grown(
        jnp.int32(number), plateau, seen, latents=5, patience=1000.0, released=jnp.array(released)
    )
    return plateau, *got


@pytest.mark.parametrize(
    ("step", "since", "number", "spread", "expected"),
    [
        (9000, 7990, 2, (1.0, 1.0, 0.0, 0.0, 0.0), 3),  # 1,010 steps, above the patience
        (9000, 8010, 2, (1.0, 1.0, 0.0, 0.0, 0.0), 2),  # 990
        (9000, 7990, 2, (1.0, 0.0, 1.0, 1.0, 1.0), 2),  # one of the open is idle
        (9000, 7990, 5, (1.0, 1.0, 1.0, 1.0, 1.0), 5),  # there is none left
        (4000, 3390, 2, (1.0, 1.0, 0.0, 0.0, 0.0), 3),  # 610, above .15 of 4,000
        (4000, 3410, 2, (1.0, 1.0, 0.0, 0.0, 0.0), 2),  # 590
        (500, 190, 1, (1.0, 0.0, 0.0, 0.0, 0.0), 2),  # 310: at least 300
        (500, 210, 1, (1.0, 0.0, 0.0, 0.0, 0.0), 1),
    ],
)
def test_a_latent_opens_after_a_plateau_where_all_others_are_in_use(
    step, since, number, spread, expected
):
    plateau, got, after = opened(step, since, number, spread, released=False)
    assert got == expected
    if expected > number:
        assert (after.since, after.lowest) == (step, plateau.level)
    else:
        assert after == plateau


@pytest.mark.parametrize(
    ("number", "spread", "expected"),
    [
        (3, (1.0, 1.0, 0.1, 0.0, 0.0), 2),  # the last one opened is idle
        (3, (1.0, 0.0, 1.0, 0.0, 0.0), 3),  # not the last one
        (3, (1.0, 1.0, 1.0, 0.0, 0.0), 3),  # none, and none opens any more
        (1, (0.0, 0.0, 0.0, 0.0, 0.0), 1),  # one stays
    ],
)
def test_a_latent_still_idle_when_the_guard_goes_is_closed(number, spread, expected):
    plateau, got, after = opened(5000, 0, number, spread, released=True)
    assert got == expected
    assert after == plateau


@pytest.mark.parametrize(
    ("spread", "expected"),
    [
        ((1.0, 0.8, 0.25, 0.0, 0.0), 2),  # .06, where the liveliest vary by 1
        ((0.3, 0.3, 0.13, 0.0, 0.0), 3),  # .017, where they vary by .09: all have shrunk
        ((0.3, 0.3, 0.09, 0.0, 0.0), 2),  # .008: nothing so small is in use
        ((0.3, 0.3, 0.13, 9.0, 9.0), 3),  # what is closed says nothing
        ((9.0, 9.0, 0.4, 0.0, 0.0), 3),  # .16: above a tenth of the prior's, is enough
    ],
)
def test_a_latent_is_in_use_by_a_tenth_of_what_the_liveliest_varies(spread, expected):
    _, got, _ = opened(5000, 0, 3, spread, released=True)
    assert got == expected


def test_latents_open_one_by_one_and_the_idle_close_with_the_release():
    """Means of two latents vary, a third's does not: it opens on trial and is closed again."""
    mean = jax.random.normal(KEY, (50, 5)) * jnp.array([1.0, 1.0, 0.0, 0.0, 0.0])[None]
    rule = homotopy.guarded(0.02, dim=3, guard=0.5, memory=1, release=(3000, 4000))
    opener = homotopy.one_by_one(rule, patience=500, memory=1)
    assert opener.init(1.0, 5, KEY).open == 1
    states = trajectory(opener, 4500, mean=mean)
    number = np.asarray(states.open)
    first, second = np.flatnonzero(np.diff(number) > 0)
    assert (number[first], number[first + 1], number[second + 1]) == (1, 2, 3)
    assert first >= 300
    assert second - first > 300
    assert (number[second + 1 : 3001] == 3).all()
    assert (number[3001:] == 2).all()
    # gamma is the rule's own.
    np.testing.assert_allclose(states.log_gamma, trajectory(rule, 4500).log_gamma, rtol=1e-6)
    # All that the rule alone has are open from the start.
    assert rule.init(1.0, 5, KEY).open == 5


@pytest.mark.parametrize(
    "rule",
    [
        homotopy.fixed(), homotopy.held(0.1), homotopy.closed_form(0.1),
        homotopy.prescribed(0.1, 0.1), homotopy.gradient(0.1, 3),
    ],
)  # fmt: skip
def test_a_rule_that_does_not_follow_the_residual_opens_no_latents(rule):
    with pytest.raises(ValueError, match=r"by the residual's variance.*: give it guarded\("):
        homotopy.one_by_one(rule, patience=100)
    assert np.isnan(rule.init(0.1, 5, KEY).residual_variance)


@pytest.mark.parametrize("without", ["residual", "mean"])
def test_what_opens_latents_has_to_be_shown(without):
    rule = homotopy.adaptive(3, 100)
    seen = homotopy.Seen(0, 1.0, np.ones((2, 3)), np.ones((4, 5)))
    with pytest.raises(ValueError, match=r"by Seen.residual and Seen.mean: give it both"):
        rule.update(seen._replace(**{without: None}), rule.init(1.0, 5, KEY))


@pytest.mark.parametrize("wide", [False, True])
def test_the_state_keeps_its_types_in_any_loop(wide):
    """Whatever integers or floats count the steps, as `lax.scan` wants it."""
    with jax.enable_x64(wide):
        rule = homotopy.adaptive(3, 100)
        start = rule.init(1.0, 5, jax.random.key(0))
        shown = jnp.ones((2, 3)), jnp.ones((4, 5))
        types = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]  # noqa: E731
        for step in (0, np.int64(1), 2.0, jnp.arange(3)[2]):
            seen = homotopy.Seen(step, jnp.ones(()), *shown)
            assert types(rule.update(seen, start)) == types(start)
        update = lambda state, i: (rule.update(homotopy.Seen(i, jnp.ones(()), *shown), state), ())  # noqa: E731
        assert jax.lax.scan(update, start, jnp.arange(5))[0].open == 1


def test_the_adaptive_homotopy_is_the_guarded_rule_opened_one_by_one():
    steps, mean = 2000, jax.random.normal(KEY, (50, 5))
    got = trajectory(homotopy.adaptive(3, steps, rate=0.02, patience=100), steps, mean=mean)
    rule = homotopy.guarded(0.02, dim=3, release=(1500, 1800))
    expected = trajectory(homotopy.one_by_one(rule, patience=100), steps, mean=mean)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    unsaid = trajectory(homotopy.adaptive(3, steps, rate=0.02), steps, mean=mean)
    said = homotopy.one_by_one(rule, patience=homotopy.patience_of(steps))
    jax.tree.map(np.testing.assert_array_equal, unsaid, trajectory(said, steps, mean=mean))
    assert (homotopy.patience_of(steps), homotopy.patience_of(20_000)) == (300, 750)
    assert np.flatnonzero(got.released)[0] == 1501
    assert got.open[-1] == 5
    np.testing.assert_allclose(jnp.exp(got.log_gamma[-1]), 1e-3, rtol=1e-3)


def test_a_steady_rate_makes_a_columns_square_the_jitter_times_gamma():
    """A column of D weights, each moved by the rate, has the square length jitter gamma."""
    rate = homotopy.steady_rate(jnp.float32(0.3), 16, 1e-2)
    assert float(jnp.square(jnp.full(16, rate)).sum()) == pytest.approx(1e-2 * 0.3, rel=1e-5)


def test_homotopies_know_of_no_network_data_or_optimiser():
    """They import JAX alone."""
    code = "import vaebal.homotopy, sys; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(told.stdout.split())
    assert "jax" in loaded
    assert not loaded & {"flax", "optax", "orbax", "ml_collections", "matplotlib", "sklearn"}
    ours = {name for name in loaded if name.startswith("vaebal.")}
    assert {name for name in ours if not name.startswith("vaebal.homotopy")} == set()
