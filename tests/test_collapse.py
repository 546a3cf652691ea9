import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from vaebal.models import GaussianVAE, init_params, latent_noise, mlp_vae
from vaebal.models.nets import MLPEncoder, ResidualDecoder
from vaebal.streams import stream
from vaebal.theory import collapse as c


def build(pixels, *, layers=3, blocks=2, width=7, activation=jnp.tanh, residual=True, affine=True,
          head_bias=True, gamma=0.05, encoder_skip=False):  # fmt: skip
    """A float64 model of the digits-like `pixels`, every weight and bias away from its start."""
    outputs = pixels.shape[1]
    model = GaussianVAE(
        encoder=MLPEncoder(
            4, width, layers, activation, head_bias=head_bias, affine_skip=encoder_skip
        ),
        decoder=ResidualDecoder(outputs, width, blocks, activation, residual, 1.0),
        latents=4, outputs=outputs, affine_skip=affine, gamma=gamma,
    )  # fmt: skip
    x = jnp.asarray(np.float64(pixels))
    return model, _moved(model, x.mean(0)), x, latent_noise(stream(2, "test"), len(x), 4)


@functools.partial(jax.jit, static_argnums=0)
def _moved(model, x_bar):
    flat, unravel = jax.flatten_util.ravel_pytree(init_params(model, stream(0, "init"), x_bar))
    return unravel(flat + 0.1 * jax.random.normal(stream(1, "test"), flat.shape))


latent_gradients = jax.jit(c.latent_gradients, static_argnums=(0, 4), static_argnames="antithetic")
collapse = jax.jit(c.collapse, static_argnums=1, static_argnames="biases")
escape_curvature = jax.jit(c.escape_curvature, static_argnums=0)


def gradients_of(*arguments, **options):
    """As Python floats: float64 arrays must not leave x64."""
    return {name: float(v) for name, v in latent_gradients(*arguments, **options).items()}


ACTIVATIONS, SIZES = (jnp.tanh, jax.nn.relu, jax.nn.silu), ((1, 1, 3), (3, 2, 7), (6, 3, 5))


def all_cases():
    """Of which each value of each kind comes up in those that are not slow."""
    for i, activation in enumerate(ACTIVATIONS):
        for j, size in enumerate(SIZES):
            for head_bias in (True, False):
                few = i == j and head_bias == (i != 1)
                marks = () if few else pytest.mark.slow
                yield pytest.param(activation, *size, head_bias, marks=marks)


@pytest.mark.parametrize(
    ("activation", "layers", "blocks", "width", "head_bias"), list(all_cases())
)
def test_the_gradients_vanish_in_expectation(pixels, activation, layers, blocks, width, head_bias):
    with jax.enable_x64(True):
        model, params, x, eps = build(
            pixels, activation=activation, layers=layers, blocks=blocks, width=width,
            head_bias=head_bias,
        )  # fmt: skip
        scale = max(gradients_of(model, params, x, eps, 1).values())
        gradients = gradients_of(model, collapse(params, 1), x, eps, 1)
    assert set(gradients) | {"encoder/affine/kernel"} == set(c.LATENT_WEIGHTS)
    assert scale > 1e-2
    assert max(gradients.values()) < 1e-12 * max(1.0, float(scale))


def test_the_gradients_vanish_with_an_encoders_skip_too(pixels):
    with jax.enable_x64(True):
        model, params, x, eps = build(pixels, encoder_skip=True)
        scale = max(gradients_of(model, params, x, eps, 1).values())
        gradients = gradients_of(model, collapse(params, 1), x, eps, 1)
    assert set(gradients) == set(c.LATENT_WEIGHTS)
    assert max(gradients.values()) < 1e-12 * max(1.0, float(scale))


def test_live_biases_break_all_of_the_claims(pixels):
    with jax.enable_x64(True):
        model, params, x, eps = build(pixels)
        gradients = gradients_of(model, collapse(params, 1, biases=False), x, eps, 1)
    assert min(gradients.values()) > 1e-4


def test_one_draw_does_not_vanish_in_the_decoder(pixels):
    with jax.enable_x64(True):
        model, params, x, eps = build(pixels)
        gradients = gradients_of(model, collapse(params, 1), x, eps, 1, antithetic=False)
    assert gradients["decoder/first/kernel"] > 1e-3
    assert gradients["encoder/mean/kernel"] < 1e-12


