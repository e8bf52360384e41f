"""Which running jobs make room for a more urgent one. A pure function, like the scheduler's decisions.

Only a higher explicit priority preempts; age never does. The jobs that leave save a checkpoint and go back to the
queue. What keeps this calm: a job is left alone for ``preempt_after_seconds`` after each start, a device from which
somebody is leaving is left alone, whoever room is made for is placed before everybody else, and a preempted job's age
counts from its return, so that it does not come back ahead of the one it made room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from swift.experiments.scheduler import Decision, Placed, Policy, QueuedJob, decide, is_whole
from swift.experiments.types import Inventory

__all__ = ["Preemption", "preempt"]

_CONSIDERED = 8
"""Different requests looked at in one round, at most."""


@dataclass(frozen=True)
class Preemption:
    """``victims`` leave so that ``job_id`` fits."""

    job_id: str
    victims: tuple[str, ...]
    reason: str


def preempt(
    queue: Sequence[QueuedJob],
    decisions: Iterable[Decision],
    inventory: Inventory,
    running: Sequence[Placed],
    now: float,
    policy: Policy,
) -> Preemption | None:
    """The most urgent blocked job that fits when jobs of lower priority leave, and which; None: nobody has to.

    As few leave as possible; of sets of equal size the one of the lowest priorities, then the one that ran shortest.
    Every candidate is tried with the scheduler itself, behind jobs for which room is being made already.

    Args:
        decisions: of this round, about ``queue``; what they placed holds its place.
        running: what held a place before them.
    """
    if not policy.preemption or not any(placed.resumable for placed in running):
        return None
    by_id = {job.job_id: job for job in queue}
    staying, leaving = _settle(by_id, decisions, running, now)
    busy = {place for placed in leaving for place in _places(placed)}
    claimed = {placed.leaving for placed in leaving}
    blocked = [by_id[entry.job_id] for entry in decisions if entry.blocked]
    claimants = [job for job in blocked if job.first]
    alike: dict[object, QueuedJob] = {}
    for job in sorted(blocked, key=lambda job: (-job.priority, job.order)):
        if job.needs.preemption and job.job_id not in claimed:
            alike.setdefault((job.needs, job.memory_bytes, job.priority), job)
    for job in list(alike.values())[:_CONSIDERED]:
        candidates = [
            placed
            for placed in staying
            if placed.resumable
            and placed.priority < job.priority
            and now - placed.started >= policy.preempt_after_seconds
            and busy.isdisjoint(_places(placed))
        ]
        if not candidates:
            continue
        before = [other for other in claimants if other.job_id != job.job_id]

        def fits(victims: Sequence[Placed], job: QueuedJob = job, before: list[QueuedJob] = before) -> bool:
            rest = [placed for placed in staying if placed not in victims]
            found = decide([*before, replace(job, first=True)], inventory, rest, now, policy)
            return any(entry.job_id == job.job_id and entry.placement for entry in found)

        # When it fits once those who are leaving have left, it only has to wait for them.
        victims = None if fits(()) else _fewest(candidates, fits, now)
        if victims:
            return Preemption(job.job_id, tuple(victim.job_id for victim in victims), _reason(job, victims))
    return None


def _settle(
    queue: dict[str, QueuedJob], decisions: Iterable[Decision], running: Sequence[Placed], now: float
) -> tuple[list[Placed], list[Placed]]:
    """(what will hold its place, what is about to give it up)."""
    started = [
        Placed(job.job_id, job.group, entry.placement, is_whole(job.needs, job.memory_bytes), now)
        for entry in decisions
        if entry.placement is not None
        for job in [queue[entry.job_id]]
    ]
    staying = [placed for placed in running if placed.leaving is None]
    return [*staying, *started], [placed for placed in running if placed.leaving is not None]


def _fewest(
    candidates: Sequence[Placed], fits: Callable[[Sequence[Placed]], bool], now: float
) -> list[Placed] | None:
    """The fewest that must leave, among all of them and among those on each single device."""
    places = sorted({place for placed in candidates for place in _places(placed)})
    crowd = {place: sum(place in _places(placed) for placed in candidates) for place in places}
    best: list[Placed] | None = None
    for start in (candidates, *([c for c in candidates if place in _places(c)] for place in places)):
        if not fits(start):
            continue
        victims = list(start)
        for spared in sorted(
            start,
            key=lambda placed: (
                -max((crowd[place] for place in _places(placed)), default=0),
                placed.placement.memory_bytes,
                -placed.priority,
                placed.started,
            ),
        ):
            rest = [placed for placed in victims if placed is not spared]
            if fits(rest):
                victims = rest
        if best is None or _cost(victims, now) < _cost(best, now):
            best = victims
    return best


def _cost(victims: Sequence[Placed], now: float) -> tuple[int, int, float]:
    return (
        len(victims),
        max(placed.priority for placed in victims),
        sum(now - placed.started for placed in victims),
    )


def _places(placed: Placed) -> set[tuple[str, int]]:
    return {(placed.placement.kind, index) for index in placed.placement.devices}


def _reason(job: QueuedJob, victims: Sequence[Placed]) -> str:
    named = ", ".join(f"{victim.job_id} (priority {victim.priority})" for victim in victims)
    return f"{job.job_id} has priority {job.priority} and finds no room beside {named}"
