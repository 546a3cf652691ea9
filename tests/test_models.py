import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaebal.models import (
    Outputs,
    conv_vae,
    infogan_vae,
    init_params,
    latent_noise,
    prior_samples,
    with_own_skips,
)
from vaebal.models.objectives import gaussian_vae_terms
from vaebal.streams import stream


def _init(model, pixels, seed=0, kappa=None):
    return init_params(model, stream(seed, "init"), jnp.asarray(pixels.mean(0)), kappa)


def _shapes(params):
    return {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def test_the_network_is_the_papers():
    """Six encoder layers, the heads being the sixth; three blocks of two; one scalar gamma."""
    from configs import mnist_kappa
    from vaebal.experiments.kappa_sweep.run import build_model

    model = build_model(mnist_kappa.get_config(), 784, 50, "residual+affine")
    shapes = _shapes(
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 784)), jnp.zeros((1, 50)))[
            "params"
        ]
    )
    width = mnist_kappa.get_config().model.width
    kernels = {name.removesuffix("/kernel"): s for name, s in shapes.items() if s and len(s) == 2}
    encoder = [f"encoder/layer{i}" for i in range(1, 6)] + ["encoder/mean", "encoder/log_var"]
    blocks = [f"decoder/block{i}{ab}" for i in (1, 2, 3) for ab in "ab"]
    assert set(kernels) == {*encoder, "decoder/first", *blocks, "decoder/out", "affine"}
    assert kernels["affine"] == (50, 784)
    assert all(kernels[name] == (width, width) for name in blocks)
    assert shapes["log_gamma"] == ()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("affine_skip", [True, False])
def test_skips_switch_alone(small_vae, pixels, residual, affine_skip):
    """Residual skips change no parameter; the affine skip adds W_x alone."""
    shapes, reference = (
        _shapes(jax.eval_shape(lambda model=model: _init(model, pixels)))
        for model in (small_vae(residual=residual, affine_skip=affine_skip), small_vae())
    )
    if not affine_skip:
        del reference["affine/kernel"]
    assert shapes == reference


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("affine_skip", [True, False])
def test_skips_left_open_are_those_of_the_parameters(small_vae, pixels, residual, affine_skip):
    """Same draws at the start, same function after it, no gradient on gates or on an absent W_x."""
    fixed = small_vae(residual=residual, affine_skip=affine_skip, branch_scale=0.3)
    left_open = small_vae(residual=None, affine_skip=None, branch_scale=0.3)
    params = init_params(
        left_open, stream(0, "init"), jnp.asarray(pixels.mean(0)), 5,
        residual=residual, affine=affine_skip,
    )  # fmt: skip
    model, own = with_own_skips(left_open, params)
    assert model == fixed
    jax.tree.map(np.testing.assert_array_equal, own, _init(fixed, pixels, kappa=5))

    params["affine"]["kernel"] = jax.random.normal(jax.random.key(2), (5, 16))
    z = prior_samples(jax.random.key(1), 7, 5)
    decode = lambda params: left_open.apply({"params": params}, z, method="decode")  # noqa: E731
    np.testing.assert_array_equal(
        decode(params),
        fixed.apply({"params": with_own_skips(left_open, params)[1]}, z, method="decode"),
    )
    gradient = jax.grad(lambda params: jnp.square(decode(params)).sum())(params)
    assert gradient["affine_gate"] == gradient["decoder"]["residual_gate"] == 0
    assert (np.asarray(gradient["affine"]["kernel"]) != 0).all() == affine_skip
    assert affine_skip or (np.asarray(gradient["affine"]["kernel"]) == 0).all()


def test_the_affine_skip_adds_w_x_z(small_vae, pixels):
    model = small_vae()
    params = _init(model, pixels)
    z = prior_samples(jax.random.key(1), 7, 5)
    before = model.apply({"params": params}, z, method="decode")
    w = jax.random.normal(jax.random.key(2), params["affine"]["kernel"].shape)
    params["affine"]["kernel"] = w
    after = model.apply({"params": params}, z, method="decode")
    np.testing.assert_allclose(after - before, z @ w, atol=2e-6)


def test_residual_blocks_are_the_identity_at_branch_scale_zero(small_vae, pixels):
    """f(z) is then out(act(first(z))), whatever the number of blocks."""
    z = prior_samples(jax.random.key(1), 7, 5)
    values = [
        model.apply({"params": _init(model, pixels)}, z, method="decode")
        for model in (small_vae(decoder_blocks=1), small_vae(decoder_blocks=4))
    ]
    np.testing.assert_array_equal(*values)


