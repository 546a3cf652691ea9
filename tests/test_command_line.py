"""What a command line or a config file has against itself, and the ways out of a program."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from vaebal import command_line
from vaebal import run as program
from vaebal.errors import CheckpointError, Diverged, InputError, Preempted

# How ml_collections loads a file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).parent.parent
NOT_HELPED = " (--help lists the flags)\n"


def parsed(monkeypatch, *arguments):
    """The flags that main.py makes of these arguments."""
    argv, values = ["main.py", *arguments], flags.FlagValues()
    monkeypatch.setattr(sys, "argv", argv)
    # Where ml_collections loads a config file over the one before.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    command_line.parse(argv, program.define_flags, values)
    return values


def refused(monkeypatch, capsys, *arguments):
    """The sentence that these arguments are refused with."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        parsed(monkeypatch, *arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.endswith(NOT_HELPED)
    assert said.count("\n") == 1
    return said.removeprefix("error: ").removesuffix(NOT_HELPED)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--config.train.epoch=3", "no field 'epoch': Did you mean \"epochs\""),
        ("--config.trian.epochs=3", "the config has no field 'trian': Did you mean \"train\""),
        ("--config.train.epochs=many", "--config.train.epochs=many: 'many' is no integer"),
        ("--config.train.epochs=1e2", "--config.train.epochs=1e2: '1e2' is no integer"),
        ("--config.model.gamma=small", "--config.model.gamma=small: 'small' is no number"),
        ("--config=configs/theorem4.py", "configs/theorem4.py is no file: did you mean 'theorem"),
        ("--config=xyz", "--config=xyz is no file: give one, or of ['arena', 'celeba128_gamma',"),
        ("--config=configs", "Is a directory: 'configs'"),
        ("--config=configs/mnist_kappa.py:qick", "no variant 'qick': use one of 'mnist_kappa.py',"),
        (
            "--config=configs/digits_kappa.py:quick",
            "--config=configs/digits_kappa.py:quick: this config has no variants",
        ),
        ("--nope=1", "Unknown command line flag 'nope'"),
        (
            "--config.train.seeds=(0,) --config.train.seeds=(1,)",
            "--config.train.seeds is given 2 times: give it once, with all its values in quotes",
        ),
        (
            "--config.model.kappas=(2,3",
            '--config.model.kappas=(2,3 is no tuple: put it in quotes, and strings in it in quotes '
            "of the other kind, as in --config.model.kappas=\"(1, 2)\"",
        ),
    ],
)  # fmt: skip
def test_a_bad_flag_is_one_sentence(monkeypatch, capsys, arguments, said):
    assert said in refused(monkeypatch, capsys, *arguments.split())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("c.data.dir = MY_DATA", "NameError: name 'MY_DATA' is not defined"),
        ("c = = 1", "SyntaxError: invalid syntax"),
        ("c.data.dir = os.environ['NO_SUCH']", "KeyError: 'NO_SUCH'"),
        ("raise ValueError", "ValueError"),
        ("raise ValueError('no\\n good')", "ValueError: no good"),
        ("open('/no/such')", "FileNotFoundError: [Errno 2] No such file or directory: '/no/such'"),
        ("import no_such", "ModuleNotFoundError: No module named 'no_such'"),
        ("c.tarin.epochs = 1", "KeyError: 'tarin'"),
        ("c.train.epochs = 'a'", "TypeError: Could not override field 'epochs'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_in_ones_own_config_names_file_and_line(tmp_path, monkeypatch, capsys, line, said):
    file = tmp_path / "mine.py"
    file.write_text(
        "import os\nfrom vaebal.experiments.kappa_sweep import fields\n\n\n"
        f"def get_config():\n    c = fields.defaults('mine')\n    {line}\n    return c\n"
    )
    got = refused(monkeypatch, capsys, f"--config={file}")
    assert got.startswith(f"{file}, line 7: {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the config file has no function get_config"),
        ("def get_config():\n    return {}\n", "get_config must return a ConfigDict"),
        ("def get_config():\n    return None\n", "get_config must return a ConfigDict"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # absl's, of a config that is None
def test_a_file_that_is_no_config_is_told(tmp_path, monkeypatch, capfd, content, said):
    (tmp_path / "mine.py").write_text(content)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        parsed(monkeypatch, f"--config={tmp_path / 'mine.py'}")
    assert f"error: {said}" in capfd.readouterr().err


def test_good_flags_are_taken(monkeypatch):
    monkeypatch.chdir(ROOT)
    values = parsed(
        monkeypatch,
        *("--config=configs/mnist_kappa.py:quick", "--config.train.epochs=7"),
        *("--config.model.kappas=(2, 3)", "--config.model.skips=none", "--workdir=w"),
    )
    config = values.config
    assert (config.name, config.train.epochs, config.model.kappas) == (
        "mnist_kappa_quick",
        7,
        (2, 3),
    )
    assert (config.model.skips, values.workdir) == (("none",), "w")


def test_a_bad_flag_and_help_are_answered_without_jax():
    """Nor anything else that takes seconds to import; a field of a config file as little."""
    code = (
        "import sys, main\nfrom configs import digits_kappa\n"
        "from vaebal.experiments import check_config\n"
        "check_config(digits_kappa.get_config(), 'runs/a')\n"
        "print(sorted({'jax', 'flax', 'orbax', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------- ways out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Diverged("a stopped."), 1, "a stopped."),
        (InputError("a=1 must be 2."), 2, "a=1 must be 2."),
        (type("Damaged", (CheckpointError,), {})("lost."), 74, "lost."),
        (Preempted("told."), 75, "told."),
        (
            OSError(28, "No space left on device", "/w/row.json"), 74,
            "/w/row.json cannot be written (No space left on device): free space; the same command "
            "then goes on.",
        ),
    ],
)  # fmt: skip
def test_what_a_user_can_meet_is_a_sentence_and_its_code(capsys, error, code, said):
    def run():
        raise error

    assert command_line.exit_code(run) == code
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_fault_of_our_own_keeps_its_traceback():
    for error in (RuntimeError("a bug"), OSError(9, "Bad file descriptor")):

        def run(error=error):
            raise error

        with pytest.raises(type(error), match=str(error.args[-1])):
            command_line.exit_code(run)
    assert command_line.exit_code(lambda: None) == 0


def test_a_stdout_that_cannot_be_written_is_named_and_not_the_workdir(monkeypatch, capsys):
    """A full disk and a reader that has left; what the run writes elsewhere is not meant."""
    for opened, reason in ((_full(), "No space left on device"), (_left(), "Broken pipe")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", opened)
            patch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
            command_line.speak_anywhere()
            code = command_line.exit_code(lambda: print("γ", flush=True))
            said = sys.stderr.buffer
            sys.stderr.flush()
            assert code == 74
            assert said.getvalue().decode() == (
                f"error: standard output cannot be written ({reason}): send it elsewhere; the same "
                "command then goes on.\n"
            )
            sys.stdout.close()
        opened.close()


def _full():
    return open("/dev/full", "w")


def _left():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def test_a_stdout_that_is_not_utf8_gets_escapes(tmp_path, monkeypatch):
    with open(tmp_path / "out", "w", encoding="ascii") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        patch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        command_line.speak_anywhere()
        print("γ = ½", flush=True)
        sys.stdout.close()
    assert (tmp_path / "out").read_text() == "\\u03b3 = \\xbd\n"


INTERRUPTED = """
import ctypes, signal, sys
from vaebal import command_line
command_line.leave_on_interrupt()
class Careless:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000):
            pass
if sys.argv[1] == "del":  # an exception would be ignored here
    Careless()
try:
    signal.raise_signal(signal.SIGINT)
    for _ in range(1000):
        pass
except BaseException:
    print("caught")
print("went on")
"""


@pytest.mark.parametrize("where", ["del", "try"])
def test_an_interrupt_ends_with_one_line_and_130_wherever_it_comes(where):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, where], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr == "error: interrupted; the same command goes on from what is saved.\n"
    assert done.stdout == ""


def test_a_job_in_the_background_goes_on_ignoring_interrupts():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command_line.leave_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def kept(monkeypatch, cache, named=None):
    """The folder that JAX would be told of."""
    for name in ("DIR", "MIN_COMPILE_TIME_SECS", "MIN_ENTRY_SIZE_BYTES"):
        for prefix in ("JAX_COMPILATION_CACHE_", "JAX_PERSISTENT_CACHE_"):
            monkeypatch.delenv(prefix + name, raising=False)
    if named:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    command_line.keep_compiled()
    return os.environ.get("JAX_COMPILATION_CACHE_DIR")


def test_compiled_programs_are_kept_in_the_users_cache_but_for_another_processor(
    tmp_path, monkeypatch
):
    folder = kept(monkeypatch, tmp_path)
    assert Path(folder).parent == tmp_path / "vaebal"
    assert Path(folder).is_dir()
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    assert kept(monkeypatch, tmp_path) == folder
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert kept(monkeypatch, tmp_path) != folder


def test_a_cache_of_the_users_own_stays_and_one_that_cannot_be_made_is_done_without(
    tmp_path, monkeypatch
):
    assert kept(monkeypatch, tmp_path, named="mine") == "mine"
    (tmp_path / "file").touch()
    assert kept(monkeypatch, tmp_path / "file") is None
    assert kept(monkeypatch, "/proc/nowhere") is None


@pytest.mark.parametrize(
    ("given", "flags", "expected"),
    [(None, "", "3"), ("5", "", "5"), (None, "--xla_force_host_platform_device_count=2", None)],
)
def test_every_core_this_process_may_use_is_a_device_unless_the_user_says(
    given, flags, expected, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    monkeypatch.delitem(sys.modules, "jax")  # as it has not been imported yet
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", given or "")
    if given is None:
        monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    command_line.take_every_core()
    assert os.environ.get("JAX_NUM_CPU_DEVICES") == expected


@pytest.mark.parametrize("arguments", [(), ("--no-cache",), ("--nocache",)])
def test_a_second_start_finds_what_the_first_compiled(tmp_path, arguments):
    """What JAX writes there is asked of it, in a process of its own."""
    program = (
        "import sys; from vaebal import command_line, experiments, run\n"
        "def ran(config, workdir):\n"
        "    import jax; jax.jit(lambda x: x + 1)(1)\n"
        "experiments.run, experiments.check_config = ran, lambda config, workdir: None\n"
        "run.main(sys.argv)"
    )
    environment = {k: v for k, v in os.environ.items() if "_CACHE_" not in k}
    kept = []
    for _ in range(2 - bool(arguments)):
        subprocess.run(
            [sys.executable, "-c", program, *arguments],
            check=True, cwd=tmp_path, env=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        )  # fmt: skip
        kept.append(sorted(tmp_path.glob("cache/vaebal/*/*-cache")))
    assert bool(kept[0]) == (not arguments)
    assert kept[-1] == kept[0]  # in the same folder, and nothing was compiled anew
