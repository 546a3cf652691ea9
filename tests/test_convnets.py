import functools
import math

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from vaebal.models import conv_vae, convnets, infogan_vae, init_params, latent_noise, mlp_vae
from vaebal.streams import stream
from vaebal.theory import collapse
from vaebal.theory.hessian import hessian_vector_product
from vaebal.training.vae import loss_and_terms

SHAPE, K = (8, 8, 2), 3  # two scales at patch 1: 8 and 4


def small_conv(**changes):
    options = {
        "image_shape": SHAPE, "latents": K, "patch": 1, "width": 3, "blocks": 1,
        "activation": jax.nn.silu, "residual": True, "affine_skip": True, "gamma": 0.1,
    }  # fmt: skip
    return conv_vae(**(options | changes))


def small_infogan(**changes):
    options = {
        "image_shape": SHAPE, "latents": K, "activation": jax.nn.silu, "affine_skip": True,
        "gamma": 0.1,
    }  # fmt: skip
    return infogan_vae(**(options | changes))


def small_pooled(**changes):
    options = {
        "outputs": 128, "image_shape": SHAPE, "pool": 2, "latents": K, "width": 6,
        "encoder_layers": 2, "decoder_blocks": 1, "activation": jax.nn.silu, "residual": True,
        "affine_skip": True, "gamma": 0.1,
    }  # fmt: skip
    return mlp_vae(**(options | changes))


small_skip = functools.partial(small_pooled, encoder_skip=True)


@pytest.fixture
def x():
    """[4, 128] in [0, 1]."""
    return np.random.default_rng(0).uniform(size=(4, math.prod(SHAPE)))


@functools.partial(jax.jit, static_argnums=0)
def started(model, x, moved=0.0):
    """`init_params`, with every weight moved away from its start by so much noise."""
    params = init_params(model, stream(0, "init"), jnp.asarray(x).mean(0))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return unravel(flat + moved * jax.random.normal(stream(1, "test"), flat.shape))


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(model, params, *arguments, method=None):
    return model.apply({"params": params}, *arguments, method=method)


@pytest.mark.parametrize(
    ("side", "build"),
    [
        (32, functools.partial(conv_vae, patch=4, width=8, blocks=2, residual=True)),
        (64, functools.partial(conv_vae, patch=4, width=64, blocks=1, residual=False)),
        (128, functools.partial(conv_vae, patch=4, width=32, blocks=1, residual=True)),
        (128, functools.partial(conv_vae, patch=8, width=32, blocks=1, residual=True)),
        (28, infogan_vae),
        (64, infogan_vae),
    ],
)
def test_images_go_in_and_out_flat(side, build):
    model = build(
        image_shape=(side, side, 3), latents=20, activation=jax.nn.silu, affine_skip=False
    )
    dim = 3 * side**2
    params = jax.eval_shape(
        lambda: init_params(model, jax.random.key(0), jnp.zeros(dim), jnp.int32(7))
    )
    outputs = jax.eval_shape(
        lambda p: model.apply({"params": p}, jnp.zeros((2, dim)), jnp.zeros((2, 20))), params
    )
    assert outputs.mean.shape == outputs.log_var.shape == (2, 20)
    assert outputs.x_hat.shape == (2, dim)
    # What touches the latents bears the names by which collapse and padding find it.
    assert params["decoder"]["first"]["kernel"].shape[0] == 20
    assert params["encoder"]["mean"]["kernel"].shape[1] == 20


@pytest.mark.parametrize("side", [32, 64, 128])
def test_a_pyramid_ends_at_a_side_of_4(side):
    p = convnets.pyramid((side, side, 3), 4, 16)
    assert p.sides[0] == side // 4
    assert p.sides[-1] == 4
    assert all(a == 2 * b for a, b in zip(p.sides, p.sides[1:], strict=False))
    assert [c * s for c, s in zip(p.channels, p.sides, strict=True)] == [4 * side] * len(p.sides)


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((32, 64, 3), 4), ((30, 30, 3), 4), ((8, 8, 3), 4), ((24, 24, 1), 2), ((96, 96, 3), 4)],
)
def test_images_that_fit_no_pyramid_are_named(shape, patch):
    with pytest.raises(ValueError, match=rf"image_shape=\({shape[0]}, .*patch={patch}: .*square"):
        convnets.pyramid(shape, patch, 8)


