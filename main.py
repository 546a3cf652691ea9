"""Flags -> `vaebal.experiments.run(config, workdir)`.

python main.py --config=configs/mnist_kappa.py --workdir=runs/mnist

Exit codes: 0 done; 1 diverged; 2 bad input; 74 nothing can be written or read any more (a full
disk, damaged checkpoints); 75 stopped on a scheduler's notice with everything saved, start again.
"""

import errno
import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from vaebal import command_line

DEFAULT_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs/digits_kappa.py")


def main(argv: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # JAX tells of every accelerator it does not find
    # Figures are written, not shown; importing vaebal in a notebook leaves its backend alone.
    os.environ.setdefault("MPLBACKEND", "Agg")
    from vaebal.errors import CheckpointError, Diverged, InputError, Preempted
    from vaebal.experiments import run

    # sysexits.h: EX_IOERR, and EX_TEMPFAIL, "the user is invited to retry".
    codes = {Diverged: 1, InputError: 2, CheckpointError: 74, Preempted: 75}
    try:
        if len(argv) > 1:
            raise InputError(f"Unexpected argument {argv[1]!r}: fields are set by --config.FIELD=.")
        _join_processes()
        config = flags.FLAGS.config
        run(config, flags.FLAGS.workdir or os.path.join("runs", config.name))
    except tuple(codes) as error:
        print(f"error: {error}", file=sys.stderr)
        return codes[type(error)]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"error: {error.filename or 'the workdir'} cannot be written ({error.strerror}): free "
            "space; the same command then goes on.",
            file=sys.stderr,
        )
        return codes[CheckpointError]
    return 0


def _join_processes() -> None:
    from vaebal.errors import InputError
    from vaebal.training import devices

    names = ("coordinator_address", "num_processes", "process_id")
    given = [flags.FLAGS[name].value for name in names]
    if flags.FLAGS.distributed:
        devices.join(*given)
        if not devices.is_writer():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif any(value is not None for value in given):
        raise InputError(f"--{', --'.join(names)} mean nothing without --distributed: add it.")


def define_flags() -> None:
    """Defines this program's flags."""
    config_flags.DEFINE_config_file(
        "config",
        DEFAULT_CONFIG,
        "The experiment; any field can be overridden, as in --config.train.epochs=10.",
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Where the run lives; the same command there continues it. Default: runs/ and the "
        "config's name.",
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "Whether this is one of several processes that train together: see docs/devices.md.",
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of process 0, with --distributed where neither a TPU pod nor Slurm tells.",
    )
    flags.DEFINE_integer("num_processes", None, "With it: how many processes there are.")
    flags.DEFINE_integer("process_id", None, "With it: which one this is, from 0.")


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: command_line.parse(argv, define_flags))
