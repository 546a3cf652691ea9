"""Kills a command at random moments, starts it again, and compares its end with a whole run's.

python tests/kills.py --kills=100 -- python main.py --config.train.epochs=20

The command gets --workdir appended and is run once to its end, as the reference. Then it is
started again and again in another workdir and killed (SIGKILL, with all it has started) at a
random moment after its opening the workdir, within the time of a run; when it ends by itself,
everything but the times taken must equal the reference, and the next workdir is begun, until there
were so many kills.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def end_of(workdir: Path) -> dict[str, Any]:
    """All rows without their times, all arrays, the fingerprints of all newest checkpoints."""
    end = {}
    for file in (*workdir.glob("*.json"), *workdir.rglob("row*.json")):
        rows = json.loads(file.read_text())
        timeless = [
            {k: v for k, v in row.items() if not k.endswith("seconds")}
            for row in (rows if isinstance(rows, list) else [rows])
        ]
        end[str(file.relative_to(workdir))] = timeless
    for file in workdir.rglob("*.npz"):
        with np.load(file) as arrays:
            end[str(file.relative_to(workdir))] = {k: a.tobytes() for k, a in arrays.items()}
    for directory in workdir.rglob("checkpoints/**/"):
        epochs = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
        if epochs:
            metadata = directory / str(max(epochs)) / "_CHECKPOINT_METADATA"
            marks = json.loads(metadata.read_text())["custom_metadata"]["fingerprint"]
            end[str(directory.relative_to(workdir))] = [max(epochs), marks]
    return end


def run(command: list[str], workdir: Path, moment: float | None = None) -> float | None:
    """Seconds from the opening of the workdir to the end; None if killed at `moment` of these.

    Raises:
      RuntimeError: the command failed.
    """
    lock = workdir / ".lock"
    before = lock.stat().st_mtime_ns if lock.exists() else 0
    # Of a whole tree of processes the group is killed.
    with subprocess.Popen(
        [*command, f"--workdir={workdir}"], stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while process.poll() is None and not (lock.exists() and lock.stat().st_mtime_ns > before):
            time.sleep(0.01)
        opened = time.perf_counter()
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code} in {workdir}.")
    return time.perf_counter() - opened


def stress(command: list[str], kills: int, directory: Path, seed: int = 0) -> int:
    """Kills `command` so many times; returns how many runs came to an end, the same each time.

    Raises:
      AssertionError: an end differs from that of the run that was never killed.
      RuntimeError: a run, resumed or not, failed.
    """
    rng = random.Random(seed)
    seconds = run(command, directory / "whole")
    expected = end_of(directory / "whole")
    assert expected, f"{' '.join(command)} leaves nothing to compare."
    killed = ends = 0
    while killed < kills or (directory / str(ends)).exists():
        moment = rng.uniform(0, seconds) if killed < kills else None
        fresh = not (directory / str(ends)).exists()
        took = run(command, directory / str(ends), moment)
        if took is None:
            killed += 1
            left = directory / str(ends)
            kept = len(list(left.rglob("_CHECKPOINT_METADATA")))
            finished = len(list(left.rglob("row.json"))) + len(list(left.rglob("evaluation/*")))
            print(
                f"kill {killed} of {kills} at {moment:.1f} s: {kept} checkpoints, "
                f"{finished} results",
                flush=True,
            )
            continue
        assert end_of(directory / str(ends)) == expected, f"{directory / str(ends)} differs."
        if fresh:  # it found its programs compiled, as those to come will
            seconds = took
        ends += 1
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("command", nargs="+")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        ends = stress(flags.command, flags.kills, Path(directory), flags.seed)
    print(f"{flags.kills} kills, {ends} runs to the end, all identical")


if __name__ == "__main__":
    sys.exit(main())
