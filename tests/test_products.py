"""Matrix products of bfloat16 factors: what is rounded, and what is not."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from vaebal import homotopy
from vaebal.models import conv_vae, convnets, infogan_vae, init_params, latent_noise, mlp_vae, nets
from vaebal.streams import stream
from vaebal.training import Member, Optimisation, gaussian_vae
from vaebal.training.step import init_state, train_step
from vaebal.training.vae import loss_and_terms

SHAPE, K = (8, 8, 2), 3
BUILDS = {
    "mlp": functools.partial(
        mlp_vae, outputs=128, width=24, encoder_layers=3, decoder_blocks=1, residual=True,
        branch_scale=1.0,
    ),
    "conv": functools.partial(
        conv_vae, image_shape=SHAPE, patch=1, width=4, blocks=1, residual=True
    ),
    "infogan": functools.partial(infogan_vae, image_shape=SHAPE),
}  # fmt: skip

# The last one's layers are as wide as they were published.
NAMES = ("mlp", "conv", pytest.param("infogan", marks=pytest.mark.slow))


def built(name, products=None):
    return BUILDS[name](
        latents=K, activation=jax.nn.silu, affine_skip=True, gamma_init=0.1, products=products
    )


def moved(model, x, noise=0.05):
    """Parameters with every weight moved away from its start, where many are zero."""
    params = init_params(model, stream(0, "init"), x.mean(0))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return unravel(flat + noise * jax.random.normal(stream(1, "test"), flat.shape))


@pytest.fixture
def x():
    """[6, 128] in [0, 1]."""
    return jax.random.uniform(jax.random.key(0), (6, 128))


def rounded(a):
    return np.float64(jnp.asarray(a).astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("outputs", [2, 30])  # narrow and wide: two ways to the kernel's gradient
def test_a_product_is_that_of_the_rounded_factors(outputs):
    """Forward and backward, accumulated and returned in float32: against NumPy in float64."""
    x, kernel, g = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(64, 40), (40, outputs), (64, outputs)])
    )
    y, pull = jax.vjp(lambda x, kernel: nets.product(x, kernel, jnp.bfloat16), x, kernel)
    got = y, *pull(g)
    expected = (
        rounded(x) @ rounded(kernel),
        rounded(g) @ rounded(kernel).T,
        rounded(x).T @ rounded(g),
    )
    for value, exact in zip(got, expected, strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-4)
    kept = [leaf.dtype for leaf in jax.tree.leaves(pull) if leaf.size > 1]
    assert kept == [jnp.bfloat16] * 2


CONVOLUTIONS = {
    "windows": convnets._windows_times_kernel,
    "xla": convnets._convolution,
}


@pytest.mark.parametrize("way", CONVOLUTIONS)
@pytest.mark.parametrize(("side", "stride", "padding"), [(3, 1, 1), (4, 2, 1), (3, 2, 0)])
def test_a_convolution_is_that_of_the_rounded_factors(way, side, stride, padding):
    """Against XLA's own convolution and its gradients, in float64 of the rounded arrays."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (side, side, 3, 5))
    options = (stride, stride), [(padding, padding)] * 2
    y, pull = jax.vjp(lambda *a: CONVOLUTIONS[way](jnp.bfloat16, *a, *options), x, kernel)
    g = jax.random.normal(jax.random.key(2), y.shape)
    got = y, *pull(g)
    with jax.enable_x64(True):
        exact, exact_pull = jax.vjp(
            lambda *a: jax.lax.conv_general_dilated(
                *a, *options, dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            jnp.asarray(rounded(x)), jnp.asarray(rounded(kernel)),
        )  # fmt: skip
        expected = exact, *exact_pull(jnp.asarray(rounded(g)))
    for value, reference in zip(got, expected, strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, reference, rtol=1e-4, atol=1e-4)


def equations(jaxpr):
    """Of a jaxpr and all inside it."""
    inside = lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr")  # noqa: E731
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=inside):
            if inside(value):
                yield from equations(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("name", NAMES)
def test_every_product_of_a_step_takes_bfloat16_and_gives_float32(name, x):
    """... and nothing else is bfloat16 but factors on their way into one."""
    model = built(name, jnp.bfloat16)
    eps = latent_noise(stream(0, "test"), len(x), K)
    params = jax.eval_shape(lambda: init_params(model, stream(0, "init"), x.mean(0)))
    step = jax.make_jaxpr(jax.grad(lambda p: loss_and_terms(model, p, x, eps)[0]))(params)
    kernels = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(params))
    products = 0
    for equation in equations(step.jaxpr):
        taken, given = (
            {v.aval.dtype for v in vs if v.aval.dtype in (jnp.float32, jnp.bfloat16)}
            for vs in (equation.invars, equation.outvars)
        )
        if equation.primitive.name == "dot_general":
            products += 1
            assert (taken, given) == ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)})
        elif jnp.bfloat16 in given and not hasattr(equation.params.get("jaxpr"), "eqns"):
            assert equation.primitive.name in CARRIERS, equation
    assert products == 3 * kernels


