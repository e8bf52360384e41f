"""Which queued trainings run together on one base model (docs/decisions/030-fused-scheduling.md).

A fused group is one process, the host, with a supervisor and a folder of its own like a job's. Every member keeps its
job, attempt, supervisor, log and run folder; the child of its supervisor is a small process that hands the run to the
host (`swift.experiments.fused_member`). So stopping, pausing, time limits and retries are those of any job.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swift.config.fusing import fusing_problem, model_options
from swift.config.schema import Resolved
from swift.core.files import atomic_write_json
from swift.experiments.demand import Correction, estimate_memory
from swift.experiments.home import Home
from swift.experiments.scheduler import QueuedJob
from swift.experiments.types import TRAINING, Inventory, Job, JobSpec, Placement

__all__ = [
    "FUSED_SOCKET",
    "GROUP_FILE",
    "WHOLE_SHARE",
    "FusedGroup",
    "Joining",
    "accounted",
    "apply_verdicts",
    "buckets",
    "form_groups",
    "fuse_fields",
    "group_room",
    "host_id",
    "joining",
    "told_verdicts",
    "write_group",
]

GROUP_FILE = "group.json"
FUSED_SOCKET = "fused.sock"
MAX_MEMBERS = 32
WHOLE_SHARE = 0.9
"""Who has so much of a device may use all of it: there is no room for anybody else."""
_SPOILT = ("crash", "out_of_memory", "lost", "stall", "launch")
"""A job that failed so is tried again alone: whatever it was, it shall not take others with it twice."""


def fuse_fields(resolved: Resolved, env: Mapping[str, str], estimate: Mapping[str, Any]) -> dict[str, Any]:
    """What a snapshot says about fusing: ``key`` (jobs with the same one can share a base), or why not."""
    if resolved.command not in TRAINING:
        return {}
    problem = fusing_problem(resolved.config)
    if problem is not None:
        return {"problem": f"{problem[0]}: {problem[1]}"}
    model = resolved.config.model.model
    parts = [str(Path(model).expanduser().absolute() if model else model), dict(env)]
    text = json.dumps([*parts, model_options(resolved.config)], sort_keys=True)
    return {
        "key": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
        "weights_bytes": estimate.get("weights_bytes"),
        "processes": resolved.config.parallel.num_processes,
    }


def _is_apart(spec: JobSpec) -> bool:
    """It asks for a place of its own, for more devices than it has processes, or waits for others."""
    return spec.needs.exclusive or spec.needs.devices > _processes(spec) or bool(spec.after)


def _processes(spec: JobSpec) -> int:
    return int(spec.fuse.get("processes") or 1)


def buckets(specs: Iterable[JobSpec]) -> dict[str, list[JobSpec]]:
    """Key -> the trainings of a submission that could run fused, where there are two at least."""
    found: dict[str, list[JobSpec]] = {}
    for spec in specs:
        if "key" in spec.fuse and not _is_apart(spec):
            found.setdefault(spec.fuse["key"], []).append(spec)
    return {key: members for key, members in found.items() if len(members) > 1}


Judge = Callable[[Sequence[JobSpec]], tuple[str, str]]
"""Trainings that could share a base -> (``fused``, ``separate`` or ``sequence``, why)."""


def apply_verdicts(specs: Sequence[JobSpec], mode: str, judge: Judge) -> list[JobSpec]:
    """The snapshots with what is to become of them: ``--fuse auto`` asks ``judge``, others have decided.

    One that has nobody beside it is left open by ``auto``: it may join a group that runs (`joining`).
    """
    words = {"always": ("fused", "--fuse always"), "never": ("separate", "--fuse never")}
    verdicts = {
        key: words[mode] if mode in words else judge(members) for key, members in buckets(specs).items()
    }
    done = []
    for spec in specs:
        found = verdicts.get(spec.fuse.get("key", "")) or words.get(mode)
        if found is not None and "key" in spec.fuse and not spec.after:
            spec = replace(spec, fuse={**spec.fuse, "plan": found[0], "why": found[1]})
        done.append(spec)
    return done


def told_verdicts(specs: Sequence[JobSpec]) -> list[str]:
    """What became of trainings that could share a base, a line for each verdict."""
    keys = buckets(specs)
    told = [one.fuse for one in specs if "plan" in one.fuse and one.fuse["key"] in keys]
    verdicts = Counter((fuse["plan"], fuse["why"]) for fuse in told)
    return [f"{count} trainings on one base model: {plan} ({why})" for (plan, why), count in verdicts.items()]


@dataclass(frozen=True)
class FusedGroup:
    """Queued jobs that start together; ``queued`` is what the scheduler places in their stead."""

    members: tuple[Job, ...]
    queued: QueuedJob
    reason: str


def form_groups(
    jobs: Mapping[str, Job],
    waiting: Sequence[QueuedJob],
    correction: Correction,
    inventory: Inventory,
    running_in: Mapping[str, int],
    usable: float,
) -> tuple[list[QueuedJob], dict[str, FusedGroup]]:
    """The queue with groups in place of their members, and group by the id of its first member.

    Args:
        running_in: submission -> its running jobs, for ``max_parallel``.
        usable: share of a device's memory that is given away.
    """
    by_id = {entry.job_id: entry for entry in waiting}
    found: dict[tuple[Any, ...], list[Job]] = {}
    for job in sorted(jobs.values(), key=lambda one: by_id[one.id].order):
        if _may_fuse(job, by_id[job.id]):
            found.setdefault((job.group, job.spec.fuse["key"], job.priority), []).append(job)
    room = max((device.memory_bytes for device in inventory.devices), default=0) * usable
    groups: dict[str, FusedGroup] = {}
    for members in found.values():
        while len(members) > 1:
            taken = _fitting(members, by_id, correction, room, running_in)
            if len(taken) < 2:
                break
            members = members[len(taken) :]
            group = _group(taken, by_id, correction, inventory)
            groups[taken[0].id] = group
    gone = {job.id for group in groups.values() for job in group.members}
    queue = [
        _in_sequence(entry, jobs[entry.job_id], inventory) for entry in waiting if entry.job_id not in gone
    ]
    return [*queue, *(group.queued for group in groups.values())], groups


@dataclass(frozen=True)
class Joining:
    """A queued job that a running group takes in, in the place of the group."""

    job: Job
    placement: Placement
    reason: str


def joining(
    jobs: Mapping[str, Job],
    waiting: Sequence[QueuedJob],
    active: Iterable[Job],
    correction: Correction,
    inventory: Inventory,
    running_in: Mapping[str, int],
    judge: Judge,
    environment: Callable[[str], Any],
) -> list[Joining]:
    """Queued jobs that take part in a group that runs already, from its next step on.

    They are of its base and priority, come from the same environment, and are to run fused: by their own verdict, or
    where they have none by ``judge`` for the group with them. The group needs room for their own parts in the memory
    that its process may use.

    Args:
        environment: of a submission.
    """
    by_id = {entry.job_id: entry for entry in waiting}
    groups: dict[str, list[Job]] = {}
    for job in active:
        if job.placement is not None and job.placement.fused:
            groups.setdefault(job.placement.fused, []).append(job)
    counts, found = Counter(running_in), list[Joining]()
    for job in sorted(jobs.values(), key=lambda one: by_id[one.id].order):
        most = by_id[job.id].max_parallel
        if not _may_fuse(job, by_id[job.id], judge) or (most is not None and counts[job.group] >= most):
            continue
        for members in groups.values():
            why = _taken_in(job, members, correction, inventory, judge, environment)
            if why is not None:
                place = members[0].placement
                assert place is not None
                members.append(job)
                counts[job.group] += 1
                others = len(members) - 1
                found.append(
                    Joining(job, place, f"joins {others} more on one base, which run already: {why}")
                )
                break
    return found


def _taken_in(
    job: Job,
    members: Sequence[Job],
    correction: Correction,
    inventory: Inventory,
    judge: Judge,
    environment: Callable[[str], Any],
) -> str | None:
    """Why a job takes part in a group; None when it does not."""
    first = members[0]
    fits = first.spec.fuse.get("key") == job.spec.fuse["key"] and first.priority == job.priority
    if not fits or len(members) >= MAX_MEMBERS or all(one.state != "running" for one in members):
        return None
    memory, place = group_memory([*members, job], correction), first.placement
    assert place is not None
    if memory is None or memory * (_processes(job.spec) if place.kind == "cpu" else 1) > group_room(
        place, inventory
    ):
        return None
    if job.group != first.group and environment(job.group) != environment(first.group):
        return None
    if "plan" in job.spec.fuse:
        return str(job.spec.fuse["why"])
    plan, why = judge([*(one.spec for one in members), job.spec])
    return why if plan == "fused" else None


def group_room(place: Placement, inventory: Inventory) -> int:
    """Bytes that a group may use, on each device: its place; what nobody else can have comes on top."""
    slots = max(1, len(place.devices))
    if place.kind == "cpu":
        count = sum(device.kind == "cpu" for device in inventory.devices) or inventory.cores
        return max(place.memory_bytes * slots, inventory.host_memory_bytes * slots // max(1, count))
    sizes = {device.index: device.memory_bytes for device in inventory.devices if device.kind == place.kind}
    size = min((sizes.get(index, 0) for index in place.devices), default=0)
    return size if place.memory_bytes >= WHOLE_SHARE * size else place.memory_bytes


def _may_fuse(job: Job, entry: QueuedJob, judge: Judge | None = None) -> bool:
    """Whether it is to run fused; with a ``judge`` also where that is open."""
    fuse = job.spec.fuse
    spoilt = any(retry.get("kind") in _SPOILT for retry in job.retries)
    is_open = judge is not None and "key" in fuse and "plan" not in fuse and not _is_apart(job.spec)
    return (fuse.get("plan") == "fused" or is_open) and not spoilt and not entry.first


def _in_sequence(entry: QueuedJob, job: Job, inventory: Inventory) -> QueuedJob:
    """One after another is fastest: such a job takes all cores, or its device, so there is no room for a second."""
    if job.spec.fuse.get("plan") != "sequence" or entry.needs.threads is not None:
        return entry
    if any(device.kind != "cpu" for device in inventory.devices):
        return replace(entry, needs=replace(entry.needs, exclusive=True))
    return replace(entry, needs=replace(entry.needs, threads=inventory.cores))


def _fitting(
    members: list[Job],
    by_id: Mapping[str, QueuedJob],
    correction: Correction,
    room: float,
    running_in: Mapping[str, int],
) -> list[Job]:
    """As many of the first jobs as fit beside each other on one base."""
    first = by_id[members[0].id]
    most = MAX_MEMBERS
    if first.max_parallel is not None:
        most = min(most, first.max_parallel - running_in.get(first.group, 0))
    taken: list[Job] = []
    for job in members[: max(0, most)]:
        memory = group_memory([*taken, job], correction)
        if memory is not None and room and memory > room:
            break
        taken.append(job)
    return taken


def group_memory(members: Sequence[Job], correction: Correction) -> int | None:
    """Bytes of the base once and of everybody's own parts; None when one of them is not known."""
    total = 0
    for number, job in enumerate(members):
        memory = estimate_memory(job, correction).memory_bytes
        if memory is None:
            return None
        total += memory - (int(job.spec.fuse.get("weights_bytes") or 0) if number else 0)
    return total


