import functools
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import (
    SETTINGS,
    Log,
    assert_trees_equal,
    closed_form,
    data_of,
    fixed,
    member_of,
    members,
    program,
    run_fit,
    trained,
)

from vaebal import homotopy
from vaebal.data import batch_indices, epoch_order
from vaebal.errors import CheckpointError, Diverged
from vaebal.generation import stages
from vaebal.measures.evaluation import posterior
from vaebal.models import latent_noise, with_own_skips
from vaebal.streams import stream
from vaebal.theory.gradients import LATENT_WEIGHTS
from vaebal.training import (
    At,
    Member,
    Objective,
    Program,
    Told,
    fit,
    gaussian_vae,
    member_params,
    stack_members,
)
from vaebal.training.checkpoints import Checkpoints
from vaebal.training.step import init_state, train_step
from vaebal.training.vae import latent_gradient_norm, loss_and_terms


def started(model, member, x, rule=fixed, settings=SETTINGS):
    """One member's state before its first step."""
    return init_state(gaussian_vae(model), settings, rule, member, jnp.asarray(x).mean(0))


@pytest.fixture(scope="module")
def two(small_vae, pixels):
    """The program of seeds 0 and 1, for all tests that need no other."""
    return program(small_vae(), members(seeds=(0, 1)), pixels)


def test_golden_first_step(small_vae, pixels):
    """A silent change of numerics shows here. To update after a meant change: run
    `python -m pytest tests/test_training.py -k golden` and copy the values it prints."""
    state, metrics = trained(program(small_vae(), members(), pixels, len(pixels)), 1)
    names = ("loss", "squared_error", "kl", "gradient_norm", "gamma")
    got = {name: float(metrics[name][0]) for name in names}
    got["norm"] = float(optax.tree.norm(state.params))
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


def test_a_chunk_is_its_steps_one_by_one(small_vae, pixels, two):
    """Two epochs in one compiled call equal a plain Python loop over `batch_indices`."""
    model = small_vae()
    state, _ = trained(two, 2)
    member = member_of(members(seeds=(0, 1)), 1)
    x = jnp.asarray(pixels)
    alone = started(model, member, x, closed_form)

    @jax.jit
    def one_step(state, batch):
        objective = gaussian_vae(model)
        return train_step(objective, SETTINGS, closed_form, member, state, batch, x.mean(0))[0]

    for step in range(6):
        alone = one_step(alone, x[batch_indices(1, step, 96, 32)])
    assert state.step.tolist() == [6, 6]
    assert_trees_equal(member_params(state, 1), alone.params, rtol=2e-4, atol=2e-6)


def test_chunks_of_any_length_give_the_same_run_without_compiling_again(two):
    whole, whole_metrics = trained(two, 5)
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **kwargs: compilations.append(event) if "compile" in event else None
    )
    try:
        state, _ = trained(two, 2)
        state, _ = two.run(state, 1)
        state, metrics = two.run(state, 2)
    finally:
        jax.monitoring.clear_event_listeners()
    assert compilations == []
    assert_trees_equal(state, whole, rtol=0)
    assert_trees_equal(metrics, whole_metrics, rtol=0)


