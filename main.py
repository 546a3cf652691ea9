"""Flags -> `vaebal.experiments.run(config, workdir)`.

python main.py --config=configs/mnist_kappa.py --workdir=runs/mnist

Exit codes: 0 done; 1 diverged; 2 bad input; 74 nothing can be written or read any more (a full
disk, damaged checkpoints); 75 stopped on notice with everything saved, start again; 130 interrupted
outside training.
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from vaebal import command_line
from vaebal.errors import InputError

DEFAULT_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs/digits_kappa.py")


def main(argv: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # JAX tells of every accelerator it does not find
    # Figures are written, not shown; importing vaebal in a notebook leaves its backend alone.
    os.environ.setdefault("MPLBACKEND", "Agg")
    return command_line.exit_code(lambda: _run(argv))


def _run(argv: list[str]) -> None:
    from vaebal.experiments import check_config, run

    if len(argv) > 1:
        raise InputError(f"Unexpected argument {argv[1]!r}: fields are set by --config.FIELD=.")
    config = flags.FLAGS.config
    workdir = flags.FLAGS.workdir or os.path.join("runs", str(config.get("name")))
    check_config(config, workdir)  # before JAX is imported
    _join_processes()
    run(config, workdir)


def _join_processes() -> None:
    names = ("coordinator_address", "num_processes", "process_id")
    given = [flags.FLAGS[name].value for name in names]
    if flags.FLAGS.distributed:
        from vaebal.training import devices

        devices.join(*given)
        if not devices.is_writer():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif any(value is not None for value in given):
        raise InputError(f"--{', --'.join(names)} mean nothing without --distributed: add it.")


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags, in `values`."""
    shared = {"flag_values": values}
    config_flags.DEFINE_config_file(
        "config",
        DEFAULT_CONFIG,
        "The experiment; any field can be overridden, as in --config.train.epochs=10, tuples in "
        'quotes, as in --config.train.seeds="(0, 1)".',
        **shared,
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Where the run lives; the same command there continues it. Default: runs/ and the "
        "config's name.",
        **shared,
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "Whether this is one of several processes that train together: see docs/devices.md.",
        **shared,
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of process 0, with --distributed where neither a TPU pod nor Slurm tells.",
        **shared,
    )
    flags.DEFINE_integer("num_processes", None, "With it: how many processes there are.", **shared)
    flags.DEFINE_integer("process_id", None, "With it: which one this is, from 0.", **shared)


if __name__ == "__main__":
    command_line.speak_anywhere()
    command_line.leave_on_interrupt()
    app.run(main, flags_parser=lambda argv: command_line.parse(argv, define_flags))
