"""What a file of experiments will do, before anything runs: order, placement, time, memory, and why jobs wait.

The real placement decisions are asked for on a virtual clock. Jobs whose speed is not known get a length in proportion
to their tokens: that puts them in an order, and no time is shown for them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift.core.errors import ConfigError
from swift.core.format import format_bytes
from swift.experiments.types import Inventory, JobSpec, Placement

__all__ = ["Choice", "Decide", "check_possible", "forecast", "memory_of"]


@dataclass(frozen=True)
class Choice:
    """What is decided about one waiting job: where it starts now, or why it does not."""

    name: str
    placement: Placement | None
    reason: str = ""


Decide = Callable[[Sequence[JobSpec], Sequence[tuple[JobSpec, Placement]], float], Sequence[Choice]]
"""(jobs that are ready, in order of submission; running jobs with their places; seconds since the start) -> choices."""

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


def check_possible(specs: Sequence[JobSpec], inventory: Inventory, *, wait: bool = False) -> list[str]:
    """Sentences about jobs that this machine can never run. Raises ConfigError for the first unless ``wait``."""
    problems = []
    for spec in specs:
        problem = _impossible(spec, inventory)
        if problem is None:
            continue
        if not wait:
            raise ConfigError(
                f"{spec.name}: {problem}",
                fix="lower it under resources:, or set wait: true (--wait) to queue it anyway",
            )
        problems.append(f"{spec.name}: {problem}")
    return problems


def _impossible(spec: JobSpec, inventory: Inventory) -> str | None:
    kinds = {device.kind for device in inventory.devices}
    most = max((sum(device.kind == kind for device in inventory.devices) for kind in kinds), default=0)
    named = ", ".join(sorted(kinds)) or "device"
    if spec.needs.devices > most:
        return f"asks for {spec.needs.devices} devices, this machine has {most} ({named})"
    threads = spec.needs.threads
    if threads is not None and threads > inventory.cores:
        return f"asks for {threads} threads, this machine has {inventory.cores} cores"
    needed = memory_of(spec)
    largest = max((device.memory_bytes for device in inventory.devices), default=0)
    if needed is not None and needed > largest:
        asked = "asks for" if spec.needs.memory_bytes else "needs about"
        return f"{asked} {format_bytes(needed)} on a device, the largest here has {format_bytes(largest)}"
    return None


def forecast(
    specs: Sequence[JobSpec],
    inventory: Inventory,
    decide: Decide,
    speeds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The course of all jobs, if every one succeeds.

    Args:
        decide: the placement decisions (see ``Decide``).
        speeds: tokens per second of jobs that have run: ``estimate["memory_key"]`` -> speed.

    Returns ``jobs`` in the order of the file, each with ``order`` (of starting; None: does not start),
    ``start_seconds`` and ``seconds`` (None where no speed is known), ``memory_bytes``, ``placement``, ``wait`` (why it
    does not start at once) and ``problems``; and ``seconds`` of the whole.
    """
    lines = {spec.name: _line(spec, speeds or {}) for spec in specs}
    _simulate(lines, decide)
    impossible = {spec.name: _impossible(spec, inventory) for spec in specs}
    jobs = [_row(line, impossible[name]) for name, line in lines.items()]
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
    seconds = tokens / speed if tokens and speed else None
    length = seconds if seconds is not None else (tokens or 0) / _TOKENS_A_SECOND or _NO_LENGTH
    return _Line(spec, seconds, length)


def _simulate(lines: dict[str, _Line], decide: Decide) -> None:
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
                    ready.append(line.spec)
                else:
                    _remember(line, blocked)
        running = [
            (line.spec, line.placement) for name, line in lines.items() if line.placement and name not in done
        ]
        for choice in decide(ready, running, now) if ready else ():
            line = lines[choice.name]
            if choice.placement is None:
                _remember(line, choice.reason)
                continue
            started += 1
            line.order, line.placement, line.start, line.end = (
                started,
                choice.placement,
                now,
                now + line.length,
            )
            heapq.heappush(ending, (line.end, started, choice.name))
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


def _row(line: _Line, impossible: str | None) -> dict[str, Any]:
    spec, place = line.spec, line.placement
    starts_at_once = line.order is not None and line.start == 0
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
        "problems": [*([impossible] if impossible else []), *spec.estimate.get("problems", [])],
        "warnings": spec.estimate.get("warnings", []),
    }
