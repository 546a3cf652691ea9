"""From rows to a VAE in balance: the count by the adaptive homotopy, then error and gamma.

Shapes: N examples, D features, K latents. Rows are standardised.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vaebal import homotopy
from vaebal.data import steps_per_epoch
from vaebal.errors import Diverged
from vaebal.estimator.kept import Kept
from vaebal.estimator.plan import Plan
from vaebal.models import GaussianVAE, latent_noise, mlp_vae
from vaebal.models.objectives import gaussian_vae_terms
from vaebal.streams import stream
from vaebal.training import (
    At,
    Member,
    Objective,
    Optimisation,
    Program,
    State,
    Told,
    gaussian_vae,
    member_params,
    shared_given,
    stack_members,
)
from vaebal.training.vae import RESIDUAL_PART

HELD_ROWS = 2000  # of those held out, by whose residual the homotopy goes
# Shares of the homotopy's steps between which its guard is let go, and before which the last latent
# must have opened for the count to be taken as found.
RELEASE, SETTLED_BY = (0.75, 0.9), 0.6
CHUNKS = 40  # of a phase: how often progress is told, the bound measured, and time looked at
# Keeps the decoder from learning by heart what its affine skip could say: without it 1,800 rows of
# twelve linear dimensions went into ten latents, at an error of .04 of the variance.
WEIGHT_DECAY = 0.1
BLOCK = 256  # rows evaluated at a time, always so many, so that a row's result is its own
# Of the held-out bound: it has worsened where for a quarter of the chunks it has not been better.
PATIENT_CHUNKS = CHUNKS // 4

# (phase, share of its steps done, the chunk's metrics)
Tell = Callable[[str, float, dict[str, float]], None]


class Fitted(NamedTuple):
    """A VAE as it is kept."""

    params: Any  # with log gamma
    open: int  # latents in the model
    history: list[dict[str, float]]
    whole: bool  # whether the homotopy went to its end
    settled: bool  # whether, besides, the count was found well before that


def build(plan: Plan, dim: int) -> GaussianVAE:
    """The network: feed-forward, residual, with eq. 5's skip and its mirror."""
    model = mlp_vae(
        outputs=dim, latents=plan.latents, width=plan.width, encoder_layers=plan.blocks + 1,
        decoder_blocks=plan.blocks, activation=jax.nn.silu, residual=True, affine_skip=True,
        encoder_skip=True,
    )  # fmt: skip
    return model.clone(linear_variance=True)


def adaptive(plan: Plan, dim: int, member: Member) -> homotopy.Homotopy:
    """The rule that finds the count, in plan.steps steps."""
    return homotopy.adaptive(dim, plan.steps, patience=plan.patience, release=RELEASE)


def _at_the_count(member: Member) -> homotopy.Homotopy:
    return homotopy.closed_form(2e-2)


class Given(NamedTuple):
    """What does not change in training."""

    mean: Array  # x_bar [D]
    held_out: Array  # [n, D], rows that are not trained on


