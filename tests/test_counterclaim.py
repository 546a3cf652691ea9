"""The published counter-claims: their data and nets, masks that change no number, a whole run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import counterclaim as counterclaim_config
from vaebal.errors import InputError
from vaebal.experiments.counterclaim import page, protocols
from vaebal.experiments.counterclaim import run as counterclaim
from vaebal.models import latent_noise
from vaebal.models.gaussians import isotropic_nll, kl_to_standard_normal
from vaebal.streams import stream
from vaebal.training import At, Member, Optimisation
from vaebal.training.step import init_state, train_step

SMALL = {"rank": 3.0, "padding": 2.0, "data_seed": 69.0}
MOST, DIM, LATENTS = 5, 5 + 1 + 4, 8  # of the stack that the small setting is part of


def test_sigmoid_sets_are_a_normal_its_bend_and_zeros():
    x = np.asarray(protocols.draw("sigmoid", jax.random.key(0), 4000, DIM, MOST, SMALL))
    z, bend, zeros = x[:, :3], x[:, MOST], np.delete(x, [0, 1, 2, MOST], axis=1)
    np.testing.assert_allclose(np.cov(z.T), np.eye(3), atol=0.1)
    assert not zeros.any()
    # The bend is a sigmoid of one linear map of z, the same in another draw.
    a, *_ = np.linalg.lstsq(z, np.log(bend / (1 - bend)), rcond=None)
    other = np.asarray(protocols.draw("sigmoid", jax.random.key(1), 50, DIM, MOST, SMALL))
    expected = 1 / (1 + np.exp(-other[:, :3] @ a))
    np.testing.assert_allclose(other[:, MOST], expected, atol=1e-4)
    mask = np.asarray(protocols.mask("sigmoid", DIM, MOST, SMALL))
    np.testing.assert_array_equal(mask, [1, 1, 1, 0, 0, 1, 1, 1, 0, 0])
    assert mask.sum() == 3 + 1 + 2  # r + 1 + zeros, as in the published code


def test_spheres_and_mixtures():
    sphere = np.asarray(protocols.draw("sphere", jax.random.key(0), 500, 9, MOST, SMALL))
    np.testing.assert_allclose(np.linalg.norm(sphere, axis=1), 1, rtol=1e-5)
    assert not sphere[:, 3:].any()
    x = np.asarray(protocols.draw("mixture", jax.random.key(0), 500, 20, MOST, SMALL))
    assert ((x > 0) & (x < 1)).all()
    assert np.linalg.matrix_rank(np.log(x / (1 - x)) - np.log(x / (1 - x)).mean(0), tol=0.1) == 3


def at(member, step=0):
    return At(member, jnp.asarray(step), jnp.asarray(member.latents), ())


def test_what_a_setting_does_not_have_is_in_no_number():
    """The stacked, masked loss is the loss of the setting's own net on its own features."""
    model = protocols.their_net("sigmoid", (), DIM, LATENTS)
    loss = protocols.objective("sigmoid", model, MOST, theirs=True, speed=3.0)
    member = Member(0, 4, float(np.exp(-3.0)), rule=SMALL)
    weights = loss.init(member, ())
    of_weights = lambda weights: loss.loss(weights, np.zeros((50, 1)), at(member))  # noqa: E731
    (value, told), slope = jax.jit(jax.value_and_grad(of_weights, has_aux=True))(weights)

    own = np.flatnonzero(protocols.mask("sigmoid", DIM, MOST, SMALL))
    encoder, decoder = weights["encoder"], weights["decoder"]
    x = np.asarray(
        protocols.draw("sigmoid", stream(0, "batch", jnp.asarray(0)), 50, DIM, MOST, SMALL)
    )[:, own]
    mean = x @ np.asarray(encoder["mean"]["kernel"])[own][:, :4]
    log_var = np.broadcast_to(np.asarray(encoder["log_var"])[:4], mean.shape)
    eps = np.asarray(latent_noise(stream(0, "noise", jnp.asarray(0)), 50, LATENTS))[:, :4]
    z = mean + np.exp(0.5 * log_var) * eps
    of = lambda name: z @ np.asarray(decoder[name]["kernel"])[:4][:, own]  # noqa: E731
    square = np.square(x - of("out") - 1 / (1 + np.exp(-of("bent")))).sum(1)
    expected = (isotropic_nll(square, -3.0, 6) + kl_to_standard_normal(mean, log_var).sum(1)).mean()
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert float(told.mean_square) == pytest.approx(square.mean() / 6, rel=1e-5)
    # Nothing that is masked has a gradient, so that Adam never moves it.
    others = np.setdiff1d(np.arange(DIM), own)
    assert not np.asarray(slope["encoder"]["mean"]["kernel"])[others].any()
    assert not np.asarray(slope["encoder"]["mean"]["kernel"])[:, 4:].any()
    for name in ("out", "bent"):
        assert not np.asarray(slope["decoder"][name]["kernel"])[:, others].any()
        assert not np.asarray(slope["decoder"][name]["kernel"])[4:].any()


