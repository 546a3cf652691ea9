"""How fast it all is, measured by anyone, on a machine that does nothing else.

python -m vaebal.bench [--what=step] [--config=configs/mnist_kappa.py] [--out=results/bench]

--what is a comma-separated list, or "all":
  step     training steps of --config at several --batch sizes against a matrix product's peak,
           PyTorch (eager, compiled) and pythae, where they are installed; NLL samples/s
  configs  the step of each of --configs, in one table
  sweep    1, 2, 4, ... --members in one program against separate runs
  metrics  NLL, MMD, Fréchet distance, NDB, Hessian, Inception: rates, and growth in their sizes
  feeding  images/s that the pipelines deliver, and what training consumes
  scaling  one batch on each of 1, 2, 4, ... devices (a lone CPU is made to look like eight)

Run it in the repository. The images are random, so no data is needed. Each measurement leaves a
Markdown file in --out. Whatever is compared takes turns (A B A B ...), so that a ratio never mixes
two moments of the machine.
"""

import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
from absl import app, flags
from ml_collections import config_flags

from vaebal import command_line
from vaebal.bench import feeding, metrics, scaling, step, sweep
from vaebal.bench.machine import describe_machine, device_name, watch_others
from vaebal.bench.page import Page, render
from vaebal.bench.subjects import load_config
from vaebal.bench.timing import Turns
from vaebal.errors import InputError
from vaebal.experiments.report import save_figure
from vaebal.training import devices
from vaebal.training.workdir import write_atomically

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ALL_CONFIGS = (
    *("digits_kappa.py", "mnist_kappa.py", "network_gamma.py", "rendered16_gamma.py"),
    *("rendered64_gamma.py", "rendered64_gamma.py:quick", "celeba64_gamma.py"),
    "celeba128_gamma.py",
)
SWEPT = "digits_kappa.py"
OF_A_PAGE = ("config", "configs", "batch", "kappa", "members", "repeats", "quick")  # flags
FED = (
    *("rendered16_gamma.py", "rendered64_gamma.py", "rendered64_gamma.py:quick"),
    *("celeba64_gamma.py", "celeba128_gamma.py"),
)


def define_flags(values: flags.FlagValues | None = None) -> None:
    """Defines this program's flags, in `values` where given."""
    shared = {"flag_values": flags.FLAGS if values is None else values}
    config_flags.DEFINE_config_file(
        "config",
        str(CONFIGS / "mnist_kappa.py"),
        f"Of step, sweep (where not given: {SWEPT}) and scaling.",
        **shared,
    )
    for name, default, text in (
        ("what", "step", f"{', '.join(MEASUREMENTS)}, or all."),
        ("configs", None, "Of --what=configs; where not given, those for images."),
        ("batch", "64,100,256,1024", "Batch sizes of step; the first is each device's of scaling."),
    ):
        flags.DEFINE_list(name, default, text, **shared)
    for name, text in (
        ("kappa", "Latent dimensions of a κ sweep's network; where not given, its first κ, and of "
         "sweep its largest."),
        ("members", "Most members of sweep; where not given, 32 on a CPU and 256 elsewhere."),
        ("repeats", "Turns of each contestant; where not given, 5 or fewer."),
    ):  # fmt: skip
        flags.DEFINE_integer(name, None, text, **shared)
    flags.DEFINE_string("out", "results/bench", "Folder of the Markdown files.", **shared)
    flags.DEFINE_bool("quick", False, "Smaller sizes, shorter turns, no torch.compile.", **shared)


class Options:
    """The flags, checked, with what --quick makes of the defaults.

    Raises:
      InputError: a flag that cannot be meant.
    """

    def __init__(self, given: flags.FlagValues):
        self.what = list(MEASUREMENTS) if given.what == ["all"] else given.what
        unknown = [name for name in self.what if name not in MEASUREMENTS]
        if unknown or not self.what:
            known = ", ".join(MEASUREMENTS)
            raise InputError(f"--what={','.join(given.what)!r} must be among {known}, or all.")
        if given.configs and "configs" not in self.what:
            raise InputError("--configs belongs to --what=configs: add it.")
        for name in ("kappa", "members", "repeats"):
            if given[name].value is not None:
                _require_positive(name, given[name].value)
        self.quick, self.kappa, self.out = given.quick, given.kappa, Path(given.out)
        self.config, self.configs, self.repeats = given.config, given.configs, given.repeats
        self.config_given = any(
            given[name].present for name in given if f"{name}.".startswith("config.")
        )
        self.batch_sizes = [_integer("batch", text) for text in given.batch]
        for batch_size in self.batch_sizes or [0]:
            _require_positive("batch", batch_size)
        most = 32 if jax.default_backend() == "cpu" else 256
        self.members = given.members or most >> (2 * self.quick)
        self.matrix_size = 2048 if self.quick else 4096
        command_line.require_folder("out", self.out)  # now, not after the measurements

    def turns(self, repeats: int, window: float) -> Turns:
        """So many turns of so many seconds, fewer and shorter if quick."""
        repeats = min(repeats, 3) if self.quick else repeats
        return Turns(self.repeats or repeats, window / 5 if self.quick else window)