def test_the_state_is_donated(two):
    state = two.init()
    two.run(state, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_stacked_padded_members_equal_members_alone(small_vae, pixels):
    """kappa 3 and 5, two seeds, two speeds of gamma: one program, the same four runs.

    In float64, where rounding cannot hide a difference in the mathematics.
    """
    with jax.enable_x64(True):
        data = np.float64(pixels)
        stack = members(seeds=(0, 1, 0, 1), kappas=(3, 5, 5, 3), rates=(0.02, 0.02, 0.3, 0.3))
        together, metrics = trained(program(small_vae(latents=5), stack, data, 16), 10)
        singles = {}
        for index in range(4):
            kappa = int(stack.latents[index])
            one = jax.tree.map(lambda leaf, index=index: leaf[index : index + 1], stack)
            if kappa not in singles:
                singles[kappa] = program(small_vae(latents=kappa), one, data, 16)
            alone, expected = trained(singles[kappa].on(**data_of(one, data)), 10)
            assert metrics["loss"][index] == pytest.approx(float(expected["loss"][0]), rel=1e-12)
            assert metrics["active"][index] == expected["active"][0]
            assert metrics["informative"][index] == expected["informative"][0]
            params = without_padding(member_params(together, index), kappa)
            assert_trees_equal(params, member_params(alone, 0), rtol=1e-9, atol=1e-12)


VARIANTS = (  # residual, affine, kappa, factor on the learning rate, seed
    (True, True, 5, 1.0, 0),
    (True, False, 3, 0.5, 1),
    (False, True, 5, 2.0, 0),
    (False, False, 3, 0.5, 0),
)


@pytest.mark.slow
def test_members_of_all_skips_equal_the_static_models_alone(small_vae, pixels):
    """Skips, kappas and learning rates in one program, each as its own network trains alone."""
    epochs, tolerance = 200, 1e-12
    with jax.enable_x64(True):
        data = pixels.astype(float)
        build = functools.partial(small_vae, encoder_layers=2, decoder_blocks=1, branch_scale=0.5)
        left_open = build(residual=None, affine_skip=None)
        numbers = {"rule": {"rate": 0.02}}
        stack = stack_members(
            [
                Member(seed, kappa, 1.0, factor, residual=r, affine=a, **numbers)
                for r, a, kappa, factor, seed in VARIANTS
            ]
        )
        together, metrics = trained(program(left_open, stack, data, len(data)), epochs)
        for index, (residual, affine, kappa, factor, seed) in enumerate(VARIANTS):
            model = build(residual=residual, affine_skip=affine, latents=kappa)
            settings = SETTINGS._replace(
                learning_rate=factor * SETTINGS.learning_rate,
                final_learning_rate=factor * SETTINGS.final_learning_rate,
            )
            one = stack_members([Member(seed, kappa, 1.0, **numbers)])
            alone, expected = trained(
                program(model, one, data, len(data), settings=settings), epochs
            )
            assert metrics["loss"][index] == pytest.approx(
                float(expected["loss"][0]), rel=tolerance
            )
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


def test_a_member_that_is_not_variational_is_a_plain_autoencoder(small_vae, pixels):
    """Its weights follow the squared error at the mean alone; the other's are eq. 2's."""
    model, x = small_vae(), jnp.asarray(pixels[:8])
    objective = gaussian_vae(model, variational=lambda member: member.rule)
    params = {**started(model, Member(0, 5), pixels).weights, "log_gamma": jnp.log(0.2)}

    def of(objective, rule):
        at = At(Member(0, 5, rule=rule), jnp.int32(3), jnp.int32(5), ())
        return jax.value_and_grad(lambda p: objective.loss(p, x, at)[0])(params)

    value, gradient = of(objective, 0.0)
    error, slope = jax.value_and_grad(lambda p: stages.autoencoder_loss(model, p, x)[0])(params)
    constant = 8 * np.log(2 * np.pi * 0.2)  # D / 2 of 16 dimensions
    assert float(value) == pytest.approx(float(error) / 0.4 + constant, rel=1e-5)
    slope = {**jax.tree.map(lambda leaf: leaf / 0.4, slope), "log_gamma": gradient["log_gamma"]}
    assert_trees_equal(gradient, slope, rtol=1e-4, atol=1e-5)
    whole, plain = of(objective, 1.0), of(gaussian_vae(model), ())
    assert_trees_equal(whole, plain, rtol=1e-6, atol=1e-7)


def test_the_loss_is_eq_2_by_hand(small_vae, pixels):
    model = small_vae(gamma=0.2)
    params = started(model, Member(0, 5), pixels).weights
    x, eps = jnp.asarray(pixels[:8]), latent_noise(jax.random.key(0), 8, 5)
    loss, _ = loss_and_terms(model, params, x, eps)
    mean, log_var = map(np.float64, model.apply({"params": params}, x, method="encode"))
    z = jnp.float32(mean + np.exp(log_var / 2) * np.float64(eps))
    x_hat = np.float64(model.apply({"params": params}, z, method="decode"))
    error = ((pixels[:8] - x_hat) ** 2).sum(1)
    by_hand = error / 0.4 + 8 * np.log(2 * np.pi * 0.2)
    by_hand += 0.5 * (mean**2 + np.exp(log_var) - log_var - 1).sum(1)
    assert float(loss) == pytest.approx(by_hand.mean(), rel=1e-5)


# ---- Homotopies in training ----


def guarded(member, release=None):
    rule = member.rule
    return homotopy.guarded(
        rule["rate"], dim=16, guard=rule["guard"], memory=10, release=release
    )  # fmt: skip


def opener(member, release=None):
    return homotopy.one_by_one(guarded(member, release), patience=300, memory=10)


def guards(*numbers, rate=0.02, **others):
    return stack_members(
        [Member(0, 5, rule={"rate": rate, "guard": guard}, **others) for guard in numbers]
    )


LONG = SETTINGS._replace(total_steps=10_000)


@pytest.mark.slow
def test_an_adaptive_gamma_stays_above_the_guarded_residual(small_vae, pixels):
    """A guard of 0 is the closed form; one of .8 holds gamma above the residual that is left."""
    stack = guards(0.0, 0.8)
    state, metrics = trained(
        program(small_vae(), stack, pixels, settings=LONG, rule=guarded), 200
    )  # fmt: skip
    plain = program(small_vae(), stack, pixels, settings=LONG)
    np.testing.assert_allclose(metrics["gamma"][0], trained(plain, 200)[1]["gamma"][0], rtol=1e-3)
    assert metrics["gamma"][1] > 2 * metrics["gamma"][0]
    x = jnp.asarray(pixels)
    mean, _ = small_vae().apply({"params": member_params(state, 1)}, x, method="encode")
    x_hat = small_vae().apply({"params": member_params(state, 1)}, mean, method="decode")
    largest = np.linalg.eigvalsh(np.cov((x - x_hat).T, ddof=0))[-1]
    assert float(metrics["residual_variance"][1]) == pytest.approx(largest, rel=0.2)
    # The guard never lifts gamma, so it follows the least that the estimate has been.
    held = float(metrics["gamma"][1]) / (0.8 * float(metrics["residual_variance"][1]))
    assert 0.6 < held < 1
    assert metrics["gamma"][1] > 2 * metrics["squared_error"][1] / 16


@pytest.mark.slow
def test_a_released_guard_lets_gamma_become_stationary(small_vae, pixels):
    """Where it is kept it does not, see the test above."""
    settings = SETTINGS._replace(total_steps=400)
    rule = functools.partial(guarded, release=(200, 240))
    built = program(small_vae(), guards(0.8, rate=0.05), pixels, settings=settings, rule=rule)
    _, metrics = trained(built, 133)
    assert float(metrics["gamma"][0]) == pytest.approx(
        float(metrics["squared_error"][0]) / 16, rel=0.1
    )


def test_idle_latents_close_at_the_release_and_not_before(small_vae, pixels):
    """The opener is shown the posterior means, and the steps as they are counted."""
    settings = SETTINGS._replace(learning_rate=1e-9, final_learning_rate=1e-9)
    rule = functools.partial(opener, release=(10, 900))
    faint = 0.1 * pixels  # so that the first means vary by less than ACTIVE
    built = program(small_vae(), guards(0.4), faint, settings=settings, rule=rule)
    state = built.init()
    everything = jnp.full_like(state.homotopy.open, 5)
    state = state._replace(homotopy=state.homotopy._replace(open=everything))
    # Three steps an epoch; step 11 is the first one after the tenth, where the guard begins to go.
    for epochs, expected in ((3, 5), (1, 4), (4, 1)):
        state, metrics = built.run(state, epochs)
        np.testing.assert_array_equal(metrics["open"], [expected])


def test_closed_latents_are_not_in_the_model(small_vae, pixels):
    """Their weights stay where they were drawn, and no metric knows of them."""
    stack = guards(0.4, 100.0, learning_rate=3.0)
    built = program(small_vae(), stack, pixels, settings=LONG, rule=opener)
    before = jax.device_get(built.init())
    np.testing.assert_array_equal(before.homotopy.open, [1, 1])
    after, metrics = jax.device_get(trained(built, 600))
    np.testing.assert_array_equal(metrics["open"], after.homotopy.open)
    assert 1 < after.homotopy.open[0] <= 5
    assert after.homotopy.open[1] == 1  # idle: gamma stays above every variance
    for member, number in enumerate(after.homotopy.open):
        for names, axis in LATENT_WEIGHTS.items():
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
        assert metrics["active"][member] <= number
        assert metrics["informative"][member] <= number


def test_the_latent_gradient_is_that_of_finite_differences(small_vae, pixels):
    with jax.enable_x64(True):
        model, member = small_vae(gamma=0.2), Member(3, 4)
        x = jnp.asarray(pixels[:3], float)
        params = started(model, member, x).weights
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
        got = float(latent_gradient_norm(model, params, x, member.latents, member.seed))
    assert got == pytest.approx(expected, rel=1e-6)


def gradient(member):
    return homotopy.gradient(member.rule["rate"], 16)


@pytest.mark.parametrize("rule", [closed_form, pytest.param(gradient, marks=pytest.mark.slow)])
def test_gamma_falls_no_faster_than_its_rate(small_vae, pixels, rule):
    built = program(small_vae(), members(rates=(0.01, 0.05)), pixels, rule=rule)
    _, metrics = trained(built, 3)  # 9 steps
    np.testing.assert_allclose(np.log(metrics["gamma"]), [-0.09, -0.45], rtol=0.02)


def test_the_step_does_not_depend_on_the_scale_of_the_loss(small_vae, pixels):
    """Weights see gamma times the gradient: for a fixed gamma a constant, which Adam ignores."""
    settings = SETTINGS._replace(warmup_steps=0)
    model, member = small_vae(), Member(0, 5, 0.1)
    x = jnp.asarray(pixels[:32])
    state = started(model, member, x, settings=settings)
    assert "log_gamma" not in state.weights
    eps = latent_noise(stream(0, "noise", 0), 32, 5)
    gradient = jax.jit(jax.grad(lambda p: loss_and_terms(model, p, x, eps)[0]))(state.params)
    step = jax.jit(functools.partial(train_step, gaussian_vae(model), settings, fixed, member))
    got, told = step(state, x, x.mean(0))
    weights = {name: leaf for name, leaf in gradient.items() if name != "log_gamma"}
    norm = 0.1 * float(optax.tree.norm(weights))
    assert float(told["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
    assert float(got.params["log_gamma"]) == pytest.approx(np.log(0.1), rel=1e-6)
    for name in ("encoder", "decoder"):
        moved = jax.tree.leaves(jax.tree.map(jnp.subtract, got.weights[name], state.weights[name]))
        slopes = jax.tree.leaves(gradient[name])
        for change, slope in zip(moved, slopes, strict=True):
            large = np.abs(slope) > 1e-3 * np.abs(slope).max()
            # Adam's first step is the rate times the sign.
            np.testing.assert_allclose(
                change[large], -settings.learning_rate * np.sign(slope)[large], rtol=2e-3, atol=1e-7
            )


@pytest.mark.slow
def test_gamma_is_stationary_at_the_end(small_vae, pixels):
    """gamma = E|x - x_hat|^2 / d on the training data, within the error of one draw each."""
    built = program(small_vae(width=32), members(rates=(0.2,)), pixels, 96)
    state, metrics = trained(built, 600)
    draws = [
        posterior(small_vae(width=32), member_params(state, 0), pixels, seed=s, block=96)
        for s in range(30)
    ]
    error = np.mean([d.squared_error_sampled.mean() for d in draws]) / 16
    assert float(metrics["gamma"][0]) == pytest.approx(error, rel=0.1)
    assert float(metrics["gamma"][0]) < 0.25 * pixels.var(0).mean()  # it has learned


# ---- Rows ----


def test_a_program_serves_other_members_and_images(small_vae, pixels, two):
    """`on` gives what a program built for them would give, without compiling again."""
    stack = members(seeds=(4, 5), rates=(0.1,))
    other = (pixels[::-1] * 0.5).copy()
    got, _ = trained(two.on(**data_of(stack, other)), 2)
    expected, _ = trained(program(small_vae(), stack, other), 2)
    assert_trees_equal(got, expected, rtol=0)


def test_rows_that_are_not_pixels_are_decoded_in_the_program(small_vae, pixels, two):
    """Factors stored, pixels drawn in every batch: the same run as with the pixels stored."""
    stack = members(seeds=(0, 1))
    got, _ = trained(program(small_vae(), stack, pixels * 2 + 3, decode=halve), 2)
    assert_trees_equal(got, trained(two, 2)[0], rtol=1e-4, atol=1e-5)


def halve(rows):
    return (rows - 3) / 2


def test_members_with_rows_of_their_own_are_runs_alone(small_vae, pixels):
    """Two data sets in one program; each member as in a program of its own data, in float64."""
    with jax.enable_x64(True):
        sets = np.float64(pixels), np.float64(1 - pixels[::-1] ** 2)
        stack = members(seeds=(0, 1), rates=(0.02, 0.1))
        means = jnp.stack([jnp.asarray(rows).mean(0) for rows in sets])
        objective, options = gaussian_vae(small_vae()), {"rule": closed_form}
        own = Program(
            objective, SETTINGS, stack, (), 16, own=np.stack(sets), given=means, **options
        )
        together, metrics = trained(own, 8)
        of = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], stack) for i in (0, 1)]
        single = program(small_vae(), of[0], sets[0], 16)
        for index, rows in enumerate(sets):
            alone, expected = trained(single.on(**data_of(of[index], rows)), 8)
            assert metrics["loss"][index] == pytest.approx(float(expected["loss"][0]), rel=1e-12)
            assert_trees_equal(
                member_params(together, index), member_params(alone, 0), rtol=1e-9, atol=1e-12
            )
        # The other's data would have been seen.
        alone, _ = trained(single.on(**data_of(of[1], sets[0])), 8)
        kernel = lambda params: params["encoder"]["layer1"]["kernel"]  # noqa: E731
        far = kernel(member_params(alone, 0)) - kernel(member_params(together, 1))
        assert np.abs(far).max() > 1e-3


