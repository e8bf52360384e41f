"""Jobs as people read them: the lines of ``swift ps``, the live table, the summary at the end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from swift.core.format import aligned, format_bytes, format_count, format_duration
from swift.experiments.progress import last_metrics, seconds_of
from swift.experiments.serving import SERVING
from swift.experiments.types import ACTIVE, FINISHED, Job
from swift.runs.status import read_status

__all__ = ["COLOURS", "live_row", "next_commands", "progress_of", "summary_rows", "table_text"]

COLOURS = {
    "running": "green", "starting": "cyan", "pausing": "yellow", "paused": "yellow", "failed": "red",
    "cancelled": "red", "succeeded": "bold", "queued": "dim", "waiting": "dim",
}  # fmt: skip


def table_text(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None = None,
    *,
    numeric: Collection[int] = (),
) -> str:
    """Columns under a header, those in ``numeric`` to the right; lines are cut at ``width`` (None: not cut)."""
    lines = aligned([header, *rows], numeric)
    cut = [line[: width - 1] + "…" if width is not None and len(line) > width else line for line in lines]
    return "\n".join(cut)


def terminal_width(file: Any) -> int | None:
    """Of a terminal; None for a pipe or file, where nothing is cut."""
    return shutil.get_terminal_size().columns if file.isatty() else None


def progress_of(job: Job) -> dict[str, Any]:
    """What the run folder says of a job that runs or ran: status fields and the newest metrics."""
    if job.spec.run_dir is None or not job.attempt:
        return {}
    return {
        **(read_status(Path(job.spec.run_dir)) or {}),
        **{f"last_{name}": value for name, value in last_metrics(job.spec.run_dir).items()},
    }


def place_of(job: Job) -> str:
    """``cuda:0,1``, or nothing."""
    if job.placement is None or not job.placement.devices or job.state in FINISHED:
        return ""
    return f"{job.placement.kind}:{','.join(map(str, job.placement.devices))}"


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def live_row(job: Job, samples: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The cells of ``swift top`` for one job, by column. ``samples``: the newest of each device."""
    seen = progress_of(job) if job.state not in ("queued", "waiting") else {}
    # A run that goes on has said nothing yet, but its metrics tell how far it had come.
    done = max(seen.get("step") or 0, seen.get("last_step") or 0)
    step = f"{done}/{seen['total_steps']}" if seen.get("total_steps") else ""
    stage = str(seen.get("stage") or "")
    eta = seen.get("eta_seconds") if job.state in ACTIVE else None
    devices = [f"{job.placement.kind}:{index}" for index in job.placement.devices] if job.placement else []
    busy = [
        samples[name]["utilisation_percent"]
        for name in devices
        if samples.get(name, {}).get("utilisation_percent") is not None
    ]
    seconds = seconds_of(job, time.time())
    return {
        "id": job.id,
        "name": job.spec.name,
        "state": job.state if stage in ("", "train") or job.state != "running" else f"running ({stage})",
        "step": step,
        "loss": _number(seen.get("last_loss"), ".4f"),
        "tokens/s": ""
        if seen.get("last_tokens_per_second") is None
        else format_count(seen["last_tokens_per_second"]),
        "ETA": "" if not eta else format_duration(eta),
        "time": "" if seconds is None else format_duration(seconds),
        "devices": place_of(job),
        "memory": format_bytes(job.placement.memory_bytes) if job.placement and job.state in ACTIVE else "",
        "util": f"{max(busy):.0f}%" if busy and job.state in ACTIVE else "",
        "reason": "" if job.state in ("running", "succeeded") else job.reason,
    }


def summary_rows(jobs: Sequence[Job]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table shown when all jobs have ended."""
    header = ["NAME", "STATE", "STEPS", "LOSS", "EVAL LOSS", "TIME", "RETRIES", "NOTE"]
    rows = []
    for job in jobs:
        seen = progress_of(job)
        seconds = seconds_of(job, time.time())
        changes = "; ".join(str(entry.get("change", "")) for entry in job.retries)
        rows.append(
            [
                job.spec.name,
                job.state,
                str(seen.get("step") or ""),
                _number(seen.get("last_loss"), ".4f"),
                _number(seen.get("last_eval_loss"), ".4f"),
                "" if seconds is None else format_duration(seconds),
                str(len(job.retries) or ""),
                changes if job.state == "succeeded" else job.reason,
            ]
        )
    return header, rows


def next_commands(group: str, jobs: Sequence[Job]) -> list[str]:
    """What one may want to do now."""
    failed = [job for job in jobs if job.state == "failed"]
    commands = [f"swift logs {job.id}" for job in failed[:3]]
    if failed:
        commands.append(f"swift retry {' '.join(job.id for job in failed[:8])}")
    if any(job.spec.run_dir for job in jobs):
        commands += [f"swift compare {group}", f"swift report {group}"]
    serving = [job.id for job in jobs if job.spec.command in SERVING and job.state == "running"]
    if serving:
        commands.append(f"swift stop {' '.join(serving)}")
    paused = [job.id for job in jobs if job.state == "paused"]
    return commands + ([f"swift resume {paused[0]}"] if paused else [])
