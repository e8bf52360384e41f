"""What a file of experiments will do, before anything runs: order, placement, time, memory, and why jobs wait.

The real placement decisions are asked for on a virtual clock. How long a job takes is known from jobs like it, else
from its plan. Without either it gets a length in proportion to its tokens: that puts it in
an order, and no time is shown.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swift.core.format import format_bytes, format_count, format_duration
from swift.experiments.demand import Correction, placed, queued
from swift.experiments.expand import expand
from swift.experiments.file import ExperimentFile
from swift.experiments.fuse_choice import Choice
from swift.experiments.fusing import apply_verdicts, told_verdicts
from swift.experiments.home import Home
from swift.experiments.scheduler import Decision, QueuedJob, check_possible, decide
from swift.experiments.show import table_text
from swift.experiments.store import Store
from swift.experiments.types import Inventory, Job, JobSpec, Placement
from swift.runs.metrics import read_metrics

__all__ = ["forecast", "forecast_file", "forecast_text", "impossible", "memory_of", "speeds_of"]


_NO_LENGTH = 1.0
_TOKENS_A_SECOND = 1000.0
"""Only for the order of jobs whose speed is not known."""


@dataclass
class _Line:
    spec: JobSpec
    seconds: float | None
    length: float
    placement: Placement | None = None
    start: float | None = None
    end: float | None = None
    order: int | None = None
    start_known: bool = True
    reasons: list[str] = field(default_factory=list)


def memory_of(spec: JobSpec) -> int | None:
    """Bytes a job needs on each device: what was asked for, else what its plan estimates."""
    return spec.needs.memory_bytes or spec.estimate.get("memory_bytes")


def impossible(spec: JobSpec, inventory: Inventory) -> Decision | None:
    """The scheduler's decision that this machine, even empty, cannot run the job; None when it can."""
    return check_possible(QueuedJob(spec.name, "", 0, spec.needs, memory_of(spec)), inventory)


def forecast_file(file: ExperimentFile, cwd: Path, inventory: Inventory, home: Home) -> dict[str, Any]:
    """What the file would do on this machine, with what finished jobs have taught. Nothing is written."""
    specs = expand(file, cwd, planning=True)
    store = Store(home.store) if home.store.exists() else None
    correction = store.correction if store is not None else _nothing_learned
    fused = told_verdicts(apply_verdicts(specs, "auto", Choice(home)))
    result = {**forecast(specs, inventory, correction, speeds_of(store)), "name": file.name, "fused": fused}
    if file.sweep is not None and file.sweep.is_controlled:
        result["sweep"] = "the values of the trials depend on earlier results; shown are the largest"
    return result


def _decide(
    ready: Sequence[_Line], running: Sequence[_Line], inventory: Inventory, correction: Correction
) -> list[Decision]:
    """The real decisions, on this inventory, as if one group were submitted now."""
    queue = [
        replace(queued(_job(line, number), correction), job_id=line.spec.name)
        for number, line in enumerate(ready)
    ]
    held = [placed(_job(line, 0)) for line in running]
    return decide(queue, inventory, [entry for entry in held if entry], 0.0)


def _job(line: _Line, number: int) -> Job:
    spec = line.spec
    return Job(f"j{number}", "this file", spec, "queued", placement=line.placement, priority=spec.priority)


def _nothing_learned(key: str) -> tuple[float, int]:
    return 1.0, 0


