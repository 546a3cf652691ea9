"""Whether the data keep up: what a pipeline delivers, and what the training step consumes."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vaebal.bench.flops import step_flops
from vaebal.bench.page import Page, with_range
from vaebal.bench.step import network
from vaebal.bench.subjects import (
    build,
    build_model,
    epoch_size,
    random_images,
    training,
    with_batch_size,
)
from vaebal.bench.timing import PEAK, Spread, Turns, Work, jax_peak, spread
from vaebal.data import ImageSet, Scenes, steps_per_epoch
from vaebal.data.feeding import Feeder
from vaebal.data.rendered import MAX_FACTORS, draw_factors
from vaebal.errors import InputError
from vaebal.experiments.report import markdown_table
from vaebal.training.program import CHUNK_BYTES
from vaebal.units import to_unit_pixels

DRAWN, FROM_DISK = "drawn on the device", "from disk"
DISK_BYTES = 2**28
ENOUGH = 2.0  # times what the step consumes


class Feed(NamedTuple):
    """One pipeline beside one config's training step."""

    pipeline: str
    resolution: int
    config: str
    network: str
    batch_size: int
    delivered: Spread  # images/s
    consumed: Spread  # by the step on images that lie on the device
    ratio: Spread  # of the two, turn by turn
    fed: Spread  # images/s of the step with the pipeline at work


