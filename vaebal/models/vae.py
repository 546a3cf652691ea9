"""The Gaussian VAE: any encoder, any decoder, one decoder variance gamma, eq. 5's skip."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from vaebal.models.convnets import ConvDecoder, ConvEncoder, InfoGANDecoder, InfoGANEncoder, pyramid
from vaebal.models.gaussians import reparameterise
from vaebal.models.nets import (
    Activation,
    MLPEncoder,
    PooledEncoder,
    Products,
    ResidualDecoder,
    dense,
    skip_gate,
)


class Outputs(NamedTuple):
    """What a Gaussian VAE says of a batch; all an objective ever sees."""

    x_hat: Array  # [B, D] decoder mean
    mean: Array  # [B, K] posterior mean
    log_var: Array  # [B, K] posterior log variance
    log_gamma: Array  # [] log decoder variance


class GaussianVAE(nn.Module):
    """q(z|x) = N(mean(x), diag exp(log_var(x))), p(x|z) = N(f(z) + W_x z, gamma I).

    b_x of eq. 5 is the bias of f's read-out: the two would be one parameter twice.

    `kappa` (an integer, possibly traced) uses only the first kappa of the K latents:
    the others are set to the prior's mean 0 and variance 1, where their KL is zero, and
    get no noise, so that neither value nor gradient knows of them. Models of several
    kappa can so be stacked in one program.

    Attributes:
      encoder: x [B, D] -> mean, log_var [B, K].
      decoder: z [B, K] -> f(z) [B, D].
      latents: K.
      outputs: D.
      affine_skip: adds W_x z (eq. 5). W_x starts at zero: with and without it the
        model starts as the same function. None: see `nets.skip_gate`.
      gamma: fixed decoder variance, a constant; None makes log gamma a parameter.
      gamma_init: where a learned gamma starts.
      linear_variance: sigma^2 = 1 + a where the encoder says a = log sigma^2 > 0: above the
        prior's variance, where an optimum hardly lies, exp(a) can overflow within a few steps.
    """

    encoder: nn.Module
    decoder: nn.Module
    latents: int
    outputs: int
    affine_skip: bool | None
    gamma: float | None = None
    gamma_init: float = 1.0
    products: Products = None
    linear_variance: bool = False

    def setup(self):
        self.affine_gate = skip_gate(self, self.affine_skip, "affine_gate")
        if self.affine_gate is not False:
            self.affine = dense(
                self.outputs,
                self.products,
                use_bias=False,
                kernel_init=nn.initializers.zeros,
                name="affine",
            )
        if self.gamma is None:
            self.learned_log_gamma = self.param(
                "log_gamma",
                nn.initializers.constant(math.log(self.gamma_init)),
                (),
                jnp.result_type(float),
            )

    def latent_mask(self, kappa: int | Array | None) -> Array | bool:
        """[K], True for the first kappa latents."""
        return True if kappa is None else jnp.arange(self.latents) < kappa

    def encode(self, x: Array, kappa: int | Array | None = None) -> tuple[Array, Array]:
        """x [B, D] -> posterior mean and log variance, [B, K] each."""
        mask = self.latent_mask(kappa)
        mean, log_var = self.encoder(x)
        if self.linear_variance:
            log_var = jnp.where(log_var > 0, jnp.log1p(jnp.maximum(log_var, 0.0)), log_var)
        return jnp.where(mask, mean, 0.0), jnp.where(mask, log_var, 0.0)

    def decode(self, z: Array) -> Array:
        """z [B, K] -> decoder mean [B, D]."""
        x_hat = self.decoder(z)
        if self.affine_gate is False:
            return x_hat
        return x_hat + jnp.where(self.affine_gate, self.affine(z), 0.0)

    def log_gamma(self) -> Array:
        """log of the decoder variance, a scalar."""
        if self.gamma is None:
            return self.learned_log_gamma
        return jnp.asarray(math.log(self.gamma))

    def __call__(self, x: Array, eps: Array, kappa: int | Array | None = None) -> Outputs:
        """x [B, D], eps [B, K] standard normal -> `Outputs`, with z = mean + sigma eps."""
        mean, log_var = self.encode(x, kappa)
        eps = jnp.where(self.latent_mask(kappa), eps, 0.0)
        x_hat = self.decode(reparameterise(mean, log_var, eps))
        return Outputs(x_hat, mean, log_var, self.log_gamma())


def latent_noise(key: Array, batch: int, latents: int) -> Array:
    """Standard normal eps [B, K], drawn latent-major: the first k columns do not depend on K."""
    return jax.random.normal(key, (latents, batch)).T


def prior_samples(key: Array, batch: int, latents: int, kappa: int | Array | None = None) -> Array:
    """z [B, K] from the prior; latents beyond kappa, which the decoder has not seen, stay 0."""
    z = latent_noise(key, batch, latents)
    return z if kappa is None else jnp.where(jnp.arange(latents) < kappa, z, 0.0)


def mlp_vae(
    *,
    outputs: int,
    latents: int,
    width: int,
    encoder_layers: int,
    decoder_blocks: int,
    activation: Activation,
    residual: bool | None,
    branch_scale: float = 0.0,
    log_var_init: float = 0.0,
    products: Products = None,
    encoder_skip: bool = False,
    image_shape: tuple[int, int, int] | None = None,
    pool: int = 1,
    **options: Any,
) -> GaussianVAE:
    """The network of Table 1: feed-forward encoder, residual decoder, affine skip.

    Args:
      options: `GaussianVAE`'s: `affine_skip`, `gamma`, `gamma_init`.
      encoder_skip: an affine skip from x to the posterior mean as well; see `MLPEncoder`.
      pool: above 1, the encoder reads means over squares of this side; see `PooledEncoder`.
      image_shape: (H, W, C); needed to pool.

    Raises:
      ValueError: the image's sides are not multiples of `pool`.
    """
    reading = {
        "latents": latents,
        "width": width,
        "layers": encoder_layers,
        "activation": activation,
        "log_var_init": log_var_init,
        "products": products,
        "affine_skip": encoder_skip,
    }
    if pool > 1:
        height, image_width, _ = image_shape
        if height % pool or image_width % pool:
            raise ValueError(
                f"image_shape={tuple(image_shape)} does not fit pool={pool}: sides must be its "
                "multiples."
            )
        encoder = PooledEncoder(**reading, image_shape=tuple(image_shape), pool=pool)
    else:
        encoder = MLPEncoder(**reading)
    return GaussianVAE(
        encoder=encoder,
        decoder=ResidualDecoder(
            outputs, width, decoder_blocks, activation, residual, branch_scale, products
        ),
        latents=latents,
        outputs=outputs,
        products=products,
        **options,
    )


def conv_vae(
    *,
    image_shape: tuple[int, int, int],
    latents: int,
    patch: int,
    width: int,
    blocks: int,
    activation: Activation,
    residual: bool | None,
    log_var_init: float = 0.0,
    products: Products = None,
    remat: bool = False,
    **options: Any,
) -> GaussianVAE:
    """The network for images of 32, 64, 128 px: residual encoder and its mirror as decoder.

    Args:
      patch: side of the patches the first layer reads; width: channels of the finest scale.
      blocks: residual blocks at each scale.
      residual: the decoder's skips; the encoder's are always there.
      remat: blocks keep their inputs alone and are computed anew for the gradient.
      options: `GaussianVAE`'s: `affine_skip`, `gamma`, `gamma_init`.
    """
    shape = pyramid(image_shape, patch, width)
    return GaussianVAE(
        encoder=ConvEncoder(
            latents, shape, blocks, activation, log_var_init, products=products, remat=remat
        ),
        decoder=ConvDecoder(shape, blocks, activation, residual, products=products, remat=remat),
        latents=latents,
        outputs=math.prod(image_shape),
        products=products,
        **options,
    )


def infogan_vae(
    *,
    image_shape: tuple[int, int, int],
    latents: int,
    activation: Activation,
    log_var_init: float = 0.0,
    products: Products = None,
    **options: Any,
) -> GaussianVAE:
    """The two-stage literature's network for 28 to 64 px, less its batch normalisation.

    Args:
      options: `GaussianVAE`'s: `affine_skip`, `gamma`, `gamma_init`.

    Raises:
      ValueError: the image's sides are not multiples of 4.
    """
    if image_shape[0] % 4 or image_shape[1] % 4:
        raise ValueError(
            f"image_shape={tuple(image_shape)} does not fit: sides must be multiples of 4."
        )
    return GaussianVAE(
        encoder=InfoGANEncoder(latents, tuple(image_shape), activation, log_var_init, products),
        decoder=InfoGANDecoder(tuple(image_shape), activation, products),
        latents=latents,
        outputs=math.prod(image_shape),
        products=products,
        **options,
    )


def init_params(
    model: GaussianVAE,
    key: Array,
    data_mean: Array,
    kappa: int | Array | None = None,
    *,
    residual: bool | Array = True,
    affine: bool | Array = True,
) -> dict[str, Any]:
    """Parameters of a model built here, centred on the data.

    The encoder's first bias starts at -W x_bar and the decoder's last at x_bar, as at
    every stationary point of the affine model (b_z = -W_z b_x, b_x = x_bar). Nets of
    patches have parameters of their own for it.

    Args:
      model: built by `mlp_vae`, `conv_vae` or `infogan_vae`.
      key: JAX key.
      data_mean: x_bar [D].
      kappa: true number of latents where the model is padded to K > kappa; the first
        decoder layer is then scaled for a fan-in of kappa.
      residual, affine: whether the skips are there, of a model that leaves it open.

    Returns:
      Leaf for leaf what the model of these skips would get; besides, "affine_gate" and
      "decoder/residual_gate" of a model that leaves them open.
    """
    x, eps = jnp.zeros((1, model.outputs)), jnp.zeros((1, model.latents))
    # Gates are given, all else is drawn: the blocks' first weights depend on theirs.
    gates: dict[str, Any] = {}
    if model.affine_skip is None:
        gates["affine_gate"] = jnp.asarray(affine, float)
    if getattr(model.decoder, "residual", True) is None:
        gates["decoder"] = {"residual_gate": jnp.asarray(residual, float)}
    _, variables = model.apply(
        {"params": gates}, x, eps, kappa, rngs={"params": key}, mutable="params"
    )
    params = variables["params"]
    encoder, decoder = params["encoder"], params["decoder"]
    read = data_mean
    if isinstance(model.encoder, MLPEncoder):
        read = model.encoder.inputs(data_mean[None])[0]
        first = encoder["layer1" if "layer1" in encoder else "mean"]  # affine: only heads
        first["bias"] = -read @ first["kernel"]
    if "centre" in encoder:
        encoder["centre"] = read
    (decoder if "bias" in decoder else decoder["out"])["bias"] = data_mean
    if kappa is not None:
        # Divided as floats: int32 / int32 is float32 even under x64.
        decoder["first"]["kernel"] *= jnp.sqrt(model.latents / jnp.asarray(kappa, float))
    return params


def with_own_skips(model: GaussianVAE, params: dict[str, Any]) -> tuple[GaussianVAE, Any]:
    """A model that leaves its skips open -> that of the skips which `params` choose, and its own.

    The same function of fewer parameters: none is left that does nothing, which a Hessian would
    show as a flat direction.
    """
    decoder, params = dict(params["decoder"]), dict(params)
    if "residual_gate" in decoder:
        residual = bool(decoder.pop("residual_gate"))
        model = model.clone(decoder=model.decoder.clone(residual=residual))
    if "affine_gate" in params:
        model = model.clone(affine_skip=bool(params.pop("affine_gate")))
        if not model.affine_skip:
            del params["affine"]
    return model, params | {"decoder": decoder}
