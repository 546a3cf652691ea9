"""How other papers move the decoder variance, in the form of `vaebal.homotopy`, and one of many."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from vaebal.homotopy import Homotopy, Seen, State, fixed

MOMENTUM = 0.99  # of both papers' averages


def moving_average() -> Homotopy:
    """Asperti & Trentin (2020): gamma = min(gamma, .99 gamma + .01 E|x - x_hat|^2 / D).

    The estimate of the error is a running mean that never rises.
    """
    start = fixed()

    def update(seen: Seen, state: State) -> State:
        gamma = jnp.exp(state.log_gamma)
        mean = MOMENTUM * gamma + (1 - MOMENTUM) * seen.mean_square
        return state._replace(log_gamma=jnp.log(jnp.minimum(gamma, mean)))

    return Homotopy(start.init, update)


def geco(tolerance: Array | float, rate: float = 1e-2) -> Homotopy:
    """GECO (Rezende & Viola, 2018): a multiplier of the constraint on E|x - x_hat|^2 / D.

    The multiplier is 1 / (2 gamma); each step multiplies it by exp(rate C), C the running mean of
    the constraint, here relative to the tolerance and cut at +-1, so that one rate serves all data.
    """
    start = fixed()

    def init(gamma, latents, key) -> State:
        return start.init(gamma, latents, key)._replace(memory=jnp.ones((), float))

    def update(seen: Seen, state: State) -> State:
        constraint = jnp.clip(seen.mean_square / tolerance - 1, -1.0, 1.0)
        mean = MOMENTUM * state.memory + (1 - MOMENTUM) * constraint
        return state._replace(log_gamma=state.log_gamma - rate * mean, memory=mean)

    return Homotopy(init, update)


def chosen(rules: Sequence[Homotopy], index: Array) -> Homotopy:
    """The rule number `index` of `rules`, so that members of one program can have different ones.

    All are followed from the same gamma. None may read the residual, or open latents.
    """

    def init(gamma, latents, key) -> State:
        started = [rule.init(gamma, latents, key) for rule in rules]
        return started[0]._replace(memory=tuple(state.memory for state in started))

    def update(seen: Seen, state: State) -> State:
        memories = zip(rules, state.memory, strict=True)
        moved = [rule.update(seen, state._replace(memory=own)) for rule, own in memories]
        log_gamma = jnp.stack([each.log_gamma for each in moved])[jnp.asarray(index, jnp.int32)]
        return state._replace(log_gamma=log_gamma, memory=tuple(each.memory for each in moved))

    return Homotopy(init, update)
