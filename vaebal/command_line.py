"""Flags and the ways out: whatever goes wrong is one sentence and an exit code.

Nothing here imports JAX: a bad flag is answered at once.
"""

import errno
import io
import os
import platform
import re
import signal
import sys
import sysconfig
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from vaebal.errors import CheckpointError, Diverged, InputError, Preempted

_STDOUT = "standard output"
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
# Files that are no user's: those of Python, of packages, and what is compiled into Python.
_LIBRARIES = (*(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")), "<frozen")


def parse(
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    values: flags.FlagValues = flags.FLAGS,
) -> list[str]:
    """Defines and parses the flags, `config` among them, in `values`; returns what are none.

    Whatever a config file or a flag has against itself is said in a sentence, with exit code 2.
    """
    try:
        # Defining reads the config, and overrides from sys.argv, so it can fail as parsing can.
        define(values)
        rest = values(argv)
        _ = values.config.experiment  # a file that could not be loaded raises only here
        _require_tuples_once(argv, values)
        return rest
    except Exception as error:  # of any type: a config file is a program
        print(f"error: {one_sentence(error)} (--help lists the flags)", file=sys.stderr)
        sys.exit(InputError.exit_code)


def _require_tuples_once(argv: Sequence[str], values: flags.FlagValues) -> None:
    # ml_collections would append, where of every other flag the last one counts.
    names = [arg.partition("=")[0].lstrip("-") for arg in argv]
    for name in values:
        flag, times = values[name], names.count(name)
        if isinstance(flag, flags.MultiFlag) and times > 1:
            raise InputError(
                f"--{name} is given {times} times: give it once, with all its values in "
                f'quotes, as in --{name}="{tuple(flag.value)!r}".'
            )


def one_sentence(error: BaseException) -> str:
    """What a config file or a flag has against itself, without the traceback."""
    root = _chain(error)[-1]
    if isinstance(root, InputError):
        return str(root)
    if isinstance(root, SyntaxError) and root.filename and root.filename.endswith(".py"):
        return f"{root.filename}, line {root.lineno}: SyntaxError: {root.msg}"
    places = filter(None, map(_place_in_config, reversed(_chain(error))))
    if place := next(places, ""):
        text = " ".join(str(root).split())
        return f"{place}: {type(root).__name__}{f': {text}' if text else ''}"
    said, lines = str(root), str(error).strip().splitlines() or [""]
    if isinstance(root, KeyError):
        # ml_collections names the field at the bottom, and guesses another further up.
        guesses = re.findall(r"Did you mean .*?\?", str(error).replace("\\n", " "))
        return f"the config has no field {root}" + (f": {guesses[0]}" if guesses else "")
    if "get_config() takes 0 positional arguments" in said:
        return f"{lines[0].partition(': Error')[0]}: this config has no variants, drop the ':' on"
    if isinstance(root, AttributeError):
        if "'get_config'" in said:
            return "the config file has no function get_config"
        return f"get_config must return a ConfigDict with a field experiment ({said})"
    if isinstance(root, OSError):
        return f"--config: {said.strip().splitlines()[-1].strip()}"
    return _plainly(" ".join(lines))


def _chain(error: BaseException) -> list[BaseException]:
    """The error, and after it those in whose handling or because of which it was raised."""
    chain = [error]
    while True:
        last = chain[-1]
        cause = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if cause is None:
            return chain
        chain.append(cause)


def _place_in_config(error: BaseException) -> str:
    """File and line of the config, or of what it imports, where `error` was raised; or ""."""
    frames = traceback.extract_tb(error.__traceback__)
    # What loads a config file is called by ml_collections.
    loading = [i for i, frame in enumerate(frames) if frame.filename.endswith("config_flags.py")]
    frames = frames[loading[-1] + 1 :] if loading else []
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else ""


def _plainly(text: str) -> str:
    """Python's own words for a bad value, in words about the value."""
    text = re.sub(r"invalid literal for int\(\) with base 10: ('.*?')", r"\1 is no integer", text)
    text = re.sub(r"could not convert string to float: ('.*?')", r"\1 is no number", text)
    told = re.match(r"flag --(config\.\S+?)=(.*?): Error while parsing string", text)
    if told:
        return (
            f"--{told[1]}={told[2]} is no tuple: put it in quotes, and strings in it in quotes of "
            f"the other kind, as in --{told[1]}=\"(1, 2)\" or --{told[1]}=\"('a', 'b')\""
        )
    return text


class _Named(io.FileIO):
    """A stream whose failures say that they are its own, not those of a file of the run."""

    def write(self, octets):
        try:
            return super().write(octets)
        except OSError as error:
            error.filename = _STDOUT
            raise


def speak_anywhere() -> None:
    """Lets any text be printed: with escapes where UTF-8 is not understood, nowhere if closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever began this: a file would get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Named(sys.stdout.fileno(), "w", closefd=False)),
        encoding=sys.stdout.encoding,
        errors="backslashreplace",
        line_buffering=sys.stdout.isatty(),
    )


def leave_on_interrupt(*, goes_on: bool = True) -> None:
    """Makes Ctrl-C one line and exit code 130, at once, wherever Python and its threads are.

    As after a kill: what is finished is kept, and the same command goes on. An exception instead
    would surface in whatever library was at work, where it is printed, ignored, or worse.

    Args:
      goes_on: whether anything is saved for the same command to go on from.
    """
    told = "interrupted; the same command goes on from what is saved" if goes_on else "interrupted"

    def leave(*signal_and_frame) -> None:
        line = f"error: {told}.\n"
        if os.isatty(2):  # a progress bar hides the cursor
            line = f"\x1b[?25h\n{line}"
        os.write(2, line.encode())
        os._exit(INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a job in the background
        signal.signal(signal.SIGINT, leave)


def keep_compiled() -> None:
    """Lets JAX keep what it compiles in the user's cache folder, and find it at the next start.

    To be called before JAX is imported. JAX_COMPILATION_CACHE_DIR goes before; where no folder can
    be made there is none. What was compiled for one kind of processor is not shown to another.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(cache, "vaebal", f"compiled-{_processor():08x}")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def take_every_core() -> None:
    """Has JAX make a device of each core of a CPU, over which stacked runs are spread.

    To be called before JAX looks for devices; what the user has set about them goes before.
    Without it XLA leaves cores idle where networks are small.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(cores))
        if "jax" in sys.modules:  # it has read its variables already
            sys.modules["jax"].config.update(
                "jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"])
            )


def require_folder(flag: str, folder: Path) -> None:
    """Makes the folder that a flag's file goes to, before any work.

    Raises:
      InputError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"--{flag}={folder} cannot be written ({error.strerror}): name another place."
        ) from error


def _processor() -> int:
    """A number for what this processor can do."""
    told = {platform.machine(), platform.processor()}
    try:
        with open("/proc/cpuinfo") as lines:
            told |= {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    except OSError:  # not Linux
        pass
    return zlib.crc32("".join(sorted(told)).encode())


def exit_code(run: Callable[[], None]) -> int:
    """Runs it; what a user can meet becomes a sentence on stderr, and the exit code for it."""
    try:
        run()
        sys.stdout.flush()
    except (InputError, Diverged, CheckpointError, Preempted) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename == _STDOUT:
            # Python would try once more at its end, and change the exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            remedy = "send it elsewhere"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "free space"
        else:
            raise
        print(
            f"error: {error.filename or 'the workdir'} cannot be written ({error.strerror}): "
            f"{remedy}; the same command then goes on.",
            file=sys.stderr,
        )
        return CheckpointError.exit_code
    return 0
