"""Jobs that wait for other jobs: which may go on, and which never will."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from swift.experiments.store import StateConflict, Store
from swift.experiments.types import FINISHED, Dependency, Job, State, state_words

__all__ = ["dependents", "settle_waiting", "verdict"]


def verdict(after: Iterable[Dependency], states: Mapping[str, State]) -> tuple[State, str]:
    """What a waiting job becomes, and why: ``queued``, ``cancelled`` or still ``waiting``.

    Args:
        states: of the jobs of its group, by name.
    """
    open_: list[str] = []
    for need in after:
        state = states.get(need.job)
        if state is None:
            return "cancelled", f"not run: {need.job} is not there"
        if state not in FINISHED:
            open_.append(f"{need.job} ({state})")
        elif need.condition == "success" and state != "succeeded":
            return "cancelled", f"not run: {need.job} {state_words(state)}"
        elif need.condition == "failure" and state != "failed":
            return "cancelled", f"not run: it follows a failure, and {need.job} {state_words(state)}"
    if open_:
        return "waiting", f"waits for {', '.join(open_)}"
    return "queued", "what it waited for has ended"


def settle_waiting(store: Store) -> None:
    """Move every waiting job on whose dependencies are settled; repeated until nothing changes."""
    waiting = store.jobs(states=["waiting"])
    while waiting:
        changes: list[tuple[str, State, str]] = []
        reasons: dict[str, str] = {}
        for group in dict.fromkeys(job.group for job in waiting):
            states = {job.spec.name: job.state for job in store.jobs(group=group)}
            for job in waiting:
                if job.group == group:
                    to, reason = verdict(job.spec.after, states)
                    if to == "waiting":
                        reasons[job.id] = reason
                        continue
                    changes.append((job.id, to, reason))
                    states[job.spec.name] = to
        store.explain(reasons)
        if not changes:
            return
        with store.batch():
            for job_id, to, reason in changes:
                with contextlib.suppress(StateConflict):  # somebody stopped it just now
                    store.transition(job_id, "waiting", to, reason)
        waiting = store.jobs(states=["waiting"])


def dependents(job: Job, group: Iterable[Job]) -> list[Job]:
    """Jobs of the group that wait for ``job``, directly or through others, nearest first."""
    jobs = list(group)
    found: dict[str, Job] = {}
    names = [job.spec.name]
    while names:
        name = names.pop(0)
        for other in jobs:
            if other.id not in found and any(need.job == name for need in other.spec.after):
                found[other.id] = other
                names.append(other.spec.name)
    return list(found.values())