# ---- Any loss ----


def regression(member, given):
    return {"w": jnp.zeros(2)}


def squared(params, batch, at):
    """Of y on x, with the member's number as the weight of a penalty."""
    error = batch["y"] - batch["x"] @ params["w"]
    penalty = at.member.rule["penalty"] * jnp.square(params["w"]).sum()
    return jnp.square(error).mean() + penalty, Told({"largest": jnp.abs(error).max()})


FAST = SETTINGS._replace(
    learning_rate=0.05, final_learning_rate=0.0, warmup_steps=0, total_steps=1500
)


def test_any_loss_on_rows_shared_and_own_is_minimised():
    """Ridge regression of targets of each member's own on inputs of all: the normal equations."""
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(64, 2)), rng.normal(size=(2, 64))
    targets = targets + np.array([[1.0], [2.0]]) * x[:, 0]
    stack = stack_members([Member(s, rule={"penalty": p}) for s, p in ((0, 0.0), (1, 0.7))])
    built = Program(
        Objective(regression, squared, dim=1), FAST, stack, {"x": np.float32(x)}, 64,
        own={"y": np.float32(targets)},
    )  # fmt: skip
    state, metrics = trained(built, 1500)
    assert state.params is state.weights
    assert set(metrics) == {"loss", "largest", "gradient_norm", "stopped"}
    for index, penalty in enumerate((0.0, 0.7)):
        expected = np.linalg.solve(x.T @ x + 64 * penalty * np.eye(2), x.T @ targets[index])
        np.testing.assert_allclose(state.weights["w"][index], expected, rtol=1e-3, atol=1e-4)
        error = np.abs(targets[index] - x @ expected).max()
        assert float(metrics["largest"][index]) == pytest.approx(error, rel=1e-3)


