"""Which waiting jobs start now, and where. A pure function: no clock, no disk, no device is asked.

The order is priority with ageing: a job that has waited ``ageing_seconds`` counts one priority more, so whatever
arrives later at the same or a bounded higher priority cannot keep it waiting for ever. In that order every job is
placed that fits (backfill). For the first one that does not fit, devices are kept free: jobs behind it get only what
would still be free beside it. Nothing is ever promised twice: the sum of what jobs were given on a device stays within
what other people's processes leave there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swift.experiments.capacity import Accelerators, Host, Request, Use
from swift.experiments.types import Inventory, Needs, Placement

__all__ = [
    "Decision",
    "Placed",
    "Policy",
    "QueuedJob",
    "check_possible",
    "decide",
    "is_whole",
    "schedule_order",
]


@dataclass(frozen=True)
class QueuedJob:
    """A job that could start.

    Attributes:
        order: grows with submission (the number of the job's id).
        memory_bytes: on each device; None: not known, so it gets whole devices (or its slots' share on the CPU).
        submitted: wall clock, for ageing only; returned: when it was preempted, from which its age counts then.
        first: room is being made for it by preemption, so it goes before everybody.
    """

    job_id: str
    group: str
    order: int
    needs: Needs
    memory_bytes: int | None
    priority: int = 0
    submitted: float = 0.0
    returned: float | None = None
    first: bool = False
    max_parallel: int | None = None


@dataclass(frozen=True)
class Placed:
    """A job that holds its place: starting, running or pausing.

    Attributes:
        whole: its devices are its own; `is_whole` tells for a queued one.
        started: wall clock, of this attempt.
        resumable: it runs, and would lose nothing but its start by being preempted.
        leaving: None: it stays; else the job that it is preempted for ("": it was paused by the user).
    """

    job_id: str
    group: str
    placement: Placement
    whole: bool = False
    started: float = 0.0
    priority: int = 0
    resumable: bool = False
    leaving: str | None = None


@dataclass(frozen=True)
class Policy:
    """How the machine is shared.

    Attributes:
        ageing_seconds: waiting so long counts as one priority more.
        usable: share of a device's memory that is given away.
        jobs_per_device: at most so many jobs beside each other on one accelerator.
        max_jobs: at most so many jobs at once in all; None: no limit.
        preemption: jobs of a higher priority may have others checkpointed and queued again (`preemption.preempt`).
        preempt_after_seconds: not before a job has run so long.
    """

    ageing_seconds: float = 600.0
    usable: float = 0.95
    jobs_per_device: int = 4
    max_jobs: int | None = None
    preemption: bool = True
    preempt_after_seconds: float = 300.0


@dataclass(frozen=True)
class Decision:
    """What happens to one job now, and why, in one sentence.

    Attributes:
        impossible: this machine can never run it; ``fix`` says what would help.
        blocked: it does not fit beside what runs.
    """

    job_id: str
    placement: Placement | None
    reason: str
    impossible: bool = False
    fix: str | None = None
    blocked: bool = False


def is_whole(needs: Needs, memory_bytes: int | None) -> bool:
    """Whether accelerators given to such a job are shared with nobody."""
    return needs.exclusive or needs.devices > 1 or memory_bytes is None


def schedule_order(queue: Iterable[QueuedJob], now: float, ageing_seconds: float) -> list[QueuedJob]:
    """The queue, most urgent first: by priority + waited / ageing_seconds, then by submission.

    A wall clock that was set back would make earlier jobs look younger than later ones; no job counts as submitted
    later than one with a higher number.
    """
    earliest, since = math.inf, {}
    jobs = sorted(queue, key=lambda job: job.order)
    for job in reversed(jobs):
        earliest = min(earliest, job.submitted)
        since[job.job_id] = min(earliest if job.returned is None else job.returned, now)
    return sorted(jobs, key=lambda job: (not job.first, since[job.job_id] - job.priority * ageing_seconds))


def check_possible(job: QueuedJob, inventory: Inventory, policy: Policy | None = None) -> Decision | None:
    """The decision that this machine, even empty, cannot run the job; None when it can."""
    problem = _Machine(inventory, (), policy or Policy()).impossible(_request(job))
    return Decision(job.job_id, None, problem[0], impossible=True, fix=problem[1]) if problem else None


def decide(
    queue: Sequence[QueuedJob],
    inventory: Inventory,
    running: Sequence[Placed],
    now: float,
    policy: Policy | None = None,
) -> list[Decision]:
    """One decision for every queued job, the most urgent first.

    Args:
        queue: jobs that wait for nothing but devices.
        running: everything that holds a place, also jobs that are starting or being paused.
        now: wall clock in seconds.
    """
    policy = policy or Policy()
    machine = _Machine(inventory, running, policy)
    ordered = schedule_order(queue, now, policy.ageing_seconds)
    in_group = Counter(placed.group for placed in running)
    num_running = len(running)
    machine.expect(_request(job) for job in ordered)
    decisions = []
    for job in ordered:
        request = _request(job)
        problem = machine.impossible(request)
        if problem is not None:
            decisions.append(Decision(job.job_id, None, problem[0], impossible=True, fix=problem[1]))
        elif policy.max_jobs is not None and num_running >= policy.max_jobs:
            reason = f"waits: {num_running} jobs run, max_jobs is {policy.max_jobs}"
            decisions.append(Decision(job.job_id, None, reason))
        elif job.max_parallel is not None and in_group[job.group] >= job.max_parallel:
            reason = (
                f"waits: {in_group[job.group]} jobs of {job.group} run, max_parallel is {job.max_parallel}"
            )
            decisions.append(Decision(job.job_id, None, reason))
        else:
            placement, reason = machine.place(job.job_id, request)
            decisions.append(Decision(job.job_id, placement, reason, blocked=placement is None))
            if placement is not None:
                in_group[job.group] += 1
                num_running += 1
    return decisions


def _request(job: QueuedJob) -> Request:
    needs = job.needs
    return Request(
        needs.devices,
        job.memory_bytes,
        needs.threads,
        is_whole(needs, job.memory_bytes),
        needs.memory_bytes is not None,
    )


class _Machine:
    """The free capacity during one round of decisions. Equal requests get equal refusals, found out once."""

    def __init__(self, inventory: Inventory, running: Iterable[Placed], policy: Policy) -> None:
        uses = [Use(job.placement, job.whole) for job in sorted(running, key=lambda job: job.started)]
        accelerators = [device for device in inventory.devices if device.kind != "cpu"]
        slots = [] if accelerators else [device for device in inventory.devices if device.kind == "cpu"]
        self._cores = inventory.cores
        self._accelerators = Accelerators(
            accelerators,
            [use for use in uses if use.placement.kind != "cpu"],
            policy.usable,
            policy.jobs_per_device,
        )
        self._host = Host(
            slots,
            inventory.cores,
            inventory.host_memory_bytes,
            [use for use in uses if use.placement.kind == "cpu"],
            policy.usable,
        )
        self._wanted = 0
        self._refused: dict[Request, str] = {}
        self._impossible: dict[Request, tuple[str, str] | None] = {}
        self._reserved: set[bool] = set()

    def _on_host(self, request: Request) -> bool:
        return request.devices == 0 or not len(self._accelerators)

    def expect(self, requests: Iterable[Request]) -> None:
        """Count the idle devices that waiting jobs need."""
        self._wanted = sum(
            self._accelerators.idle_wanted(request)
            for request in requests
            if not self._on_host(request) and self.impossible(request) is None
        )

    def impossible(self, request: Request) -> tuple[str, str] | None:
        if request not in self._impossible:
            side = self._host if self._on_host(request) else self._accelerators
            problem = side.impossible(request)
            if problem is None and (request.threads or 0) > self._cores:
                threads = f"asks for {request.threads} threads, this machine has {self._cores} cores"
                problem = threads, f"threads: {self._cores}"
            self._impossible[request] = problem
        return self._impossible[request]

    def place(self, job_id: str, request: Request) -> tuple[Placement | None, str]:
        if request in self._refused:
            return None, self._refused[request]
        on_host = self._on_host(request)
        if on_host:
            found = self._host.place(request)
        else:
            found = self._accelerators.place(request, self._cores, self._wanted)
        if found is not None:
            if not on_host:
                self._wanted -= self._accelerators.idle_wanted(request)
            self._refused.clear()
            return found
        side = self._host if on_host else self._accelerators
        reason = side.explain(request)
        # The first that does not fit on a side gets a reservation there; later ones wait for their turn.
        if on_host not in self._reserved:
            kept = side.reserve(job_id, request)
            if kept:
                self._reserved.add(on_host)
                self._refused.clear()
                return (
                    None,
                    f"{reason}; {', '.join(kept)} {'is' if len(kept) == 1 else 'are'} kept free for it",
                )
        self._refused[request] = reason
        return None, reason
