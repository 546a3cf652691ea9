import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaebal.data import batch_indices
from vaebal.errors import Diverged
from vaebal.generation import stages
from vaebal.models import init_params, latent_noise
from vaebal.streams import stream
from vaebal.training.checkpoints import Checkpoints
from vaebal.training.engine import Member, Optimisation, init_state, train_step, weights_optimiser
from vaebal.training.fitting import Fitter, State, fit, fit_step

SETTINGS = Optimisation(
    learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=5, total_steps=600,
    clip_norm=20.0, gamma_rule="closed_form",
)  # fmt: skip


def assert_trees_equal(got, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


def vae_fitter(model, batch_size=32):
    def loss(params, batch, key, given):
        eps = latent_noise(key, len(batch), model.latents)
        return stages.vae_loss(model, params, batch, eps, target=batch)

    init = lambda key, given: init_params(model, key, given)  # noqa: E731
    return Fitter("vae", init, loss, SETTINGS, batch_size, gamma_rate=0.02)


def run(fitter, seed, rows, given, checkpoints, epochs, report=lambda *_: None):
    return fit(
        fitter, seed=seed, rows=rows, given=given, epochs=epochs, epochs_per_checkpoint=2,
        checkpoints=checkpoints, report=report,
    )[0]  # fmt: skip


def test_a_step_is_that_of_the_sweeps_training(small_vae, pixels):
    """Its elder sister, on the same loss, noise and batches: the same parameters, gamma too."""
    model, x = small_vae(), jnp.asarray(pixels)
    member = Member(seed=0, kappa=5, gamma_start=1.0, gamma_rate=0.02)
    reference = jax.jit(lambda x: init_state(model, SETTINGS, member, x.mean(0)))(x)
    params = reference.params
    weights = {name: leaf for name, leaf in params.items() if name != "log_gamma"}
    ours = State(reference.step, params, weights_optimiser(SETTINGS).init(weights))

    def loss(params, batch, key, given):
        eps = latent_noise(key, len(batch), model.latents)
        return stages.vae_loss(model, params, batch, eps, target=batch)

    sister = jax.jit(lambda state: train_step(model, SETTINGS, member, state, x))
    one = jax.jit(lambda state, key: fit_step(loss, SETTINGS, 0.02, state, x, key, ()))
    for step in range(4):
        reference, statistics = sister(reference)
        ours, metrics = one(ours, stream(0, "noise", step))
        for name in ("loss", "squared_error", "kl", "gradient_norm"):
            assert float(metrics[name]) == pytest.approx(float(statistics[name]), rel=1e-5)
    assert_trees_equal(ours.params, reference.params, rtol=1e-5, atol=1e-7)


def test_an_epoch_is_its_steps_one_by_one(small_vae, pixels):
    model, x = small_vae(), jnp.asarray(pixels)
    fitter = vae_fitter(model)
    state = fitter.init(3, x.mean(0))
    alone = jax.tree.map(jnp.copy, state)
    for _ in range(2):
        state, _ = fitter.epoch(3, state, x, x.mean(0))

    def loss(params, batch, key, given):
        eps = latent_noise(key, len(batch), model.latents)
        return stages.vae_loss(model, params, batch, eps, target=batch)

    @jax.jit
    def one(state, batch, key):
        return fit_step(loss, SETTINGS, 0.02, state, batch, key, ())[0]

    for step in range(6):
        batch = x[batch_indices(3, step, 96, 32)]
        alone = one(alone, batch, stream(3, "vae/noise", step))
    assert int(state.step) == 6
    assert_trees_equal(state.params, alone.params, rtol=2e-4, atol=2e-6)


def test_latents_are_redrawn_every_step_as_a_function_of_seed_and_step():
    """A program whose "loss" tells the z it drew: one batch an epoch, so one z an epoch."""

    def loss(params, batch, key, given):
        z = stages.draw_latents(batch["mean"], batch["log_var"], key)
        return jnp.square(params["w"]).sum(), {"z": z.sum()}

    init = lambda key, given: {"w": jnp.ones(2)}  # noqa: E731
    fitter = Fitter("vae_plus", init, loss, SETTINGS, batch_size=8)
    rows = {"mean": jnp.ones((8, 2)), "log_var": jnp.zeros((8, 2))}

    def draws(seed, epochs):
        state, found = fitter.init(seed, ()), []
        for _ in range(epochs):
            state, metrics = fitter.epoch(seed, state, rows, ())
            found.append(float(metrics["z"]))
        return found

    first = draws(0, 4)
    assert len(set(first)) == 4
    assert draws(0, 4) == first
    assert not set(draws(1, 4)) & set(first)
    expected = [
        float(
            stages.draw_latents(
                rows["mean"], rows["log_var"], stream(0, "vae_plus/noise", step)
            ).sum()
        )
        for step in range(4)
    ]
    assert first == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_ends_as_the_uninterrupted_one(small_vae, pixels, tmp_path):
    fitter, x = vae_fitter(small_vae()), jnp.asarray(pixels)
    with Checkpoints(tmp_path / "whole") as checkpoints:
        whole = run(fitter, 0, x, x.mean(0), checkpoints, 5)

    def kill(epoch, metrics):
        if epoch == 3:
            raise KeyboardInterrupt

    with Checkpoints(tmp_path / "killed") as checkpoints, pytest.raises(KeyboardInterrupt):
        run(fitter, 0, x, x.mean(0), checkpoints, 5, kill)
    epochs = []
    with Checkpoints(tmp_path / "killed") as checkpoints:
        assert checkpoints.latest == 2
        again = run(fitter, 0, x, x.mean(0), checkpoints, 5, lambda epoch, _: epochs.append(epoch))
    assert epochs == [3, 4, 5]
    assert_trees_equal(again, whole, rtol=0)


def test_a_finished_run_is_read_not_trained(small_vae, pixels, tmp_path):
    fitter, x = vae_fitter(small_vae()), jnp.asarray(pixels)
    with Checkpoints(tmp_path) as checkpoints:
        first = run(fitter, 0, x, x.mean(0), checkpoints, 2)
    with Checkpoints(tmp_path) as checkpoints:
        second = run(fitter, 0, x, x.mean(0), checkpoints, 2, lambda *_: pytest.fail("trained"))
    assert_trees_equal(second, first, rtol=0)


def test_a_loss_that_is_not_finite_stops_with_its_step(small_vae, pixels, tmp_path):
    def loss(params, batch, key, given):
        # The square's mean falls step by step; the root of what falls below .5 is NaN.
        value = jnp.square(params["w"]).mean()
        return value + 0.0 * jnp.sqrt(value - 0.5), {}

    settings = SETTINGS._replace(learning_rate=0.1, warmup_steps=0)
    init = lambda key, given: {"w": jnp.ones(2)}  # noqa: E731
    fitter = Fitter("test", init, loss, settings, batch_size=32)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(Diverged, match=r"step 3 of .*last good checkpoint: none yet"):
            run(fitter, 0, jnp.asarray(pixels), (), checkpoints, 6)
        assert checkpoints.latest is None


def test_fewer_rows_than_a_batch_are_refused(small_vae, pixels):
    fitter, x = vae_fitter(small_vae(), batch_size=200), jnp.asarray(pixels)
    with pytest.raises(ValueError, match="96 rows make no batch of 200"):
        fitter.epoch(0, fitter.init(0, x.mean(0)), x, x.mean(0))
