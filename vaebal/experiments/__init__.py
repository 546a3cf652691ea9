"""Experiments: a config in, rows and a report out. Only this floor knows configs."""

from collections.abc import Callable

from vaebal.errors import InputError
from vaebal.experiments import kappa_sweep

EXPERIMENTS: dict[str, Callable] = {
    "kappa_sweep": kappa_sweep.run,
}


def run(config, workdir: str) -> None:
    """Runs the experiment that `config.experiment` names, in `workdir`."""
    if config.experiment not in EXPERIMENTS:
        raise InputError(
            f"experiment={config.experiment!r} does not exist: use one of {sorted(EXPERIMENTS)}."
        )
    EXPERIMENTS[config.experiment](config, workdir)
