"""Second stages: their losses and samples against closed forms of Gaussian latents."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaebal.generation import priors, stages
from vaebal.models import latent_noise, mlp_vae

MEAN, SPREAD = 0.7, 0.3


def exact_velocity(z, t):
    """Of straight lines from N(0, 1) to N(MEAN, SPREAD^2): E[z1 - eps | z_t], by regression."""
    slope = (t * SPREAD**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * SPREAD**2)
    return MEAN + slope * (z - t * MEAN)


def test_heun_follows_the_exact_flow_of_a_gaussian_with_second_order():
    # The exact flow keeps quantiles: eps goes to MEAN + SPREAD eps.
    eps = jnp.linspace(-2.0, 2.0, 9)[:, None]
    errors = [
        float(jnp.abs(priors.heun(exact_velocity, eps, steps) - (MEAN + SPREAD * eps)).max())
        for steps in (10, 20, 40)
    ]
    assert errors[-1] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.25)


def test_an_untrained_flow_says_nothing_and_its_loss_is_that_of_zero_velocity():
    stage, mask = priors.flow_matching(3, 8, 1), jnp.array([1.0, 0.0, 1.0])
    params = stage.init(jax.random.key(0), mask)
    z = jax.random.normal(jax.random.key(1), (20_000, 3)) * mask[None]
    value, _ = jax.jit(stage.loss)(params, z, mask, jax.random.key(2))
    assert float(value) == pytest.approx(2.0, abs=0.04)  # E|z - eps|^2 per dimension that counts
    drawn = stage.sample(params, mask, jax.random.key(3), 4)
    np.testing.assert_array_equal(drawn, latent_noise(jax.random.key(3), 4, 3) * mask[None])


def trained(stage, z, mask, steps):
    """Parameters after Adam's steps on all of z."""
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    params = stage.init(jax.random.key(0), mask)
    log_gamma = {"log_gamma": jnp.log(0.1)} if stage.has_gamma else {}

    def step(carry, key):
        params, state = carry
        value, gradient = jax.value_and_grad(
            lambda p: stage.loss({**p, **log_gamma}, z, mask, key)[0]
        )(params)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(4), steps)
    (params, _), values = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
        (params, optimiser.init(params))
    )
    return {**params, **log_gamma}, values


def test_a_trained_flow_has_the_loss_and_the_samples_of_its_data():
    z = jax.random.normal(jax.random.key(5), (1000, 2))
    z = (z - z.mean(0)[None]) / z.std(0)[None]
    z = z.at[:, 1].set(0.8 * z[:, 0] + 0.6 * z[:, 1])  # correlated by about .8
    mask, stage = jnp.ones(2), priors.flow_matching(2, 32, 2, steps=20)
    params, values = trained(stage, z, mask, 600)
    # Of N(0, C), eigenvalues c: mean over them of the integral of c / ((1 - t)^2 + c t^2).
    t, c = np.linspace(0, 1, 20001)[:, None], np.linalg.eigvalsh(np.cov(z.T))[None]
    least = np.trapezoid((c / ((1 - t) ** 2 + c * t**2)).mean(1), t[:, 0])
    assert float(values[-100:].mean()) == pytest.approx(least, rel=0.05)
    draw = jax.jit(stage.sample, static_argnums=3)
    drawn = np.asarray(draw(params, mask, jax.random.key(6), 4000))
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(z.T), atol=0.1)
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.1)


def disturbed(params, seed=0):
    """Parameters of which none is at its start, where an error could hide."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise, strict=True)])


def test_a_flow_leads_back_whence_it_came():
    """The closer the more steps, with second order; latents left out stay 0."""
    model, mask = priors.Velocity(3, 8, 1), jnp.array([1.0, 0.0, 1.0])
    params = model.init(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros(1))["params"]
    params = disturbed(params)
    noise = jax.random.normal(jax.random.key(1), (50, 3))
    errors = []
    for steps in (50, 100, 200):
        z = priors.transported(model, params, noise, mask, steps=steps)
        back = priors.transported(model, params, z, mask, back=True, steps=steps)
        assert not np.asarray(z)[:, 1].any()
        errors.append(float(jnp.abs(back - noise * mask[None]).max()))
    assert float(jnp.abs(z - noise * mask[None]).max()) > 0.5
    assert errors[-1] < 1e-2
    assert errors[0] / errors[2] > 10


@pytest.mark.parametrize("mask", [(1, 1, 1, 1, 1), (1, 0, 1, 1, 0), (0, 1, 0, 0, 0)])
def test_an_invertible_networks_likelihood_is_that_of_its_samples(mask):
    """log p(z) = log N(u) - log|dz/du| at z(u), by the Jacobian of `sample` itself."""
    mask = jnp.array(mask, float)
    stage, used = priors.invertible(5, 8, 3), np.flatnonzero(np.asarray(mask))
    params = disturbed(stage.init(jax.random.key(0), mask))
    key = jax.random.key(11)

    def drawn(u):
        """The sample that noise u [K] becomes, in the place of the noise that `sample` draws."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(priors, "latent_noise", lambda key, *shape: u[None])
            return stage.sample(params, mask, key, 1)[0]

    u = latent_noise(key, 1, 5)[0]
    z, jacobian = drawn(u), jax.jacobian(drawn)(u)[np.ix_(used, used)]
    log_p = -0.5 * (jnp.square(u[used]) + jnp.log(2 * jnp.pi)).sum()
    log_p -= jnp.linalg.slogdet(jacobian)[1]
    value, _ = stage.loss(params, z[None], mask, key)
    assert float(value) * len(used) == pytest.approx(-float(log_p), rel=1e-4)
    if len(used) > 1:  # each moves with every other
        assert (np.abs(jacobian) > 1e-6).sum() > len(used)