CARRIERS = {"convert_element_type", "reshape", "transpose", "jit", "pjit", "custom_vjp_call"}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_rounded_products_are_close_and_not_equal(name, x):
    eps = latent_noise(stream(0, "test"), len(x), K)
    params = moved(built(name), x)

    def gradient(products):
        model = built(name, products)
        loss = lambda params: loss_and_terms(model, params, x, eps)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    (exact_loss, exact), (loss, got) = gradient(None), gradient(jnp.bfloat16)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    assert float(loss) == pytest.approx(float(exact_loss), rel=1e-2)
    a, b = (np.asarray(jax.flatten_util.ravel_pytree(tree)[0]) for tree in (got, exact))
    assert 0 < np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)
    assert a @ b > 0.999 * np.linalg.norm(a) * np.linalg.norm(b)


def test_master_weights_and_moments_stay_float32(x):
    """A step smaller than bfloat16 resolves moves every weight that has a gradient."""
    settings = Optimisation(1e-6, 1e-6, 0, 10, 20.0)
    objective = gaussian_vae(model := built("mlp", jnp.bfloat16))
    setup = objective, settings, lambda member: homotopy.closed_form(0.02), Member(0, K, 0.1)
    state = init_state(*setup, x.mean(0))
    weights = {name: leaf for name, leaf in moved(model, x).items() if name != "log_gamma"}
    state = state._replace(weights=weights)
    new, statistics = jax.jit(functools.partial(train_step, *setup))(state, x, x.mean(0))
    floats = {
        leaf.dtype
        for leaf in jax.tree.leaves((new, statistics))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    assert floats == {jnp.dtype(jnp.float32)}
    kernel, before = (s.params["decoder"]["block1a"]["kernel"] for s in (new, state))
    assert (np.asarray(kernel) != before).mean() > 0.9
    assert (kernel.astype(jnp.bfloat16) != before.astype(jnp.bfloat16)).mean() < 0.1


def _precisions(jaxpr):
    """Of all products in a jaxpr, those of its inner ones too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _precisions(inner)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("products", "backend", "wanted"),
    [
        *(("float32", "gpu", "HIGHEST"), ("tensorfloat32", "gpu", "DEFAULT")),
        *(("tensorfloat32", "tpu", "HIGH"), ("bfloat16", "tpu", "DEFAULT")),
    ],
)
def test_products_are_exact_wherever_nothing_else_is_asked_for(
    x, name, products, backend, wanted, monkeypatch
):
    """An accelerator's own way with float32 (TF32: errors of 3e-4) is not taken unasked."""
    monkeypatch.setattr(nets.jax, "default_backend", lambda: backend)
    model = built(name, nets.PRODUCTS[products])
    params = init_params(model, stream(0, "init"), x.mean(0))
    eps = latent_noise(stream(0, "noise"), len(x), K)
    loss = jax.grad(lambda params: loss_and_terms(model, params, x, eps)[0])
    found = list(_precisions(jax.make_jaxpr(loss)(params).jaxpr))
    assert len(found) > 20
    precision = jax.lax.Precision[wanted]
    assert all(each in (precision, (precision, precision)) for each in found)