def test_first_layers_start_with_the_variance_of_the_settings_own_size():
    model = protocols.their_net("sigmoid", (), DIM, LATENTS)
    loss = protocols.objective("sigmoid", model, MOST, theirs=True, speed=3.0)
    init = jax.jit(jax.vmap(lambda seed: loss.init(Member(seed, 4, 1.0, rule=SMALL), ())))
    weights = init(jnp.arange(300))
    for layer, fan_in in ((weights["encoder"]["mean"], 6), (weights["decoder"]["bent"], 4)):
        assert float(layer["kernel"].var()) == pytest.approx(1 / fan_in, rel=0.05)
    assert (weights["encoder"]["log_var"] == 1).all()  # as in the published code


@pytest.mark.slow
def test_their_variance_starts_where_theirs_does_and_moves_three_times_as_fast():
    model = protocols.their_net("sigmoid", (), DIM, LATENTS)
    loss = protocols.objective("sigmoid", model, MOST, theirs=True, speed=3.0)
    settings = Optimisation(1e-4, 1e-4, 0, 100, np.inf)
    member = Member(0, 4, float(np.exp(-3.0)), rule=SMALL)
    state = init_state(loss, settings, None, member, ())
    moved, _ = train_step(loss, settings, None, member, state, np.zeros((50, 1)), ())
    # Adam's first step is its rate.
    assert abs(float(moved.weights["gamma_step"])) == pytest.approx(1e-4, rel=1e-3)
    params = moved.weights | {"gamma_step": jnp.asarray(1e-4)}
    square = lambda p: float(loss.loss(p, np.zeros((50, 1)), at(member))[0])  # noqa: E731
    shifted = member._replace(gamma=float(np.exp(-3.0 + 3e-4)))
    expected = loss.loss(
        moved.weights | {"gamma_step": jnp.zeros(())}, np.zeros((50, 1)), at(shifted)
    )
    assert square(params) == pytest.approx(float(expected[0]), rel=1e-5)


def test_a_sphere_may_take_one_latent_more_than_its_dimension():
    row = functools.partial(dict, kind="sphere", rank=3, informative=2.0)
    assert page.right([row(active=2.0), row(active=3.0), row(active=4.0)]) == 2
    assert page.superset([row(active=2.0), row(active=4.0)]) == 1
    flat = functools.partial(dict, kind="sigmoid", rank=3)
    rows = [flat(active=3.0, informative=3.0), flat(active=3.0, informative=2.0)]
    assert page.right(rows) == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("arms", ("ours",), "arms holds 'ours'"),
        ("arms", ("ours, learned 1e",), "arms holds 'ours, learned 1e'"),
        ("arms", ("ours, learned 1.2.3",), "arms holds"),
        ("arms", ("ours, learned 0",), "RATE in nats of log γ a step above 0"),
        ("model.hidden", ("a",), "model.hidden holds 'a'"),
        ("model.hidden", (0,), "model.hidden holds 0: use integers of at least 1"),
        ("data.seeds", (-1,), "data.seeds holds -1"),
        ("data.zeros", (1, 2), "data.zeros"),
        ("data.kind", "cube", "data.kind"),
    ],
)
def test_a_config_that_cannot_be_meant_is_a_sentence(field, value, message):
    config = counterclaim_config.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=message):
        counterclaim.check(config)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", "starts"])
def test_a_whole_run_shows_every_arm_and_setting(tmp_path, variant):
    config = counterclaim_config.get_config(variant)
    changes = {
        "data.ranks": (2, 3), "data.zeros": (1, 2), "data.kappas": (3, 4), "data.tests": 60,
        "data.seeds": (1,), "model.width": 8, "model.blocks": 1, "train.batch_size": 10,
        "train.their_steps": 100, "train.steps": 100,
    }  # fmt: skip
    if variant:
        changes |= {"data.starts": (-1.0, 2.0), "arms": ("theirs", "theirs, adaptive")}
    else:
        changes["arms"] = ("theirs", "ours, adaptive")
    for field, value in changes.items():
        config.update_from_flattened_dict({field: value})
    rows = counterclaim.run(config, str(tmp_path))
    starts = 2 if variant else 1
    assert len(rows) == len(config.arms) * 2 * starts
    theirs = [row for row in rows if row["arm"] == "theirs"]
    for row in theirs:  # a hundred steps of at most about the rate, from where it starts
        most = 100 * config.train.their_gamma_speed * config.train.their_rate
        assert abs(np.log(row["gamma"]) - row["start"]) < 1.1 * most
        assert row["kl"] >= 0
    text = (tmp_path / "table.md").read_text()
    assert all(arm in text for arm in config.arms)
    assert ("By where γ starts" in text) == bool(variant)
    assert counterclaim.run(config, str(tmp_path)) == rows
