"""Experiments: a config in, rows and a report out. Only this floor knows configs.

One folder an experiment: `fields` its config's defaults, `run` how a config becomes rows, `page`
its tables and figures.
"""

import difflib
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from vaebal.errors import InputError
from vaebal.experiments import schema

EXPERIMENTS = (
    *("arena", "collapse", "counterclaim", "gamma", "generation", "kappa_sweep"),
    *("latent_diffusion", "theorem1", "theorem2", "theorem3"),
)
ON_ONE_PROCESS = ("arena", "counterclaim", "latent_diffusion", "theorem1", "theorem2", "theorem3")


def fields_of(experiment: str) -> ModuleType:
    """The module `fields` of an experiment."""
    return importlib.import_module(f"vaebal.experiments.{experiment}.fields")


def check_config(config: Any, workdir: str) -> None:
    """Checks what can be checked of a config without JAX and without data.

    Raises:
      InputError: no such experiment, a field unknown, missing or of another type, a workdir among
        the images.
    """
    experiment = config.get("experiment")
    if experiment not in EXPERIMENTS:
        close = difflib.get_close_matches(str(experiment), EXPERIMENTS, n=1)
        raise InputError(
            f"experiment={experiment!r} does not exist: "
            + (f"did you mean {close[0]!r}?" if close else f"use one of {sorted(EXPERIMENTS)}.")
        )
    schema.check_fields(config, fields_of(experiment).defaults(config.get("name", "")))
    data = config.get("data", {})
    if data.get("name") == "folder" and data.folder.strip() and "://" not in workdir:
        folder, path = (Path(name).expanduser().resolve() for name in (data.folder, workdir))
        if path.is_relative_to(folder):
            raise InputError(
                f"--workdir={workdir} lies in data.folder={data.folder!r}, whose images its "
                "figures would join: choose one outside."
            )


def run(config: Any, workdir: str) -> list[dict[str, Any]]:
    """Runs the experiment that `config.experiment` names, in `workdir`; returns its rows."""
    check_config(config, workdir)
    import jax  # not before: a config file that is read needs none of this

    if config.experiment in ON_ONE_PROCESS and jax.process_count() > 1:
        raise InputError(
            f"experiment={config.experiment!r} runs in one process: leave out --distributed."
        )
    module = importlib.import_module(f"vaebal.experiments.{config.experiment}.run")
    return module.run(config, workdir)