Say = Callable[[str], None]


def _step(options: Options, say: Say) -> Page:
    results = step.measure(
        options.config,
        turns=options.turns(5, 1.0),
        kappa=options.kappa,
        batch_sizes=options.batch_sizes,
        matrix_size=options.matrix_size,
        epoch_seconds=0.1 if options.quick else 0.5,
        nll_samples=10 if options.quick else 50,
        with_compile=not options.quick,
        say=say,
    )
    return step.page(results)


def _configs(options: Options, say: Say) -> Page:
    rows = step.measure_many(
        _loaded(options.configs or [str(CONFIGS / name) for name in ALL_CONFIGS]),
        turns=options.turns(3, 0.5),
        matrix_size=options.matrix_size,
        epoch_seconds=0.1 if options.quick else 0.3,
        say=say,
    )
    return step.many_page(rows)


def _sweep(options: Options, say: Say) -> Page:
    (swept,) = [options.config] if options.config_given else _loaded([str(CONFIGS / SWEPT)])
    measured = sweep.measure(
        swept,
        turns=options.turns(5, 0.5),
        members=options.members,
        kappa=options.kappa,
        with_compile=not options.quick,
        say=say,
    )
    return sweep.page(measured)


def _metrics(options: Options, say: Say) -> Page:
    ladders = metrics.ladders(options.quick)
    return metrics.page(metrics.measure(ladders, turns=options.turns(3, 0.2), say=say))


def _feeding(options: Options, say: Say) -> Page:
    feeds = feeding.measure(
        _loaded([str(CONFIGS / name) for name in FED]),
        turns=options.turns(3, 0.5),
        matrix_size=options.matrix_size,
        epoch_seconds=0.1 if options.quick else 0.3,
        disk_bytes=feeding.DISK_BYTES >> (3 * options.quick),
        say=say,
    )
    return feeding.page(feeds)


def _scaling(options: Options, say: Say) -> Page:
    measured = scaling.measure(
        options.config,
        turns=options.turns(5, 0.5),
        batch_size=options.batch_sizes[0],
        kappa=options.kappa,
        say=say,
    )
    return scaling.page(measured)


MEASUREMENTS: dict[str, Callable[[Options, Say], Page]] = {
    "step": _step,
    "configs": _configs,
    "sweep": _sweep,
    "metrics": _metrics,
    "feeding": _feeding,
    "scaling": _scaling,
}


def main(argv: Sequence[str]) -> int:
    """Measures, prints, and writes a Markdown file for each measurement."""
    matplotlib.use("agg")
    say = functools.partial(print, flush=True, file=sys.stderr)
    try:
        if len(argv) > 1:
            raise InputError(f"Unexpected argument {argv[1]!r}: see --help.")
        options = Options(flags.FLAGS)
        for what in options.what:
            lone = devices.are_cores() or jax.device_count() == 1
            if what == "scaling" and jax.default_backend() == "cpu" and lone:
                code = _on_virtual_devices()
                if code:
                    return code
                continue
            others = watch_others()
            page = MEASUREMENTS[what](options, say)
            _write(page, command(what, flags.FLAGS), options, others())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _on_virtual_devices() -> int:
    """This command's scaling, in a process of its own that sees several devices."""
    force = f"--xla_force_host_platform_device_count={scaling.VIRTUAL}"
    given = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    flags_of_xla = f"{given.get('XLA_FLAGS', '')} {force}"
    return subprocess.run(
        [sys.executable, "-m", "vaebal.bench", *sys.argv[1:], "--what=scaling", "--configs="],
        env={**given, "XLA_FLAGS": flags_of_xla, "JAX_PLATFORMS": "cpu"},
        check=False,
    ).returncode


def command(what: str, given: flags.FlagValues) -> str:
    """The command of one measurement's page, with the flags that were given."""
    of_it = [name for name in given if name.partition(".")[0] in OF_A_PAGE]
    own = [name for name in of_it if given[name].present and given[name].value != []]
    return shlex.join(
        ["python", "-m", "vaebal.bench", f"--what={what}", *(given[n].serialize() for n in own)]
    )


def _write(page: Page, told: str, options: Options, others: float) -> None:
    path = options.out / f"{page.name}_{device_name()}.md"
    figure = path.with_suffix(".png")
    notes = ["**Quick**: small sizes and short turns."] if options.quick else []
    page = page._replace(notes=[*page.notes, *notes, f"Command: `{told}`."])
    if page.figure is not None:
        save_figure(page.figure, figure)
    image = figure.name if page.figure is not None else ""
    text = render(page, describe_machine(), others, image)
    write_atomically(path, text)
    print(f"{text}\nwritten to {path}", flush=True)


def _loaded(names: Sequence[str]) -> list[Any]:
    return [load_config(name) for name in names]


def _integer(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--{flag}: {text!r} is not an integer.") from None


def _require_positive(flag: str, value: int) -> None:
    if value < 1:
        raise InputError(f"--{flag} must be 1 or more, not {value}.")


if __name__ == "__main__":
    command_line.take_every_core()  # as the programs that are measured do
    app.run(main, flags_parser=lambda argv: command_line.parse(argv, define_flags))
