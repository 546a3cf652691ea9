"""Experiments made of parts: a part that is finished is kept and not done again."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from vaebal.experiments.report import Row
from vaebal.training.workdir import read_json, write_atomically


def finished(path: Path, beat: str, name: str, make: Callable[[], list[Row]]) -> list[Row]:
    """A part's rows: read if it has been finished before, else made and kept."""
    file = path / "parts" / f"{re.sub(r'[^a-z0-9.-]+', '_', name)}.json"
    if file.exists():
        print(f"{beat}{name}: finished before, not done again", flush=True)
    else:
        start = time.perf_counter()
        rows = make()
        seconds = time.perf_counter() - start
        for row in rows:
            row["seconds"] = seconds / len(rows)
        write_atomically(file, json.dumps(rows, indent=1) + "\n")
        print(f"{beat}{name}: {seconds:.1f} s", flush=True)
    return read_json(file)