def test_a_fixed_gamma_is_no_parameter(small_vae, pixels):
    learned, fixed = small_vae(gamma_init=0.5), small_vae(gamma=0.5)
    params = _init(fixed, pixels)
    assert "log_gamma" not in params
    assert float(fixed.apply({"params": params}, method="log_gamma")) == pytest.approx(np.log(0.5))
    learned_params = _init(learned, pixels)
    assert float(learned_params.pop("log_gamma")) == pytest.approx(np.log(0.5))
    jax.tree.map(np.testing.assert_array_equal, learned_params, params)


def test_a_linear_variance_is_the_usual_one_up_to_the_priors(small_vae, pixels):
    """exp(a) for a <= 0 and 1 + a above: once differentiable at 0, and finite for any a."""
    model = small_vae()
    params = init_params(model, jax.random.key(0), pixels.mean(0), 5)
    encode = lambda bias, model: model.apply(  # noqa: E731
        {"params": params | {"encoder": params["encoder"] | {
            "log_var": {**params["encoder"]["log_var"], "bias": jnp.full(5, bias)}}}},
        jnp.float32(pixels[:1]), method="encode",
    )[1][0, 0]  # fmt: skip
    linear = model.clone(linear_variance=True)
    for bias in (-2.0, -1e-4, 0.0):
        assert encode(bias, linear) == encode(bias, model)
    for bias in (1e-4, 0.7, 1e30):
        assert encode(bias, linear) == pytest.approx(np.log1p(bias), rel=1e-5)
    slopes = [float(jax.grad(encode)(jnp.float32(bias), linear)) for bias in (-1.0, 0.0, 1.0, 1e30)]
    assert slopes == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_initialisation_centres_both_ends_on_the_data(small_vae, pixels):
    """The encoder's first layer sees x - x_bar; the decoder's mean for z = 0 is near x_bar."""
    model = small_vae(decoder_blocks=1)
    params = _init(model, pixels)
    first = params["encoder"]["layer1"]
    np.testing.assert_allclose(pixels.mean(0) @ first["kernel"] + first["bias"], 0, atol=1e-6)
    at_zero = model.apply({"params": params}, jnp.zeros((1, 5)), method="decode")
    np.testing.assert_allclose(at_zero[0], pixels.mean(0), atol=1e-6)


def _image_vae(build, **changes):
    options = {"image_shape": (8, 8, 1), "latents": 5, "affine_skip": True, "gamma": 0.1}
    if build is conv_vae:
        options |= {"patch": 1, "width": 2, "blocks": 1, "residual": True}
    return build(activation=jax.nn.silu, **(options | changes))


def test_skips_of_convolutional_nets_switch_alone():
    """As those of the MLP: residual skips change no parameter, the affine skip adds W_x."""

    def shapes(build, **changes):
        model = _image_vae(build, **changes)
        return _shapes(jax.eval_shape(lambda: _init(model, np.zeros((1, 64)))))

    for build in (conv_vae, infogan_vae):
        reference = shapes(build)
        assert reference.pop("affine/kernel") == (5, 64)
        assert shapes(build, affine_skip=False) == reference
    assert shapes(conv_vae, residual=False) == shapes(conv_vae)
    assert shapes(conv_vae, gamma=None) == shapes(conv_vae) | {"log_gamma": ()}


