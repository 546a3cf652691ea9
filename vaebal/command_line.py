"""Flags: a bad one is one sentence and exit code 2."""

import sys
from collections.abc import Callable, Sequence

from absl import flags


def parse(argv: Sequence[str], define: Callable[[], None]) -> list[str]:
    """Defines and parses the flags, `config` among them; returns what are none."""
    try:
        # Defining reads the config, and overrides from sys.argv, so it can fail as parsing can.
        define()
        rest = flags.FLAGS(argv)
        _ = flags.FLAGS.config.experiment  # a file that could not be loaded raises only here
        return rest
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        print(f"error: {one_sentence(error)} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def one_sentence(error: BaseException) -> str:
    """What a config file or a flag has against itself, without the traceback."""
    cause = error
    while cause.args and isinstance(cause.args[0], BaseException):
        cause = cause.args[0]
    lines = str(cause.args[0] if cause.args else cause).strip().splitlines()
    if any("Traceback" in line for line in lines):
        return lines[-1].partition(": ")[2]  # raised by the config file itself
    if isinstance(error, OSError):
        return f"--config: {lines[-1].strip()}"
    if isinstance(cause, KeyError):  # ml_collections: the field, then a guess
        return f"the config has no field {': '.join(lines)}"
    return " ".join(lines)
