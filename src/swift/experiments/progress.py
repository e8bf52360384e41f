"""What a job's files say about how it goes; light, because ``swift ps`` reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from swift.core.errors import SwiftError
from swift.experiments.types import ACTIVE, Job
from swift.runs.metrics import read_metrics

__all__ = [
    "OUTPUT_LOG",
    "last_metrics",
    "median_step_seconds",
    "seconds_of",
    "tail_start",
]

OUTPUT_LOG = "output.log"
"""In the job's folder: what all its attempts printed."""
_BLOCK_BYTES = 65_536


def last_metrics(run_dir: str | Path | None, tail_bytes: int = 8192) -> dict[str, Any]:
    """The newest training line of ``metrics.jsonl``, with the newest ``eval_*`` values; from the end of the file."""
    if run_dir is None:
        return {}
    try:
        with (Path(run_dir) / "metrics.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            start = max(0, file.tell() - tail_bytes)
            file.seek(start)
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return {}
    found: dict[str, Any] = {}
    for line in lines[1 if start else 0 : -1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut by a kill; the run repairs it when it goes on
        found |= row
    return found


def median_step_seconds(run_dir: str | Path, lines: int = 50) -> float | None:
    """Median of the step times of the newest metric lines; None before there are any."""
    try:
        rows = read_metrics(Path(run_dir) / "metrics.jsonl")[-lines:]
    except SwiftError:
        return None
    times = sorted(row["step_time"] for row in rows if row.get("step_time"))
    return times[len(times) // 2] if times else None


def tail_start(path: Path, lines: int) -> int:
    """Where the last ``lines`` lines of a file begin; 0 when it is not there."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        block, found = b"", end
        while found > 0 and block.count(b"\n") <= lines:
            start = max(0, found - _BLOCK_BYTES)
            file.seek(start)
            block = file.read(found - start) + block
            found = start
    kept = block.splitlines(keepends=True)[-lines:] if lines else []
    return end - sum(map(len, kept))


def seconds_of(job: Job, now: float) -> float | None:
    """How long it has run in all its attempts; None before the first."""
    if job.started is None:
        return None
    return job.spent + (max(0.0, now - job.started) if job.state in ACTIVE else 0.0)
