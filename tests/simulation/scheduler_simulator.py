"""A machine on paper: the real placement decisions, driven by a virtual clock. Nothing runs; times are assumptions.

Model of speed: a job alone on a device uses a part ``compute`` of it. Jobs beside each other run at full speed while
their parts add up to at most 1, else all of them are slowed in proportion. A job on several devices runs at the speed
of its slowest one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from swift.experiments.preemption import preempt
from swift.experiments.scheduler import Decision, Placed, Policy, QueuedJob, decide
from swift.experiments.types import Device, Inventory, Needs, Placement

GIB = 1 << 30
SAVE_SECONDS = 10.0
RESTART_SECONDS = 20.0
"""Assumptions: to save a checkpoint on being preempted, and to come back from it."""

Decide = Callable[[Sequence[QueuedJob], Inventory, Sequence[Placed], float], list[Decision]]


@dataclass(frozen=True)
class Work:
    """A job: when it comes, what it asks for, and how long it takes alone (seconds)."""

    arrival: float
    seconds: float
    gib: float
    devices: int = 1
    compute: float = 1.0
    priority: int = 0
    exclusive: bool = False
    group: str = "g"
    max_parallel: int | None = None


@dataclass
class Outcome:
    """What happened. Times in virtual seconds."""

    waits: list[float]
    makespan: float
    compute_share: float
    """Part of all devices' compute that was used until the last job ended."""
    busy_share: float
    """Part of all devices' time during which at least one job was on them."""
    heads: dict[int, float] = field(default_factory=dict)
    """Job -> time between its becoming the first that is blocked and its start."""
    preemptions: list[tuple[int, int, float]] = field(default_factory=list)
    """(who left, for whom, seconds since its last start)."""

    @property
    def mean_wait(self) -> float:
        return sum(self.waits) / len(self.waits)

    def wait_quantile(self, share: float) -> float:
        return sorted(self.waits)[min(len(self.waits) - 1, math.ceil(share * len(self.waits)) - 1)]


def machine(count: int = 8, gib: int = 80) -> Inventory:
    devices = tuple(Device("cuda", index, "A100", gib * GIB, gib * GIB) for index in range(count))
    return Inventory(devices, 8 * count, 1024 * GIB)


def ours(policy: Policy) -> Decide:
    """The scheduler of the service."""
    return lambda queue, inventory, running, now: decide(queue, inventory, running, now, policy)


def fifo_by_count(
    queue: Sequence[QueuedJob], inventory: Inventory, running: Sequence[Placed], now: float
) -> list[Decision]:
    """What a queue that only counts devices does: strictly in order, each device for one job."""
    taken = {index for placed in running for index in placed.placement.devices}
    free = [device.index for device in inventory.devices if device.index not in taken]
    decisions = []
    for job in sorted(queue, key=lambda job: job.order):
        if job.needs.devices > len(free):
            break
        mine, free = free[: job.needs.devices], free[job.needs.devices :]
        placement = Placement("cuda", tuple(mine), inventory.devices[0].memory_bytes, 1)
        decisions.append(Decision(job.job_id, placement, "next"))
    return decisions


@dataclass
class _Run:
    number: int
    placed: Placed
    left: float
    compute: float
    later: float = 0.0
    """What is left to do after a preemption."""


def simulate(
    work: Sequence[Work],
    choose: Decide,
    inventory: Inventory | None = None,
    watch: Callable[[Sequence[Placed]], None] | None = None,
    preemption: Policy | None = None,
) -> Outcome:
    """Let all jobs come, be placed by ``choose``, and end.

    Args:
        watch: called with everything that holds a place after each round of decisions.
        preemption: let jobs make room as this policy says.

    Raises RuntimeError when jobs are left that are never started.
    """
    inventory = inventory or machine()
    jobs = {f"j{number}": _queued(number, entry) for number, entry in enumerate(work)}
    coming = sorted(range(len(work)), key=lambda number: work[number].arrival)
    queue: dict[str, QueuedJob] = {}
    runs: dict[str, _Run] = {}
    waits = [0.0] * len(work)
    heads: dict[str, float] = {}
    left = {f"j{number}": entry.seconds for number, entry in enumerate(work)}
    made_room_for: dict[str, str] = {}
    preemptions: list[tuple[int, int, float]] = []
    started: set[str] = set()
    now = compute = busy = 0.0
    while coming or queue or runs:
        now_ends = _next_end(runs)
        arrival = work[coming[0]].arrival - now if coming else math.inf
        step = max(0.0, min(now_ends, arrival, _next_preemption(queue, runs, preemption, now)))
        if math.isinf(step):
            raise RuntimeError(f"never started: {sorted(queue)}")
        shares = _device_shares(runs)
        compute += step * sum(min(1.0, share) for share in shares.values())
        busy += step * len(shares)
        for run, rate in zip(runs.values(), _rates(runs), strict=True):
            run.left -= step * rate
        now += step
        for job_id in [job_id for job_id, run in runs.items() if run.left <= 1e-6]:
            run = runs.pop(job_id)
            if run.placed.leaving:
                queue[job_id], left[job_id] = replace(jobs[job_id], returned=now), run.later + RESTART_SECONDS
        while coming and work[coming[0]].arrival <= now:
            number = coming.pop(0)
            queue[f"j{number}"] = jobs[f"j{number}"]
        held = [run.placed for run in runs.values()]
        claims = set(made_room_for.values())
        waiting = [replace(job, first=job.job_id in claims) for job in queue.values()]
        decisions = choose(waiting, inventory, held, now)
        found = preempt(waiting, decisions, inventory, held, now, preemption) if preemption else None
        for victim in found.victims if found else ():
            run = runs[victim]
            preemptions.append((run.number, int(found.job_id[1:]), now - run.placed.started))
            made_room_for[victim] = found.job_id
            run.placed = replace(run.placed, leaving=found.job_id)
            run.later, run.left = run.left, SAVE_SECONDS
        for decision in decisions:
            if decision.placement is None:
                if "kept free for it" in decision.reason:
                    heads.setdefault(decision.job_id, now)
                continue
            job = queue.pop(decision.job_id)
            entry = work[job.order]
            whole = entry.exclusive or entry.devices > 1
            placed = Placed(
                job.job_id, job.group, decision.placement, whole, now, entry.priority, resumable=True
            )
            runs[job.job_id] = _Run(job.order, placed, left[job.job_id], entry.compute)
            made_room_for.pop(job.job_id, None)
            if job.job_id not in started:
                started.add(job.job_id)
                waits[job.order] = now - entry.arrival
        if watch is not None:
            watch([run.placed for run in runs.values()])
    count = len(inventory.devices)
    return Outcome(
        waits,
        now,
        compute / (now * count) if now else 0.0,
        busy / (now * count) if now else 0.0,
        {int(key[1:]): work[int(key[1:])].arrival + waits[int(key[1:])] - at for key, at in heads.items()},
        preemptions,
    )