def test_rows_may_be_any_tree():
    """A tuple of arrays is one, and not the absence of rows."""
    rows = np.ones((8, 2), np.float32), np.float32(np.arange(8))

    def loss(params, batch, at):
        x, y = batch
        return jnp.square(params["w"]).sum(), Told({"x": x.sum(), "y": y.sum()})

    stack = stack_members([Member(0)])
    built = Program(Objective(regression, loss, dim=1), FAST, stack, rows, 8)
    metrics = trained(built, 1)[1]
    assert (float(metrics["x"][0]), float(metrics["y"][0])) == (16, 28)


def test_a_rules_number_that_float32_would_change_is_refused():
    """A data set's seed: training would be on other data than the evaluation."""
    members = [Member(0, rule={"data_seed": seed}) for seed in (2**24, 20240101)]
    with pytest.raises(ValueError, match=r"Member\.rule\['data_seed'\]=20240101 is no float32"):
        stack_members(members)
    np.testing.assert_array_equal(stack_members(members[:1]).rule["data_seed"], [2**24])


def test_a_pass_over_the_rows_in_parts_sees_what_a_whole_one_does():
    """Ten batches in three parts: nine, each of three, in the order of the whole."""

    def loss(params, batch, at):
        nth = jnp.where(jnp.arange(20) == at.step, batch.sum(), 0.0)
        return jnp.square(params["w"]).sum(), Told({"sums": nth})

    rows, stack = 2.0 ** np.arange(20, dtype=np.float32), stack_members([Member(3)])
    built = Program(Objective(regression, loss, dim=1), FAST, stack, rows, 2, parts=3)
    state, seen = built.init(), np.zeros(20)
    for part in range(6):
        state, metrics = built.run(state, 1)
        sums = 3 * np.asarray(metrics["sums"][0])  # metrics are means over the part's steps
        assert np.flatnonzero(sums).tolist() == [3 * part, 3 * part + 1, 3 * part + 2]
        seen += sums
    for epoch in (0, 1):
        order = np.asarray(epoch_order(3, epoch, 20, 2))
        expected = rows[order].sum(1)[:9]
        np.testing.assert_allclose(seen[9 * epoch : 9 * epoch + 9], expected, rtol=1e-6)


