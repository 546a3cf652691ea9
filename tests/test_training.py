import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from vaebal.training.engine import (
    Member,
    Optimisation,
    Plateau,
    ResidualMode,
    Trainer,
    TrainState,
    fit,
    follow_plateau,
    follow_residual,
    init_state,
    latent_gradient_norm,
    loss_and_terms,
    member_params,
    next_log_gamma,
    open_latents,
    release,
    stack_members,
    steady_rate,
    train_step,
    weights_optimiser,
)

from vaebal.data import batch_indices
from vaebal.measures.evaluation import posterior
from vaebal.models import latent_noise, with_own_skips
from vaebal.streams import stream
from vaebal.theory.gradients import LATENT_WEIGHTS
from vaebal.training.checkpoints import Checkpoints

SETTINGS = Optimisation(
    learning_rate=3e-3,
    final_learning_rate=1e-4,
    warmup_steps=5,
    total_steps=600,
    gamma_rule="closed_form",
    clip_norm=20.0,
)


def members(seeds=(0,), kappas=(5,), rates=(0.02,)):
    size = max(len(seeds), len(kappas), len(rates))
    wide = [np.resize(np.asarray(values), size).tolist() for values in (seeds, kappas, rates)]
    return stack_members([Member(s, k, 1.0, r) for s, k, r in zip(*wide, strict=True)])


def trained(trainer, epochs):
    return trainer.run(trainer.init(), epochs)


def assert_trees_equal(got, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


def test_golden_first_step(small_vae, pixels):
    """A silent change of numerics shows here. To update after a meant change: run
    `python -m pytest tests/test_training.py -k golden` and copy the values it prints."""
    trainer = Trainer(small_vae(), SETTINGS, members(), pixels, len(pixels))
    state, metrics = trained(trainer, 1)
    got = {
        "loss": float(metrics.loss[0]),
        "squared_error": float(metrics.squared_error[0]),
        "kl": float(metrics.kl[0]),
        "gradient_norm": float(metrics.gradient_norm[0]),
        "gamma": float(metrics.gamma[0]),
        "norm": float(optax.tree.norm(state.params)),
    }
    print(got)
    assert got == pytest.approx(
        {
            "loss": 19.317485809326172,
            "squared_error": 8.897360801696777,
            "kl": 0.16579130291938782,
            "gradient_norm": 8.579893112182617,
            "gamma": 0.9801986813545227,
            "norm": 12.02348804473877,
        },
        rel=1e-5,
    )


def test_a_chunk_is_its_steps_one_by_one(small_vae, pixels):
    """Two epochs in one compiled call equal a plain Python loop over `batch_indices`."""
    model, stack = small_vae(), members()
    trainer = Trainer(model, SETTINGS, stack, pixels, 32)
    state, _ = trained(trainer, 2)
    member = jax.tree.map(lambda leaf: leaf[0], stack)
    alone = init_state(model, SETTINGS, member, jnp.asarray(pixels).mean(0))
    one_step = jax.jit(lambda state, x: train_step(model, SETTINGS, member, state, x)[0])
    for step in range(6):
        alone = one_step(alone, jnp.asarray(pixels)[batch_indices(0, step, 96, 32)])
    assert int(state.step[0]) == 6
    assert_trees_equal(member_params(state, 0), alone.params, rtol=2e-4, atol=2e-6)


def test_chunks_of_any_length_give_the_same_run_without_compiling_again(small_vae, pixels):
    trainer = Trainer(small_vae(), SETTINGS, members(seeds=(0, 1)), pixels, 32)
    whole, whole_metrics = trained(trainer, 5)
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **kwargs: compilations.append(event) if "compile" in event else None
    )
    try:
        state, _ = trained(trainer, 2)
        state, _ = trainer.run(state, 1)
        state, metrics = trainer.run(state, 2)
    finally:
        jax.monitoring.clear_event_listeners()
    assert compilations == []
    assert_trees_equal(state, whole, rtol=0)
    assert_trees_equal(metrics, whole_metrics, rtol=0)


