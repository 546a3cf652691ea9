import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from vaebal import homotopy
from vaebal.generation import stages
from vaebal.measures.mmd import SCALES, imq_mmd2, imq_mmd2_to_normal
from vaebal.models import init_params, latent_noise
from vaebal.models.gaussians import isotropic_nll
from vaebal.streams import stream
from vaebal.training import (
    Member,
    Objective,
    Optimisation,
    Program,
    Told,
    member_params,
    shared_given,
    stack_members,
)
from vaebal.training.vae import loss_and_terms

C = 3  # code dimensions


def with_random_params(model, seed):
    """The model's parameters, every one moved away from its start (zeros among them)."""
    start = jax.jit(lambda key: init_params(model, key, jnp.zeros(model.outputs)))
    leaves, tree = jax.tree.flatten(start(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    )


@pytest.fixture(scope="module")
def pair(small_vae, pixels):
    """An autoencoder from 16 pixels to C codes and a VAE on them, with parameters and codes."""
    ae = small_vae(latents=C, affine_skip=False, gamma=1.0)
    vae = small_vae(outputs=C, latents=C)
    ae_params, params = with_random_params(ae, 0), with_random_params(vae, 2)
    params["log_gamma"] = jnp.log(0.3)
    x = jnp.asarray(pixels[:8])
    raw, _ = stages.encode(ae, ae_params, x)
    scale = stages.code_scale(raw)
    return ae, ae_params, vae, params, x, scale.standardise(raw), scale


def test_the_error_in_pixels_is_eq_2_behind_the_frozen_decoder_by_hand(pair):
    ae, ae_params, vae, params, x, codes, scale = pair
    eps = latent_noise(jax.random.key(5), 8, C)
    decoder = stages.frozen_decoder(ae, ae_params, scale)
    got, metrics = stages.vae_loss(vae, params, codes, eps, target=x, decoder=decoder)

    mean, log_var = (np.float64(v) for v in vae.apply({"params": params}, codes, method="encode"))
    z = jnp.asarray(mean + np.exp(log_var / 2) * eps)
    codes_hat = vae.apply({"params": params}, z, method="decode")
    raw = np.asarray(codes_hat) * np.asarray(scale.std) + np.asarray(scale.mean)
    x_hat = np.float64(ae.apply({"params": ae_params}, jnp.asarray(raw), method="decode"))
    error = np.square(np.float64(x) - x_hat).sum(1)
    kl = 0.5 * (mean**2 + np.exp(log_var) - log_var - 1).sum(1)
    by_hand = error / (2 * 0.3) + 16 / 2 * np.log(2 * np.pi * 0.3) + kl
    assert float(got) == pytest.approx(by_hand.mean(), rel=1e-5)
    assert float(metrics["mean_square"]) == pytest.approx(error.mean() / 16, rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(kl.mean(), rel=1e-5)


def test_dimensions_left_out_are_in_no_loss_by_hand(pair):
    """Neither in the error nor in the D that log gamma is counted by; all of them: none is."""
    _, _, vae, params, _, codes, _ = pair
    eps, mask = latent_noise(jax.random.key(5), 8, C), jnp.asarray([1.0, 0.0, 1.0])

    @jax.jit
    def loss(params, mask):
        return stages.vae_loss(vae, params, codes, eps, target=codes, mask=mask)

    got, metrics = loss(params, mask)
    outputs = vae.apply({"params": params}, codes, eps)
    error = np.square(np.float64(codes) - np.float64(outputs.x_hat))[:, [0, 2]].sum(1)
    mean, log_var = np.float64(outputs.mean), np.float64(outputs.log_var)
    kl = 0.5 * (mean**2 + np.exp(log_var) - log_var - 1).sum(1)
    by_hand = error / (2 * 0.3) + 2 / 2 * np.log(2 * np.pi * 0.3) + kl
    assert float(got) == pytest.approx(by_hand.mean(), rel=1e-5)
    assert float(metrics["mean_square"]) == pytest.approx(error.mean() / 2, rel=1e-5)
    whole, _ = stages.vae_loss(vae, params, codes, eps, target=codes)
    assert float(loss(params, jnp.ones(C))[0]) == pytest.approx(float(whole), rel=1e-6)


def test_without_a_decoder_the_loss_is_the_gaussian_vaes(pair):
    """The sweeps' own, on the same noise: value, gradients and what gamma follows."""
    _, _, vae, params, _, codes, _ = pair
    eps = latent_noise(jax.random.key(5), 8, C)
    sister = jax.jit(jax.value_and_grad(lambda p: loss_and_terms(vae, p, codes, eps), has_aux=True))
    ours = jax.jit(
        jax.value_and_grad(
            lambda p: stages.vae_loss(vae, p, codes, eps, target=codes), has_aux=True
        )
    )
    (expected, (_, terms)), slopes = sister(params)
    (got, metrics), gradient = ours(params)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)
    error = float(terms.squared_error.mean())
    assert float(metrics["squared_error"]) == pytest.approx(error, rel=1e-6)
    assert float(metrics["mean_square"]) == pytest.approx(error / C, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), gradient, slopes)


