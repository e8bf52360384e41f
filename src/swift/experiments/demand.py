"""How much memory a job will need: its plan's figure, corrected by what jobs like it really took, and a margin."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swift.core.files import read_json
from swift.core.format import format_bytes
from swift.experiments.scheduler import Placed, QueuedJob, is_whole
from swift.experiments.types import TRAINING, Job, JobSpec

__all__ = ["Estimate", "device_peak", "estimate_memory", "memory_key", "placed", "queued"]

Correction = Callable[[str], tuple[float, int]]
"""`Store.correction`: key -> (median of actual / estimate, number of observations)."""

_LOWEST_RATIO = 0.5
"""Never plan with less than half of what the plan says: a job may simply not have met its longest batch yet."""
_MARGINS = ((5, 0.05), (1, 0.10), (0, 0.15))
"""(observations at least, margin): the more jobs like it have been seen, the closer the fit."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device; None when nothing is known about the job. ``reason``: where the number comes from."""

    memory_bytes: int | None
    reason: str


def memory_key(job: Job) -> str | None:
    """Jobs with the same key are alike enough to learn from each other; None: nothing is known about this one.

    Model (shape and precision), command and tuner, as the snapshot's estimate has them; checkpointing, which changes
    what the plan gets wrong; and the kind of device, for allocators differ.
    """
    key = job.spec.estimate.get("memory_key")
    if not key:
        return None
    options = {**job.spec.options, **job.overrides}
    checkpointing = options.get("gradient_checkpointing")
    word = {None: "auto", True: "checkpointing", False: "plain"}.get(checkpointing, str(checkpointing))
    return f"{key}/{word}/{job.spec.estimate.get('device') or 'any'}"


def estimate_memory(job: Job, correction: Correction) -> Estimate:
    """What the job will need on each device.

    What the user asked for counts as it is. Retries may ask for more: the largest ``memory_bytes`` in
    ``job.retries`` is a lower bound of both.
    """
    least = max((int(retry.get("memory_bytes") or 0) for retry in job.retries), default=0)
    asked = job.spec.needs.memory_bytes
    if asked is not None:
        return _at_least(Estimate(asked, "as asked for"), least)
    planned = job.spec.estimate.get("memory_bytes")
    if not planned:
        return _at_least(Estimate(None, "not known: the plan has no figure for this job"), least)
    key = memory_key(job)
    ratio, observations = correction(key) if key is not None else (1.0, 0)
    factor = _cautious(ratio, observations)
    margin = next(share for number, share in _MARGINS if observations >= number)
    needed = math.ceil(planned * factor * (1 + margin))
    learned = f" x {factor:.2f} learned from {observations} like it" if observations else ""
    reason = f"plan {format_bytes(planned)}{learned} + {margin:.0%} margin"
    return _at_least(Estimate(needed, reason), least)


def _cautious(ratio: float, observations: int) -> float:
    """More is believed at once, less only gradually: after n observations n / (n + 2) of the way."""
    if ratio >= 1:
        return ratio
    return max(_LOWEST_RATIO, 1 + (ratio - 1) * observations / (observations + 2))


def _at_least(estimate: Estimate, least: int) -> Estimate:
    if least > (estimate.memory_bytes or 0):
        return Estimate(least, f"raised to {format_bytes(least)} after it ran out of memory")
    return estimate


def queued(job: Job, correction: Correction) -> QueuedJob:
    """The job as the scheduler sees it while it waits."""
    return QueuedJob(
        job_id=job.id,
        group=job.group,
        order=int(job.id.removeprefix("j")),
        needs=job.spec.needs,
        memory_bytes=estimate_memory(job, correction).memory_bytes,
        priority=job.priority,
        submitted=job.submitted,
        returned=job.preempted["at"] if job.preempted else None,
        max_parallel=job.spec.max_parallel,
    )


def placed(job: Job) -> Placed | None:
    """The job as the scheduler sees it while it holds a place; None when it holds none."""
    if job.placement is None:
        return None
    # Without a figure it was given whole devices. The snapshot and the retries tell, as when it was placed.
    known = job.spec.needs.memory_bytes or job.spec.estimate.get("memory_bytes")
    known = known or any(retry.get("memory_bytes") for retry in job.retries)
    whole = is_whole(job.spec.needs, 1 if known else None)
    leaving = str((job.preempted or {}).get("by", "")) if job.state == "pausing" else None
    # A member of a fused group that leaves gives nothing back: the base and the device stay with the others.
    leaves_room = job.spec.needs.preemption and not job.placement.fused
    resumable = job.state == "running" and leaves_room and can_resume(job.spec)
    return Placed(
        job.id, job.group, job.placement, whole, job.started or 0.0, job.priority, resumable, leaving
    )


def can_resume(spec: JobSpec) -> bool:
    """Whether a stopped attempt goes on where it was: trainings, unless their checkpoints hold the model only."""
    return spec.command in TRAINING and spec.run_dir is not None and not spec.options.get("save_only_model")


def device_peak(job: Job) -> int | None:
    """Peak device memory of a finished training, from its summary."""
    peak = read_json(Path(job.spec.run_dir or "") / "summary.json").get("peak_memory_gib")
    return round(peak * 2**30) if peak else None
