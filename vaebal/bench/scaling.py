"""Weak scaling: the same batch on every device, over 1, 2, 4, ... of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vaebal import homotopy
from vaebal.bench.page import Page, with_range
from vaebal.bench.subjects import (
    build_model,
    image_shape,
    random_images,
    training,
    with_batch_size,
)
from vaebal.bench.sweep import ladder
from vaebal.bench.timing import Spread, Turns, spread
from vaebal.experiments.report import markdown_table
from vaebal.training import (
    Member,
    Optimisation,
    Program,
    gaussian_vae,
    mesh_for,
    shared_given,
    stack_members,
)

VIRTUAL = 8  # devices that one CPU is made to look like


class Scaling(NamedTuple):
    """Images/s by the number of devices."""

    name: str
    title: str
    batch_size: int  # on each device
    total: dict[int, Spread]
    efficiency: dict[int, Spread]  # images/s of a device, relative to one device alone
    compile_seconds: dict[int, float]
    virtual: bool  # whether the devices are one CPU


def measure(
    config: Any,
    *,
    turns: Turns,
    batch_size: int,
    kappa: int | None = None,
    steps: int = 16,
    devices: Sequence[jax.Device] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Scaling:
    """One member's step with `batch_size` examples on each device.

    Args:
      devices: all of this process unless told otherwise.

    Raises:
      InputError: a field that cannot be meant.
    """
    devices = jax.local_devices() if devices is None else devices
    model = build_model(with_batch_size(config, batch_size * len(devices)), kappa)
    works, compile_seconds = {}, {}
    train = config.train
    settings = Optimisation(
        learning_rate=train.learning_rate,
        final_learning_rate=train.final_learning_rate,
        warmup_steps=train.warmup_steps,
        total_steps=train.epochs * steps,
        clip_norm=train.clip_norm,
    )
    members = stack_members([Member(0, model.latents, config.model.gamma or 0.1)])
    given = shared_given(np.full(model.outputs, 0.5, np.float32), 1)
    for count in ladder(len(devices)):
        say(f"compiling for {count} device{'s' * (count > 1)}")
        images = random_images(config, steps * batch_size * count).train
        program = Program(
            gaussian_vae(model), settings, members, images, batch_size * count, given=given,
            rule=lambda member: homotopy.closed_form(1e-3), mesh=mesh_for(1, devices[:count]),
        )  # fmt: skip
        works[count], compile_seconds[count] = training(program), program.compile_seconds
    say("epochs, in turns")
    seconds = turns(works)
    height, width, _ = image_shape(config)
    return Scaling(
        name=config.name,
        title=f"{config.name}, κ = {model.latents}, width {config.model.width}, "
        f"{height}×{width} pixels",
        batch_size=batch_size,
        total={n: spread(steps * batch_size * n / taken) for n, taken in seconds.items()},
        efficiency={n: spread(seconds[1] / taken) for n, taken in seconds.items()},
        compile_seconds=compile_seconds,
        virtual=devices[0].platform == "cpu",
    )


def page(scaling: Scaling) -> Page:
    """Images/s in total and for each device."""
    header = [
        "devices",
        "batch in all",
        "images/s",
        "images/s a device",
        "efficiency",
        "compile, s",
    ]
    body = [
        [
            str(count),
            str(count * scaling.batch_size),
            with_range(total, ",.0f"),
            with_range(total, ",.0f", 1 / count),
            with_range(scaling.efficiency[count], ".2f"),
            f"{scaling.compile_seconds[count]:.1f}",
        ]
        for count, total in scaling.total.items()
    ]
    if len(body) == 1:
        notes = ["There is one device only, so nothing to scale over."]
    elif scaling.virtual:
        notes = [
            "**The devices are virtual**, one CPU made to look like several, and share its cores: "
            "what can be read here is what sharing a batch costs. The ideal is the same images/s "
            "in total for any number of them, an efficiency of 1 over their number."
        ]
    else:
        notes = []
    return Page(
        name=f"scaling_{scaling.name}",
        title=f"Weak scaling: {scaling.title}, batch {scaling.batch_size} on each device",
        sections=[markdown_table(header, body)],
        method=[
            "Every device gets the same batch, so the whole batch grows with their number; "
            "parameters are copied to each, and gradients summed over all in every step. A learned "
            "γ follows its closed form. "
            "*Efficiency*: images/s of a device over those of one device alone."
        ],
        notes=notes,
    )