def _next_preemption(
    queue: dict[str, QueuedJob], runs: dict[str, _Run], policy: Policy | None, now: float
) -> float:
    """Seconds until the next running job may be preempted, should anybody wait."""
    if policy is None or not queue:
        return math.inf
    moments = (run.placed.started + policy.preempt_after_seconds - now for run in runs.values())
    return min((moment for moment in moments if moment > 0), default=math.inf)


def _queued(number: int, work: Work) -> QueuedJob:
    return QueuedJob(
        job_id=f"j{number}",
        group=work.group,
        order=number,
        needs=Needs(devices=work.devices, exclusive=work.exclusive),
        memory_bytes=round(work.gib * GIB),
        priority=work.priority,
        submitted=work.arrival,
        max_parallel=work.max_parallel,
    )


def _device_shares(runs: dict[str, _Run]) -> dict[int, float]:
    shares: dict[int, float] = {}
    for run in runs.values():
        for device in run.placed.placement.devices:
            shares[device] = shares.get(device, 0.0) + run.compute
    return shares


def _rates(runs: dict[str, _Run]) -> list[float]:
    shares = _device_shares(runs)
    return [min(min(1.0, 1.0 / shares[d]) for d in run.placed.placement.devices) for run in runs.values()]


def _next_end(runs: dict[str, _Run]) -> float:
    return min(
        (run.left / rate for run, rate in zip(runs.values(), _rates(runs), strict=True)), default=math.inf
    )


def article() -> list[Work]:
    """The article's scenario: four QLoRA runs of a 7-8B model handed in together to a machine of eight devices."""
    return [Work(0.0, 2 * 3600.0, 22, compute=0.8) for _ in range(4)]


def sweep() -> list[Work]:
    """A sweep of 32 QLoRA runs: small batches that leave half of a device's compute unused."""
    return [Work(0.0, 3600.0 + 60 * number, 22, compute=0.5) for number in range(32)]


def mixed(seed: int = 0, count: int = 60) -> list[Work]:
    """A day of a team: many LoRA runs, some full fine-tunings on 2-8 devices, short evaluations in between."""
    draw = random.Random(seed)
    work, now = [], 0.0
    for _ in range(count):
        now += draw.expovariate(1 / 400)
        kind = draw.choices(("qlora", "lora", "full", "eval"), (5, 3, 2, 3))[0]
        if kind == "qlora":
            work.append(Work(now, draw.uniform(1800, 7200), draw.uniform(12, 26), 1, 0.5))
        elif kind == "lora":
            work.append(Work(now, draw.uniform(1800, 7200), draw.uniform(30, 60), 1, 0.9))
        elif kind == "full":
            work.append(
                Work(now, draw.uniform(3600, 10800), draw.uniform(40, 74), draw.choice((2, 4, 8)), 1.0)
            )
        else:
            work.append(Work(now, draw.uniform(120, 600), draw.uniform(16, 30), 1, 0.6))
    return work


def small(seed: int = 0, count: int = 120) -> list[Work]:
    """A day of LoRA experiments only: one device each, a few on two, with an evaluation after each of them."""
    draw = random.Random(seed)
    work, now = [], 0.0
    for _ in range(count // 2):
        now += draw.expovariate(1 / 400)
        devices = draw.choices((1, 2), (9, 1))[0]
        work.append(
            Work(now, draw.uniform(1800, 7200), draw.uniform(12, 60), devices, draw.uniform(0.4, 0.9))
        )
        work.append(Work(now + 1800, draw.uniform(120, 600), draw.uniform(16, 30), 1, 0.6))
    return sorted(work, key=lambda entry: entry.arrival)


SCENARIOS: dict[str, Callable[[], list[Work]]] = {
    "article: 4 QLoRA runs": article,
    "sweep: 32 QLoRA runs": sweep,
    "mixed day: 60 jobs, 1-8 devices": mixed,
}
