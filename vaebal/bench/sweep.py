"""M members in one program against M separate runs, vaebal's and PyTorch's."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

from vaebal.bench import pytorch
from vaebal.bench.flops import step_flops
from vaebal.bench.machine import cores
from vaebal.bench.page import Page, three_digits, with_range
from vaebal.bench.step import COMPILED, EAGER, OURS
from vaebal.bench.subjects import Subject, build, build_model, random_images, training
from vaebal.bench.timing import Spread, Turns, Work, spread
from vaebal.experiments.report import COLOURS, markdown_table

# One thread a run, and as many runs at a time as there are cores.
SIDE_BY_SIDE = "{}, a run a core"


class Sweep(NamedTuple):
    """Seconds per member and step."""

    name: str  # of the config
    title: str
    batch_size: int
    stacked: Mapping[int, Spread]  # by M, in one program
    separate: Mapping[str, Spread]  # one run after the other, by library
    factors: Mapping[int, Mapping[str, Spread]]  # by M: separate / stacked, turn by turn
    memory: Mapping[int, int]  # bytes on a device, by M
    compile_seconds: Mapping[int, float]
    machine: Sequence[tuple[str, str]]
    notes: Sequence[str]


def ladder(members: int) -> list[int]:
    """1, 2, 4, ... up to `members`, itself included."""
    return sorted({1 << i for i in range(members.bit_length())} | {members})


def measure(
    config: Any,
    *,
    turns: Turns,
    members: int,
    kappa: int | None = None,
    steps: int = 32,
    with_torch: bool = True,
    with_compile: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Programs of 1, 2, 4, ... `members` seeds of one config, and runs of a single one.

    Args:
      kappa: latent dimensions of a kappa sweep's members; None: its largest, to which the sweep
        pads all of them.
      steps: in an epoch, which is what a turn repeats.
      say: told what is being measured.

    Raises:
      InputError: a field or an argument that cannot be meant.
    """
    if kappa is None and config.experiment == "kappa_sweep":
        kappa = max(config.model.kappas)
    model = build_model(config, kappa)
    batch_size = config.train.batch_size
    images = random_images(config, steps * batch_size)
    subjects = {}
    for count in ladder(members):
        say(f"compiling {count} member{'s' * (count > 1)}")
        subjects[count] = build(config, images, kappa, range(count))
    works: dict[Any, Work] = {
        count: training(subject.program) for count, subject in subjects.items()
    }
    machine, notes = [("Products", config.model.products)], []
    rebuilt = with_torch and pytorch.can_be_rebuilt(model)
    best = functools.partial(pytorch.torch_at_its_best, config.model.products)
    with best() if rebuilt else contextlib.nullcontext() as torch:
        if torch is None:
            notes.append("No PyTorch runs beside: it is not installed, left out, or for these "
                         "networks not written.")  # fmt: skip
        else:
            machine.append(pytorch.described(torch))
            works |= _in_torch(torch, subjects[1], images.train, with_compile)
        say("epochs, in turns")
        seconds = turns(works)
    return _of(subjects, seconds, steps, machine, notes)


def _in_torch(torch: Any, subject: Subject, images: np.ndarray, with_compile: bool) -> dict:
    """A member's epochs in PyTorch, eager and compiled, with all threads and with one."""
    train = functools.partial(
        pytorch.torch_training,
        torch,
        images=images,
        batch_size=subject.config.train.batch_size,
        learning_rate=subject.config.train.learning_rate,
    )
    kinds = [(cores(), "{}")]
    if cores() > 1 and not torch.cuda.is_available():
        kinds.append((1, SIDE_BY_SIDE))
    works = {}
    for threads, name in kinds:
        torch.set_num_threads(threads)
        net = functools.partial(pytorch.torch_vae, torch, subject.model, subject.params)
        works[name.format(EAGER)] = pytorch.with_threads(torch, threads, train(net()))
        if with_compile:
            compiled, _ = pytorch.torch_compiled(torch, train, net())
            if compiled is not None:
                works[name.format(COMPILED)] = pytorch.with_threads(torch, threads, compiled)
    return works


def _runs(name: int | str) -> int:
    """Members that make the steps of a contestant's turn."""
    if isinstance(name, int):
        return name
    return cores() if name in (SIDE_BY_SIDE.format(library) for library in (EAGER, COMPILED)) else 1