def test_the_frozen_decoder_gets_no_gradient_and_passes_one_on(pair):
    ae, ae_params, vae, params, x, codes, scale = pair
    eps = latent_noise(jax.random.key(5), 8, C)

    @jax.jit
    def loss(params, ae_params, scale):
        decoder = stages.frozen_decoder(ae, ae_params, scale)
        return stages.vae_loss(vae, params, codes, eps, target=x, decoder=decoder)[0]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    own, frozen, of_scale = gradient(params, ae_params, scale)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((frozen, of_scale)))
    # The loss does depend on what is frozen: the zeros are not those of a constant.
    moved = jax.tree.map(lambda leaf: 1.01 * leaf, ae_params)
    assert abs(loss(params, moved, scale) - loss(params, ae_params, scale)) > 1e-3
    # What the VAE gets is the derivative along its own parameters, through the decoder.
    norm = optax.tree.norm(own)
    step = jax.tree.map(lambda leaf: 3e-3 * leaf / norm, own)
    ahead = loss(jax.tree.map(jnp.add, params, step), ae_params, scale)
    behind = loss(jax.tree.map(jnp.subtract, params, step), ae_params, scale)
    assert float(ahead - behind) == pytest.approx(6e-3 * float(norm), rel=1e-2)


def test_the_second_stages_gamma_is_stationary_at_the_mean_square_error(small_vae):
    """Which only a loss with its log term has: without it gamma would grow for ever."""
    vae = small_vae(outputs=C, latents=C)
    params = with_random_params(vae, 0)
    z = jax.random.normal(jax.random.key(1), (32, C))
    eps = latent_noise(jax.random.key(2), 32, C)

    @jax.jit
    @jax.grad
    def gradient(log_gamma):
        return stages.vae_loss(vae, params | {"log_gamma": log_gamma}, z, eps, target=z)[0]

    def slope(gamma):
        return float(gradient(jnp.log(gamma)))

    _, metrics = stages.vae_loss(vae, params, z, eps, target=z)
    stationary = metrics["mean_square"]
    assert slope(stationary) == pytest.approx(0.0, abs=1e-5)
    # d/2 (1 - gamma* / gamma), either side.
    assert slope(2 * stationary) == pytest.approx(C / 4, rel=1e-4)
    assert slope(stationary / 2) == pytest.approx(-C / 2, rel=1e-4)


def test_the_autoencoders_error_and_the_gamma_it_implies(pair):
    ae, params, *_, x, _, _ = pair
    error, metrics = stages.autoencoder_loss(ae, params, x)
    z = ae.apply({"params": params}, x, method="encode")[0]
    x_hat = np.asarray(ae.apply({"params": params}, z, method="decode"))
    assert float(error) == pytest.approx(np.square(x - x_hat).sum(1).mean(), rel=1e-5)
    slope = jax.grad(lambda log_gamma: isotropic_nll(error, log_gamma, 16))
    assert float(slope(jnp.log(metrics["mean_square"]))) == pytest.approx(0.0, abs=1e-5)


