"""Their data, drawn anew for every batch, and their nets.

Settings of one kind are stacked: features and latents that a setting does not have are masked, are
zero in x and x_hat, and are in no loss. Shapes: B batch, D features, K latents, R dimensions of z.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from vaebal.models import GaussianVAE, init_params, latent_noise
from vaebal.models.gaussians import isotropic_nll, kl_to_standard_normal
from vaebal.streams import stream
from vaebal.training import At, Member, Objective, Told
from vaebal.training.vae import RESIDUAL_PART

COMPONENTS = (0.2, 0.3, 0.5, 0.3, 0.2)  # Zheng et al.'s mixture, up to its sum


def features(kind: str, most: int, padding: int) -> int:
    """D of padded rows: R coordinates, one that bends (of "sigmoid"), zeros; of "mixture" 20."""
    if kind == "mixture":
        return 20
    return most + padding + (kind == "sigmoid")


def mask(kind: str, dim: int, most: int, numbers: Any) -> Array:
    """[D], 1 for the features that a member's setting has."""
    if kind == "mixture":
        return jnp.ones(dim)
    place, first = jnp.arange(dim), most + (kind == "sigmoid")
    own = (place < numbers["rank"]) | ((place >= most) & (place < first + numbers["padding"]))
    return own.astype(float)


def draw(kind: str, key: Array, size: int, dim: int, most: int, numbers: Any) -> Array:
    """x [B, D] of a member's data set."""
    own = jnp.arange(most) < numbers["rank"]
    seed = jnp.asarray(numbers["data_seed"], jnp.int32)
    if kind == "mixture":
        return _mixture(key, size, dim, own, seed)
    z = jnp.where(own[None, :], jax.random.normal(key, (size, most)), 0.0)
    parts = [z]
    if kind == "sigmoid":
        a = jnp.where(own, jax.random.normal(stream(seed, "a"), (most,)), 0.0)
        parts.append(jax.nn.sigmoid(jnp.matmul(z, a, precision="highest"))[:, None])
    else:
        parts = [z / jnp.linalg.norm(z, axis=1, keepdims=True)]
    width = sum(part.shape[1] for part in parts)
    return jnp.concatenate([*parts, jnp.zeros((size, dim - width))], axis=1)


def _mixture(key: Array, size: int, dim: int, own: Array, seed: Array) -> Array:
    keys, most = jax.random.split(key, 3), len(own)
    shape = (len(COMPONENTS), most)
    centres = jax.random.normal(stream(seed, "centres"), shape)
    spreads = jnp.exp(jax.random.normal(stream(seed, "spreads"), shape))
    part = jax.random.categorical(keys[0], jnp.log(jnp.array(COMPONENTS)), shape=(size,))
    z = centres[part] + spreads[part] * jax.random.normal(keys[1], (size, most))
    z = jnp.where(own[None, :], z + jax.random.normal(keys[2], (size, most)), 0.0)
    width = 1 / jnp.sqrt(own.sum())  # of torch.nn.Linear's start
    weights = jax.random.uniform(stream(seed, "map"), (most + 1, dim), minval=-1, maxval=1) * width
    return jax.nn.sigmoid(jnp.matmul(z, weights[1:], precision="highest") + weights[:1])


class TheirEncoder(nn.Module):
    """x -> a linear map, after hidden layers; one variance for all x, or one of each (`varies`)."""

    latents: int
    hidden: tuple[int, ...]
    varies: bool

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """x [B, D] -> mean, log_var [B, K]."""
        for index, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, name=f"layer{index}")(x))
        mean = nn.Dense(self.latents, name="mean")(x)
        if self.varies:
            return mean, nn.Dense(self.latents, name="log_var")(x)
        log_var = self.param("log_var", nn.initializers.ones, (self.latents,))
        return mean, jnp.broadcast_to(log_var, mean.shape)


class TheirDecoder(nn.Module):
    """z -> a linear map after hidden layers; of "sigmoid" sets with a sigmoid of one beside it."""

    outputs: int
    hidden: tuple[int, ...]
    bends: bool

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """z [B, K] -> [B, D]."""
        h = z
        for index, width in enumerate(self.hidden):
            h = nn.relu(nn.Dense(width, name=f"layer{index}")(h))
        out = nn.Dense(self.outputs, name="out")(h)
        return out + nn.sigmoid(nn.Dense(self.outputs, name="bent")(h)) if self.bends else out


