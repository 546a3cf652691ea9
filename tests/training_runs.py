"""Programs of small VAEs and small runs of them, as the tests of training build them."""

import jax
import numpy as np

from vaebal import homotopy
from vaebal.data import mean_image
from vaebal.training import (
    Member,
    Optimisation,
    Program,
    fit,
    gaussian_vae,
    shared_given,
    stack_members,
)
from vaebal.training.checkpoints import Checkpoints
from vaebal.units import to_unit_pixels

SETTINGS = Optimisation(
    learning_rate=3e-3,
    final_learning_rate=1e-4,
    warmup_steps=5,
    total_steps=600,
    clip_norm=20.0,
)


def closed_form(member):
    return homotopy.closed_form(member.rule["rate"])


def fixed(member):
    return homotopy.fixed()


def members(seeds=(0,), kappas=(5,), rates=(0.02,)):
    """Stacked; a list of one stands for as many as the longest has."""
    size = max(len(seeds), len(kappas), len(rates))
    wide = [np.resize(np.asarray(values), size).tolist() for values in (seeds, kappas, rates)]
    return stack_members([Member(s, k, rule={"rate": r}) for s, k, r in zip(*wide, strict=True)])


def data_of(stack, rows, decode=to_unit_pixels):
    """A program's `members`, `rows` and `given`: the mean image."""
    mean = jax.jit(lambda rows: mean_image(rows, decode))(rows)
    return {"members": stack, "rows": rows, "given": shared_given(mean, len(stack.seed))}


def program(
    model, stack, rows, batch_size=32, *, settings=SETTINGS, rule=closed_form, build=Program,
    decode=to_unit_pixels, **options,
):  # fmt: skip
    """The program of `model` on `rows` that all members share."""
    return build(
        gaussian_vae(model, decode), settings, batch_size=batch_size, rule=rule,
        **data_of(stack, rows, decode), **options,
    )  # fmt: skip


def trained(program, epochs):
    """A new state after so many epochs, and their metrics."""
    return program.run(program.init(), epochs)


def assert_trees_equal(got, expected, **tolerance):
    """Leaf by leaf; with rtol=0 bit for bit."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


def member_of(tree, index):
    """One member of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


class Log:
    """A report that keeps (epoch, epochs of the chunk)."""

    def __init__(self):
        self.rows = []

    def __call__(self, epoch, epochs, metrics, seconds):
        assert seconds > 0
        self.rows.append((epoch, epochs))


def run_fit(program, directory, epochs, report=None, every=4, **options):
    """In chunks of three epochs."""
    with Checkpoints(directory) as checkpoints:
        return fit(
            program,
            epochs=epochs,
            epochs_per_chunk=3,
            epochs_per_checkpoint=every,
            checkpoints=checkpoints,
            report=report or Log(),
            **options,
        )
