"""Experiments: a config in, rows and a report out. Only this floor knows configs.

One folder an experiment: `fields` its config's defaults, `run` how a config becomes rows, `page`
its tables and figures.
"""

import importlib
from typing import Any

from vaebal.errors import InputError

EXPERIMENTS = ("gamma", "generation", "kappa_sweep", "theorem1", "theorem2", "theorem3")
ON_ONE_PROCESS = ("theorem1", "theorem2", "theorem3")


def run(config: Any, workdir: str) -> list[dict[str, Any]]:
    """Runs the experiment that `config.experiment` names, in `workdir`; returns its rows."""
    if config.experiment not in EXPERIMENTS:
        raise InputError(
            f"experiment={config.experiment!r} does not exist: use one of {sorted(EXPERIMENTS)}."
        )
    import jax  # not before: a config file that is read needs none of this

    if config.experiment in ON_ONE_PROCESS and jax.process_count() > 1:
        raise InputError(
            f"experiment={config.experiment!r} runs in one process: leave out --distributed."
        )
    module = importlib.import_module(f"vaebal.experiments.{config.experiment}.run")
    return module.run(config, workdir)