def test_wae_mmd_by_hand(pair):
    ae, ae_params, vae, params, x, codes, scale = pair
    prior = np.asarray(jax.random.normal(jax.random.key(7), (8, C)))
    decoder = stages.frozen_decoder(ae, ae_params, scale)
    got, metrics = stages.wae_loss(
        vae, params, codes, jnp.asarray(prior), target=x, decoder=decoder, weight=7.0
    )
    z, codes_hat = (np.asarray(v) for v in stages.mean_path(vae, params, codes))

    def kernel(a, b):
        return sum(2 * C * s / (2 * C * s + np.square(a - b).sum()) for s in SCALES)

    pairs = [(i, j) for i in range(8) for j in range(8)]
    within = sum(kernel(z[i], z[j]) + kernel(prior[i], prior[j]) for i, j in pairs if i != j)
    mmd = within / 56 - 2 * sum(kernel(z[i], prior[j]) for i, j in pairs) / 64
    error = np.square(np.asarray(x) - np.asarray(decoder(jnp.asarray(codes_hat)))).sum(1).mean()
    assert float(metrics["mmd"]) == pytest.approx(mmd, abs=1e-5)
    assert float(got) == pytest.approx(error + 7 * mmd, rel=1e-4)


def test_standardised_codes_have_unit_variance_and_come_back():
    codes = np.random.default_rng(0).normal(3.0, [0.1, 5.0, 0.0, 2.0], (200, 4))
    scale = stages.code_scale(jnp.asarray(codes))
    standard = scale.standardise(jnp.asarray(codes))
    np.testing.assert_allclose(standard.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(standard.std(0), [1, 1, 0, 1], atol=1e-4)  # one never moves
    np.testing.assert_allclose(scale.restore(standard), codes, rtol=1e-5)


def test_latents_are_drawn_from_their_posteriors():
    mean = jnp.tile(jnp.asarray([[1.0, -2.0]]), (50_000, 1))
    log_var = jnp.tile(jnp.log(jnp.asarray([[0.25, 4.0]])), (50_000, 1))
    z = np.asarray(stages.draw_latents(mean, log_var, jax.random.key(0)))
    np.testing.assert_allclose(z.mean(0), [1, -2], atol=0.05)
    np.testing.assert_allclose(z.var(0), [0.25, 4], rtol=0.03)
    assert abs(np.corrcoef(z.T)[0, 1]) < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_downsample_is_pillows_box_and_back(channels):
    images = np.random.default_rng(0).random((2, 12, 8, channels)).astype(np.float32)
    got = np.asarray(stages.downsample(jnp.asarray(images)))
    for image, ours in zip(images, got, strict=True):
        for channel in range(channels):
            small = Image.fromarray(image[..., channel]).resize((4, 6), Image.Resampling.BOX)
            large = np.asarray(small.resize((8, 12), Image.Resampling.NEAREST))
            np.testing.assert_allclose(ours[..., channel], large, rtol=1e-6)
    np.testing.assert_allclose(stages.downsample(jnp.asarray(got)), got, rtol=1e-6)


def test_great_circles_go_from_end_to_end_at_a_steady_angle():
    start = jnp.asarray([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    end = jnp.asarray([[0.0, 0.0, 1.0], [0.0, 2.0, 2.0]])  # the second in the same direction
    path = np.asarray(stages.great_circle(start, end, 5))
    np.testing.assert_allclose(path[0], start, atol=1e-6)
    np.testing.assert_allclose(path[-1], end, atol=1e-6)
    norms = np.linalg.norm(path, axis=-1)
    np.testing.assert_allclose(norms[:, 0], [2, 1.75, 1.5, 1.25, 1], rtol=1e-5)
    cosines = (path[:-1, 0] * path[1:, 0]).sum(1) / (norms[:-1, 0] * norms[1:, 0])
    np.testing.assert_allclose(cosines, np.cos(np.pi / 8), rtol=1e-5)


def test_a_draw_from_the_second_stage_has_its_variance(small_vae):
    vae = small_vae(outputs=C, latents=C)
    params = with_random_params(vae, 0) | {"log_gamma": jnp.log(0.3)}
    u = jnp.zeros((20_000, C))
    z = stages.sample_observed(vae, params, u, jax.random.normal(jax.random.key(0), u.shape))
    np.testing.assert_allclose(z.var(0), 0.3, rtol=0.05)
    np.testing.assert_allclose(z.mean(0), stages.decode(vae, params, u)[0], atol=0.02)


def test_codes_of_another_dimension_are_refused_in_one_sentence(pair):
    ae, ae_params, vae, params, _, codes, _ = pair
    narrow = codes[:, :2]
    with pytest.raises(ValueError, match=r"vae_loss was given shape \(8, 2\).* takes \[B, 3\]"):
        stages.vae_loss(vae, params, narrow, narrow, target=narrow)
    with pytest.raises(ValueError, match=r"decode was given shape \(8, 2\)"):
        stages.decode(ae, ae_params, narrow)
    with pytest.raises(ValueError, match=r"encode was given shape \(8, 3\).* takes \[B, 16\]"):
        stages.encode(ae, ae_params, codes)
    with pytest.raises(ValueError, match="8 x 5 pixels; downsample needs even"):
        stages.downsample(jnp.zeros((1, 8, 5, 1)))


@pytest.mark.slow
def test_a_second_stage_samples_two_modes_that_the_prior_misses(small_vae):
    """z: two narrow modes. N(0, I) misses them, and so does a Gaussian of the right moments."""
    vae = small_vae(outputs=2, latents=2, width=32, encoder_layers=3)
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (2000, 1))
    mean = jnp.asarray(np.concatenate([1.5 * signs, 0 * signs], 1), jnp.float32)
    log_var = jnp.full(mean.shape, jnp.log(0.05))

    def init(member, given):
        params = init_params(vae, stream(member.seed, "init"), given)
        return {name: leaf for name, leaf in params.items() if name != "log_gamma"}

    def loss(params, batch, at):
        to_z, to_eps = jax.random.split(stream(at.member.seed, "noise", at.step))
        z = stages.draw_latents(batch["mean"], batch["log_var"], to_z)
        value, metrics = stages.vae_loss(vae, params, z, latent_noise(to_eps, *z.shape), target=z)
        return value, Told(metrics, metrics["mean_square"])

    settings = Optimisation(
        learning_rate=5e-3, final_learning_rate=1e-4, warmup_steps=10, total_steps=1000,
        clip_norm=20.0,
    )  # fmt: skip
    program = Program(
        Objective(init, loss, dim=2), settings, stack_members([Member(0)]),
        {"mean": mean, "log_var": log_var}, 100, given=shared_given(mean.mean(0), 1),
        rule=lambda member: homotopy.closed_form(0.02),
    )  # fmt: skip
    params = member_params(program.run(program.init(), 50)[0], 0)
    u, eps = (jax.random.normal(stream(0, name), (2000, 2)) for name in ("u", "eps"))
    ours = stages.sample_observed(vae, params, u, eps)
    true = stages.draw_latents(mean, log_var, stream(0, "true"))
    gaussian = true.mean(0)[None] + u @ jnp.linalg.cholesky(jnp.cov(true.T)).T
    distances = [float(imq_mmd2(true, each)) for each in (ours, gaussian, u)]
    assert distances[0] < distances[1] / 5
    assert distances[0] < distances[2] / 5
    assert distances[2] == pytest.approx(float(imq_mmd2_to_normal(true).value), rel=0.2)
    # Its own latents come closer to the prior than z is: what the second stage is for.
    u_mean, u_log_var = stages.encode(vae, params, true)
    latents = stages.draw_latents(u_mean, u_log_var, stream(0, "latents"))
    assert float(imq_mmd2_to_normal(latents).value) < distances[2] / 5
