"""Experiments: a config in, rows and a report out. Only this floor knows configs."""

from collections.abc import Callable
from typing import Any

import jax

from vaebal.errors import InputError
from vaebal.experiments import gamma, generation, kappa_sweep, theorem1, theorem2, theorem3

EXPERIMENTS: dict[str, Callable] = {
    "gamma": gamma.run,
    "generation": generation.run,
    "kappa_sweep": kappa_sweep.run,
    "theorem1": theorem1.run,
    "theorem2": theorem2.run,
    "theorem3": theorem3.run,
}
ON_ONE_PROCESS = ("theorem1", "theorem2", "theorem3")


def run(config: Any, workdir: str) -> list[dict[str, Any]]:
    """Runs the experiment that `config.experiment` names, in `workdir`; returns its rows."""
    if config.experiment not in EXPERIMENTS:
        raise InputError(
            f"experiment={config.experiment!r} does not exist: use one of {sorted(EXPERIMENTS)}."
        )
    if config.experiment in ON_ONE_PROCESS and jax.process_count() > 1:
        raise InputError(
            f"experiment={config.experiment!r} runs in one process: leave out --distributed."
        )
    return EXPERIMENTS[config.experiment](config, workdir)
