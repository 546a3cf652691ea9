"""How the decoder variance gamma moves while a VAE is trained, and which latents are open.

A homotopy is a pair of pure functions, `init` and `update`, in the manner of optax's gradient
transformations. It knows of no network, optimiser or data: each step it is shown a `Seen`, and says
in its `State` what gamma and the number of open latents are.

    homotopy = adaptive(dim=192, steps=20_000)
    state = homotopy.init(gamma, latents, key)         # exp(state.log_gamma), state.open
    state = homotopy.update(Seen(step, mean_square, residual, mean), state)

It imports JAX alone.
"""

from vaebal.homotopy.opener import one_by_one, patience_of
from vaebal.homotopy.rules import (
    Homotopy,
    Seen,
    State,
    closed_form,
    fixed,
    gradient,
    guarded,
    held,
    prescribed,
)
from vaebal.homotopy.steady import steady_rate

__all__ = [
    "Homotopy",
    "Seen",
    "State",
    "adaptive",
    "closed_form",
    "fixed",
    "gradient",
    "guarded",
    "held",
    "one_by_one",
    "patience_of",
    "prescribed",
    "steady_rate",
]


def adaptive(
    dim: int,
    steps: int,
    *,
    rate: float = 2e-3,
    guard: float = 0.4,
    memory: int = 50,
    patience: float | None = None,
    release: tuple[float, float] = (0.75, 0.9),
) -> Homotopy:
    """The adaptive homotopy: guarded, latents opened one by one, released towards the end.

    The numbers are those that were exact on drawn images of 1 to 12 dimensions; see `guarded` and
    `one_by_one` for what they mean.

    Args:
      dim: D.
      steps: of the whole training; the learning rate should be near 0 at its end.
      patience: steps; None: `patience_of(steps)`.
      release: shares of the steps between which the guard is let go.
    """
    start, end = release
    patience = patience_of(steps) if patience is None else patience
    rule = guarded(rate, dim=dim, guard=guard, memory=memory, release=(start * steps, end * steps))
    return one_by_one(rule, patience=patience, memory=memory)
