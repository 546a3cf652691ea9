"""Convolutional encoders and decoders on flattened images. H, W, C: height, width, channels.

No layer normalises by statistics of a batch: training, generation and probing see one and the
same function, and the Hessian is that of the function that generates. What normalisation buys,
activations of one scale at every depth, residual branches that start at zero give as well
(De & Smith, 2020).

Both nets take and return flattened images [B, D], and their latent-facing layers bear the names
of `nets`: "mean", "log_var", "first". `Pyramid` holds what an encoder and its decoder share.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from vaebal.nets import Activation, dense, he_normal, latent_heads, scaled


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
    x: Array, kernel: Array, strides: tuple, padding: tuple, **same_as_default
) -> Array:
    """x [B, H, W, C], kernel [k, k, C, F] -> [B, H', W', F]: windows gathered, then one product."""
    side, (stride, _), B = len(kernel), strides, len(x)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    out = (x.shape[1] - side) // stride + 1
    reach = stride * (out - 1) + 1
    shifted = [
        x[:, i : i + reach : stride, j : j + reach : stride]
        for i in range(side)
        for j in range(side)
    ]
    windows = jnp.concatenate(shifted, axis=-1).reshape(B * out * out, -1)
    return (windows @ kernel.reshape(-1, kernel.shape[-1])).reshape(B, out, out, -1)


def conv(features: int, side: int, stride: int = 1, **options) -> nn.Conv:
    """nn.Conv with a square window, zero padding, and parameters in JAX's default float.

    On a CPU the convolution is a matrix product over windows: XLA's own gradient of a
    convolution is several hundred times slower there inside a compiled loop.
    """
    by_products = {"conv_general_dilated": _windows_times_kernel}
    return nn.Conv(
        features,
        (side, side),
        (stride, stride),
        padding=(side - stride) // 2 if stride > 1 else side // 2,
        param_dtype=jnp.result_type(float),
        **(by_products if jax.default_backend() == "cpu" else {}),
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
    """h + conv act(conv act(h)), or the two convolutions alone without `residual`."""

    channels: int
    activation: Activation
    residual: bool
    branch_scale: float

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """[B, H, W, channels] -> the same shape."""
        branch = conv(self.channels, 3, kernel_init=he_normal, name="a")(self.activation(h))
        last = scaled(he_normal, self.branch_scale) if self.residual else he_normal
        branch = conv(self.channels, 3, kernel_init=last, name="b")(self.activation(branch))
        return h + branch if self.residual else branch


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

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """x [B, D] -> mean [B, K], log_var [B, K]."""
        centre = self.param("centre", nn.initializers.zeros, x.shape[-1:], jnp.result_type(float))
        h = to_patches(
            (x - centre[None, :]).reshape(-1, *self.pyramid.image_shape), self.pyramid.patch
        )
        for scale, channels in enumerate(self.pyramid.channels):
            h = to_patches(self.activation(h), 2) if scale else h
            h = dense(channels, kernel_init=he_normal, name=f"down{scale}")(h)
            for block in range(self.blocks):
                h = Block(
                    channels, self.activation, True, self.branch_scale, name=f"scale{scale}_{block}"
                )(h)
        return latent_heads(
            self.activation(h).reshape(len(x), -1), self.latents, True, self.log_var_init
        )


class ConvDecoder(nn.Module):
    """The encoder's mirror: a linear layer to the coarsest grid, blocks, sub-pixel upsampling.

    Attributes:
      blocks: of two convolutions, at each scale.
      residual: skip connections between decoder layers (prescription 1).
      branch_scale: as in `nets.ResidualDecoder`.
    """

    pyramid: Pyramid
    blocks: int
    activation: Activation
    residual: bool
    branch_scale: float = 0.0

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """z [B, K] -> [B, D]."""
        side, channels = self.pyramid.sides[-1], self.pyramid.channels
        h = dense(side * side * channels[-1], name="first")(z)
        h = h.reshape(len(z), side, side, channels[-1])
        for scale in reversed(range(len(channels))):
            for block in range(self.blocks):
                h = Block(
                    channels[scale],
                    self.activation,
                    self.residual,
                    self.branch_scale,
                    name=f"scale{scale}_{block}",
                )(h)
            if scale:
                h = dense(4 * channels[scale - 1], kernel_init=he_normal, name=f"up{scale}")(
                    self.activation(h)
                )
                h = from_patches(h, 2)
        # 3 x 3, so that neighbouring patches know of each other and no seams show.
        pixels = self.pyramid.patch**2 * self.pyramid.image_shape[2]
        h = conv(pixels, 3, use_bias=False, name="out")(self.activation(h))
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

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """x [B, D] -> mean [B, K], log_var [B, K]."""
        centre = self.param("centre", nn.initializers.zeros, x.shape[-1:], jnp.result_type(float))
        h = (x - centre[None, :]).reshape(-1, *self.image_shape)
        for i, channels in enumerate((64, 128)):
            h = self.activation(conv(channels, 4, 2, kernel_init=he_normal, name=f"conv{i}")(h))
        h = dense(1024, kernel_init=he_normal, name="hidden")(h.reshape(len(x), -1))
        return latent_heads(self.activation(h), self.latents, True, self.log_var_init)


class InfoGANDecoder(nn.Module):
    """The counterpart of `InfoGANEncoder`; its output is linear, so that eq. 5's skip fits it."""

    image_shape: tuple[int, int, int]
    activation: Activation

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """z [B, K] -> [B, D]."""
        height, width, channels = self.image_shape
        h = self.activation(dense(1024, name="first")(z))
        h = dense(128 * (height // 4) * (width // 4), kernel_init=he_normal, name="hidden")(h)
        h = self.activation(h).reshape(len(z), height // 4, width // 4, 128)
        # A transposed 4 x 4 convolution of stride 2 is a case of a 3 x 3 sub-pixel one.
        h = self.activation(from_patches(conv(4 * 64, 3, kernel_init=he_normal, name="up")(h), 2))
        h = from_patches(conv(4 * channels, 3, use_bias=False, name="out")(h), 2)
        bias = self.param("bias", nn.initializers.zeros, (height * width * channels,), h.dtype)
        return h.reshape(len(z), -1) + bias[None, :]