def test_rows_that_cannot_be_joined_are_refused():
    stack, rows = stack_members([Member(0)]), np.ones((8, 2), np.float32)
    for shared, own in ((rows, rows[None]), (rows, {"x": rows[None]}), ({"x": rows}, rows[None])):
        with pytest.raises(ValueError, match="own rows join shared ones where both are dicts"):
            Program(Objective(regression, squared, dim=1), FAST, stack, shared, 8, own=own)


def test_what_a_loss_draws_is_a_function_of_seed_and_step():
    """A program whose "loss" tells what it drew: one batch an epoch, so one draw an epoch."""

    def draw(seed, step):
        return jax.random.normal(stream(seed, "test/noise", step), (8, 2))

    def loss(params, batch, at):
        drawn = draw(at.member.seed, at.step)
        return jnp.square(params["w"]).sum(), Told({"z": (batch * drawn).sum()})

    rows = np.ones((8, 2), np.float32)
    stack = stack_members([Member(seed) for seed in (0, 1)])
    built = Program(Objective(regression, loss, dim=1), FAST, stack, rows, 8)

    def draws():
        state, found = built.init(), []
        for _ in range(4):
            state, metrics = built.run(state, 1)
            found.append(metrics["z"].tolist())
        return np.array(found)

    first = draws()
    assert len(set(first.ravel())) == 8
    np.testing.assert_array_equal(draws(), first)
    expected = [[float(draw(seed, step).sum()) for seed in (0, 1)] for step in range(4)]
    np.testing.assert_allclose(first, expected, rtol=1e-5)


