"""Flags -> `vaebal.experiments.run(config, workdir)`.

python main.py --config=configs/mnist_kappa.py --workdir=runs/mnist
"""

import os
import sys

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "digits_kappa.py"),
    "The experiment; any field can be overridden, as in --config.train.epochs=10.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; the same command there continues it. "
    "Default: runs/ and the config's name."
)  # fmt: skip


def main(argv: list[str]) -> int:
    from vaebal.errors import Diverged, InputError
    from vaebal.experiments import run

    try:
        if len(argv) > 1:
            raise InputError(f"Unexpected argument {argv[1]!r}: fields are set by --config.FIELD=.")
        config = _CONFIG.value
        run(config, _WORKDIR.value or os.path.join("runs", config.name))
    except (InputError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, but a bad flag or field is one sentence and exit code 2."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        text = str(error.args[0] if error.args else error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
