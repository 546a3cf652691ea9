"""What is chosen from the size of the data alone: network, batch, steps, patience."""

from typing import NamedTuple

from vaebal import homotopy

# Latents that there are at first; twice as many where all of them come into use.
LATENTS = 32
# Of the rows, held out: the bound on them says when to stop, and all reported numbers are theirs.
HELD_OUT = 0.1
LEAST_ROWS = 8


class Plan(NamedTuple):
    """How a data set is fitted."""

    latents: int  # kappa, at most so many can come into use
    width: int  # of every hidden layer
    blocks: int  # residual blocks of the decoder
    batch_size: int
    steps: int  # of the homotopy, that finds the count
    settle_steps: int  # after it, at that count
    patience: int  # steps without a fall of the residual's variance before a latent opens
    learning_rate: float

    def __str__(self) -> str:
        return (
            f"up to {self.latents} latents, layers of {self.width}, {self.steps:,} steps of "
            f"{self.batch_size} to find the count, at most {self.settle_steps:,} more to settle"
        )


def plan(examples: int, dim: int, max_latents: int | None = None) -> Plan:
    """For N training examples of D features; knows nothing of their dimension.

    Fewer examples get fewer steps, as they would only be learned by heart.
    """
    latents = min(dim, max_latents or LATENTS)
    width = 64 if dim <= 32 else 128 if dim <= 256 else 256 if dim <= 1024 else 512
    steps = int(min(max(15 * examples, 2_000), 20_000))
    return Plan(
        latents=latents,
        width=width if examples >= 500 else min(width, 64),
        blocks=2,
        batch_size=min(100, examples),
        steps=steps,
        settle_steps=steps,
        patience=int(homotopy.patience_of(steps)),
        learning_rate=3e-3,
    )
