"""What the rivals train: a VAE whose prior may be ARD's, and autoencoders that drop latents.

One objective serves all members of a program; a member's numbers (`Member.rule`) say which terms
it has. Rows are centred. Shapes: B batch, D features, K latents, L linear layers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vaebal.models import GaussianVAE, init_params, latent_noise
from vaebal.models.gaussians import reparameterise
from vaebal.streams import stream
from vaebal.theory import penalties
from vaebal.training import At, Member, Objective, Told
from vaebal.training.vae import loss_and_terms

ITERATIONS = 8  # of a layer's spectral norm: within a tenth, of random matrices
# Least Volume's eta: 1 in its code, on images whose largest standard deviation is about ten.
ETA = 0.1


def _weights(model: GaussianVAE, member: Member, mean: Array) -> Any:
    params = init_params(model, stream(member.seed, "init"), mean, member.latents)
    return {name: leaf for name, leaf in params.items() if name != "log_gamma"}


def vae(model: GaussianVAE) -> Objective:
    """-ELBO of `model`; where a member's number "ard" is 1, with the prior N(0, s^2) of ARD-VAE.

    s^2 [K] is the mean square of the batch's draws of z, that is the mode of its Gamma posterior
    under a flat hyperprior, and has no gradient (Saha, Joshi & Whitaker, 2025).
    """

    def loss(params: Any, x: Array, at: At) -> tuple[Array, Told]:
        eps = latent_noise(stream(at.member.seed, "noise", at.step), len(x), model.latents)
        value, (outputs, terms) = loss_and_terms(model, params, x, eps, at.open)
        square = jnp.square(outputs.mean) + jnp.exp(outputs.log_var)
        z = reparameterise(outputs.mean, outputs.log_var, eps)
        prior = jax.lax.stop_gradient(jnp.square(z).mean(0))[None, :] + 1e-12
        kl = 0.5 * (jnp.log(prior) - outputs.log_var + square / prior - 1).sum(-1).mean()
        plain = terms.kl.sum(-1).mean()
        value = value + at.member.rule["ard"] * (kl - plain)
        mean_square = jnp.square(x - outputs.x_hat).mean()
        statistics = {"squared_error": terms.squared_error.mean(), "kl": plain}
        return value, Told(statistics, mean_square, outputs.mean)

    return Objective(lambda member, mean: _weights(model, member, mean), loss, model.outputs)


def spectral_norm(kernel: Array) -> Array:
    """A matrix's spectral norm, by power iteration from a fixed start; from below.

    As in `torch.nn.utils.spectral_norm`, whose start is the step before's, the vectors have no
    gradient.
    """
    v = jax.random.normal(jax.random.key(0), kernel.shape[1:])
    fixed = jax.lax.stop_gradient(kernel)
    for _ in range(ITERATIONS):
        v = fixed.T @ (fixed @ v)
        v = v / (jnp.linalg.norm(v) + 1e-12)
    return jnp.sqrt(jnp.square(kernel @ v).sum() + 1e-12)


def bounded(params: Any, gate: Array | float) -> Any:
    """Where `gate` is 1, every matrix of the decoder over its `spectral_norm`, if that is above 1.

    Every layer then has a Lipschitz constant of about 1 at most, so that the decoder cannot undo a
    shrinking of the codes.
    """

    def one(leaf: Array) -> Array:
        if leaf.ndim < 2:
            return leaf
        return leaf / jnp.where(gate > 0, jnp.maximum(spectral_norm(leaf), 1.0), 1.0)

    return params | {name: jax.tree.map(one, params[name]) for name in ("decoder", "affine")}


def codes(model: GaussianVAE, params: Any, x: Array, numbers: Any) -> Array:
    """z [B, K]: the encoder's mean, through as many of the L linear layers as "layers" says."""
    z, _ = model.apply({"params": params["vae"]}, x, method="encode")
    latents = jnp.eye(model.latents)
    for index, layer in enumerate(params["chain"]):
        z = z @ jnp.where(index < numbers["layers"], layer, latents)
    return z


def decoded(model: GaussianVAE, params: Any, z: Array, numbers: Any) -> Array:
    """x_hat [B, D] of codes."""
    own = bounded(params["vae"], numbers["bounded"])
    return model.apply({"params": own}, z, method="decode")


def annealed(end: Array | float, step: Array, steps: int) -> Array:
    """The eps by which log is smoothed: from 1 down to `end` at three quarters of the steps."""
    return jnp.exp(jnp.log(end) * jnp.minimum(step / (0.75 * steps), 1.0))


def autoencoder(model: GaussianVAE, steps: int, layers: int) -> Objective:
    """E|x - x_hat|^2 over the data's variance, with the penalty that a member's numbers choose.

      layers: how many linear layers stand behind the encoder (IRMAE: Jing, Zbontar & LeCun, 2020);
      bounded: 1 where the decoder's Lipschitz constant is bounded;
      volume: weight of Least Volume's (prod_k (std z_k + ETA))^(1/K) (Chen & Fuge, 2024);
      log: final eps of eq. 6 with h = log (u + eps), 0: none;
      variance: of a feature.

    Args:
      model: one of fixed gamma, whose posterior variance is not used.
      steps: of the whole training.
      layers: L, at most.
    """

    def init(member: Member, mean: Array) -> Any:
        width = 1 / math.sqrt(model.latents)  # torch.nn.Linear's, as in IRMAE's code
        shape, key = (layers, model.latents, model.latents), stream(member.seed, "chain")
        chain = jax.random.uniform(key, shape, minval=-width, maxval=width)
        return {"vae": _weights(model, member, mean), "chain": chain}

    def loss(params: Any, x: Array, at: At) -> tuple[Array, Told]:
        numbers = at.member.rule
        z = codes(model, params, x, numbers)
        error = jnp.square(x - decoded(model, params, z, numbers)).mean() / numbers["variance"]
        spread = jnp.sqrt(z.var(0) + 1e-12)  # no infinite slope at 0
        volume = jnp.exp(jnp.log(spread + ETA).mean())
        # Times the error, which keeps the gradient's scale, as gamma does in a VAE's.
        h = penalties.smooth(
            penalties.log(1e-12), annealed(jnp.maximum(numbers["log"], 1e-12), at.step, steps)
        )
        rows = h.value(error) + h.value(jnp.square(z).mean(0)).sum() / model.outputs
        scale = jax.lax.stop_gradient(error + 1e-6)
        value = jnp.where(numbers["log"] > 0, scale * rows, error + numbers["volume"] * volume)
        statistics = {"squared_error": error * numbers["variance"] * model.outputs}
        return value, Told(statistics)

    return Objective(init, loss, model.outputs)
