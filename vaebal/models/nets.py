"""Encoders and decoders as Flax modules. Shapes: B batch, D pixels, K latents (kappa).

Kernels that touch the latent space are drawn latent-major, so that the first k
latents of a net built for K > k get the weights that a net built for k would get.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Activation = Callable[[Array], Array]
# The type to which a matrix product's factors are rounded, forward and backward, to be multiplied
# as the device does it fastest; None: as they are, and exactly, where an accelerator's own way with
# float32 would shorten them. Results, and all that is not a product, keep the parameters' type.
Products = DTypeLike | None

ACTIVATIONS: dict[str, Activation] = {
    name: getattr(jax.nn, name) for name in ("relu", "gelu", "silu", "tanh", "softplus")
}

# No layer is exempt: of trained nets on digits and MNIST, rounding moves x_hat by 1e-6 per pixel in
# mean square (7e-5 to 1.5e-4 of gamma), and sparing the decoder's last layer and the affine skip
# saves a third of that. Where gamma ends near 1e-5 it would be a tenth of it: float32 there.
# TF32, an Nvidia GPU's own way with float32, moves x_hat a sixty-fourth as much.
PRODUCTS: dict[str, Products] = {
    "float32": None,
    "tensorfloat32": jnp.float32,
    "bfloat16": jnp.bfloat16,
}

# Keeps the variance of activations constant through rectifiers (He et al., 2015).
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


def scaled(
    initializer: nn.initializers.Initializer, scale: float | Array
) -> nn.initializers.Initializer:
    """`initializer` times `scale`."""
    return lambda *args: scale * initializer(*args)


def _latent_major_fan_in(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    """[W, K] with variance 1/W, drawn as [K, W]: a prefix of latents is a prefix of draws."""
    return jax.random.normal(key, shape[::-1], dtype).T / jnp.sqrt(shape[0]).astype(dtype)


def rounded(factors: tuple[Array, ...], products: Products) -> tuple[Array, ...]:
    """`factors` as a product takes them."""
    return factors if products is None else tuple(factor.astype(products) for factor in factors)


def precision(products: Products) -> jax.lax.Precision:
    """Of a product: exact, or the device's fastest, but of float32 not less than TF32's.

    A TPU's own way with float32 is one pass in bfloat16.
    """
    if products is None:
        return jax.lax.Precision.HIGHEST
    shorter = products == jnp.float32 and jax.default_backend() == "tpu"
    return jax.lax.Precision.HIGH if shorter else jax.lax.Precision.DEFAULT


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, products: Products = None) -> Array:
    """x [B, I], kernel [I, O], of one type -> [B, O] of that type.

    The kernel's gradient is computed in the kernel's layout. JAX's own rule computes its
    transpose. XLA folds that into the product for a lone network, but not under vmap (of one
    member or many), where every use of the gradient (its norm, Adam's moments) then reads it
    column by column: nearly half of a training step's time on a CPU.
    """
    return _product_forward(x, kernel, products)[0]


# Plain operations in both rules, so that forward over reverse (Hessians) goes through.
def _product_forward(x: Array, kernel: Array, products: Products):
    factors = rounded((x, kernel), products)
    y = jnp.matmul(*factors, precision=precision(products), preferred_element_type=x.dtype)
    return y, factors


def _product_backward(products: Products, factors: tuple[Array, Array], g: Array):
    (x, kernel), (low,) = factors, rounded((g,), products)
    contract = functools.partial(
        jax.lax.dot_general, precision=precision(products), preferred_element_type=g.dtype
    )
    over_outputs, over_batch = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
    dx = contract(low, kernel, over_outputs)
    if 4 * kernel.shape[1] < kernel.shape[0]:  # a narrow product is faster the other way round
        return dx, contract(low, x, over_batch).T
    return dx, contract(x, low, over_batch)


product.defvjp(_product_forward, _product_backward)


def _dot_general(products: Products, x: Array, kernel: Array, *_, **same_as_default) -> Array:
    """The matrix product that nn.Dense calls: x [..., I], kernel [I, O] -> [..., O]."""
    flat = product(x.reshape(-1, x.shape[-1]), kernel, products)
    return flat.reshape(*x.shape[:-1], -1)


def dense(features: int, products: Products = None, **options) -> nn.Dense:
    """nn.Dense with parameters in float32, or in float64 where JAX has x64 enabled.

    Differentiable in reverse mode, and forward over reverse (Hessians); not in forward mode
    alone.
    """
    return nn.Dense(
        features,
        param_dtype=jnp.result_type(float),
        dot_general=functools.partial(_dot_general, products),
        **options,
    )


def latent_heads(
    features: Array, latents: int, bias: bool, log_var_init: float, products: Products
) -> tuple[Array, Array]:
    """features [B, F] -> mean, log_var [B, K]: an encoder's last layer, inside its `__call__`.

    The mean head starts at unit scale, so that every latent carries signal from
    the first step. The log-variance head starts at zero weights, so that sigma^2
    starts at exp(log_var_init) for every x.
    """
    mean = dense(latents, products, use_bias=bias, kernel_init=_latent_major_fan_in, name="mean")(
        features
    )
    log_var = dense(
        latents,
        products,
        use_bias=bias,
        kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(log_var_init),
        name="log_var",
    )(features)
    return mean, log_var


class MLPEncoder(nn.Module):
    """Feed-forward encoder of `layers` layers; the two heads are the last one (Theorem 2).

    Attributes:
      latents: K.
      width: units of each hidden layer.
      layers: rho of Theorem 2, the heads included.
      head_bias: whether the heads have biases; Theorem 2 needs them zero or absent.
      log_var_init: log sigma^2 at the start (bias of that head; unused without biases).
      affine_skip: adds W (x - x_bar) to the mean, eq. 5's skip mirrored; W starts at zero. While
        latents idle the KL term shrinks the hidden features that they would need to wake up
        (seen: to a hundredth of those of the active ones); x itself it cannot shrink.
    """

    latents: int
    width: int
    layers: int
    activation: Activation
    head_bias: bool = True
    log_var_init: float = 0.0
    products: Products = None
    affine_skip: bool = False

    def inputs(self, x: Array) -> Array:
        """What the first layer reads of x [B, D]."""
        return x

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """x [B, D] -> mean [B, K], log_var [B, K]."""
        x = features = self.inputs(x)
        for i in range(1, self.layers):
            layer = dense(self.width, self.products, kernel_init=he_normal, name=f"layer{i}")
            features = self.activation(layer(features))
        mean, log_var = latent_heads(
            features, self.latents, self.head_bias, self.log_var_init, self.products
        )
        if not self.affine_skip:
            return mean, log_var
        centre = self.param("centre", nn.initializers.zeros, x.shape[-1:], jnp.result_type(float))
        affine = dense(
            self.latents, self.products, use_bias=False, kernel_init=nn.initializers.zeros,
            name="affine",
        )  # fmt: skip
        return mean + affine(x - centre[None, :]), log_var


def skip_gate(module: nn.Module, skip: bool | None, name: str) -> bool | Array:
    """Whether a skip is there: `skip`, or where that is None the module's parameter `name`.

    The parameter is 1 or 0 and differs between members of one program. It only ever decides a
    `where`, so no gradient reaches it and no optimiser moves it.
    """
    if skip is None:
        return module.param(name, nn.initializers.ones, (), jnp.result_type(float))
    return bool(skip)


def branch_last_init(residual: bool | Array, scale: float) -> nn.initializers.Initializer:
    """He's, times `scale` in a residual branch."""
    return scaled(he_normal, jnp.where(residual, scale, 1.0))


class PooledEncoder(MLPEncoder, kw_only=True):
    """An `MLPEncoder` that reads an image's means over squares, not its pixels.

    A large image is then as cheap to read as a small one, and a step of Adam, which moves every
    weight alike, moves what the first layer says of it no further.

    Attributes:
      image_shape: (H, W, C), of sides that `pool` divides.
      pool: side of the squares.
    """

    image_shape: tuple[int, int, int]
    pool: int

    def inputs(self, x: Array) -> Array:
        """[B, H W C / pool^2]."""
        height, width, channels = self.image_shape
        squares = (height // self.pool, self.pool, width // self.pool, self.pool, channels)
        return x.reshape(-1, *squares).mean((2, 4)).reshape(len(x), -1)


class ResidualDecoder(nn.Module):
    """z -> f_theta(z): a linear layer, `blocks` blocks of two layers, a linear read-out.

    A block is h + W2 act(W1 act(h)); without `residual` the same two layers stand
    alone, W2 act(W1 act(h)), so that the ablation has the same parameters.

    Attributes:
      outputs: D.
      width: units of each hidden layer.
      blocks: number of two-layer blocks.
      residual: skip connections between decoder layers (prescription 1); None: see
        `skip_gate`.
      branch_scale: weight scale of a residual branch's last layer, relative to He's;
        0 starts every block as the identity. Unused without `residual`.
    """

    outputs: int
    width: int
    blocks: int
    activation: Activation
    residual: bool | None
    branch_scale: float = 0.0
    products: Products = None

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """z [B, K] -> [B, D]."""
        residual = skip_gate(self, self.residual, "residual_gate")
        last = branch_last_init(residual, self.branch_scale)
        layer = functools.partial(dense, self.width, self.products)
        h = layer(kernel_init=nn.initializers.lecun_normal(), name="first")(z)
        for i in range(1, self.blocks + 1):
            branch = layer(kernel_init=he_normal, name=f"block{i}a")(self.activation(h))
            branch = layer(kernel_init=last, name=f"block{i}b")(self.activation(branch))
            h = jnp.where(residual, h, 0.0) + branch
        return dense(
            self.outputs, self.products, kernel_init=nn.initializers.lecun_normal(), name="out"
        )(self.activation(h))