def test_the_affine_skip_must_collapse_too(pixels):
    """With eq. 5 a live column of W_x keeps the encoder's gradient alive."""
    with jax.enable_x64(True):
        model, params, x, eps = build(pixels)
        collapsed = collapse(params, 1)
        collapsed["affine"]["kernel"] = params["affine"]["kernel"]
        gradients = gradients_of(model, collapsed, x, eps, 1)
    assert gradients["encoder/mean/kernel"] > 1e-4


def test_collapsing_one_latent_leaves_the_others(pixels):
    with jax.enable_x64(True):
        model, params, x, _ = build(pixels)
        collapsed = collapse(params, 2)
        posterior = model.apply({"params": collapsed}, x, method="encode")
        before = model.apply({"params": params}, x, method="encode")
    for after, was in zip(posterior, before, strict=True):
        np.testing.assert_array_equal(after[:, 2], 0)
        np.testing.assert_array_equal(np.delete(after, 2, 1), np.delete(was, 2, 1))


def test_latents_after_the_first_collapse_as_one_after_the_other(pixels):
    """Of NumPy's arrays as well."""
    with jax.enable_x64(True):
        model, params, _, _ = build(pixels)
        expected = params
        for latent in range(1, model.latents):
            expected = collapse(expected, latent)
        got = c.collapse(jax.tree.map(np.asarray, params), slice(1, None))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def collapsed_with_features(pixels, scale=1.0, **options):
    """A model at total collapse that decodes 0 to x_bar, and what its heads read.

    scale: of the hidden layers' weights and biases.
    """
    model, params, x, _ = build(pixels, **options)
    params = collapse(params)
    at_zero = model.apply({"params": params}, jnp.zeros((1, 4)), method="decode")[0]
    params["decoder"]["out"]["bias"] += x.mean(0) - at_zero
    layers, h = params["encoder"], x
    for name in ("layer1", "layer2"):
        layers[name] = jax.tree.map(lambda leaf: scale * leaf, layers[name])
        h = jnp.tanh(h @ layers[name]["kernel"] + layers[name]["bias"][None, :])
    read = [h, x - layers["centre"][None, :]] if "centre" in layers else [h]
    return model, params, x, jnp.concatenate([*read, jnp.ones((len(x), 1))], axis=1)


def test_only_an_encoders_skip_keeps_the_way_out_steep_where_features_have_shrunk(pixels):
    """What they explain is the same, but the curvature falls with them; that of x stays."""
    with jax.enable_x64(True):
        found = {}
        for skip in (False, True):
            for scale in (1.0, 0.03):
                case = collapsed_with_features(pixels, scale, gamma=0.01, encoder_skip=skip)
                found[skip, scale] = list(map(float, escape_curvature(*case)))
        x_alone = jnp.concatenate([case[2] - case[2].mean(0)[None, :], case[3][:, -1:]], axis=1)
        least, _ = map(float, escape_curvature(*case[:3], x_alone))
    curvature = {key: value[0] for key, value in found.items()}
    assert all(explained > 1 for _, explained in found.values())
    assert curvature[False, 1.0] < 30 * curvature[False, 0.03] < 0
    assert curvature[True, 0.03] <= 0.999 * least < 30 * curvature[False, 0.03]