def _group(
    members: list[Job], by_id: Mapping[str, QueuedJob], correction: Correction, inventory: Inventory
) -> FusedGroup:
    first = by_id[members[0].id]
    on_host = all(device.kind == "cpu" for device in inventory.devices)
    threads = first.needs.threads or (inventory.cores if on_host else None)
    queued = replace(
        first,
        memory_bytes=group_memory(members, correction),
        needs=replace(first.needs, threads=threads, memory_bytes=None),
    )
    return FusedGroup(
        tuple(members),
        queued,
        f"fused with {len(members) - 1} more on one base: {members[0].spec.fuse['why']}",
    )


def host_id(first: Job) -> str:
    """Name of the folder of a group's process, beside those of jobs; of the attempt that ``first`` is about to make."""
    return f"fused-{first.id}-{first.attempt + 1}"


def write_group(home: Home, name: str, members: Sequence[Job]) -> Path:
    """``group.json``: whom the host has to wait for, and how many processes it is. Returns its folder."""
    folder = home.job_dir(name)
    folder.mkdir(parents=True, exist_ok=True)
    told = {"members": [job.id for job in members], "processes": _processes(members[0].spec)}
    atomic_write_json(folder / GROUP_FILE, told)
    return folder


def accounted(active: Iterable[Job]) -> list[Job]:
    """The active jobs with what each of them takes: the first of a fused group has its one place."""
    found, seen = [], set()
    for job in active:
        place = job.placement
        if place is not None and place.fused and place.fused in seen:
            job = replace(job, placement=replace(place, devices=(), memory_bytes=0, threads=0))
        elif place is not None:
            seen.add(place.fused)
        found.append(job)
    return found