def measure(
    configs: Sequence[Any],
    *,
    turns: Turns,
    matrix_size: int = 4096,
    epoch_seconds: float = 1.0,
    disk_bytes: int = DISK_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> list[Feed]:
    """Each config's own pipeline: "rendered" data are drawn, all others come from disk.

    Raises:
      InputError: a config of other data than images in colour.
    """
    for config in configs:
        read = ("rendered", "celeb_a", "folder")
        if config.experiment != "gamma" or config.data.name not in read:
            raise InputError(
                f"{config.name} has no pipeline: its data are small and stay as drawn."
            )
        build_model(config, None)
    peak = jax_peak(matrix_size)
    rate = float(np.median(peak.rate(turns({PEAK: peak.work})[PEAK])))
    return [_feed(config, rate, turns, epoch_seconds, disk_bytes, say) for config in configs]


def _feed(
    config: Any,
    rate: float,
    turns: Turns,
    epoch_seconds: float,
    disk_bytes: int,
    say: Callable[[str], None],
) -> Feed:
    resolution, flops = config.data.resolution, step_flops(build_model(config, None))
    pipeline = DRAWN if config.data.name == "rendered" else FROM_DISK
    batch_size, steps = epoch_size(config.train.batch_size, flops, rate, epoch_seconds)
    config, epoch = with_batch_size(config, batch_size), steps * batch_size
    say(f"{resolution} px {pipeline}, {config.name}, B = {batch_size}, {steps} steps")
    with tempfile.TemporaryDirectory() as folder:
        if pipeline == DRAWN:
            rows = np.asarray(draw_factors(0, np.arange(epoch), MAX_FACTORS))
            decode, (deliver, images) = Scenes(resolution), drawing(rows, resolution, batch_size)
        else:
            rows = images_on_disk(Path(folder), resolution, disk_bytes, least=epoch)
            decode, (deliver, images) = to_unit_pixels, reading(rows, batch_size)
            rows = rows[:epoch]
        on_device = build(config, random_images(config, epoch))
        # Above so many bytes of data the experiments read chunks from the host.
        config.train.device_bytes = 2**60 if pipeline == DRAWN else 1
        shape = (resolution, resolution, 3)
        fed = build(config, ImageSet("fed", rows, rows[:1], shape, decode))
        seconds = turns(
            {
                "deliver": deliver,
                "consume": training(on_device.program),
                "fed": training(fed.program),
            }
        )
    delivered = images / seconds["deliver"]
    consumed, together = (epoch / seconds[name] for name in ("consume", "fed"))
    return Feed(
        pipeline,
        resolution,
        config.name,
        network(config),
        batch_size,
        *map(spread, (delivered, consumed, delivered / consumed, together)),
    )


def drawing(factors: np.ndarray, resolution: int, batch_size: int) -> tuple[Work, int]:
    """Batches of scenes of factors [N, r], and the images in one."""
    batches = jnp.asarray(factors[: len(factors) // batch_size * batch_size])
    batches = batches.reshape(-1, batch_size, factors.shape[1])
    draw = Scenes(resolution)

    @jax.jit
    def run(count):
        # The batch is carried along, so that every one is written out.
        blank = jnp.zeros((batch_size, resolution * resolution * 3))
        return jax.lax.fori_loop(0, count, lambda i, _: draw(batches[i % len(batches)]), blank)

    return lambda count: jax.block_until_ready(run(count)), batch_size


def images_on_disk(folder: Path, resolution: int, size: int, least: int) -> np.ndarray:
    """A memory-mapped file of random images [N, D] of about `size` bytes, N at least `least`."""
    dim = resolution * resolution * 3
    number, rng = max(size // dim, least), np.random.default_rng(0)
    path = folder / "images.npy"
    rows = np.lib.format.open_memmap(path, "w+", np.uint8, (number, dim))
    for start in range(0, number, 1024):
        rows[start : start + 1024] = rng.integers(
            0, 256, rows[start : start + 1024].shape, np.uint8
        )
    rows.flush()
    return np.load(path, mmap_mode="r")


def reading(rows: np.ndarray, batch_size: int) -> tuple[Work, int]:
    """Chunks of shuffled batches, put on the device, and the images in one."""
    most = steps_per_epoch(len(rows), batch_size)
    steps = int(np.clip(CHUNK_BYTES // (batch_size * rows[0].nbytes), 1, most))

    def work(count: int) -> None:
        # A feeder of its own: one kept from turn to turn would have read ahead in between.
        with Feeder(rows, seeds=[0], batch_size=batch_size, steps_per_chunk=steps) as feeder:
            for _ in range(count):
                jax.block_until_ready(jax.device_put(next(feeder)))

    return work, steps * batch_size


def page(feeds: Sequence[Feed]) -> Page:
    """What is delivered beside what is consumed."""
    header = ["pipeline", "px", "for the step of", "network", "batch", "delivers, images/s"]
    header += ["step consumes, images/s", "delivers / consumes", "step when fed, images/s"]
    body = [
        [
            feed.pipeline,
            str(feed.resolution),
            feed.config,
            feed.network,
            str(feed.batch_size),
            with_range(feed.delivered, ",.0f"),
            with_range(feed.consumed, ",.0f"),
            with_range(feed.ratio, ",.2f"),
            with_range(feed.fed, ",.0f"),
        ]
        for feed in feeds
    ]
    short = [
        f"{feed.pipeline} at {feed.resolution} px for {feed.config} ({feed.ratio.median:.2f})"
        for feed in feeds
        if feed.ratio.median < ENOUGH
    ]
    verdict = (
        f"Less than {ENOUGH:g} times what the step consumes: {', '.join(short)}."
        if short
        else f"Every pipeline delivers at least {ENOUGH:g} times what the step consumes."
    )
    return Page(
        name="feeding",
        title="Feeding: what the pipelines deliver and what training consumes",
        sections=[verdict, markdown_table(header, body)],
        method=[
            "*Delivers*: the pipeline alone, with nothing to train. *Consumes*: the training step "
            "alone, on images that lie on the device. *When fed*: the step with the pipeline at "
            "work beside or in it. Scenes of 12 factors are drawn on the device in every batch "
            "(the experiments do so only where the images take more than 2 GiB, and else draw them "
            "once). From disk: shuffled batches of random bytes from a memory-mapped file that "
            "was just written, so from memory where it fits, put on the device in chunks; the "
            "start of the reading threads counts. The batch is the config's, halved until a few "
            "steps make a short epoch."
        ],
    )
