"""The optimiser: Adam by hand, and how long a step can get."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaebal import homotopy
from vaebal.training import Member, Objective, Optimisation, Told
from vaebal.training.optimiser import averaged, weights_optimiser
from vaebal.training.step import init_state, train_step

CONSTANT = Optimisation(
    learning_rate=1e-3, final_learning_rate=1e-3, warmup_steps=0, total_steps=10**9, clip_norm=1e9
)


def test_the_optimiser_is_adam_by_hand():
    """Kingma and Ba's bias-corrected moments, with the settings' beta2; never above a rate."""
    settings = CONSTANT._replace(beta2=0.5)
    first, second = 1.0, 3.0
    mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.5 * 0.5 * first**2 + 0.5 * second**2) / (1 - 0.5**2)
    for longest, rate in ((np.inf, 1e-3), (1e-4, 1e-4)):
        optimiser = weights_optimiser(settings, longest=longest)
        state = optimiser.init(jnp.zeros(()))
        _, state = optimiser.update(jnp.float32(first), state)
        update, _ = optimiser.update(jnp.float32(second), state)
        assert float(update) == pytest.approx(-rate * mean / square**0.5, rel=1e-5)


def test_warm_up_is_linear_and_the_cosine_ends_at_the_last_step():
    """The first step of Adam is its rate times the sign: so the rates are seen."""
    settings = Optimisation(1e-2, 1e-3, 10, 110, 1e9)
    optimiser = weights_optimiser(settings)
    state = optimiser.init(jnp.zeros(()))
    rates = jax.lax.scan(
        lambda state, _: optimiser.update(jnp.float32(1.0), state)[::-1], state, length=150
    )[1]
    np.testing.assert_allclose(-rates[:10], 1e-3 * np.arange(10), rtol=1e-3)
    cosine = 1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + np.cos(np.pi * np.arange(101) / 100))
    np.testing.assert_allclose(-rates[10:111], cosine, rtol=1e-3)
    np.testing.assert_allclose(-rates[110:], 1e-3, rtol=1e-3)


def test_weights_decay_but_for_biases_and_affine_skips():
    """On no gradient a step is the decay alone, rate times weight_decay times the weight."""
    weights = {
        "decoder": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.ones(3)},
        "affine": {"kernel": jnp.ones((2, 3))},
    }
    optimiser = weights_optimiser(CONSTANT._replace(weight_decay=0.5))
    nothing = jax.tree.map(jnp.zeros_like, weights)
    updates, _ = optimiser.update(nothing, optimiser.init(weights), weights)
    np.testing.assert_allclose(updates["decoder"]["kernel"], -1e-3 * 0.5 * 2.0, rtol=1e-6)
    assert not updates["decoder"]["bias"].any()
    assert not updates["affine"]["kernel"].any()


def test_the_mean_of_the_weights_forgets_the_start_and_changes_no_step():
    """m <- d m + (1 - d) w with d = min(decay, (1 + t) / (10 + t)), w before each step."""
    plain, kept = (weights_optimiser(CONSTANT._replace(average=a)) for a in (0.0, 0.3))
    weights = {"w": jnp.float32(1.0)}
    states, mean = [each.init(weights) for each in (plain, kept)], 0.0
    assert averaged(states[0], weights) is weights
    for step, gradient in enumerate((1.0, -2.0, 0.5, 3.0, 1.0)):
        decay = min(0.3, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * float(weights["w"])
        updates = []
        for index, each in enumerate((plain, kept)):
            update, states[index] = each.update(
                {"w": jnp.float32(gradient)}, states[index], weights
            )
            updates.append(float(update["w"]))
        assert updates[0] == updates[1]
        weights = {"w": weights["w"] + 100 * updates[0]}
    assert float(averaged(states[1], weights)["w"]) == pytest.approx(mean, rel=1e-6)


def test_a_gradient_is_clipped_to_its_norm():
    settings = CONSTANT._replace(clip_norm=5.0)
    optimiser = weights_optimiser(settings)
    state = optimiser.init(jnp.zeros(2))
    _, state = optimiser.update(jnp.array([30.0, 40.0]), state)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,)]
    np.testing.assert_allclose(moments[0], 0.1 * np.array([3.0, 4.0]), rtol=1e-5)


# ---- Just after a latent opens ----

OPENS, DIM, GAMMA = 20_000, 16, 0.5


def steps_of(settings, factor=1.0):
    """|step| [T, 2] of two weights: one always has the gradient 1, one from OPENS on."""

    def loss(params, batch, at):
        slopes = jnp.where(at.step < OPENS, jnp.array([1.0, 0.0]), jnp.ones(2))
        return params["w"] @ slopes, Told({})

    objective = Objective(lambda member, given: {"w": jnp.zeros(2)}, loss, DIM)
    rule = lambda member: homotopy.fixed()  # noqa: E731
    member = Member(0, 2, GAMMA, factor)

    def step(state, _):
        after, _ = train_step(objective, settings, rule, member, state, (), ())
        # The weights start each step at 0, so that their steps are seen to the last digit.
        moved = after.weights["w"]
        return after._replace(weights={"w": jnp.zeros(2)}), jnp.abs(moved)

    state = init_state(objective, settings, rule, member, ())
    return np.asarray(jax.jit(lambda s: jax.lax.scan(step, s, length=OPENS + 300)[1])(state))


@pytest.mark.parametrize(("beta2", "times"), [(0.99, 2.1), (0.999, 6.6)])
def test_after_a_latent_opens_adams_step_is_several_times_its_rate(beta2, times):
    """(1 - .9^k) / sqrt(1 - beta2^k) after k steps: Adam's correction has long gone."""
    steps = steps_of(CONSTANT._replace(beta2=beta2))
    k = np.arange(1, 301)
    expected = (1 - 0.9**k) / np.sqrt(1 - beta2**k)
    np.testing.assert_allclose(steps[OPENS:, 1] / 1e-3, expected, rtol=1e-3)
    assert expected.max() == pytest.approx(times, abs=0.05)
    np.testing.assert_allclose(steps[:, 0] / 1e-3, 1.0, rtol=1e-3)


@pytest.mark.parametrize("factor", [1.0, 0.7, 3.0])
def test_with_jitter_no_weights_step_is_longer_than_the_steady_rate(factor):
    """sqrt(jitter gamma / D), whatever the member's factor on the learning rate."""
    bound = (1e-5 * GAMMA / DIM) ** 0.5  # below .7 of the rate
    assert float(homotopy.steady_rate(GAMMA, DIM, 1e-5)) == pytest.approx(bound, rel=1e-6)
    steps = steps_of(CONSTANT._replace(beta2=0.99, jitter=1e-5), factor)
    assert steps.max() <= bound * (1 + 1e-6)
    np.testing.assert_allclose(steps[:, 0], bound, rtol=1e-3)
    # The one that opens would take up to 2.1 times as much.
    assert (steps[OPENS + 2 : OPENS + 50, 1] > 0.999 * bound).all()


def test_a_wide_bound_changes_no_step_at_all_but_the_longest():
    bound = (1e-3 * GAMMA / DIM) ** 0.5  # 5.6 times the rate
    free, bounded = (
        steps_of(CONSTANT._replace(jitter=jitter)) for jitter in (0.0, 1e-3)
    )  # fmt: skip
    np.testing.assert_allclose(bounded, np.minimum(free, bound), rtol=1e-6)
    assert free.max() > 1.1 * bound