def forecast(
    specs: Sequence[JobSpec],
    inventory: Inventory,
    correction: Correction = _nothing_learned,
    speeds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The course of all jobs, if every one succeeds.

    Args:
        correction: what finished jobs have taught about memory.
        speeds: tokens per second of jobs that have run: ``estimate["memory_key"]`` -> speed.

    Returns ``jobs`` in the order of the file, each with ``order`` (of starting; None: does not start),
    ``start_seconds`` and ``seconds`` (None where no speed is known), ``memory_bytes``, ``placement``, ``wait`` (why it
    does not start at once) and ``problems``; and ``seconds`` of the whole.
    """
    lines = {spec.name: _line(spec, speeds or {}) for spec in specs}
    _simulate(lines, inventory, correction)
    jobs = [_row(line, impossible(line.spec, inventory)) for line in lines.values()]
    ends = [line.end for line in lines.values() if line.end is not None]
    known = all(
        line.start_known and line.seconds is not None for line in lines.values() if line.order is not None
    )
    return {
        "jobs": jobs,
        "seconds": max(ends, default=0.0) if known else None,
        "devices": [
            {"kind": device.kind, "index": device.index, "name": device.name} for device in inventory.devices
        ],
        "cores": inventory.cores,
    }


def _line(spec: JobSpec, speeds: Mapping[str, float]) -> _Line:
    tokens, speed = spec.estimate.get("tokens"), speeds.get(spec.estimate.get("memory_key", ""))
    seconds = tokens / speed if tokens and speed else spec.estimate.get("seconds")
    length = seconds if seconds is not None else (tokens or 0) / _TOKENS_A_SECOND or _NO_LENGTH
    return _Line(spec, seconds, length)


def _simulate(lines: dict[str, _Line], inventory: Inventory, correction: Correction) -> None:
    """Start jobs as decided, let the one that ends first end, and so on until nothing can start."""
    now = 0.0
    ending: list[tuple[float, int, str]] = []
    done: set[str] = set()
    started = 0
    while True:
        ready = []
        for line in lines.values():
            if line.order is None:
                blocked = _waits_for(line.spec, lines, done)
                if blocked is None:
                    ready.append(line)
                else:
                    _remember(line, blocked)
        running = [line for name, line in lines.items() if line.placement and name not in done]
        for decision in _decide(ready, running, inventory, correction) if ready else ():
            line = lines[decision.job_id]
            if decision.placement is None:
                _remember(line, decision.reason)
                continue
            started += 1
            line.order, line.placement = started, decision.placement
            line.start, line.end = now, now + line.length
            heapq.heappush(ending, (line.end, started, decision.job_id))
        if not ending:
            return
        now, _, name = heapq.heappop(ending)
        done.add(name)
        _pass_on_doubt(lines, name)


def _pass_on_doubt(lines: dict[str, _Line], ended: str) -> None:
    """A job that starts after one of unknown length has no known time of its own."""
    if lines[ended].seconds is None or not lines[ended].start_known:
        for line in lines.values():
            if line.order is None:
                line.start_known = False


def _waits_for(spec: JobSpec, lines: Mapping[str, _Line], done: set[str]) -> str | None:
    for need in spec.after:
        if need.condition == "failure":
            return f"runs only when {need.job} fails"
        if need.job in lines and need.job not in done:
            return f"waits for {need.job}"
    return None


def _remember(line: _Line, reason: str) -> None:
    if reason and reason not in line.reasons:
        line.reasons.append(reason)


def _row(line: _Line, refused: Decision | None) -> dict[str, Any]:
    spec, place = line.spec, line.placement
    starts_at_once = line.order is not None and line.start == 0
    problems = [*([refused.reason] if refused else []), *spec.estimate.get("problems", [])]
    return {
        "name": spec.name,
        "experiment": spec.experiment,
        "command": spec.command,
        "parameters": spec.parameters,
        "order": line.order,
        "start_seconds": line.start if line.start_known else None,
        "seconds": line.seconds,
        "memory_bytes": memory_of(spec),
        "steps": spec.estimate.get("steps"),
        "tokens": spec.estimate.get("tokens"),
        "disk_bytes": spec.estimate.get("disk_bytes"),
        "placement": {"kind": place.kind, "devices": list(place.devices), "threads": place.threads}
        if place
        else None,
        "wait": None if starts_at_once else "; ".join(line.reasons) or None,
        "after": [{"job": need.job, "condition": need.condition} for need in spec.after],
        "run_dir": spec.run_dir,
        "problems": problems,
        "warnings": [
            warning
            for warning in spec.estimate.get("warnings", [])
            if not any(warning in text for text in problems)
        ],
    }


def speeds_of(store: Store | None, newest: int = 200) -> dict[str, float]:
    """Tokens per second of jobs that succeeded: ``estimate["memory_key"]`` -> the newest speed seen."""
    speeds: dict[str, float] = {}
    for job in store.jobs(states=["succeeded"], limit=newest) if store is not None else ():
        key = job.spec.estimate.get("memory_key")
        if key and job.spec.run_dir and (Path(job.spec.run_dir) / "metrics.jsonl").exists():
            rows = read_metrics(Path(job.spec.run_dir) / "metrics.jsonl")
            seen = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
            if seen:
                speeds[key] = sorted(seen)[len(seen) // 2]
    return speeds


def forecast_text(result: dict[str, Any]) -> str:
    """The forecast as a table and what needs attention."""
    rows = []
    for job in sorted(result["jobs"], key=lambda job: job["order"] or 10**9):
        place = job["placement"]
        rows.append(
            [
                str(job["order"] or "-"),
                job["name"],
                job["command"],
                "" if job["steps"] is None else str(job["steps"]),
                "" if job["tokens"] is None else format_count(job["tokens"]),
                "" if job["memory_bytes"] is None else format_bytes(job["memory_bytes"]),
                "" if job["seconds"] is None else format_duration(job["seconds"]),
                "" if job["start_seconds"] is None else f"+{format_duration(job['start_seconds'])}",
                "" if place is None else f"{place['kind']}:{','.join(map(str, place['devices']))}",
                job["wait"] or "",
            ]
        )
    header = ["#", "NAME", "COMMAND", "STEPS", "TOKENS", "MEMORY", "TIME", "START", "PLACE", "WAITS BECAUSE"]
    lines = [f"{result['name']}: {len(rows)} jobs; nothing runs", "", table_text(header, rows)]
    if result.get("sweep"):
        lines.append(result["sweep"])
    lines += result.get("fused", [])
    total = result["seconds"]
    known = f"about {format_duration(total)} in all" if total is not None else None
    lines += ["", known or "no time in all: of some no job like them has run here yet"]
    for job in result["jobs"]:
        lines += [f"problem: {job['name']}: {text}" for text in job["problems"]]
        lines += [f"warning: {job['name']}: {text}" for text in job["warnings"]]
    return "\n".join(lines)