def test_fewer_rows_than_a_batch_are_refused(small_vae, pixels):
    with pytest.raises(ValueError, match="96 rows make no batch of 200"):
        program(small_vae(), members(), pixels, 200)


# ---- fit ----


def test_a_resumed_run_is_bit_identical(small_vae, pixels, tmp_path, two):
    """Stopped at a checkpoint and started again in a new program; chunks cut differently."""
    whole = run_fit(two, tmp_path / "a", 10)
    run_fit(two, tmp_path / "b", 5)
    log = Log()
    again = program(small_vae(), members(seeds=(0, 1)), pixels)
    resumed = run_fit(again, tmp_path / "b", 10, log)
    assert log.rows == [(8, 3), (10, 2)]
    assert_trees_equal(resumed, whole, rtol=0)


def test_a_finished_run_is_not_trained_again(tmp_path, two):
    first = run_fit(two, tmp_path, 5)
    log = Log()
    assert_trees_equal(run_fit(two, tmp_path, 5, log), first, rtol=0)
    assert log.rows == []


def test_a_later_epoch_is_not_taken_for_the_one_asked_for(tmp_path, two):
    run_fit(two, tmp_path, 5)
    with pytest.raises(CheckpointError, match="goes on to epoch 5, and epoch 3 is asked for"):
        run_fit(two, tmp_path, 3)


