"""``swift plan FILE.yaml`` for a file of experiments: the real placement decisions, asked ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift.core.format import format_bytes, format_count, format_duration
from swift.experiments.estimate import estimate_memory
from swift.experiments.expand import expand
from swift.experiments.file import ExperimentFile
from swift.experiments.forecast import Choice, Decide, forecast
from swift.experiments.home import Home
from swift.experiments.scheduler import Placed, QueuedJob, decide, is_whole
from swift.experiments.show import table_text
from swift.experiments.store import Store
from swift.experiments.types import Inventory, Job, JobSpec, Placement
from swift.runs.metrics import read_metrics

__all__ = ["forecast_file", "forecast_text", "speeds_of"]


def forecast_file(file: ExperimentFile, cwd: Path, inventory: Inventory, home: Home) -> dict[str, Any]:
    """What the file would do on this machine, with what finished jobs have taught. Nothing is written."""
    specs = expand(file, cwd, planning=True)
    store = Store(home.store) if home.store.exists() else None
    result = forecast(specs, inventory, _decider(file.name, specs, inventory, store), speeds_of(store))
    result["name"] = file.name
    if file.sweep is not None and file.sweep.is_controlled:
        result["sweep"] = (
            f"{file.sweep.trials} trials by {file.sweep.method}; each depends on the results of earlier ones"
        )
    return result


def _decider(group: str, specs: Sequence[JobSpec], inventory: Inventory, store: Store | None) -> Decide:
    order = {spec.name: number for number, spec in enumerate(specs)}

    def correction(key: str) -> tuple[float, int]:
        return store.correction(key) if store is not None else (1.0, 0)

    def memory(spec: JobSpec) -> int | None:
        return estimate_memory(Job(spec.name, group, spec, "queued"), correction).memory_bytes

    def choose(
        ready: Sequence[JobSpec], running: Sequence[tuple[JobSpec, Placement]], now: float
    ) -> list[Choice]:
        queue = [
            QueuedJob(
                spec.name, group, order[spec.name], spec.needs, memory(spec), spec.priority, 0.0,
                spec.max_parallel,
            )
            for spec in ready
        ]  # fmt: skip
        held = [
            Placed(spec.name, group, placement, is_whole(spec.needs, memory(spec)))
            for spec, placement in running
        ]
        found = decide(queue, inventory, held, now)
        return [Choice(entry.job_id, entry.placement, entry.reason) for entry in found]

    return choose


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
        lines.append(f"and {result['sweep']}")
    total = result["seconds"]
    known = f"about {format_duration(total)} in all" if total is not None else None
    lines += ["", known or "no time is shown: no job like these has run here yet"]
    for job in result["jobs"]:
        lines += [f"problem: {job['name']}: {text}" for text in job["problems"]]
        lines += [f"warning: {job['name']}: {text}" for text in job["warnings"]]
    return "\n".join(lines)