@pytest.mark.parametrize(
    ("affine", "skip", "gamma"),
    [
        (True, False, 0.01), (False, False, 0.01), (True, True, 0.01), (True, False, 0.3),
        pytest.param(False, False, 0.3, marks=pytest.mark.slow),
        pytest.param(True, True, 0.3, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_predicted_curvature_is_the_hessians(pixels, affine, skip, gamma):
    """The least eigenvalue of the dense Hessian in latent j's weights, antithetic in eps."""
    with jax.enable_x64(True):
        model, params, x, features = collapsed_with_features(
            pixels, affine=affine, gamma=gamma, encoder_skip=skip
        )
        layers = params["encoder"]
        predicted, explained = escape_curvature(model, params, x, features)

        # One latent's weights: decoder row, affine row, mean head column and bias.
        parts = [params["decoder"]["first"]["kernel"][1], layers["mean"]["kernel"][:, 1]]
        parts += [layers["mean"]["bias"][1:2]]
        parts += [params["affine"]["kernel"][1]] if affine else []
        parts += [layers["affine"]["kernel"][:, 1]] if skip else []
        flat, unravel = jax.flatten_util.ravel_pytree(parts)
        # z_j = mu_j + eps_j with E eps_j = 0, E eps_j^2 = 1: the pair +-1 has these moments.
        eps = jnp.zeros((len(x), 4)).at[:, 1].set(1.0)

        def loss(flat):
            first, mean, bias, *skips = unravel(flat)
            moved = jax.tree.map(lambda leaf: leaf, params)
            moved["decoder"]["first"]["kernel"] = (
                moved["decoder"]["first"]["kernel"].at[1].set(first)
            )
            moved["encoder"]["mean"]["kernel"] = (
                moved["encoder"]["mean"]["kernel"].at[:, 1].set(mean)
            )
            moved["encoder"]["mean"]["bias"] = moved["encoder"]["mean"]["bias"].at[1].set(bias[0])
            if affine:
                moved["affine"]["kernel"] = moved["affine"]["kernel"].at[1].set(skips[0])
            if skip:
                read = moved["encoder"]["affine"]
                read["kernel"] = read["kernel"].at[:, 1].set(skips[-1])
            return c.antithetic_loss(model, moved, x, eps, 1)

        curvatures = jnp.linalg.eigvalsh(jax.jit(jax.hessian(loss))(flat))
    assert float(predicted) == pytest.approx(float(curvatures[0]), rel=1e-8, abs=1e-10)
    assert (float(explained) > 1) == (float(curvatures[0]) < -1e-9)


def test_a_skip_that_is_shut_is_none(pixels):
    """A gate at 0 leaves the curvature of the model without the skip."""
    with jax.enable_x64(True):
        model, params, x, features = collapsed_with_features(pixels, affine=False, gamma=0.01)
        expected = escape_curvature(model, params, x, features)
        shut = {"affine": {"kernel": jnp.zeros((4, 16))}, "affine_gate": jnp.zeros(())}
        got = escape_curvature(model.clone(affine_skip=None), params | shut, x, features)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_rounding_reaches_no_direction(pixels):
    """A decoder of rank 2 in float32: its other directions' singular values are rounding's."""
    with jax.enable_x64(True):
        model, params, x, features = collapsed_with_features(pixels, affine=False, gamma=0.01)
        out = params["decoder"]["out"]["kernel"]
        left, sizes, right = jnp.linalg.svd(out, full_matrices=False)
        params["decoder"]["out"]["kernel"] = (left[:, :2] * sizes[None, :2]) @ right[:2]
        at_zero = model.apply({"params": params}, jnp.zeros((1, 4)), method="decode")[0]
        params["decoder"]["out"]["bias"] += x.mean(0) - at_zero
        exact = float(escape_curvature(model, params, x, features)[1])
        few = jax.device_get((params, x, features))
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), few)
    assert float(escape_curvature(model, *single)[1]) == pytest.approx(exact, rel=0.01)


def test_the_affine_model_escapes_where_its_largest_variance_exceeds_gamma():
    """An affine encoder explains all the variance: Theorem 1's condition lambda_1 > gamma."""
    with jax.enable_x64(True):
        x = jax.random.normal(stream(0, "test"), (400, 5)) * jnp.sqrt(
            jnp.asarray([[3.0, 1, 0.5, 0.2, 0.1]])
        )
        x -= x.mean(0)[None, :]
        top = jnp.linalg.eigvalsh(x.T @ x / 400)[-1]
        features = jnp.concatenate([x, jnp.ones((400, 1))], axis=1)
        for factor in (0.99, 1.01):
            model = mlp_vae(
                outputs=5, latents=2, width=3, encoder_layers=1, decoder_blocks=1,
                activation=jnp.tanh, residual=True, affine_skip=True, gamma=float(top * factor),
            )  # fmt: skip
            params = collapse(init_params(model, stream(0, "init"), x.mean(0)))
            curvature, explained = escape_curvature(model, params, x, features)
            assert float(explained) == pytest.approx(1 / factor, rel=1e-8)
            assert (float(curvature) < -1e-9) == (factor < 1)
