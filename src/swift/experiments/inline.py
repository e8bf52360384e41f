"""Running experiments without a service: the engine in this very process, for as long as it lasts."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

from swift.core.errors import Terminated, UsageError
from swift.experiments.engine import Engine
from swift.experiments.follow import follow
from swift.experiments.home import Home
from swift.experiments.service import ServiceLock
from swift.experiments.serving import SERVING
from swift.experiments.store import Store
from swift.experiments.submission import Submission
from swift.experiments.types import ACTIVE, FINISHED, Job

__all__ = ["end_left_jobs", "run_inline"]

_LEAVE_SECONDS = 15.0
"""Beyond the grace period: for the supervisors to write how the jobs ended."""
Follow = Callable[[Home, Store, str, Callable[[float], None]], list[Job]]


def run_inline(
    home: Home, submission: Submission, follow_: Follow = follow, **settings: Any
) -> tuple[str, list[Job]]:
    """Submit, run to the end, return (group, jobs).

    Jobs that were queued in this home before run as well: it is the same queue. At Ctrl-C and SIGTERM the submitted
    jobs are paused, running ones with a checkpoint: none outlives this process, and ``swift resume NAME`` goes on.

    Args:
        follow_: shows progress; calls its last argument to let the engine work for about so many seconds.
        settings: of the Engine.

    Raises SwiftError when a service runs the jobs of this home, and for jobs that would go on after the end (deploy).
    """
    serving = [spec.name for spec in submission.specs if spec.command in SERVING]
    if serving:
        raise UsageError(
            f"{serving[0]} would serve until it is stopped, and nothing outlives an inline run",
            fix="swift run without --inline",
        )
    lock = ServiceLock(home)
    engine = Engine(home, Store(home.store), **settings)
    try:
        group = engine.submit(
            submission.name, submission.source, submission.specs, submission.sweep, submission.environment
        )

        def work(seconds: float) -> None:
            engine.wait(min(seconds, engine.tick()))

        engine.tick()
        try:
            return group.name, follow_(home, engine.store, group.name, work)
        except (KeyboardInterrupt, Terminated):
            _pause(engine, group.name)
            raise
    finally:
        engine.close()
        lock.release()


def end_left_jobs(home: Home) -> int:
    """Cancel what a killed inline run has left in this home; returns how many jobs that were.

    Raises SwiftError when another engine runs the jobs of this home.
    """
    if not home.store.exists():
        return 0
    lock = ServiceLock(home)
    engine = Engine(home, Store(home.store))
    try:
        left = [job for job in engine.store.jobs() if job.state not in FINISHED]
        for job in left:
            engine.stop(job.id, "its run was killed", 0)
        _wait_for_ends(engine, None)
        return len(left)
    finally:
        engine.close()
        lock.release()


def _pause(engine: Engine, group: str) -> None:
    """Set the jobs of a group aside, and wait until those that ran have saved and ended."""
    print(f"pausing; go on later: swift resume {group}", file=sys.stderr, flush=True)
    engine.sweeps.stop(group)
    for job in engine.store.jobs(group=group):
        with contextlib.suppress(UsageError):  # it has ended, or is paused
            engine.pause(job.id)
    _wait_for_ends(engine, group)


def _wait_for_ends(engine: Engine, group: str | None) -> None:
    deadline = time.monotonic() + engine.grace_seconds + _LEAVE_SECONDS
    while time.monotonic() < deadline and any(job.state in ACTIVE for job in engine.store.jobs(group=group)):
        engine.wait(min(0.2, engine.tick()))