def test_a_checkpoint_is_not_overwritten_by_the_steps_after_it(small_vae, pixels, tmp_path):
    """The state is donated to the next chunk while the save may still be writing."""
    wide = program(small_vae(width=300), members(), pixels)
    expected, _ = trained(wide, 4)
    run_fit(wide, tmp_path, 8)
    with Checkpoints(tmp_path) as checkpoints:
        assert_trees_equal(checkpoints.restore(4, wide.state_shapes), expected, rtol=0)


# log gamma 0, -30, -60, and at step 3, the first of the second epoch, too small for float32.
FALLS_FOR_EVER = -30.0


def test_a_member_that_diverges_stops_at_its_last_good_state_and_the_others_go_on(
    small_vae, pixels
):
    stack = members(seeds=(0, 1, 2), rates=(0.02, FALLS_FOR_EVER, 0.02))
    built = program(small_vae(), stack, pixels)
    state, metrics = trained(built, 4)
    assert state.stopped.tolist() == metrics["stopped"].tolist() == [-1, 3, -1]
    assert state.step.tolist() == [12, 3, 12]
    for name, values in metrics.items():
        assert name == "residual_variance" or np.isfinite(values[np.array([0, 2])]).all()
        assert name == "stopped" or np.isnan(values[1])

    before, _ = trained(built, 1)
    kept = lambda state: member_of((state.weights, state.homotopy), 1)  # noqa: E731
    assert_trees_equal(kept(state), kept(before), rtol=0)
    found = jax.tree.leaves((state.params, state.opt_state))
    assert all(np.isfinite(leaf).all() for leaf in found)
    well, _ = trained(built.on(**data_of(members(seeds=(0, 1, 2)), pixels)), 4)
    for index in (0, 2):
        assert_trees_equal(member_of(state, index), member_of(well, index), rtol=0)


@pytest.mark.parametrize("jitter", [0.0, 1e-3])
def test_a_gamma_that_is_no_number_leaves_the_weights_as_they_were(jitter):
    """Also where it bounds the steps, so that the bound is none either."""

    def loss(params, batch, at):
        return jnp.square(params["w"] - 1).sum() / jnp.exp(params["log_gamma"]), Told({})

    objective = Objective(regression, loss, dim=2)
    settings, rows = FAST._replace(jitter=jitter), np.ones((8, 2), np.float32)
    stack = stack_members([Member(0, gamma=np.nan), Member(0, gamma=1.0)])
    after, _ = trained(Program(objective, settings, stack, rows, 8, rule=fixed), 1)
    assert (after.stopped.tolist(), after.step.tolist()) == ([0, -1], [0, 1])
    assert after.weights["w"][0].tolist() == [0, 0]
    assert (after.weights["w"][1] > 0).all()


