"""VAEs whose state is known, trained for the purpose: material for `diagnose` to be tried on.

Small VAEs on manifolds of known dimension r, stacked: the arms of all data sets of one D train in
one vmapped program, by a plain loop of their own.

Shapes: M members, N examples, D pixels, K latents, B batch.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vaebal.data import CurvedCube, FlatCube
from vaebal.data.rendered import draw_factors
from vaebal.models import GaussianVAE, init_params, latent_noise, mlp_vae
from vaebal.models.gaussians import kl_to_standard_normal, reparameterise
from vaebal.streams import stream

LATENTS = 16
TRAIN, HELD_OUT = 3000, 2000
BATCH = 64
STEPS = {"long": 8000, "short": 2500}
LEARNING_RATE = 3e-3


class Source(NamedTuple):
    """A data set: a manifold of dimension r in D dimensions, with white noise."""

    manifold: str  # "linear" or "network"
    rank: int
    dim: int
    noise: float
    seed: int


class Case(NamedTuple):
    """One VAE: its data, the arm that trains it, and the goal, the verdict meant."""

    source: Source
    arm: str
    goal: str
    kappa: int  # latents in the model, of LATENTS
    gamma: float  # where gamma starts
    rate: float  # nats of log gamma a step towards the batch's E|x - x_hat|^2 / D; 0: fixed
    steps: int  # where training stops
    length: str  # the program that trains it, of STEPS


class Outcome(NamedTuple):
    """What a trained VAE says of held-out data; NumPy arrays."""

    x: np.ndarray  # [N, D]
    x_hat: np.ndarray  # [N, D] at the posterior mean
    x_hat_sampled: np.ndarray  # [N, D] at a draw of z
    mean: np.ndarray  # [N, K]
    log_var: np.ndarray  # [N, K]
    gamma: float


@functools.lru_cache(maxsize=64)
def examples(source: Source) -> np.ndarray:
    """[TRAIN + HELD_OUT, D] float32, in random order."""
    kind = {"linear": FlatCube, "network": CurvedCube}[source.manifold]
    factors = draw_factors(source.seed, jnp.arange(TRAIN + HELD_OUT), source.rank)
    x = kind(source.dim, source.seed)(factors)
    noise = jax.random.normal(stream(source.seed, "observation noise"), x.shape)
    return np.asarray(x + source.noise * noise)


@functools.lru_cache(maxsize=64)
def spectrum(source: Source) -> np.ndarray:
    """Variances of the data along its principal directions, descending, [D]."""
    return np.linalg.eigvalsh(np.cov(examples(source), rowvar=False))[::-1]


def cases(source: Source) -> list[Case]:
    """Every arm on one data set."""
    variances, r = spectrum(source), source.rank
    top, least = float(variances[0]), float(variances[r - 1])
    long, short = STEPS["long"], STEPS["short"]
    made = [
        # All latents open, gamma slow: a homotopy.
        ("γ slow", "balanced", LATENTS, top, 0.003, long, "long"),
        # The state that opening latents one by one ends in: r open, the others the prior's.
        ("γ slow, r open", "balanced", r, top, 0.003, long, "long"),
        ("γ slow, κ = r", "balanced", r, top, 0.003, long, "long"),
        ("γ fixed too small", "under-regularized", LATENTS, 1e-6, 0.0, short, "short"),
        ("autoencoder, tiny KL", "under-regularized", LATENTS, 1e-9, 0.0, short, "short"),
        ("autoencoder, κ = r", "under-regularized", r, 1e-9, 0.0, short, "short"),
        ("κ = r + 2, γ fixed small", "under-regularized", r + 2, 1e-6, 0.0, short, "short"),
        ("γ learned too fast", "under-regularized", LATENTS, top, 0.1, short, "short"),
        ("γ fixed too large", "over-regularized", LATENTS, 0.5 * least, 0.0, short, "short"),
        ("collapsed at birth", "over-regularized", LATENTS, 2 * top, 0.0, short, "short"),
        ("cut off early", "over-regularized", LATENTS, top, 0.003, 300, "short"),
    ]
    if r > 1:
        made += [
            ("κ < r", "over-regularized", max(r // 2, r - 2), top, 0.01, short, "short"),
            ("κ = r − 1", "over-regularized", r - 1, top, 0.01, short, "short"),
            ("partial collapse", "over-regularized", r // 2, top, 0.01, short, "short"),
            ("autoencoder, κ < r", "over-regularized", r // 2, 1e-9, 0.0, short, "short"),
        ]
    return [Case(source, *each) for each in made]


def network(dim: int) -> GaussianVAE:
    """The VAE of every case: an MLP with skips."""
    return mlp_vae(
        outputs=dim, latents=LATENTS, width=64, encoder_layers=2, decoder_blocks=1,
        activation=jax.nn.silu, residual=True, affine_skip=True, log_var_init=-1.0,
        encoder_skip=True,
    )  # fmt: skip


def _loss(model, params, x, eps, kappa, gamma):
    """gamma times -ELBO without its constants, and E|x - x_hat|^2 / D."""
    mean, log_var = model.apply({"params": params}, x, kappa, method="encode")
    eps = jnp.where(model.latent_mask(kappa), eps, 0.0)
    x_hat = model.apply({"params": params}, reparameterise(mean, log_var, eps), method="decode")
    error = jnp.square(x - x_hat).sum(-1).mean()
    kl = kl_to_standard_normal(mean, log_var).sum(-1).mean()
    return 0.5 * error + gamma * kl, error / x.shape[-1]


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def _train(model, steps, data, member, kappa, start, rate, stop, seed):
    """One member after the other would do the same; see `train`."""
    schedule = lambda last: optax.warmup_cosine_decay_schedule(  # noqa: E731
        0.0, LEARNING_RATE, 50, last, 0.01 * LEARNING_RATE
    )
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))

    def one(member, kappa, start, rate, stop, seed):
        params = init_params(model, stream(seed, "init"), data[member, :TRAIN].mean(0), kappa)

        def step(carry, index):
            params, state, log_gamma = carry
            chosen = jax.random.randint(stream(seed, "batch", index), (BATCH,), 0, TRAIN)
            eps = latent_noise(stream(seed, "noise", index), BATCH, LATENTS)
            (_, error), gradient = jax.value_and_grad(_loss, argnums=1, has_aux=True)(
                model, params, data[member, chosen], eps, kappa, jnp.exp(log_gamma)
            )
            updates, state = adam.update(gradient, state, params)
            size = jnp.where(index < stop, schedule(steps)(index), 0.0)
            params = jax.tree.map(lambda p, u: p - size * u, params, updates)
            move = jnp.clip(jnp.log(error) - log_gamma, -rate, rate)
            return (params, state, log_gamma + jnp.where(index < stop, move, 0.0)), None

        carry = (params, adam.init(params), jnp.log(start))
        (params, _, log_gamma), _ = jax.lax.scan(step, carry, jnp.arange(steps))
        return params, jnp.exp(log_gamma)

    return jax.vmap(one)(member, kappa, start, rate, stop, seed)


@functools.partial(jax.jit, static_argnames="model")
def _evaluate(model, params, x, kappa, seed):
    mean, log_var = model.apply({"params": params}, x, kappa, method="encode")
    eps = latent_noise(stream(seed, "evaluation"), len(x), LATENTS)
    eps = jnp.where(model.latent_mask(kappa), eps, 0.0)
    z = reparameterise(mean, log_var, eps)
    decode = lambda z: model.apply({"params": params}, z, method="decode")  # noqa: E731
    return decode(mean), decode(z), mean, log_var


def train(population: Sequence[Case]) -> list[Outcome]:
    """Trains cases of one D and one length together; their held-out outcomes, in order."""
    sources = list(dict.fromkeys(case.source for case in population))
    data = np.stack([examples(source) for source in sources])
    model = network(sources[0].dim)
    fields = [
        np.array([sources.index(case.source) for case in population]),
        np.array([case.kappa for case in population]),
        np.array([case.gamma for case in population], np.float32),
        np.array([case.rate for case in population], np.float32),
        np.array([case.steps for case in population]),
        np.arange(len(population)) + 1000 * np.array([case.source.seed for case in population]),
    ]
    steps = STEPS[population[0].length]
    params, gammas = _train(model, steps, jnp.asarray(data[:, :TRAIN]), *fields)
    outcomes = []
    for index, case in enumerate(population):
        x = examples(case.source)[TRAIN:]
        own = jax.tree.map(lambda leaf: leaf[index], params)  # noqa: B023 (used at once)
        x_hat, sampled, mean, log_var = jax.device_get(
            _evaluate(model, own, jnp.asarray(x), case.kappa, index)
        )
        if "κ" in case.arm:  # such a model has no more latents
            mean, log_var = mean[:, : case.kappa], log_var[:, : case.kappa]
        outcomes.append(Outcome(x, x_hat, sampled, mean, log_var, float(gammas[index])))
    return outcomes


def sources(seed: int, count: int = 24) -> list[Source]:
    """Data sets: r = 1..8 in turn; D, manifold and noise drawn at random by `seed`."""
    random = np.random.default_rng(seed)
    return [
        Source(
            str(random.choice(["linear", "network"])),
            index % 8 + 1,
            int(random.choice([20, 48, 96, 200])),
            float(random.choice([0.0, 0.002, 0.01])),
            100 * seed + index,
        )
        for index in range(count)
    ]