@pytest.mark.parametrize(
    ("side", "stride", "padding"), [(3, 1, 1), (4, 1, 2), (3, 2, 0), (4, 2, 1)]
)
def test_a_convolution_by_products_is_xlas(side, stride, padding):
    """Value and both gradients, to float64 rounding; the padding is part of the claim."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
        layer = convnets.conv(5, side, stride, use_bias=False)
        params = layer.init(jax.random.key(1), x)

        def xla(params, x):
            return jax.lax.conv_general_dilated(
                x, params["params"]["kernel"], (stride, stride), [(padding, padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip

        def everything(apply):
            weights = jnp.sin(jnp.arange(apply(params, x).size, dtype=float))
            loss = lambda p, x: (apply(p, x).ravel() * weights).sum()  # noqa: E731
            return apply(params, x), jax.grad(loss, argnums=(0, 1))(params, x)

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
            everything(layer.apply),
            everything(xla),
        )


def test_patches_are_blocks_of_the_image_and_back():
    images = jnp.arange(2 * 6 * 4 * 3.0).reshape(2, 6, 4, 3)
    patches = convnets.to_patches(images, 2)
    assert patches.shape == (2, 3, 2, 12)
    np.testing.assert_array_equal(patches[1, 2, 0], images[1, 4:6, 0:2].ravel())
    np.testing.assert_array_equal(convnets.from_patches(patches, 2), images)


def test_a_block_moves_with_its_input():
    """Two windows of 3 reach 2 pixels: beyond that from the edge a shift commutes."""
    block = convnets.Block(3, jax.nn.silu, 1.0)
    h = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    params = block.init(jax.random.key(1), h)
    moved = block.apply(params, jnp.roll(h, (2, 1), (1, 2)))
    back = jnp.roll(moved, (-2, -1), (1, 2))
    here = block.apply(params, h)
    np.testing.assert_allclose(back[:, 2:-4, 2:-3], here[:, 2:-4, 2:-3], rtol=1e-5, atol=1e-5)
    assert np.abs(back - here)[:, :2].max() > 0.1  # the edge does know where it is


def test_residual_blocks_start_as_the_identity_and_others_do_not():
    h = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    for residual in (True, False):
        block = convnets.Block(3, jax.nn.silu, 0.0)
        out = block.apply(block.init(jax.random.key(1), h, residual), h, residual)
        assert (np.asarray(out) == h).all() == residual


@pytest.mark.parametrize("build", [small_conv, small_infogan, small_pooled, small_skip])
def test_initialisation_centres_both_ends_on_the_data(build, x):
    """Encoded, x_bar is 0; decoded, 0 is x_bar; and an image is neither."""
    model, mean_image = build(), np.float32(x.mean(0))[None]
    params = started(model, x)
    mean, log_var = apply(model, params, np.float32(np.r_[mean_image, x]), method="encode")
    np.testing.assert_allclose(mean[0], 0, atol=1e-6)
    np.testing.assert_array_equal(log_var, 0)
    at_zero = apply(model, params, np.zeros((1, K), np.float32), method="decode")
    np.testing.assert_allclose(at_zero, mean_image, atol=1e-6)
    assert np.abs(mean[1:]).max() > 0.1


def test_a_pooled_encoder_reads_the_means_of_squares(x):
    """As an encoder of the smaller image does, with the same weights."""
    images = jnp.float32(x)
    rows = images.reshape(-1, *SHAPE)
    small = (rows[:, ::2] + rows[:, 1::2]) / 2
    small = ((small[:, :, ::2] + small[:, :, 1::2]) / 2).reshape(len(x), -1)
    model = small_pooled()
    encoder = started(model, x, 0.1)["encoder"]
    plain = small_pooled(outputs=small.shape[1], pool=1).encoder
    got = model.encoder.apply({"params": encoder}, images)
    for a, b in zip(got, plain.apply({"params": encoder}, small), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_encoders_skip_adds_a_linear_map_of_the_centred_image(x):
    """To the mean alone; at the start it is zero, and all other weights are those without it."""
    model, images = small_pooled(encoder_skip=True), jnp.float32(x)
    params, without = started(model, x)["encoder"], started(small_pooled(), x)["encoder"]
    kernel = params["affine"].pop("kernel")
    np.testing.assert_array_equal(kernel, 0)
    kernel = jax.random.normal(stream(0, "skip"), kernel.shape)
    read = model.encoder.inputs(images)
    centred = read - model.encoder.inputs(jnp.float32(x.mean(0))[None])
    got = model.encoder.apply({"params": params | {"affine": {"kernel": kernel}}}, images)
    plain = small_pooled().encoder.apply({"params": without}, images)
    np.testing.assert_allclose(got[0], plain[0] + centred @ kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[1], plain[1])


def test_squares_that_do_not_tile_the_image_are_named():
    with pytest.raises(ValueError, match=r"image_shape=\(8, 8, 2\) does not fit pool=3: sides"):
        small_pooled(pool=3)


@pytest.mark.parametrize("build", [small_conv, small_infogan, small_pooled, small_skip])
def test_an_image_does_not_know_its_batch(build, x):
    """No statistics of a batch anywhere: alone and among others, the same outputs."""
    model = build()
    params = started(model, x, 0.1)
    x, eps = np.float32(x), np.asarray(latent_noise(jax.random.key(0), len(x), K))
    together = apply(model, params, x, eps)
    alone = apply(model, params, x[2:3], eps[2:3])
    for got, expected in zip(alone[:3], together[:3], strict=True):
        np.testing.assert_allclose(got[0], expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "build",
    [
        small_conv,
        pytest.param(functools.partial(small_conv, residual=False), marks=pytest.mark.slow),
        pytest.param(small_infogan, marks=pytest.mark.slow),
        pytest.param(small_skip, marks=pytest.mark.slow),
    ],
)
def test_gradients_and_curvature_are_those_of_finite_differences(build, x):
    """Along one direction, in float64: the gradient, and the Hessian (forward over reverse)."""
    model = build()
    with jax.enable_x64(True):
        params = started(model, x, 0.05)
        images, eps = jnp.asarray(x), latent_noise(jax.random.key(0), len(x), K)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        direction = jax.random.normal(jax.random.key(1), flat.shape)
        direction = unravel(direction / jnp.linalg.norm(direction))

        def loss(params):
            return loss_and_terms(model, params, images, eps)[0]

        value_and_grad = jax.jit(jax.value_and_grad(loss))
        step = 1e-5
        at = lambda sign: value_and_grad(  # noqa: E731
            jax.tree.map(lambda p, d: p + sign * step * d, params, direction)
        )
        (above, slope_above), (below, slope_below) = at(1), at(-1)
        _, gradient = value_and_grad(params)
        slope = float(
            sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
        )
        product = jax.jit(lambda p: hessian_vector_product(loss, p, direction))(params)
        difference = jax.tree.map(lambda a, b: (a - b) / (2 * step), slope_above, slope_below)
    assert slope == pytest.approx(float(above - below) / (2 * step), rel=1e-6)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(difference))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7 * size),
        product,
        difference,
    )


def test_theorem_2_holds_for_a_convolutional_net(x):
    """Live, latent 1 has gradients; collapsed, none in expectation over its noise."""
    with jax.enable_x64(True):
        model = small_conv()
        params, images = started(model, x, 0.1), jnp.asarray(x)
        eps = latent_noise(jax.random.key(0), len(x), K)
        gradients = jax.jit(lambda p: collapse.latent_gradients(model, p, images, eps, 1))
        live = {name: float(value) for name, value in gradients(params).items()}
        dead = {
            name: float(value) for name, value in gradients(collapse.collapse(params, 1)).items()
        }
    assert set(dead) | {"encoder/affine/kernel"} == set(collapse.LATENT_WEIGHTS)
    assert min(live.values()) > 1e-3
    assert max(dead.values()) < 1e-12 * max(1.0, *live.values())


@pytest.mark.parametrize("build", [small_conv, small_infogan, small_pooled, small_skip])
def test_a_collapsed_latent_is_one_that_is_not_there(build, x):
    """The model of kappa = 2 in K = 3 latents, whatever the third's noise."""
    with jax.enable_x64(True):
        model = build()
        params, eps = started(model, x, 0.1), latent_noise(jax.random.key(0), len(x), K)
        without = apply(model, params, x, eps, K - 1)
        collapsed = apply(model, collapse.collapse(params, K - 1), x, eps, K)
        whole = apply(model, params, x, eps, K)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), collapsed, without)
    assert np.abs(whole.x_hat - without.x_hat).max() > 1e-3


