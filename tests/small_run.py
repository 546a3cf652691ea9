"""A training run of a second or two, as a program: python tests/small_run.py --workdir=DIR.

With --address, --processes and --process it is one of several. --save leaves the end state in a
file, --pause waits so long after every chunk.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from training_runs import program

from vaebal.errors import Preempted
from vaebal.models import mlp_vae
from vaebal.training import Member, Program, devices, fit, stack_members
from vaebal.training.checkpoints import Checkpoints
from vaebal.training.workdir import open_workdir


def small_program(
    float64: bool = False, kappas: Sequence[int | None] = (5, 3), width: int = 12, **options
) -> Program:
    """Members of seeds 0, 1, ... with these kappas on [96, 16] pixels; three steps an epoch.

    A seed whose kappa is None is left out.
    """
    rng = np.random.default_rng(0)
    pixels = 1 / (1 + np.exp(-rng.normal(size=(96, 4)) @ rng.normal(size=(4, 16))))
    model = mlp_vae(
        outputs=16,
        latents=max(filter(None, kappas)),
        width=width,
        encoder_layers=3,
        decoder_blocks=1,
        activation=jax.nn.silu,
        residual=True,
        affine_skip=True,
    )
    members = [Member(s, k, rule={"rate": 0.02}) for s, k in enumerate(kappas) if k]
    pixels = pixels.astype(np.float64 if float64 else np.float32)
    return program(model, stack_members(members), pixels, **options)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--address")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--save")
    parser.add_argument("--pause", type=float, default=0.0)
    flags = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_enable_x64", flags.float64)
    if flags.address:
        devices.join(flags.address, flags.processes, flags.process)
    path = open_workdir(flags.workdir, {"epochs": flags.epochs})

    def report(epoch, *_):
        print(epoch, flush=True)
        time.sleep(flags.pause)

    with Checkpoints(path / "checkpoints") as checkpoints:
        try:
            state = fit(
                small_program(flags.float64),
                epochs=flags.epochs,
                epochs_per_chunk=2,
                epochs_per_checkpoint=4,
                checkpoints=checkpoints,
                report=report,
            )
        except Preempted as notice:
            print(notice)
            return 75
    state = devices.local(state)
    if flags.save and devices.is_writer():
        np.savez(Path(flags.save), *jax.tree.leaves(state))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