def test_a_stopped_member_stays_so_and_training_ends_when_none_is_left(pixels, tmp_path, two):
    half = two.on(**data_of(members(seeds=(0, 1), rates=(0.02, FALLS_FOR_EVER)), pixels))
    whole = run_fit(half, tmp_path / "a", 10)
    run_fit(half, tmp_path / "b", 5)
    assert_trees_equal(run_fit(half, tmp_path / "b", 10), whole, rtol=0)
    assert (whole.stopped.tolist(), whole.step.tolist()) == ([-1, 3], [30, 3])

    log = Log()
    none = two.on(**data_of(members(seeds=(0, 1), rates=(FALLS_FOR_EVER,)), pixels))
    state = run_fit(none, tmp_path / "c", 1000, log, every=1000)
    assert state.stopped.tolist() == [3, 3]
    assert log.rows == [(3, 3), (6, 3)]  # told one chunk late
    again = run_fit(none, tmp_path / "c", 1000)
    kept = lambda state: state._replace(opt_state=())  # noqa: E731
    assert_trees_equal(kept(again), kept(state), rtol=0)


def test_where_no_member_may_diverge_the_first_ends_it_all(pixels, tmp_path, two):
    """With its step, the last good checkpoint, and nothing saved after it."""
    half = two.on(**data_of(members(seeds=(0, 1), rates=(0.02, FALLS_FOR_EVER)), pixels))
    with pytest.raises(Diverged, match=r"at step 3 of .*last good checkpoint: none yet"):
        run_fit(half, tmp_path / "a", 10, diverged_goes_on=False)
    with Checkpoints(tmp_path / "a") as checkpoints:
        assert checkpoints.latest is None
    with pytest.raises(Diverged, match=rf"last good checkpoint: {tmp_path}/b/1\b"):
        run_fit(half, tmp_path / "b", 10, every=1, diverged_goes_on=False)
    with Checkpoints(tmp_path / "b") as checkpoints:
        assert checkpoints.latest == 1


# ---- how long a chunk took ----


class Clocked:
    """A stand-in for a program, on a machine whose clock it moves: an epoch takes a second.

    A call returns as the chunk before it has ended, or as its own has (`waits`).
    """

    def __init__(self, waits):
        self.now, self.end, self.waits, self.state_shapes = 0.0, 0.0, waits, None
        self.seen, self.calls = threading.local(), 0

    def clock(self):
        """What time it is; to who has waited for a chunk, when that ended."""
        return getattr(self.seen, "now", self.now)

    def init(self):
        return None

    def run(self, state, epochs):
        self.now = max(self.now, self.end)
        self.end = self.now + epochs
        self.calls += 1
        if self.waits(self.calls):
            self.now = self.end
        return None, {"stopped": Coming(self, self.end)}


class Coming:
    """Metrics that are there when their chunk has ended."""

    def __init__(self, machine, end):
        self.machine, self.end = machine, end

    def block_until_ready(self):
        self.machine.seen.now = self.end
        return self

    def __array__(self, dtype=None, copy=None):
        self.machine.now = max(self.machine.now, self.end)
        return np.array([-1])


@pytest.mark.parametrize(
    "waits",
    [
        pytest.param(lambda call: False, id="as on a CPU"),
        pytest.param(lambda call: True, id="as where the host drives a GPU's loops"),
        pytest.param(lambda call: call % 2 == 0, id="by turns, as on some GPUs"),
    ],
)
def test_a_chunk_is_told_to_take_as_long_as_it_does(monkeypatch, waits):
    """Chunks of unequal length, checkpoints between them, on every kind of device."""
    machine, told = Clocked(waits), []
    monkeypatch.setattr(time, "perf_counter", machine.clock)
    kept = types.SimpleNamespace(restore_latest=lambda _: None, save=lambda *_: None)
    fit(
        machine, epochs=20, epochs_per_chunk=3, epochs_per_checkpoint=8, checkpoints=kept,
        report=lambda done, count, metrics, seconds: told.append((done, count, seconds)),
    )  # fmt: skip
    ends = ((3, 3), (6, 3), (8, 2), (11, 3), (14, 3), (16, 2), (19, 3), (20, 1))
    assert told == [(done, count, count) for done, count in ends]