@pytest.mark.slow
def test_rematerialised_blocks_are_the_same_net_in_less_memory(x):
    """Same parameters, loss and gradient; less than half is kept for it, 32 images of 64 px.

    Counted before XLA, whose CPU compiler undoes it: it merges what is computed twice.
    """
    eps = latent_noise(jax.random.key(0), len(x), K)

    def loss(params, images, eps, model):
        return loss_and_terms(model, params, images, eps)[0]

    got, expected = (
        (params := started(model, x, 0.1), jax.value_and_grad(loss)(params, x, eps, model))
        for model in (small_conv(remat=True), small_conv())
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)

    def kept_bytes(remat):
        model = small_conv(
            image_shape=(64, 64, 3), patch=4, width=16, blocks=2, latents=20, remat=remat
        )
        images, eps = jnp.zeros((32, 64 * 64 * 3)), jnp.zeros((32, 20))
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), images[0]))
        pull = jax.eval_shape(
            lambda params: jax.vjp(lambda p: loss(p, images, eps, model), params)[1], params
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    assert kept_bytes(True) < 0.5 * kept_bytes(False)


def test_images_need_not_be_square():
    """On a CPU the windows were as many across as down: others' right-hand side was not seen."""
    model = small_infogan(image_shape=(8, 12, 1))
    x = np.random.default_rng(0).uniform(size=(2, 96)).astype(np.float32)
    params = started(model, x, 0.1)
    pixels = jax.grad(lambda x: apply(model, params, x, method="encode")[0].sum())(jnp.asarray(x))
    assert (np.abs(pixels.reshape(2, 8, 12)) > 0).all()
    mean, _ = apply(model, params, x, method="encode")
    assert apply(model, params, mean, method="decode").shape == (2, 96)
    kernel = jax.random.normal(jax.random.key(0), (4, 4, 3, 5))
    for shape in ((2, 8, 12, 3), (2, 12, 8, 3)):
        image = jax.random.normal(jax.random.key(1), shape)
        given = None, image, kernel, (2, 2), ((1, 1), (1, 1))
        expected = jax.lax.conv_general_dilated(
            image, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(
            convnets._windows_times_kernel(*given), expected, rtol=1e-4, atol=1e-4
        )