@pytest.mark.parametrize("build", [conv_vae, pytest.param(infogan_vae, marks=pytest.mark.slow)])
def test_padding_the_latents_of_a_convolutional_net_changes_nothing(build):
    """K = 9 with kappa = 5 starts as the model of K = 5, and the rest is the prior."""
    x = jax.random.uniform(jax.random.key(0), (3, 64))
    outputs = []
    for latents, kappa in ((5, None), (9, 5)):
        model = _image_vae(build, latents=latents)
        eps = latent_noise(jax.random.key(1), 3, latents)
        run = jax.jit(
            lambda model=model, kappa=kappa, eps=eps: model.apply(
                {"params": _init(model, np.asarray(x), kappa=kappa)}, x, eps, kappa
            )
        )
        outputs.append(run())
    alone, padded = outputs
    np.testing.assert_allclose(padded.x_hat, alone.x_hat, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(padded.mean[:, :5], alone.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(padded.mean[:, 5:], 0)
    np.testing.assert_array_equal(padded.log_var[:, 5:], 0)
    assert np.abs(alone.mean).max() > 0.1


@pytest.mark.parametrize("latents", [4, 64, 784])
def test_the_start_does_not_depend_on_kappa(latents):
    """Posterior means and decoder outputs start at the same scale for kappa = 4 and 784."""
    from vaebal.models import mlp_vae

    model = mlp_vae(
        outputs=64, latents=latents, width=256, encoder_layers=6, decoder_blocks=3,
        activation=jax.nn.relu, residual=True, affine_skip=True,
    )  # fmt: skip
    x = jax.random.uniform(jax.random.key(0), (256, 64))
    params = init_params(model, stream(0, "init"), x.mean(0))
    mean, log_var = model.apply({"params": params}, x, method="encode")
    x_hat = model.apply(
        {"params": params}, prior_samples(jax.random.key(1), 256, latents), method="decode"
    )
    assert 0.15 < float(mean.std()) < 0.4
    assert (np.asarray(log_var) == 0).all()
    assert 0.4 < float((x_hat - x.mean(0)[None]).std()) < 1.0


def test_padding_the_latents_changes_nothing(small_vae, pixels):
    """K = 9 with kappa = 5 is, in value and gradient, the model of K = 5."""
    with jax.enable_x64(True):
        small, padded = small_vae(), small_vae(latents=9)
        x = jnp.asarray(pixels, jnp.float64)
        eps = {k: latent_noise(jax.random.key(3), len(x), k) for k in (5, 9)}
        np.testing.assert_array_equal(eps[9][:, :5], eps[5])

        def loss(model, kappa, latents):
            def value(params):
                terms = gaussian_vae_terms(
                    x, model.apply({"params": params}, x, eps[latents], kappa)
                )
                return terms.negative_elbo.mean()

            return jax.jit(jax.value_and_grad(value))(_init(model, x, kappa=kappa))

        (value, gradient), (value_padded, gradient_padded) = (
            loss(small, None, 5),
            loss(padded, 5, 9),
        )
    np.testing.assert_allclose(value_padded, value, rtol=1e-14)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient_padded):
        name = "/".join(key.key for key in path)
        reference = gradient
        for key in path:
            reference = reference[key.key]
        if name in ("decoder/first/kernel", "affine/kernel"):
            outside, leaf = leaf[5:], leaf[:5]
        elif name.startswith(("encoder/mean", "encoder/log_var")):
            outside, leaf = leaf[..., 5:], leaf[..., :5]
        else:
            outside = np.zeros(1)
        np.testing.assert_array_equal(outside, 0, err_msg=name)
        np.testing.assert_allclose(leaf, reference, rtol=1e-11, atol=1e-13, err_msg=name)


def test_terms_refuse_to_broadcast():
    outputs = Outputs(jnp.zeros((1, 3)), jnp.zeros((4, 2)), jnp.zeros((4, 2)), jnp.zeros(()))
    with pytest.raises(ValueError, match=r"x_hat has shape \(1, 3\)"):
        gaussian_vae_terms(jnp.zeros((4, 3)), outputs)


def test_the_gradient_of_the_terms_with_respect_to_z_is_one_grad_away(small_vae, pixels):
    """Encode, sample and decode are separable: dL/dz against finite differences."""
    model = small_vae()
    params = _init(model, pixels)
    x = jnp.asarray(pixels[:3])

    def error(z):
        return jnp.square(x - model.apply({"params": params}, z, method="decode")).sum()

    z = prior_samples(jax.random.key(0), 3, 5)
    direction = prior_samples(jax.random.key(1), 3, 5)
    step = 1e-2
    slope = (error(z + step * direction) - error(z - step * direction)) / (2 * step)
    np.testing.assert_allclose((jax.grad(error)(z) * direction).sum(), slope, rtol=1e-3)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (40, 2)])
def test_the_dense_layers_gradients_are_jaxs_own(shape):
    """Value, gradient and Hessian-vector product of the layer equal those of a plain product."""
    from vaebal.models.nets import dense

    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (5, shape[0]))
        layer = dense(shape[1])
        params = layer.init(jax.random.key(1), x)
        direction = jax.tree.map(jnp.cos, params)

        def ours(params, x):
            return jnp.tanh(layer.apply(params, x)).sum()

        def plain(params, x):
            return jnp.tanh(x @ params["params"]["kernel"] + params["params"]["bias"][None]).sum()

        def everything(loss):
            gradient = jax.grad(loss, argnums=(0, 1))
            product = jax.jvp(lambda p: gradient(p, x), (params,), (direction,))
            return loss(params, x), product

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14),
            everything(ours),
            everything(plain),
        )