def test_any_two_latents_are_parted_by_some_coupling():
    mask = np.ones(11)
    mask[[2, 5, 6]] = 0
    reads = np.asarray(priors.parts(jnp.asarray(mask), 8))
    assert (reads[:, mask == 0] == 0).all()
    np.testing.assert_array_equal(reads[::2] + reads[1::2], np.tile(mask, (4, 1)))
    for one in np.flatnonzero(mask):
        for other in set(np.flatnonzero(mask)) - {one}:
            assert ((reads[:, one] == 0) & (reads[:, other] == 1)).any()


@pytest.mark.parametrize(("latents", "used"), [(20, 20), (50, 50), (64, 3), (64, 64), (5, 1)])
def test_an_invertible_network_has_as_many_couplings_as_part_all_its_latents(latents, used):
    """However few blocks are asked for; and of few that take part no coupling moves none."""
    mask = jnp.arange(latents) < used
    stage = priors.invertible(latents, 4, 1)
    count = len(stage.init(jax.random.key(0), mask))
    reads = np.asarray(priors.parts(mask.astype(float), count))[:, :used]
    parted = (reads[:, :, None] != reads[:, None]).any(0)
    assert (parted | np.eye(used, dtype=bool)).all()
    if used > 1:
        assert (reads.any(1) & ~reads.all(1)).all()


def test_a_trained_invertible_network_has_the_entropy_and_the_samples_of_its_data():
    z = jax.random.normal(jax.random.key(5), (2000, 2))
    z = z.at[:, 1].set(jnp.square(z[:, 0]) + 0.3 * z[:, 1])  # a parabola: no Gaussian
    mask, stage = jnp.ones(2), priors.invertible(2, 32, 1)
    params, values = trained(stage, z, mask, 600)
    entropy = 0.5 * (2 * (1 + np.log(2 * np.pi)) + 2 * np.log(0.3)) / 2  # per dimension
    assert float(values[-50:].mean()) == pytest.approx(entropy, abs=0.04)
    draw = jax.jit(stage.sample, static_argnums=3)
    drawn = np.asarray(draw(params, mask, jax.random.key(6), 4000))
    left = drawn[:, 1] - drawn[:, 0] ** 2
    assert left.std() == pytest.approx(0.3, abs=0.06)


def test_a_second_vae_without_closed_latents_is_the_pipelines():
    stage, mask, key = priors.second_vae(3, 8, 1), jnp.ones(3), jax.random.key(7)
    params = {**stage.init(key, mask), "log_gamma": jnp.log(0.2)}
    z = jax.random.normal(jax.random.key(8), (40, 3))
    value, metrics = stage.loss(params, z, mask, key)
    model = mlp_vae(
        outputs=3, latents=3, width=8, encoder_layers=2, decoder_blocks=1, activation=jax.nn.silu,
        residual=True, affine_skip=True, log_var_init=-2.0,
    )  # fmt: skip
    theirs, told = stages.vae_loss(model, params, z, latent_noise(key, 40, 3), target=z)
    assert float(value) == pytest.approx(float(theirs), rel=1e-5)
    assert float(metrics["mean_square"]) == pytest.approx(float(told["mean_square"]), rel=1e-5)


@pytest.mark.parametrize("kind", sorted(priors.KINDS))
def test_latents_left_out_are_in_no_loss_and_in_no_sample(kind):
    stage, mask = priors.KINDS[kind](3, 8, 1), jnp.array([1.0, 1.0, 0.0])
    params, _ = trained(stage, jnp.ones((30, 3)) * mask[None], mask, 5)
    drawn = jax.jit(stage.sample, static_argnums=3)(params, mask, jax.random.key(9), 50)
    assert (np.asarray(drawn[:, 2]) == 0).all()
    assert (np.asarray(drawn[:, :2]).std(0) > 0).all()
    # What the network says of a latent left out moves no loss: its read-out's bias does not.
    out = {"flow": ("out",), "invertible": ("coupling0", "out"), "vae": ("decoder", "out")}[kind]
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.at[2].add(5.0) if tuple(p.key for p in path) == (*out, "bias") else leaf
        ),
        params,
    )
    z = jnp.ones((30, 3)) * mask[None]
    loss = jax.jit(stage.loss)
    before, after = (loss(p, z, mask, jax.random.key(1))[0] for p in (params, moved))
    assert float(before) == float(after)


def test_standardised_latents_have_unit_variance_noise_included_and_go_back():
    key = jax.random.split(jax.random.key(10), 3)
    mean = jax.random.normal(key[0], (4000, 3)) * jnp.array([2.0, 0.05, 1.0])[None] + 1.0
    deviation = jnp.full((4000, 3), 0.5)
    found = priors.latents_of(mean, deviation, active=0.01)
    assert found.mask.tolist() == [1, 0, 1]  # .05^2 is below .01
    z = mean + deviation * jax.random.normal(key[1], mean.shape)
    standard = found.standardise(z)
    np.testing.assert_allclose(standard.std(0), [1, 0, 1], atol=0.03)
    others = jax.random.normal(key[2], z.shape)
    back = found.restore(standard, others)
    np.testing.assert_allclose(back[:, ::2], z[:, ::2], atol=1e-5)
    np.testing.assert_array_equal(back[:, 1], others[:, 1])
