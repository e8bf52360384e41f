"""The scheduler's decisions about jobs that are not submitted yet, for `forecast` (``swift plan FILE``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from swift.experiments.estimate import Correction, placed, queued
from swift.experiments.forecast import Choice, Decide
from swift.experiments.scheduler import Policy, decide
from swift.experiments.types import Inventory, Job, JobSpec, Placement

__all__ = ["rehearse"]


def rehearse(
    inventory: Inventory,
    correction: Correction = lambda key: (1.0, 0),
    policy: Policy | None = None,
    others: Sequence[Job] = (),
) -> Decide:
    """What `forecast` asks: the real decisions, on this inventory, as if one group were submitted now.

    Args:
        correction: `Store.correction`, where there is a store.
        others: jobs of the service that hold places; they are taken to stay.
    """
    holding = [entry for entry in map(placed, others) if entry is not None]

    def choose(
        ready: Sequence[JobSpec], running: Sequence[tuple[JobSpec, Placement]], now: float
    ) -> Sequence[Choice]:
        queue = [
            replace(queued(_job(spec, number), correction), job_id=spec.name)
            for number, spec in enumerate(ready)
        ]
        held = [placed(replace(_job(spec, 0), placement=place)) for spec, place in running]
        decisions = decide(queue, inventory, [*holding, *(entry for entry in held if entry)], now, policy)
        return [Choice(entry.job_id, entry.placement, entry.reason) for entry in decisions]

    return choose


def _job(spec: JobSpec, number: int) -> Job:
    return Job(f"j{number}", "this file", spec, "queued", priority=spec.priority)