def test_the_state_is_donated(small_vae, pixels):
    trainer = Trainer(small_vae(), SETTINGS, members(), pixels, 32)
    state = trainer.init()
    trainer.run(state, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_stacked_padded_members_equal_members_alone(small_vae, pixels):
    """kappa 3 and 5, two seeds, two speeds of gamma: one program, the same four runs.

    In float64, where rounding cannot hide a difference in the mathematics.
    """
    with jax.enable_x64(True):
        data = np.float64(pixels)
        stack = members(seeds=(0, 1, 0, 1), kappas=(3, 5, 5, 3), rates=(0.02, 0.02, 0.3, 0.3))
        together, metrics = trained(Trainer(small_vae(latents=5), SETTINGS, stack, data, 16), 10)
        for index in range(4):
            kappa = int(stack.kappa[index])
            one = jax.tree.map(lambda leaf, index=index: leaf[index : index + 1], stack)
            alone, alone_metrics = trained(
                Trainer(small_vae(latents=kappa), SETTINGS, one, data, 16), 10
            )
            assert metrics.loss[index] == pytest.approx(float(alone_metrics.loss[0]), rel=1e-12)
            assert metrics.active[index] == alone_metrics.active[0]
            assert metrics.informative[index] == alone_metrics.informative[0]
            params = without_padding(member_params(together, index), kappa)
            assert_trees_equal(params, member_params(alone, 0), rtol=1e-9, atol=1e-12)


VARIANTS = (  # residual, affine, kappa, factor on the learning rate, seed
    (True, True, 5, 1.0, 0),
    (True, False, 3, 0.5, 1),
    (False, True, 5, 2.0, 0),
    (False, False, 3, 0.5, 0),
)


@pytest.mark.parametrize(
    ("float64", "epochs", "tolerance"), [(True, 200, 1e-12), (False, 20, 1e-5)]
)
def test_members_of_all_skips_equal_the_static_models_alone(
    small_vae, pixels, float64, epochs, tolerance
):
    """Skips, kappas and learning rates in one program, each as its own network trains alone."""
    with jax.enable_x64(float64):
        data = pixels.astype(float if float64 else np.float32)
        build = functools.partial(small_vae, decoder_blocks=1, branch_scale=0.5)
        left_open = build(residual=None, affine_skip=None)
        stack = stack_members(
            [
                Member(seed, kappa, 1.0, 0.02, learning_rate=factor, residual=r, affine=a)
                for r, a, kappa, factor, seed in VARIANTS
            ]
        )
        together, metrics = trained(Trainer(left_open, SETTINGS, stack, data, len(data)), epochs)
        for index, (residual, affine, kappa, factor, seed) in enumerate(VARIANTS):
            model = build(residual=residual, affine_skip=affine, latents=kappa)
            settings = SETTINGS._replace(
                learning_rate=factor * SETTINGS.learning_rate,
                final_learning_rate=factor * SETTINGS.final_learning_rate,
            )
            one = stack_members([Member(seed, kappa, 1.0, 0.02)])
            alone, expected = trained(Trainer(model, settings, one, data, len(data)), epochs)
            assert metrics.loss[index] == pytest.approx(float(expected.loss[0]), rel=tolerance)
            own, params = with_own_skips(left_open, member_params(together, index))
            assert own == build(residual=residual, affine_skip=affine)
            for got, reference in zip(
                jax.tree.leaves(without_padding(params, kappa)),
                jax.tree.leaves(member_params(alone, 0)),
                strict=True,
            ):
                scale = np.abs(reference).max()
                np.testing.assert_allclose(got, reference, rtol=0, atol=tolerance * scale)


def without_padding(params, kappa):
    """The weights that the first `kappa` latents touch."""

    def cut(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in ("decoder/first/kernel", "affine/kernel"):
            return leaf[:kappa]
        return leaf[..., :kappa] if name.split("/")[1:2] in (["mean"], ["log_var"]) else leaf

    return jax.tree_util.tree_map_with_path(cut, params)


def test_the_loss_is_eq_2_by_hand(small_vae, pixels):
    model = small_vae(gamma=0.2)
    params = init_state(
        model,
        SETTINGS._replace(gamma_rule="fixed"),
        Member(0, 5, 0.1, 0.0),
        jnp.asarray(pixels).mean(0),
    ).params
    x, eps = jnp.asarray(pixels[:8]), latent_noise(jax.random.key(0), 8, 5)
    loss, _ = loss_and_terms(model, params, x, eps)
    mean, log_var = map(np.float64, model.apply({"params": params}, x, method="encode"))
    z = jnp.float32(mean + np.exp(log_var / 2) * np.float64(eps))
    x_hat = np.float64(model.apply({"params": params}, z, method="decode"))
    error = ((pixels[:8] - x_hat) ** 2).sum(1)
    by_hand = error / 0.4 + 8 * np.log(2 * np.pi * 0.2)
    by_hand += 0.5 * (mean**2 + np.exp(log_var) - log_var - 1).sum(1)
    assert float(loss) == pytest.approx(by_hand.mean(), rel=1e-5)


@pytest.mark.parametrize("ratio", [0.2, 0.99, 1.0, 1.01, 30.0])
def test_gamma_jumps_to_its_stationary_value_or_by_its_rate(ratio):
    """gamma = E|x - x_hat|^2 / (ratio d): unlimited, one step lands where the gradient is zero."""
    dim, error = 7, 0.9
    log_gamma = jnp.float32(np.log(error / dim / ratio))
    loss = lambda v: 0.5 * (error * jnp.exp(-v) + dim * v)  # noqa: E731
    landed = next_log_gamma(log_gamma, error / dim, Member(0, 5, 1.0, 1e9))
    assert float(jax.grad(loss)(landed)) == pytest.approx(0, abs=1e-5)
    limited = next_log_gamma(log_gamma, error / dim, Member(0, 5, 1.0, 1e-3))
    assert float(limited - log_gamma) == pytest.approx(
        np.clip(np.log(ratio), -1e-3, 1e-3), abs=1e-6
    )


def test_gamma_can_be_prescribed_held_and_guarded():
    start = jnp.log(jnp.float32(0.5))
    prescribed = Member(0, 5, 0.5, 1e9, gamma_end=0.01)
    assert float(jnp.exp(next_log_gamma(start, 0.2, prescribed))) == pytest.approx(0.01, rel=1e-5)
    assert next_log_gamma(start, 0.2, Member(0, 5, 0.5, 0.0)) == start
    learned = Member(0, 5, 0.5, 1e9)
    assert float(jnp.exp(next_log_gamma(start, 0.2, learned, 0.3))) == pytest.approx(0.3, rel=1e-5)
    # The guard never lifts gamma, and leaves a gamma below its stationary value free to rise.
    assert next_log_gamma(start, 0.2, learned, 7.0) == start
    assert float(jnp.exp(next_log_gamma(start, 0.9, learned, 7.0))) == pytest.approx(0.9, rel=1e-5)
    assert np.isnan(next_log_gamma(start, jnp.float32(np.nan), learned))


def test_the_residuals_leading_direction_and_variance_are_found():
    """Against eigh of the covariance the residuals are drawn from; noise does not bias it."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    variances = np.r_[2.0, 0.7, np.full(38, 0.3)]
    draw = lambda: jnp.asarray(  # noqa: E731
        (rng.normal(size=(16, 40)) * np.sqrt(variances)) @ basis.T, jnp.float32
    )
    mode = ResidualMode(jnp.asarray(basis[:, 5], jnp.float32), jnp.float32(50.0))
    step, found = jax.jit(follow_residual), []
    for i in range(600):
        mode = step(mode, draw(), 10)
        found += [float(mode.variance)] if i >= 200 else []
    assert abs(float(mode.direction @ jnp.asarray(basis[:, 0], jnp.float32))) > 0.9
    # Without the top direction the sample covariance of 16 draws would still say about 1.2.
    assert np.mean(found) == pytest.approx(2.0, rel=0.12)


def test_the_guard_is_whole_before_its_release_and_gone_after():
    steps = jnp.arange(601)
    factor = np.asarray(release(SETTINGS, steps))
    assert (factor[:361] == 1).all()
    assert (factor[480:] == 0).all()
    assert factor[420] == pytest.approx(1e-2, rel=1e-3)
    assert (np.diff(factor) <= 0).all()


def test_an_adaptive_gamma_stays_above_the_guarded_residual(small_vae, pixels):
    """Until the release; unguarded members of the same program are those of the closed form."""
    settings = SETTINGS._replace(gamma_rule="adaptive", total_steps=10_000)
    stack = stack_members([Member(0, 5, 1.0, 0.02, gamma_guard=g) for g in (0.0, 0.8)])
    state, metrics = trained(Trainer(small_vae(), settings, stack, pixels, 32), 200)
    plain = Trainer(small_vae(), settings._replace(gamma_rule="closed_form"), stack, pixels, 32)
    _, expected = trained(plain, 200)
    np.testing.assert_allclose(metrics.gamma[0], expected.gamma[0], rtol=1e-3)
    assert metrics.gamma[1] > 2 * metrics.gamma[0]
    x = jnp.asarray(pixels)
    mean, _ = small_vae().apply({"params": member_params(state, 1)}, x, method="encode")
    x_hat = small_vae().apply({"params": member_params(state, 1)}, mean, method="decode")
    largest = np.linalg.eigvalsh(np.cov((x - x_hat).T, ddof=0))[-1]
    assert float(metrics.residual_variance[1]) == pytest.approx(largest, rel=0.2)


def test_only_a_released_guard_lets_gamma_become_stationary(small_vae, pixels):
    """After the release gamma follows the error; kept to the end, the guard holds it above."""
    settings = SETTINGS._replace(gamma_rule="adaptive", total_steps=400, release=(0.5, 0.6))
    stack = stack_members(
        [Member(0, 5, 1.0, 0.05, gamma_guard=0.8, gamma_release=r) for r in (0.0, 1.0)]
    )
    _, metrics = trained(Trainer(small_vae(), settings, stack, pixels, 32), 133)
    residual = np.asarray(metrics.gamma) / (np.asarray(metrics.squared_error) / 16) - 1
    assert abs(residual[1]) < 0.1
    assert residual[0] > 1
    # The guard never lifts gamma, so it follows the least that the estimate has been.
    assert 0.6 < float(metrics.gamma[0]) / (0.8 * float(metrics.residual_variance[0])) < 1


def test_the_slowest_fall_passes_a_guard():
    """What no training explains cannot hold gamma for ever."""
    member = Member(0, 5, 0.5, 0.02)
    start = jnp.log(jnp.float32(0.5))
    got = next_log_gamma(start, 1e-3, member, 7.0, slowest=1e-3)
    assert float(got - start) == pytest.approx(-1e-3, rel=1e-4)


def plateau_after(variances, memory=1):
    start = Plateau(jnp.log(variances[0]), jnp.log(variances[0]), jnp.zeros((), jnp.int32))

    def step(plateau, at):
        return follow_plateau(plateau, at[0], at[1], memory), None

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
    member = Member(0, 5, 1.0, 0.0, patience=1000.0)
    state = TrainState(jnp.int32(step), None, None, None, jnp.int32(number), None)
    mean = np.random.default_rng(0).normal(size=(200, 5)) * np.array(spread) + 3.0
    plateau = Plateau(jnp.float32(-1.0), jnp.float32(-0.98), jnp.int32(since))
    got, after = open_latents(member, state, plateau, jnp.asarray(mean), jnp.array(False))
    assert got == expected
    if expected > number:
        assert (after.since, after.lowest) == (step, plateau.level)
    else:
        assert after == plateau


@pytest.mark.parametrize(
    ("patience", "number", "spread", "expected"),
    [
        (1000.0, 3, (1.0, 1.0, 0.1, 0.0, 0.0), 2),  # the last one opened is idle
        (1000.0, 3, (1.0, 0.0, 1.0, 0.0, 0.0), 3),  # not the last one
        (1000.0, 3, (1.0, 1.0, 1.0, 0.0, 0.0), 3),  # none, and none opens any more
        (1000.0, 1, (0.0, 0.0, 0.0, 0.0, 0.0), 1),  # one stays
        (0.0, 5, (1.0, 1.0, 0.0, 0.0, 0.0), 5),  # all were open from the start
    ],
)
def test_a_latent_still_idle_when_the_guard_goes_is_closed(patience, number, spread, expected):
    member = Member(0, 5, 1.0, 0.0, patience=patience)
    state = TrainState(jnp.int32(5000), None, None, None, jnp.int32(number), None)
    mean = np.random.default_rng(0).normal(size=(200, 5)) * np.array(spread) + 3.0
    plateau = Plateau(jnp.float32(-1.0), jnp.float32(-0.98), jnp.int32(0))
    got, after = open_latents(member, state, plateau, jnp.asarray(mean), jnp.array(True))
    assert got == expected
    assert after == plateau


def test_idle_latents_close_at_the_release_and_not_before(small_vae, pixels):
    settings = SETTINGS._replace(
        **{"gamma_rule": "adaptive", "total_steps": 1000, "release": (0.01, 0.9)},
        **{"learning_rate": 1e-9, "final_learning_rate": 1e-9},
    )
    stack = stack_members(
        [
            Member(0, 5, 1.0, 0.02, gamma_guard=0.4, gamma_release=released, patience=patience)
            for released, patience in ((1.0, 900.0), (0.0, 900.0), (1.0, 0.0))
        ]
    )
    trainer = Trainer(small_vae(), settings, stack, pixels, 32)
    state = trainer.init()
    state = state._replace(open=jnp.full_like(state.open, 5))
    # Three steps an epoch; step 11 is the first one after the tenth, where the guard begins to go.
    for epochs, expected in ((3, (5, 5, 5)), (1, (4, 5, 5)), (4, (1, 5, 5))):
        state, metrics = trainer.run(state, epochs)
        np.testing.assert_array_equal(metrics.open, expected)


def test_closed_latents_are_not_in_the_model(small_vae, pixels):
    """Their weights stay where they were drawn, and no metric knows of them."""
    settings = SETTINGS._replace(gamma_rule="adaptive", total_steps=10_000)
    stack = stack_members(
        [
            Member(0, 5, 1.0, 0.02, gamma_guard=guard, patience=patience, learning_rate=3.0)
            for guard, patience in ((0.4, 0.0), (0.4, 300.0), (100.0, 300.0))
        ]
    )
    trainer = Trainer(small_vae(), settings, stack, pixels, 32)
    before = jax.device_get(trainer.init())
    np.testing.assert_array_equal(before.open, [5, 1, 1])
    after, metrics = jax.device_get(trained(trainer, 600))
    np.testing.assert_array_equal(metrics.open, after.open)
    assert after.open[0] == 5
    assert 1 < after.open[1] <= 5
    assert after.open[2] == 1  # idle: gamma stays above every variance
    for member, number in enumerate(after.open):
        for path, axis in LATENT_WEIGHTS.items():
            names = path.split("/")
            try:
                old, new = (
                    np.moveaxis(functools.reduce(lambda tree, name: tree[name], names, state.params)
                                [member], axis, 0)
                    for state in (before, after)
                )  # fmt: skip
            except KeyError:  # a skip that this model lacks
                continue
            np.testing.assert_array_equal(old[number:], new[number:])
            assert (old[:number] != new[:number]).any()
        assert metrics.active[member] <= number
        assert metrics.informative[member] <= number


def test_the_optimiser_is_adam_by_hand():
    """Kingma and Ba's bias-corrected moments, with the settings' beta2; never above a rate."""
    settings = SETTINGS._replace(warmup_steps=0, beta2=0.5, total_steps=10**9, clip_norm=1e9)
    first, second = 1.0, 3.0
    mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.5 * 0.5 * first**2 + 0.5 * second**2) / (1 - 0.5**2)
    for highest, rate in ((np.inf, settings.learning_rate), (1e-4, 1e-4)):
        optimiser = weights_optimiser(settings, highest_rate=highest)
        state = optimiser.init(jnp.zeros(()))
        _, state = optimiser.update(jnp.float32(first), state)
        update, _ = optimiser.update(jnp.float32(second), state)
        assert float(update) == pytest.approx(-rate * mean / square**0.5, rel=1e-5)


def test_jitter_bounds_a_step_by_the_decoder_variance(small_vae, pixels):
    """D rate^2 = jitter gamma; Adam's first step moves a weight by its rate, or by less."""
    settings = SETTINGS._replace(warmup_steps=0, gamma_rule="fixed")
    stack = stack_members(
        [
            Member(0, 5, 1.0, 0.0, jitter=jitter, learning_rate=factor)
            for jitter, factor in ((0.0, 1.0), (1e-4, 1.0), (1e-4, 0.7), (10.0, 1.0))
        ]
    )
    model = small_vae(gamma=0.5)
    trainer = Trainer(model, settings, stack, pixels, len(pixels))
    before = jax.device_get(trainer.init().params)
    after = jax.device_get(trained(trainer, 1)[0].params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).reshape(len(a), -1).max(1), after, before)
    steps = np.max([leaf for leaf in jax.tree.leaves(moved) if leaf.any()], axis=0)
    bound = (1e-4 * 0.5 / 16) ** 0.5
    # The third would take .7 of the scheduled rate, which is above the bound; the last is free.
    expected = [settings.learning_rate, bound, bound, settings.learning_rate]
    np.testing.assert_allclose(steps, expected, rtol=1e-3)
    assert float(steady_rate(Member(0, 5, 1.0, 0.0), jnp.float32(0.5), 16)) == np.inf


def test_the_latent_gradient_is_that_of_finite_differences(small_vae, pixels):
    with jax.enable_x64(True):
        model, member = small_vae(gamma=0.2), Member(3, 4, 0.2, 0.0)
        x = jnp.asarray(pixels[:3], float)
        params = init_state(model, SETTINGS._replace(gamma_rule="fixed"), member, x.mean(0)).params
        variables = {"params": params}
        mean, log_var = model.apply(variables, x, 4, method="encode")
        noise = latent_noise(stream(3, "probe"), 3, 5) * (jnp.arange(5) < 4)[None, :]
        z = np.asarray(mean + jnp.exp(log_var / 2) * noise)

        def nll(z):
            x_hat = model.apply(variables, jnp.asarray(z), method="decode")
            return np.asarray(jnp.square(x - x_hat).sum(-1)) / 0.4

        slopes = np.stack(
            [(nll(z + 1e-6 * e) - nll(z - 1e-6 * e)) / 2e-6 for e in np.eye(5)[:4, None]], -1
        )
        expected = np.linalg.norm(slopes, axis=-1).mean()
        got = float(latent_gradient_norm(model, params, x, member.kappa, member.seed))
    assert got == pytest.approx(expected, rel=1e-6)


def test_a_program_serves_other_members_and_images(small_vae, pixels):
    """`on` gives what a trainer built for them would give, without compiling again."""
    first = Trainer(small_vae(), SETTINGS, members(), pixels, 32)
    other = (pixels[::-1] * 0.5).copy()
    got, _ = trained(first.on(members(seeds=(4,), rates=(0.1,)), other), 2)
    expected, _ = trained(Trainer(small_vae(), SETTINGS, members((4,), rates=(0.1,)), other, 32), 2)
    assert_trees_equal(got, expected, rtol=0)


def test_rows_that_are_not_pixels_are_decoded_in_the_program(small_vae, pixels):
    """Factors stored, pixels drawn in every batch: the same run as with the pixels stored."""
    got, _ = trained(Trainer(small_vae(), SETTINGS, members(), pixels * 2 + 3, 32, halve), 2)
    expected, _ = trained(Trainer(small_vae(), SETTINGS, members(), pixels, 32), 2)
    assert_trees_equal(got, expected, rtol=1e-4, atol=1e-5)


def halve(rows):
    return (rows - 3) / 2


@pytest.mark.parametrize("rule", ["closed_form", "adam"])
def test_gamma_falls_no_faster_than_its_rate(small_vae, pixels, rule):
    settings = SETTINGS._replace(gamma_rule=rule)
    trainer = Trainer(small_vae(), settings, members(rates=(0.01, 0.05)), pixels, 32)
    _, metrics = trained(trainer, 3)  # 9 steps
    np.testing.assert_allclose(np.log(metrics.gamma), [-0.09, -0.45], rtol=0.02)


def test_a_fixed_gamma_stays(small_vae, pixels):
    settings = SETTINGS._replace(gamma_rule="fixed")
    state, metrics = trained(Trainer(small_vae(gamma=0.1), settings, members(), pixels, 32), 3)
    assert "log_gamma" not in state.params
    np.testing.assert_allclose(metrics.gamma, 0.1, rtol=1e-6)


def test_the_step_does_not_depend_on_the_scale_of_the_loss(small_vae, pixels):
    """Weights see gamma times the gradient: for a fixed gamma a constant, which Adam ignores."""
    settings = SETTINGS._replace(gamma_rule="fixed", warmup_steps=0)
    model, member = small_vae(gamma=0.1), Member(0, 5, 0.1, 0.0)
    x = jnp.asarray(pixels[:32])
    state = init_state(model, settings, member, x.mean(0))
    eps = latent_noise(stream(0, "noise", 0), 32, 5)
    gradient = jax.grad(lambda p: loss_and_terms(model, p, x, eps)[0])(state.params)
    got, _ = train_step(model, settings, member, state, x)
    for name in ("encoder", "decoder"):
        moved = jax.tree.leaves(jax.tree.map(jnp.subtract, got.params[name], state.params[name]))
        slopes = jax.tree.leaves(gradient[name])
        for change, slope in zip(moved, slopes, strict=True):
            large = np.abs(slope) > 1e-3 * np.abs(slope).max()
            # Adam's first step is the rate times the sign.
            np.testing.assert_allclose(
                change[large], -settings.learning_rate * np.sign(slope)[large], rtol=2e-3, atol=1e-7
            )


def test_gamma_is_stationary_at_the_end(small_vae, pixels):
    """gamma = E|x - x_hat|^2 / d on the training data, within the error of one draw each."""
    trainer = Trainer(small_vae(width=32), SETTINGS, members(rates=(0.2,)), pixels, 96)
    state, metrics = trained(trainer, 600)
    draws = [
        posterior(small_vae(width=32), member_params(state, 0), pixels, seed=s, block=96)
        for s in range(30)
    ]
    error = np.mean([d.squared_error_sampled.mean() for d in draws]) / 16
    assert float(metrics.gamma[0]) == pytest.approx(error, rel=0.1)
    assert float(metrics.gamma[0]) < 0.25 * pixels.var(0).mean()  # it has learned


class Log:
    def __init__(self):
        self.rows = []

    def __call__(self, epoch, epochs, metrics, seconds):
        assert seconds > 0
        self.rows.append((epoch, epochs, float(metrics.loss[0])))


def run_fit(trainer, directory, epochs, log=None, every=4):
    with Checkpoints(directory) as checkpoints:
        return fit(
            trainer,
            epochs=epochs,
            epochs_per_chunk=3,
            epochs_per_checkpoint=every,
            checkpoints=checkpoints,
            report=log or Log(),
        )


def test_a_resumed_run_is_bit_identical(small_vae, pixels, tmp_path):
    """Stopped at a checkpoint and started again in a new program; chunks cut differently."""
    stack = members(seeds=(0, 7))
    whole = run_fit(Trainer(small_vae(), SETTINGS, stack, pixels, 32), tmp_path / "a", 10)
    run_fit(Trainer(small_vae(), SETTINGS, stack, pixels, 32), tmp_path / "b", 5)
    log = Log()
    resumed = run_fit(Trainer(small_vae(), SETTINGS, stack, pixels, 32), tmp_path / "b", 10, log)
    assert [row[:2] for row in log.rows] == [(8, 3), (10, 2)]
    assert_trees_equal(resumed, whole, rtol=0)


def test_a_finished_run_is_not_trained_again(small_vae, pixels, tmp_path):
    trainer = Trainer(small_vae(), SETTINGS, members(), pixels, 32)
    first = run_fit(trainer, tmp_path, 5)
    log = Log()
    assert_trees_equal(run_fit(trainer, tmp_path, 5, log), first, rtol=0)
    assert log.rows == []


def test_a_checkpoint_is_not_overwritten_by_the_steps_after_it(small_vae, pixels, tmp_path):
    """The state is donated to the next chunk while the save may still be writing."""
    trainer = Trainer(small_vae(width=300), SETTINGS, members(), pixels, 32)
    expected, _ = trained(trainer, 4)
    run_fit(trainer, tmp_path, 8)
    with Checkpoints(tmp_path) as checkpoints:
        assert_trees_equal(checkpoints.restore(4, trainer.state_shapes), expected, rtol=0)


# log gamma 0, -30, -60, and at step 3, the first of the second epoch, too small for float32.
FALLS_FOR_EVER = -30.0


def test_a_member_that_diverges_stops_at_its_last_good_state_and_the_others_go_on(
    small_vae, pixels
):
    stack = members(seeds=(0, 1, 2), rates=(0.02, FALLS_FOR_EVER, 0.02))
    trainer = Trainer(small_vae(), SETTINGS, stack, pixels, 32)
    state, metrics = trained(trainer, 4)
    assert state.stopped.tolist() == metrics.stopped.tolist() == [-1, 3, -1]
    assert state.step.tolist() == [12, 3, 12]
    for name, values in metrics._asdict().items():
        assert name == "residual_variance" or np.isfinite(values[::2]).all()
        assert name == "stopped" or np.isnan(values[1])

    of = lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree)  # noqa: E731
    before, _ = trained(trainer, 1)
    kept = lambda state: (of(state, 1).params, of(state, 1).gamma_state)  # noqa: E731
    assert_trees_equal(kept(state), kept(before), rtol=0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    well, _ = trained(trainer.on(members(seeds=(0, 1, 2)), pixels), 4)
    for index in (0, 2):
        assert_trees_equal(of(state, index), of(well, index), rtol=0)


def test_a_stopped_member_stays_so_and_training_ends_when_none_is_left(small_vae, pixels, tmp_path):
    stack = members(seeds=(0, 1), rates=(0.02, FALLS_FOR_EVER))
    trainer = Trainer(small_vae(), SETTINGS, stack, pixels, 32)
    whole = run_fit(trainer, tmp_path / "a", 10)
    run_fit(trainer, tmp_path / "b", 5)
    assert_trees_equal(run_fit(trainer, tmp_path / "b", 10), whole, rtol=0)
    assert (whole.stopped.tolist(), whole.step.tolist()) == ([-1, 3], [30, 3])

    log = Log()
    trainer = trainer.on(members(seeds=(0, 1), rates=(FALLS_FOR_EVER,)), pixels)
    state = run_fit(trainer, tmp_path / "c", 1000, log, every=1000)
    assert state.stopped.tolist() == [3, 3]
    assert [row[:2] for row in log.rows] == [(3, 3), (6, 3)]  # told one chunk late
    again = run_fit(trainer, tmp_path / "c", 1000)
    kept = lambda state: state._replace(opt_state=())  # noqa: E731
    assert_trees_equal(kept(again), kept(state), rtol=0)