def _of(
    subjects: Mapping[int, Subject],
    seconds: Mapping[Any, np.ndarray],
    steps: int,
    machine: Sequence[Any],
    notes: Sequence[str],
) -> Sweep:
    """What the turns' seconds say, per member and step."""
    config, model = subjects[1].config, subjects[1].model
    batch_size = config.train.batch_size
    per_member_step = {name: taken / (steps * _runs(name)) for name, taken in seconds.items()}
    separate = {OURS: per_member_step[1]} | {
        name: taken for name, taken in per_member_step.items() if isinstance(name, str)
    }
    return Sweep(
        name=config.name,
        title=f"{config.name}, κ = {model.latents}, width {config.model.width}, "
        f"{sum(leaf.size for leaf in jax.tree.leaves(subjects[1].params)):,} parameters",
        batch_size=batch_size,
        stacked={count: spread(per_member_step[count]) for count in subjects},
        separate={name: spread(taken) for name, taken in separate.items()},
        factors={
            count: {
                name: spread(taken / per_member_step[count]) for name, taken in separate.items()
            }
            for count in subjects
        },
        memory={count: subject.program.memory() for count, subject in subjects.items()},
        compile_seconds={
            count: subject.program.compile_seconds for count, subject in subjects.items()
        },
        machine=machine,
        notes=[
            *notes,
            f"Model FLOPs: {step_flops(model) * batch_size / 1e6:,.1f} M a member-step.",
        ],
    )


def page(sweep: Sweep) -> Page:
    """The table over M, the separate runs, and the curve."""
    scale, unit = _unit(sweep)
    header = ["M", f"{unit} a member-step", "MB on the device", "compile, s"]
    header += [f"{name}, separate / this" for name in sweep.separate]
    body = []
    for count, taken in sweep.stacked.items():
        line = [
            str(count),
            with_range(taken, scale=scale),
            f"{sweep.memory[count] / 1e6:,.1f}",
            f"{sweep.compile_seconds[count]:.1f}",
        ]
        factors = (sweep.factors[count][name] for name in sweep.separate)
        body.append(line + [with_range(factor) for factor in factors])
    alone = [[name, with_range(taken, scale=scale)] for name, taken in sweep.separate.items()]
    last = max(sweep.stacked)
    gains = "; ".join(
        f"{taken.median:{three_digits(taken.median)}} times as fast as in {name}"
        for name, taken in sweep.factors[last].items()
    )
    return Page(
        name=f"sweep_{sweep.name}",
        title=f"A sweep in one program: {sweep.title}, batch {sweep.batch_size}",
        sections=[
            f"One program of {last} members, against {last} separate runs: {gains}.",
            "## M members in one program",
            markdown_table(header, body),
            "## One run at a time",
            markdown_table(["library", f"{unit} a step"], alone),
        ],
        method=[
            "A member-step is one step of one member; members differ in their seeds, and each has "
            "its own order of the data. Separate runs are timed as one run, again and again in one "
            "process, data and program in place: M of them take M times as long, and compiling and "
            "starting up, which every process of its own would add, are not counted. "
            "*A run a core* is one run on one thread, its time divided by the "
            "number of cores: as though others beside it took nothing from it. "
            "*MB on the device* is what the compiler says of the program: images, states, scratch. "
            "PyTorch trains the same network with fused Adam, data on the device, no loader."
        ],
        machine=sweep.machine,
        notes=sweep.notes,
        figure=lambda: draw(sweep),
    )


def _unit(sweep: Sweep) -> tuple[float, str]:
    """The scale and the name of a unit in which all steps read well."""
    least = min(taken.median for taken in sweep.stacked.values())
    return (1e3, "ms") if least > 1e-3 else (1e6, "µs")


def draw(sweep: Sweep) -> plt.Figure:
    """Cost of a member-step over M, and that of separate runs, on logarithmic axes."""
    scale, unit = _unit(sweep)
    figure, axis = plt.subplots(figsize=(5.4, 3.4))
    counts = np.array(list(sweep.stacked))
    median, low, high = (
        scale * np.array(each) for each in zip(*sweep.stacked.values(), strict=True)
    )
    axis.errorbar(
        counts, median, [median - low, high - median], color=COLOURS[0], marker="o", ms=4,
        capsize=2, label="vaebal, one program",
    )  # fmt: skip
    for (name, taken), colour in zip(sweep.separate.items(), COLOURS[1:], strict=False):
        value, low, high = (scale * each for each in taken)
        axis.axhspan(low, high, color=colour, alpha=0.15, lw=0)
        axis.axhline(value, color=colour, ls="--", lw=1.2, label=f"{name}, separate runs")
    axis.set(xscale="log", yscale="log", xlabel="members M", ylabel=f"{unit} per member and step")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(plt.FuncFormatter(lambda y, _: f"{y:g}"))
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.set_title(f"{sweep.title}, batch {sweep.batch_size}", loc="left")
    return figure