def their_net(kind: str, hidden: tuple[int, ...], dim: int, latents: int) -> GaussianVAE:
    """Their VAE, with gamma a parameter."""
    return GaussianVAE(
        TheirEncoder(latents, hidden, kind == "mixture"),
        TheirDecoder(dim, hidden, kind == "sigmoid"),
        latents,
        dim,
        affine_skip=False,
        linear_variance=kind == "mixture",
    )


def _refitted(params: Any, dim: int, own: Array, member: Member, latents: int) -> Any:
    """First layers scaled for the features and latents that there are: lecun_normal's 1/fan-in."""

    def one(layers: Any, scale: Array, first: tuple[str, ...]) -> Any:
        again = lambda layer: layer | {"kernel": layer["kernel"] * scale}  # noqa: E731
        return layers | {name: again(layers[name]) for name in first if name in layers}

    encoder, decoder = params["encoder"], params["decoder"]
    heads = ("mean", "log_var") if isinstance(encoder["log_var"], dict) else ("mean",)
    return params | {
        "encoder": one(
            encoder, jnp.sqrt(dim / own.sum()), ("layer0",) if "layer0" in encoder else heads
        ),
        "decoder": one(
            decoder,
            jnp.sqrt(latents / member.latents),
            ("layer0",) if "layer0" in decoder else ("out", "bent"),
        ),
    }


def objective(
    kind: str, model: GaussianVAE, most: int, *, theirs: bool, speed: float = 0.0
) -> Objective:
    """-ELBO on fresh draws of `kind`; the rows that a program has only count the batch.

    Args:
      most: R.
      theirs: whether `model` is their net, started as in their code.
      speed: above 0, log gamma is a weight, and moves so many times as fast as others do.
    """
    dim = model.outputs
    numbers_of = lambda member: member.rule  # noqa: E731

    def init(member: Member, given: Any) -> Any:
        key, own = stream(member.seed, "init"), mask(kind, dim, most, numbers_of(member))
        if theirs:
            arguments = jnp.zeros((1, dim)), jnp.zeros((1, model.latents))
            params = _refitted(
                model.init(key, *arguments)["params"], dim, own, member, model.latents
            )
        else:
            rows = draw(kind, stream(0, "mean"), 1000, dim, most, numbers_of(member))
            params = init_params(model, key, rows.mean(0), member.latents)
        weights = {name: leaf for name, leaf in params.items() if name != "log_gamma"}
        return weights | ({"gamma_step": jnp.zeros(())} if speed else {})

    def loss(params: Any, rows: Array, at: At) -> tuple[Array, Told]:
        numbers, seed = numbers_of(at.member), at.member.seed
        x = draw(kind, stream(seed, "batch", at.step), len(rows), dim, most, numbers)
        own = mask(kind, dim, most, numbers)
        if speed:
            start = jnp.log(at.member.gamma)
            params = params | {"log_gamma": start + speed * params["gamma_step"]}
            params = {name: leaf for name, leaf in params.items() if name != "gamma_step"}
        eps = latent_noise(stream(seed, "noise", at.step), len(x), model.latents)
        outputs = model.apply({"params": params}, x, eps, at.open)
        square = jnp.square(x - outputs.x_hat) @ own
        kl = kl_to_standard_normal(outputs.mean, outputs.log_var).sum(1)
        value = (isotropic_nll(square, outputs.log_gamma, own.sum()) + kl).mean()
        statistics = {"squared_error": square.mean(), "kl": kl.mean()}
        mean_square = square.mean() / own.sum()
        return value, Told(statistics, mean_square, outputs.mean, kept=(x, own))

    def residual(params: Any, told: Told) -> Array:
        (x, own), part = told.kept, max(len(told.mean) // RESIDUAL_PART, 1)
        at_mean = model.apply({"params": params}, told.mean[:part], method="decode")
        return own[None, :] * (x[:part] - at_mean)

    return Objective(init, loss, dim, residual)
