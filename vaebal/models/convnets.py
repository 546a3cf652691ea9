"""Convolutional encoders and decoders on flattened images. H, W, C: height, width, channels.

No layer normalises by statistics of a batch: training, generation and probing see one and the
same function, and the Hessian is that of the function that generates. What normalisation buys,
activations of one scale at every depth, residual branches that start at zero give as well
(De & Smith, 2020).

Both nets take and return flattened images [B, D], and their latent-facing layers bear the names
of `nets`: "mean", "log_var", "first". `Pyramid` holds what an encoder and its decoder share.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from vaebal.models.nets import (
    Activation,
    Products,
    branch_last_init,
    dense,
    he_normal,
    latent_heads,
    precision,
    product,
    rounded,
    skip_gate,
)


class Pyramid(NamedTuple):
    """The resolutions that a net passes through, from the image down to a grid of side 4.

    Attributes:
      image_shape: (H, W, C), H = W.
      patch: side of the patches that the first layer reads and the last one writes.
      channels: of each scale, finest first; every further scale halves the side.
    """

    image_shape: tuple[int, int, int]
    patch: int
    channels: tuple[int, ...]

    @property
    def sides(self) -> tuple[int, ...]:
        """The grid's side at each scale."""
        return tuple(self.image_shape[0] // self.patch >> i for i in range(len(self.channels)))


def pyramid(image_shape: tuple[int, int, int], patch: int, width: int) -> Pyramid:
    """Scales from H / patch down to 4, with `width` channels that double from one to the next.

    Raises:
      ValueError: the image is not square, or its side not patch times 4 times a power of two.
    """
    height, image_width, _ = image_shape
    grid, rest = divmod(height, patch)
    if height != image_width or rest or grid < 4 or grid & (grid - 1):
        raise ValueError(
            f"image_shape={tuple(image_shape)} does not fit patch={patch}: images must be square, "
            "with a side of patch times 4, 8, 16, ..."
        )
    scales = (grid // 4).bit_length()
    return Pyramid(tuple(image_shape), patch, tuple(width << i for i in range(scales)))


def _windows_times_kernel(
    products: Products, x: Array, kernel: Array, strides: tuple, padding: tuple, **same_as_default
) -> Array:
    """x [B, H, W, C], kernel [k, k, C, F] -> [B, H', W', F]: windows gathered, then one product."""
    side, (stride, _), B = len(kernel), strides, len(x)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    high, wide = ((length - side) // stride + 1 for length in x.shape[1:3])
    down, across = stride * (high - 1) + 1, stride * (wide - 1) + 1
    shifted = [
        x[:, i : i + down : stride, j : j + across : stride]
        for i in range(side)
        for j in range(side)
    ]
    windows = jnp.concatenate(shifted, axis=-1).reshape(B * high * wide, -1)
    flat = product(windows, kernel.reshape(-1, kernel.shape[-1]), products)
    return flat.reshape(B, high, wide, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _convolution(
    products: Products, x: Array, kernel: Array, strides: tuple, padding: tuple
) -> Array:
    """As `_windows_times_kernel`, by XLA's convolution.

    Its gradients are written out: JAX's own rule refuses factors of another type than the result.
    """
    return _convolution_forward(products, x, kernel, strides, padding)[0]


def _convolution_forward(products, x, kernel, strides, padding):
    factors = rounded((x, kernel), products)
    y = jax.lax.conv_general_dilated(
        *factors, strides, padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision(products),
        preferred_element_type=x.dtype,
    )  # fmt: skip
    return y, factors


def _convolution_backward(products, strides, padding, factors, g):
    (x, kernel), (low,) = factors, rounded((g,), products)
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), precision=precision(products),
        preferred_element_type=g.dtype,
    )  # fmt: skip
    sizes = zip(x.shape[1:3], kernel.shape[:2], g.shape[1:3], strides, padding, strict=True)
    # Every output pixel meets the input pixels under its window, and no others.
    of_x, of_kernel = [], []
    for size, side, out, stride, (before, _) in sizes:
        after = stride * (out - 1) + side - size - before
        of_x.append((side - 1 - before, side - 1 - after))
        of_kernel.append((before, after))
    dx = convolve(
        low, kernel[::-1, ::-1], padding=of_x, lhs_dilation=strides,
        dimension_numbers=("NHWC", "HWOI", "NHWC"),
    )  # fmt: skip
    dkernel = convolve(
        x, low, padding=of_kernel, rhs_dilation=strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )  # fmt: skip
    return dx, dkernel


_convolution.defvjp(_convolution_forward, _convolution_backward)


def conv(
    features: int, side: int, stride: int = 1, products: Products = None, **options
) -> nn.Conv:
    """nn.Conv with a square window, zero padding, and parameters in JAX's default float.

    On a CPU the convolution is a matrix product over windows: XLA's own gradient of a
    convolution is several hundred times slower there inside a compiled loop.
    """
    by_products = {}
    if jax.default_backend() == "cpu":
        by_products["conv_general_dilated"] = functools.partial(_windows_times_kernel, products)
    elif products is not None:
        by_products["conv_general_dilated"] = lambda *arguments, **same_as_default: _convolution(
            products, *arguments
        )
    return nn.Conv(
        features,
        (side, side),
        (stride, stride),
        padding=(side - stride) // 2 if stride > 1 else side // 2,
        param_dtype=jnp.result_type(float),
        precision=precision(products),
        **by_products,
        **options,
    )


def to_patches(images: Array, side: int) -> Array:
    """[B, H, W, C] -> [B, H / side, W / side, side * side * C]."""
    B, H, W, C = images.shape
    grid = images.reshape(B, H // side, side, W // side, side, C).swapaxes(2, 3)
    return grid.reshape(B, H // side, W // side, side * side * C)


def from_patches(patches: Array, side: int) -> Array:
    """The inverse of `to_patches`: sub-pixel upsampling (Shi et al., 2016)."""
    B, H, W, F = patches.shape
    grid = patches.reshape(B, H, W, side, side, F // side**2).swapaxes(2, 3)
    return grid.reshape(B, H * side, W * side, F // side**2)


class Block(nn.Module):
    """h + conv act(conv act(h)), or the two convolutions alone where not `residual`."""

    channels: int
    activation: Activation
    branch_scale: float
    products: Products = None

    @nn.compact
    def __call__(self, h: Array, residual: bool | Array = True) -> Array:
        """[B, H, W, channels] -> the same shape."""
        layer = functools.partial(conv, self.channels, 3, products=self.products)
        branch = layer(kernel_init=he_normal, name="a")(self.activation(h))
        last = branch_last_init(residual, self.branch_scale)
        branch = layer(kernel_init=last, name="b")(self.activation(branch))
        return jnp.where(residual, h, 0.0) + branch


def block(remat: bool) -> type[Block]:
    """`Block`, which under `remat` keeps its input alone and computes anew for the gradient."""
    return nn.remat(Block) if remat else Block


class ConvEncoder(nn.Module):
    """Patches, then at each scale `blocks` residual blocks, then the two heads.

    The image is first centred by a learned [D] `centre`, as the affine model's b_z = -W_z b_x
    does: `models.init_params` sets it to the data's mean.

    Attributes:
      latents: K.
      log_var_init: log sigma^2 at the start.
    """

    latents: int
    pyramid: Pyramid
    blocks: int
    activation: Activation
    log_var_init: float = 0.0
    branch_scale: float = 0.0
    products: Products = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """x [B, D] -> mean [B, K], log_var [B, K]."""
        centre = self.param("centre", nn.initializers.zeros, x.shape[-1:], jnp.result_type(float))
        h = to_patches(
            (x - centre[None, :]).reshape(-1, *self.pyramid.image_shape), self.pyramid.patch
        )
        for scale, channels in enumerate(self.pyramid.channels):
            h = to_patches(self.activation(h), 2) if scale else h
            h = dense(channels, self.products, kernel_init=he_normal, name=f"down{scale}")(h)
            for i in range(self.blocks):
                h = block(self.remat)(
                    channels,
                    self.activation,
                    self.branch_scale,
                    self.products,
                    name=f"scale{scale}_{i}",
                )(h)
        features = self.activation(h).reshape(len(x), -1)
        return latent_heads(features, self.latents, True, self.log_var_init, self.products)


class ConvDecoder(nn.Module):
    """The encoder's mirror: a linear layer to the coarsest grid, blocks, sub-pixel upsampling.

    Attributes:
      blocks: of two convolutions, at each scale.
      residual: skip connections between decoder layers (prescription 1); None: see
        `nets.skip_gate`.
      branch_scale: as in `nets.ResidualDecoder`.
    """

    pyramid: Pyramid
    blocks: int
    activation: Activation
    residual: bool | None
    branch_scale: float = 0.0
    products: Products = None
    remat: bool = False

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """z [B, K] -> [B, D]."""
        residual = skip_gate(self, self.residual, "residual_gate")
        side, channels = self.pyramid.sides[-1], self.pyramid.channels
        h = dense(side * side * channels[-1], self.products, name="first")(z)
        h = h.reshape(len(z), side, side, channels[-1])
        for scale in reversed(range(len(channels))):
            for i in range(self.blocks):
                h = block(self.remat)(
                    channels[scale],
                    self.activation,
                    self.branch_scale,
                    self.products,
                    name=f"scale{scale}_{i}",
                )(h, residual)
            if scale:
                up = dense(
                    4 * channels[scale - 1], self.products, kernel_init=he_normal, name=f"up{scale}"
                )
                h = from_patches(up(self.activation(h)), 2)
        # 3 x 3, so that neighbouring patches know of each other and no seams show.
        pixels = self.pyramid.patch**2 * self.pyramid.image_shape[2]
        out = conv(pixels, 3, products=self.products, use_bias=False, name="out")
        h = out(self.activation(h))
        flat = from_patches(h, self.pyramid.patch).reshape(len(z), -1)
        bias = self.param("bias", nn.initializers.zeros, flat.shape[-1:], flat.dtype)
        return flat + bias[None, :]


class InfoGANEncoder(nn.Module):
    """Two strided convolutions and a layer of 1024, as in the two-stage literature (Dai & Wipf).

    After InfoGAN (Chen et al., 2016), less its batch normalisation.
    """

    latents: int
    image_shape: tuple[int, int, int]
    activation: Activation
    log_var_init: float = 0.0
    products: Products = None

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """x [B, D] -> mean [B, K], log_var [B, K]."""
        centre = self.param("centre", nn.initializers.zeros, x.shape[-1:], jnp.result_type(float))
        h = (x - centre[None, :]).reshape(-1, *self.image_shape)
        for i, channels in enumerate((64, 128)):
            layer = conv(channels, 4, 2, self.products, kernel_init=he_normal, name=f"conv{i}")
            h = self.activation(layer(h))
        hidden = dense(1024, self.products, kernel_init=he_normal, name="hidden")
        h = self.activation(hidden(h.reshape(len(x), -1)))
        return latent_heads(h, self.latents, True, self.log_var_init, self.products)


class InfoGANDecoder(nn.Module):
    """The counterpart of `InfoGANEncoder`; its output is linear, so that eq. 5's skip fits it."""

    image_shape: tuple[int, int, int]
    activation: Activation
    products: Products = None

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """z [B, K] -> [B, D]."""
        height, width, channels = self.image_shape
        units = 128 * (height // 4) * (width // 4)
        h = self.activation(dense(1024, self.products, name="first")(z))
        h = dense(units, self.products, kernel_init=he_normal, name="hidden")(h)
        h = self.activation(h).reshape(len(z), height // 4, width // 4, 128)
        # A transposed 4 x 4 convolution of stride 2 is a case of a 3 x 3 sub-pixel one.
        up = conv(4 * 64, 3, products=self.products, kernel_init=he_normal, name="up")
        out = conv(4 * channels, 3, products=self.products, use_bias=False, name="out")
        h = from_patches(out(self.activation(from_patches(up(h), 2))), 2)
        bias = self.param("bias", nn.initializers.zeros, (height * width * channels,), h.dtype)
        return h.reshape(len(z), -1) + bias[None, :]
