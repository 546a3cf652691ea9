"""Latents opened one by one, where those that are open have done what they can."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from vaebal.homotopy.rules import Homotopy, Seen, State

# A variance has fallen anew where the log of its running mean, over so many times the memory of the
# estimate itself, is so many nats lower.
PLATEAU_MEMORY, PLATEAU_FALL = 2, 0.1
# Patience, where nothing else is said: 750 in 20,000 steps.
PATIENCE = 0.0375
# While all is moving fast, a latent waits for this share of the steps so far, and so many at least.
EARLY_PATIENCE, LEAST_PATIENCE = 0.15, 300
# A latent is in use where its posterior means vary by a tenth of what the liveliest's do, and by
# ACTIVE at least. Relative, as where gamma falls fast over many features all means shrink to a
# tenth of the prior's variance. Not by a small posterior variance, nor by means that vary by more
# than it: what Adam's noise makes of an idle latent's decoder column passes for use by both.
IN_USE, ACTIVE = 0.1, 0.01


def patience_of(steps: int) -> float:
    """The patience that suits a training of so many steps, as far as was tried."""
    return max(PATIENCE * steps, LEAST_PATIENCE)


class Plateau(NamedTuple):
    """Since when a variance has not fallen."""

    level: Array  # [], running mean of its log
    lowest: Array  # [], where the level last fell anew
    since: Array  # [], the step of that


class Opening(NamedTuple):
    """What the opener remembers, the rule's own memory among it."""

    rule: Any
    plateau: Plateau
    latents: Array  # how many there are


def follow(plateau: Plateau, variance: Array, step: Array, memory: int) -> Plateau:
    """A step more of `variance` []; its level is a mean over about `memory` steps."""
    level = plateau.level + (jnp.log(variance) - plateau.level) / memory
    fell = level < plateau.lowest - PLATEAU_FALL
    lowest = jnp.where(fell, level, plateau.lowest)
    return Plateau(level, lowest, jnp.where(fell, step, plateau.since))


def grown(
    number: Array,
    plateau: Plateau,
    seen: Seen,
    *,
    latents: Array | int,
    patience: Array | float,
    released: Array,
) -> tuple[Array, Plateau]:
    """How many latents are open after a step, and the plateau, which begins anew where one opened.

    Args:
      number: how many were open.
      plateau: of the residual's largest variance.
      latents: how many there are.
      patience: see `one_by_one`.
      released: [], whether the guard goes.
    """
    waited = seen.step - plateau.since
    early = jnp.maximum(EARLY_PATIENCE * seen.step, LEAST_PATIENCE)
    spread, latent = seen.mean.var(0), jnp.arange(seen.mean.shape[1])
    liveliest = jnp.where(latent < number, spread, 0).max()
    used = spread > jnp.clip(IN_USE * liveliest, ACTIVE, IN_USE)
    all_used = (used | (latent >= number)).all()
    last_used = (used & (latent == number - 1)).any()
    patient = waited > jnp.minimum(patience, early)
    grows = ~released & patient & all_used & (number < latents)
    shrinks = released & ~last_used & (number > 1)
    since = jnp.where(grows, seen.step, plateau.since)
    lowest = jnp.where(grows, plateau.level, plateau.lowest)
    return number + grows - shrinks, Plateau(plateau.level, lowest, since)


def one_by_one(rule: Homotopy, *, patience: Array | float, memory: int = 50) -> Homotopy:
    """`rule`, with one latent at first and the next where those open have done what they can.

    That is where all of them are in use and the residual's largest variance has not fallen for
    `patience` steps, or early in training for a share of the steps so far. Were all open from the
    start, a curve whose principal directions have variances near each other would wake a latent for
    each of them: none carries enough, at a gamma so near these variances, for the decoder to bend
    around it. One alone carries more and more while gamma falls. A closed latent is the prior's, as
    after Theorem 2's collapse.

    Once the rule is released none is opened, and the last one opened is closed again if it is idle:
    what the data had no use for while gamma was guarded would wake up to explain what is left.

    Args:
      rule: one that follows the residual, as `guarded` does.
      patience: steps.
      memory: the rule's own, in steps.

    Raises:
      ValueError: the rule does not follow the residual; or an update is not shown what it needs.
    """
    if not rule.reads_residual:
        raise ValueError(
            "one_by_one opens latents by the residual's variance, which this rule does not follow: "
            "give it guarded(...)."
        )

    def init(gamma, latents, key) -> State:
        state = rule.init(gamma, latents, key)
        level = jnp.log(state.residual_variance)
        plateau = Plateau(level, level, jnp.zeros((), jnp.int32))
        return state._replace(
            open=jnp.ones((), jnp.int32), memory=Opening(state.memory, plateau, state.open)
        )

    def update(seen: Seen, state: State) -> State:
        if seen.mean is None or seen.residual is None:
            raise ValueError(
                "one_by_one opens latents by Seen.residual and Seen.mean: give it both."
            )
        # One kind of integer in the state, of whatever kind the loop's is.
        seen = seen._replace(step=jnp.asarray(seen.step, jnp.int32))
        before = state.memory
        moved = rule.update(seen, state._replace(memory=before.rule))
        plateau = follow(
            before.plateau, moved.residual_variance, seen.step, PLATEAU_MEMORY * memory
        )
        number, plateau = grown(
            state.open, plateau, seen,
            latents=before.latents, patience=patience, released=moved.released,
        )  # fmt: skip
        return moved._replace(open=number, memory=Opening(moved.memory, plateau, before.latents))

    return Homotopy(init, update, reads_residual=True)
