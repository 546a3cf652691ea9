"""`vaebal run` and `python main.py`: flags -> `vaebal.experiments.run(config, workdir)`.

Exit codes: 0 done; 1 diverged; 2 bad input; 74 nothing can be written or read any more (a full
disk, damaged checkpoints); 75 stopped on notice with everything saved, start again; 130 interrupted
outside training.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from vaebal import command_line
from vaebal.errors import InputError
from vaebal.experiments import shipped

DEFAULT_CONFIG = "configs/digits_kappa.py"
PROCESSES = ("coordinator_address", "num_processes", "process_id")


def found(config: str) -> str:
    """The file that --config=`config` means: as it is, or if there is none of the shipped ones.

    "configs/mnist_kappa.py:quick", "mnist_kappa.py:quick" and "mnist_kappa:quick" are one. A file
    of another folder is never taken for one of ours.
    """
    name, colon, variant = config.partition(":")
    file = Path(name).expanduser()
    ours = shipped.folder() / f"{file.stem}.py"
    if not file.exists() and file.parent in (Path(), Path("configs")) and ours.exists():
        file = ours
    return f"{file}{colon}{variant}"


def require_config(argv: Sequence[str]) -> None:
    """Raises an InputError that names the shipped configs where --config= is no file."""
    for config in (arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")):
        file = Path(config.partition(":")[0])
        if not file.exists():
            names = sorted(path.stem for path in shipped.folder().glob("*.py"))
            close = difflib.get_close_matches(file.stem, names, n=1)
            raise InputError(
                f"--config={config} is no file: "
                + (f"did you mean {close[0]!r}?" if close else f"give one, or of {names}.")
            )


def _main(argv: Sequence[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # JAX tells of every accelerator it does not find
    # Figures are written, not shown; importing vaebal in a notebook leaves its backend alone.
    os.environ.setdefault("MPLBACKEND", "Agg")
    return command_line.exit_code(lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    from vaebal.experiments import check_config, run

    if len(argv) > 1:
        raise InputError(f"Unexpected argument {argv[1]!r}: fields are set by --config.FIELD=.")
    if flags.FLAGS.cache:
        command_line.keep_compiled()
    if not flags.FLAGS.distributed:
        command_line.take_every_core()
    config = flags.FLAGS.config
    workdir = flags.FLAGS.workdir or os.path.join("runs", str(config.get("name")))
    check_config(config, workdir)  # before JAX is imported
    _join_processes()
    run(config, workdir)


def _join_processes() -> None:
    given = [flags.FLAGS[name].value for name in PROCESSES]
    if flags.FLAGS.distributed:
        from vaebal.training import devices

        devices.join(*given)
        if not devices.is_writer():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif any(value is not None for value in given):
        raise InputError(f"--{', --'.join(PROCESSES)} mean nothing without --distributed: add it.")


def define_flags(values: flags.FlagValues) -> None:
    """Defines this program's flags, in `values`."""
    require_config(sys.argv)
    shared = {"flag_values": values}
    config_flags.DEFINE_config_file(
        "config",
        found(DEFAULT_CONFIG),
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
        "cache",
        True,
        "Whether compiled programs are kept in the user's cache folder; --no-cache: they are not.",
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
    # --help lists the flags of the program's own file, which these are.
    for name in ("config", "workdir", "cache", "distributed", *PROCESSES):
        values.register_key_flag_for_module(sys.argv[0], values[name])


def main(argv: Sequence[str]) -> None:
    """Runs the experiment that the flags in `argv` name, and exits."""
    # A shipped config is found from anywhere; sys.argv, as ml_collections reads overrides from it.
    sys.argv = [
        f"--config={found(arg.removeprefix('--config='))}" if arg.startswith("--config=") else arg
        for arg in argv
    ]
    sys.argv = ["--nocache" if arg == "--no-cache" else arg for arg in sys.argv]  # as absl has it
    command_line.speak_anywhere()
    command_line.leave_on_interrupt()
    app.run(_main, flags_parser=lambda argv: command_line.parse(argv, define_flags))
