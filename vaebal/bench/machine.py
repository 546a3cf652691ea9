"""What a reader needs to know of the machine, and of who else was using it."""

import contextlib
import datetime
import importlib.metadata
import math
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import jax


def cores() -> int:
    """CPU cores that this process may use: a container or a scheduler may give fewer than all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def device_name() -> str:
    """The device's kind, as a part of a file's name."""
    return re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower()).strip("_")


def _seconds_of_cpu() -> tuple[float, float]:
    """Seconds of CPU used since boot by all processes (NaN if unknown), and by this one."""
    own = sum(os.times()[:4])
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    except OSError:
        return math.nan, own
    user, nice, system, _, _, irq, softirq, _ = (int(field) for field in fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), own


def watch_others() -> Callable[[], float]:
    """A function that tells what share of the cores other processes have used from now on."""
    start, (busy, own) = time.perf_counter(), _seconds_of_cpu()

    def share() -> float:
        busy_now, own_now = _seconds_of_cpu()
        others = (busy_now - busy) - (own_now - own)
        return max(others, 0.0) / (os.cpu_count() * (time.perf_counter() - start))

    return share


def describe_machine() -> list[tuple[str, str]]:
    """What a reader needs to place the numbers; nothing that names the machine."""
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    processor = match[1].strip() if match else platform.processor() or platform.machine()
    rows = [("CPU", f"{processor}, {cores()} cores")]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        rows.append(("RAM", f"{memory / 2**30:.0f} GiB"))
    versions = (
        f"{name} {importlib.metadata.version(name)}" for name in ("jaxlib", "flax", "optax")
    )
    return [
        *rows,
        ("Devices", f"{jax.device_count()} × {jax.devices()[0].device_kind}"),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("JAX", ", ".join([jax.__version__, *versions])),
        ("Date", datetime.date.today().isoformat()),
    ]
