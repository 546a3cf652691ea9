"""Second stages: models of a trained autoencoder's latents, all behind one seam.

A `SecondStage` learns the distribution of z ~ q(z|x), standardised, and draws from it: by flow
matching, by an invertible network, or as a second VAE (the paper names the last two; Dai & Wipf,
2019). Latents that tell nothing of x are left out: their entries are 0 in, 0 out, and no loss
counts them.

Shapes: B batch, K latents, W width; mask [K] of 1 and 0, the latents that take part.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from vaebal.generation.stages import vae_loss
from vaebal.models import init_params, latent_noise, mlp_vae
from vaebal.models.nets import Activation, dense, he_normal
from vaebal.units import LOG_2PI

FREQUENCIES = 32  # of time, see `Velocity`
STEPS = 50  # of `heun`
STRETCH = 2.0  # log of what a coupling stretches or shrinks by, at most


class Latents(NamedTuple):
    """What standardises latents [B, K], per dimension, and which of them take part."""

    centre: Array  # [K]
    scale: Array  # [K]
    mask: Array  # [K], 1 or 0

    def standardise(self, z: Array) -> Array:
        """Mean 0 and variance 1 over the set this was taken from; 0 where the mask is."""
        return (z - self.centre[None]) / self.scale[None] * self.mask[None]

    def restore(self, z: Array, others: Array) -> Array:
        """The inverse; `others` [B, K], N(0, I) say, stand in for the latents left out."""
        whole = z * self.scale[None] + self.centre[None]
        return jnp.where(self.mask[None] > 0, whole, others)


def latents_of(mean: Array, deviation: Array, active: Array | float = 0.0) -> Latents:
    """Of the posterior means and standard deviations [N, K] of N examples.

    Args:
      active: a latent takes part where its means' variance is above so much, and above 1e-6 of the
        largest.
    """
    spread = mean.var(0)
    mask = (spread > active) & (spread > 1e-6 * spread.max())
    scale = jnp.sqrt(jnp.where(mask, spread + jnp.square(deviation).mean(0), 1.0))
    return Latents(mean.mean(0), scale, mask.astype(mean.dtype))


class SecondStage(NamedTuple):
    """A model of standardised latents, as pure functions.

    Attributes:
      init: (key, mask) -> parameters.
      loss: (parameters, z [B, K], mask, key) -> (value, metrics); of one with a gamma "mean_square"
        is what gamma follows, and the parameters hold "log_gamma".
      sample: (parameters, mask, key, B) -> z [B, K].
      has_gamma: whether it has one.
    """

    init: Callable[[Array, Array], Any]
    loss: Callable[[Any, Array, Array, Array], tuple[Array, dict[str, Array]]]
    sample: Callable[[Any, Array, Array, int], Array]
    has_gamma: bool


class Velocity(nn.Module):
    """z [B, K], t [B] -> dz/dt [B, K]: residual blocks of two layers that all read the time.

    Attributes:
      latents: K.
      width: units of each hidden layer.
      blocks: number of blocks; each starts as the identity, and the whole at 0.
    """

    latents: int
    width: int
    blocks: int
    activation: Activation = nn.silu

    @nn.compact
    def __call__(self, z: Array, t: Array) -> Array:
        angles = t[:, None] * jnp.geomspace(1.0, 100.0, FREQUENCIES, dtype=z.dtype)[None]
        time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        h = dense(self.width, name="first")(z) + dense(self.width, name="time")(time)
        for i in range(1, self.blocks + 1):
            branch = nn.LayerNorm(name=f"norm{i}", param_dtype=z.dtype)(h)
            branch = dense(self.width, kernel_init=he_normal, name=f"block{i}a")(branch)
            branch = self.activation(branch + dense(self.width, name=f"time{i}")(time))
            h += dense(self.width, kernel_init=nn.initializers.zeros, name=f"block{i}b")(branch)
        h = nn.LayerNorm(name="norm", param_dtype=z.dtype)(h)
        return dense(self.latents, kernel_init=nn.initializers.zeros, name="out")(h)


def heun(velocity: Callable[[Array, Array], Array], z: Array, steps: int = STEPS) -> Array:
    """Where dz/dt = velocity(z, t []) leads from z [B, K] at t = 0 to t = 1.

    Heun's method with a fixed step: of second order, 2 `steps` evaluations.
    """
    h = 1.0 / steps

    def step(index, z):
        slope = velocity(z, index * h)
        ahead = velocity(z + h * slope, (index + 1) * h)
        return z + 0.5 * h * (slope + ahead)

    return jax.lax.fori_loop(0, steps, step, z)


def transported(
    model: Velocity, params: Any, z: Array, mask: Array, *, back: bool = False, steps: int = STEPS
) -> Array:
    """Where the velocity leads from noise z [B, K], or `back` from latents to noise, [B, K].

    Args:
      z: noise, or standardised latents.
      mask: [K], see `Latents`; the other entries are 0.
      steps: of `heun`, whose error back and forth falls as their square.
    """

    def velocity(z, t):
        t, sign = (1 - t, -1.0) if back else (t, 1.0)
        return sign * model.apply({"params": params}, z, jnp.full(len(z), t)) * mask[None]

    return heun(velocity, z * mask[None], steps)


def flow_matching(latents: int, width: int, blocks: int, steps: int = STEPS) -> SecondStage:
    """The velocity of straight lines from noise to latents (Lipman et al.; Liu et al., 2023).

    The loss is E|v(z_t, t) - (z - eps)|^2 per dimension, z_t = (1 - t) eps + t z, t uniform; its
    least value is not 0. Samples solve the ODE of v from N(0, I), see `heun`.
    """
    model = Velocity(latents, width, blocks)

    def init(key: Array, mask: Array) -> Any:
        return model.init(key, jnp.zeros((1, latents)), jnp.zeros(1))["params"]

    def loss(params: Any, z: Array, mask: Array, key: Array):
        to_t, to_eps = jax.random.split(key)
        t = jax.random.uniform(to_t, (len(z), 1))
        eps = latent_noise(to_eps, *z.shape) * mask[None]
        velocity = model.apply({"params": params}, (1 - t) * eps + t * z, t[:, 0])
        square = jnp.square(velocity - (z - eps)) * mask[None]
        return square.sum() / (len(z) * jnp.maximum(mask.sum(), 1)), {}

    def sample(params: Any, mask: Array, key: Array, count: int) -> Array:
        return transported(model, params, latent_noise(key, count, latents), mask, steps=steps)

    return SecondStage(init, loss, sample, has_gamma=False)


class Coupling(nn.Module):
    """z [B, K], of which one part is 0 -> how the others' shift and stretch, [B, K] each.

    Attributes:
      latents: K.
      width: units of the two hidden layers; nothing is moved at first.
    """

    latents: int
    width: int
    activation: Activation = nn.silu

    @nn.compact
    def __call__(self, z: Array) -> tuple[Array, Array]:
        h = self.activation(dense(self.width, kernel_init=he_normal, name="first")(z))
        h = self.activation(dense(self.width, kernel_init=he_normal, name="second")(h))
        out = dense(2 * self.latents, kernel_init=nn.initializers.zeros, name="out")(h)
        shift, stretch = jnp.split(out, 2, -1)
        return shift, STRETCH * jnp.tanh(stretch / STRETCH)


def parts(mask: Array, count: int) -> Array:
    """Which latents each of `count` couplings reads: [count, K] of 1 and 0, 0 where the mask is.

    Those that take part are numbered; couplings 2i and 2i + 1 read those with a bit of theirs 0
    and 1, by turns of all bits that tell their numbers apart. Any two differ in one of these: with
    two couplings a bit some coupling moves one by the other.
    """
    number = (jnp.cumsum(mask) - 1).astype(int)
    most = jnp.maximum(mask.sum().astype(int) - 1, 1)
    bits = (most[None] >> jnp.arange(_bits(len(mask))) > 0).sum()
    index = jnp.arange(count)[:, None]
    return (number[None] >> (index // 2 % bits) & 1 == index % 2) * mask[None]


def _bits(latents: int) -> int:
    """How many tell the numbers of so many latents apart."""
    return max(latents - 1, 1).bit_length()


def invertible(latents: int, width: int, blocks: int) -> SecondStage:
    """Affine couplings between noise and latents, of exact likelihood (RealNVP; Dinh et al., 2017).

    The loss is -log p(z) per dimension, in nats. A coupling reads a part of the latents, and
    shifts and stretches the others by what it has read; each block is a pair of them, and there are
    as many as `blocks` says, or as it takes for every latent to be moved by every other, log2 of
    their number. A latent that is alone is only shifted and stretched: a Gaussian.
    """
    coupling, count = Coupling(latents, width), 2 * max(blocks, _bits(latents))

    def moved(params: Any, index: int, z: Array, reads: Array) -> tuple[Array, Array, Array]:
        """What coupling `index` leaves as it is, its shift and its stretch of the others."""
        kept, others = z * reads[None], 1 - reads[None]
        shift, stretch = coupling.apply({"params": params[f"coupling{index}"]}, kept)
        return kept, shift * others, stretch * others

    def init(key: Array, mask: Array) -> Any:
        zeros = jnp.zeros((1, latents))
        return {
            f"coupling{index}": coupling.init(each, zeros)["params"]
            for index, each in enumerate(jax.random.split(key, count))
        }

    def loss(params: Any, z: Array, mask: Array, key: Array):
        log_det = jnp.zeros(len(z), z.dtype)
        for index, reads in enumerate(parts(mask, count)):
            kept, shift, stretch = moved(params, index, z, reads)
            z = (kept + (z - kept - shift) * jnp.exp(-stretch)) * mask[None]
            log_det -= (stretch * mask[None]).sum(-1)
        size = jnp.maximum(mask.sum(), 1)
        nll = 0.5 * (jnp.square(z).sum(-1) + size * LOG_2PI) - log_det
        return nll.mean() / size, {}

    def sample(params: Any, mask: Array, key: Array, size: int) -> Array:
        z = latent_noise(key, size, latents) * mask[None]
        for index, reads in reversed(list(enumerate(parts(mask, count)))):
            kept, shift, stretch = moved(params, index, z, reads)
            z = (kept + (z - kept) * jnp.exp(stretch) + shift) * mask[None]
        return z

    return SecondStage(init, loss, sample, has_gamma=False)


def second_vae(latents: int, width: int, blocks: int) -> SecondStage:
    """The paper's: a small VAE with skips and as many latents, whose gamma is learned.

    Samples include the decoder's noise, as it is z, noise and all, that is modelled.
    """
    model = mlp_vae(
        outputs=latents, latents=latents, width=width, encoder_layers=blocks + 1,
        decoder_blocks=blocks, activation=nn.silu, residual=True, affine_skip=True,
        # z has about the variance of gamma's start, where total collapse is a minimum: latents
        # that start informative find the way down.
        log_var_init=-2.0,
    )  # fmt: skip

    def init(key: Array, mask: Array) -> Any:
        params = init_params(model, key, jnp.zeros(latents))
        return {name: leaf for name, leaf in params.items() if name != "log_gamma"}

    def loss(params: Any, z: Array, mask: Array, key: Array):
        return vae_loss(model, params, z, latent_noise(key, *z.shape), target=z, mask=mask)

    def sample(params: Any, mask: Array, key: Array, count: int) -> Array:
        to_u, to_eps = jax.random.split(key)
        z = model.apply({"params": params}, latent_noise(to_u, count, latents), method="decode")
        noise = jnp.exp(0.5 * params["log_gamma"]) * latent_noise(to_eps, count, latents)
        return (z + noise) * mask[None]

    return SecondStage(init, loss, sample, has_gamma=True)


KINDS = {"flow": flow_matching, "invertible": invertible, "vae": second_vae}
