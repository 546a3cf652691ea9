"""Encoders and decoders as Flax modules. Shapes: B batch, D pixels, K latents (kappa).

Kernels that touch the latent space are drawn latent-major, so that the first k
latents of a net built for K > k get the weights that a net built for k would get.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Activation = Callable[[Array], Array]

ACTIVATIONS: dict[str, Activation] = {
    name: getattr(jax.nn, name) for name in ("relu", "gelu", "silu", "tanh", "softplus")
}

# Keeps the variance of activations constant through rectifiers (He et al., 2015).
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


def scaled(initializer: nn.initializers.Initializer, scale: float) -> nn.initializers.Initializer:
    """`initializer` times `scale`."""
    return lambda *args: scale * initializer(*args)


def _latent_major_fan_in(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    """[W, K] with variance 1/W, drawn as [K, W]: a prefix of latents is a prefix of draws."""
    return jax.random.normal(key, shape[::-1], dtype).T / jnp.sqrt(shape[0]).astype(dtype)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    """x [B, I], kernel [I, O] -> [B, O]."""
    return x @ kernel


def _product_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    over_outputs, over_batch = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
    dx = jax.lax.dot_general(g, kernel, over_outputs)
    if 4 * kernel.shape[1] < kernel.shape[0]:  # a narrow product is faster the other way round
        return dx, jax.lax.dot_general(g, x, over_batch).T
    return dx, jax.lax.dot_general(x, g, over_batch)


# The plain product in the forward rule, so that forward over reverse (Hessians) goes through.
_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


def _dot_general(x, kernel, dimensions, precision=None, preferred_element_type=None) -> Array:
    """The matrix product that nn.Dense calls, with the kernel's gradient in the kernel's layout.

    JAX's own rule computes the transpose of that gradient. XLA folds the transpose into the
    product for a lone network, but not under vmap (of one member or many), where every use of
    the gradient (its norm, Adam's moments) then reads it column by column: nearly half of a
    training step's time on a CPU.
    """
    if x.ndim == kernel.ndim == 2 and dimensions == (((1,), (0,)), ((), ())):
        return _product(x, kernel)
    return jax.lax.dot_general(
        x, kernel, dimensions, precision, preferred_element_type=preferred_element_type
    )


def dense(features: int, **options) -> nn.Dense:
    """nn.Dense with parameters in float32, or in float64 where JAX has x64 enabled.

    Differentiable in reverse mode, and forward over reverse (Hessians); not in forward mode
    alone.
    """
    return nn.Dense(
        features, param_dtype=jnp.result_type(float), dot_general=_dot_general, **options
    )


def latent_heads(
    features: Array, latents: int, bias: bool, log_var_init: float
) -> tuple[Array, Array]:
    """features [B, F] -> mean, log_var [B, K]: an encoder's last layer, inside its `__call__`.

    The mean head starts at unit scale, so that every latent carries signal from
    the first step. The log-variance head starts at zero weights, so that sigma^2
    starts at exp(log_var_init) for every x.
    """
    mean = dense(latents, use_bias=bias, kernel_init=_latent_major_fan_in, name="mean")(features)
    log_var = dense(
        latents,
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
    """

    latents: int
    width: int
    layers: int
    activation: Activation
    head_bias: bool = True
    log_var_init: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """x [B, D] -> mean [B, K], log_var [B, K]."""
        for i in range(1, self.layers):
            x = self.activation(dense(self.width, kernel_init=he_normal, name=f"layer{i}")(x))
        return latent_heads(x, self.latents, self.head_bias, self.log_var_init)


class ResidualDecoder(nn.Module):
    """z -> f_theta(z): a linear layer, `blocks` blocks of two layers, a linear read-out.

    A block is h + W2 act(W1 act(h)); without `residual` the same two layers stand
    alone, W2 act(W1 act(h)), so that the ablation has the same parameters.

    Attributes:
      outputs: D.
      width: units of each hidden layer.
      blocks: number of two-layer blocks.
      residual: skip connections between decoder layers (prescription 1).
      branch_scale: weight scale of a residual branch's last layer, relative to He's;
        0 starts every block as the identity. Unused without `residual`.
    """

    outputs: int
    width: int
    blocks: int
    activation: Activation
    residual: bool
    branch_scale: float = 0.0

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """z [B, K] -> [B, D]."""
        last = scaled(he_normal, self.branch_scale) if self.residual else he_normal
        h = dense(self.width, kernel_init=nn.initializers.lecun_normal(), name="first")(z)
        for i in range(1, self.blocks + 1):
            branch = dense(self.width, kernel_init=he_normal, name=f"block{i}a")(self.activation(h))
            branch = dense(self.width, kernel_init=last, name=f"block{i}b")(self.activation(branch))
            h = h + branch if self.residual else branch
        return dense(self.outputs, kernel_init=nn.initializers.lecun_normal(), name="out")(
            self.activation(h)
        )