def objective(model: GaussianVAE) -> Objective:
    """`gaussian_vae`, whose residual is that of held-out rows.

    The homotopy then lets gamma fall, and opens latents, by what the decoder has understood. By
    what it has learned by heart a few latents can hold any number of training rows: twelve
    dimensions of 1,800 rows in ten latents.
    """
    base = gaussian_vae(model)

    def init(member: Member, given: Given) -> Any:
        return base.init(member, given.mean)

    def loss(params: Any, rows: Array, at: At) -> tuple[Array, Told]:
        value, told = base.loss(params, rows, at)
        key = stream(at.member.seed, "held-out residual", at.step)
        size = max(len(rows) // RESIDUAL_PART, 1)
        drawn = jax.random.randint(key, (size,), 0, len(at.given.held_out))
        return value, told._replace(kept=(at.given.held_out[drawn], at.open))

    def residual(params: Any, told: Told) -> Array:
        x, number = told.kept
        mean, _ = model.apply({"params": params}, x, number, method="encode")
        return x - model.apply({"params": params}, mean, method="decode")

    return base._replace(init=init, loss=loss, residual=residual)


@functools.lru_cache(maxsize=8)
def _program(plan: Plan, phase: str, shape: tuple[int, int], held: int) -> Program:
    """The compiled program of a phase, for any data of this shape and so many rows held out."""
    dim = shape[1]
    finding = phase == "count"
    steps = plan.steps if finding else plan.settle_steps
    settings = Optimisation(
        learning_rate=plan.learning_rate if finding else plan.learning_rate / 3,
        final_learning_rate=2e-6,
        warmup_steps=min(200, steps // 10),
        total_steps=steps,
        clip_norm=20.0,
        beta2=0.99,
        weight_decay=WEIGHT_DECAY,
    )
    rule = functools.partial(adaptive, plan, dim) if finding else _at_the_count
    member = stack_members([Member(0, plan.latents, 1.0)])
    return Program(
        objective(build(plan, dim)), settings, member, jax.ShapeDtypeStruct(shape, np.float32),
        plan.batch_size, given=Given(jnp.zeros((1, dim)), jnp.zeros((1, held, dim))), rule=rule,
        parts=_parts(plan, shape[0]),
    )  # fmt: skip


def _parts(plan: Plan, examples: int) -> int:
    """Into how many a pass over the rows is cut, so that none is longer than a chunk."""
    whole = steps_per_epoch(examples, plan.batch_size)
    return min(-(-CHUNKS * whole // plan.steps), whole)


@functools.partial(jax.jit, static_argnames="model")
def _bound(model: GaussianVAE, params: Any, x: Array, weight: Array, number: Array, seed: Array):
    """Of rows [n, D]: E|x - x_hat|^2 / D and KL at one draw each, weighted means."""
    eps = latent_noise(stream(seed, "held out"), len(x), model.latents)
    outputs = model.apply({"params": params}, x, eps, number)
    terms = gaussian_vae_terms(x, outputs)
    mean = lambda values: (values * weight).sum() / weight.sum()  # noqa: E731
    return mean(terms.squared_error) / x.shape[-1], mean(terms.kl.sum(-1))


class HeldOut:
    """The bound on rows that training does not see."""

    def __init__(self, model: GaussianVAE, rows: np.ndarray, seed: int, most: int = 4096):
        used = rows[:most]
        padding = -len(used) % BLOCK
        self._rows = jnp.asarray(np.pad(used, ((0, padding), (0, 0))))
        self._weight = jnp.asarray(np.pad(np.ones(len(used), np.float32), (0, padding)))
        self._model, self._seed, self._dim = model, seed, rows.shape[1]

    def __call__(self, params: Any, number: Any) -> tuple[float, float]:
        """-ELBO in nats per example with gamma at its best for these rows, and that gamma."""
        square, kl = jax.device_get(
            _bound(self._model, params, self._rows, self._weight, number, self._seed)
        )
        gamma = max(float(square), 1e-12)
        return 0.5 * self._dim * (np.log(2 * np.pi * gamma) + 1) + float(kl), gamma


class _Phase(NamedTuple):
    state: State  # the last one
    best: Any  # the parameters of the best held-out bound
    best_bound: float
    history: list[dict[str, float]]


def _run(
    program: Program,
    state: State,
    phase: str,
    epochs: int,
    held_out: HeldOut,
    tell: Tell,
    deadline: float,
    kept: Kept,
    stops: bool,
    after: Sequence[int] = (),
) -> _Phase:
    """A phase, chunk by chunk.

    Args:
      deadline: by `time.monotonic`.
      kept: where the phase goes on from, and is kept after every chunk.
      stops: whether it ends where the held-out bound has worsened.
      after: what it begins from and counts in, as integers: what was kept of a phase of others is
        not gone on with.

    Raises:
      Diverged: the loss or gradient stopped being finite.
    """
    done, history = 0, []
    best, best_bound, since = None, np.inf, 0
    held = kept.load(phase, (state, member_params(state, 0)))
    if held is not None and held[1]["after"] == list(after):
        (state, best), told = held
        best, history, since = jax.device_get(best), told["history"], told["since"]
        done, best_bound = told["done"], told["bound"]
    chunk = max(1, epochs // CHUNKS)
    while done < epochs and (best is None or time.monotonic() < deadline):
        if stops and since > PATIENT_CHUNKS:
            break
        count = min(chunk, epochs - done)
        state, metrics = program.run(state, count)
        done, since = done + count, since + 1
        told = _told(state, metrics, held_out)
        history.append(told)
        tell(phase, done / epochs, told)
        if told["held_out_bound"] < best_bound:
            best = jax.device_get(member_params(state, 0))
            best_bound, since = told["held_out_bound"], 0
        values = {"history": history, "since": since, "done": done, "bound": best_bound}
        kept.save(phase, (state, best), values | {"after": list(after)})
    return _Phase(state, best, best_bound, history)


def _told(state: State, metrics: Any, held_out: HeldOut) -> dict[str, float]:
    """What a chunk tells.

    Raises:
      Diverged: the loss or gradient stopped being finite.
    """
    stopped = int(state.stopped[0])
    if stopped >= 0:
        raise Diverged(
            f"The loss or its gradient stopped being finite at step {stopped}: give another seed, "
            "or look for outliers in X."
        )
    bound, gamma = held_out(member_params(state, 0), state.homotopy.open[0])
    told = {name: float(v[0]) for name, v in jax.device_get(metrics).items()}
    return told | {"step": float(state.step[0]), "held_out_bound": bound, "held_out_gamma": gamma}


def fit(
    plan: Plan,
    train: np.ndarray,
    held_out: np.ndarray,
    seed: int,
    tell: Tell,
    deadline: float,
    kept: Kept,
) -> Fitted:
    """Finds the count, and then lets error and gamma settle at it. In float32, whatever JAX's mode.

    Args:
      train, held_out: standardised rows [N, D].
      deadline: by `time.monotonic`; what is under way then is finished with what there is.
      kept: what an interrupted fit goes on from.

    Raises:
      Diverged: training did, from this seed.
    """
    with jax.enable_x64(False):
        dim = train.shape[1]
        model, seen = build(plan, dim), held_out[:HELD_ROWS]
        given = shared_given(Given(jnp.asarray(train.mean(0)), jnp.asarray(seen)), 1)
        shape = train.shape, len(seen)
        bound = HeldOut(model, held_out, seed)
        member = stack_members([Member(seed, plan.latents, 1.0)])
        parts = _parts(plan, len(train))
        each = steps_per_epoch(len(train), plan.batch_size) // parts
        epochs = lambda steps: -(-steps // each)  # noqa: E731
        found_in = (parts,) if parts > 1 else ()
        program = _program(plan, "count", *shape).on(member, train, given=given)
        found = _run(
            program, program.init(), "count", epochs(plan.steps), bound, tell, deadline, kept,
            stops=False, after=found_in,
        )  # fmt: skip
        state = jax.tree.map(lambda leaf: leaf[0], found.state)
        number = int(state.homotopy.open)
        history = [{"phase": 0.0, **each} for each in found.history]
        program = _program(plan, "settle", *shape)
        program = program.on(
            member._replace(latents=np.array([number], np.int32)), train, given=given
        )
        last_bound = bound(state.params, state.homotopy.open)[0]
        ends = [(last_bound, jax.device_get(state.params))]
        # From where the count was found; and, where that has learned the rows by heart, anew.
        starts = [_from_where(program.init(), found.state)]
        if found.best_bound < last_bound - 0.01 * dim:
            starts.append(program.init())
        for index, start in enumerate(starts):
            later = _run(
                program, start, f"settle{index}", epochs(plan.settle_steps), bound, tell, deadline,
                kept, stops=True, after=(int(state.step), number, *found_in),
            )  # fmt: skip
            history += [{"phase": 1.0, **each} for each in later.history]
            ends.append((later.best_bound, later.best))
        _, params = min(ends, key=lambda end: end[0])
        # gamma where it is stationary on rows that were not trained on: by heart it would be too
        # small.
        log_gamma = np.float32(np.log(bound(params, number)[1]))
        whole = found.history[-1]["step"] >= plan.steps
        settled = whole and _settled(found.history, plan)
        return Fitted(params | {"log_gamma": log_gamma}, number, history, whole, settled)


def _from_where(start: State, found: State) -> State:
    """A phase's first state, with the weights and gamma of another's last."""
    homotopy = start.homotopy._replace(log_gamma=found.homotopy.log_gamma)
    return start._replace(weights=found.weights, homotopy=homotopy)


def _settled(history: list[dict[str, float]], plan: Plan) -> bool:
    """Whether no latent opened late, or the last one was offered and found no use."""
    number = [each["open"] for each in history]
    steps = [each["step"] for each in history]
    guarded = [n for n, step in zip(number, steps, strict=True) if step <= RELEASE[0] * plan.steps]
    if guarded and number[-1] < guarded[-1]:
        return True
    # At the end of a chunk it is known to have opened: within it, where chunks are long.
    opened = min(step for n, step in zip(number, steps, strict=True) if n >= number[-1])
    return opened < SETTLED_BY * plan.steps
