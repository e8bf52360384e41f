"""Running experiments without a service: the engine in this very process, for as long as it lasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swift.experiments.engine import Engine
from swift.experiments.follow import follow
from swift.experiments.home import Home
from swift.experiments.service import ServiceLock
from swift.experiments.store import Store
from swift.experiments.submission import Submission
from swift.experiments.types import Job

__all__ = ["run_inline"]

Follow = Callable[[Home, Store, str, Callable[[float], None]], list[Job]]


def run_inline(
    home: Home, submission: Submission, follow_: Follow = follow, **settings: Any
) -> tuple[str, list[Job]]:
    """Submit, run to the end, return (group, jobs).

    Jobs that were queued in this home before run as well: it is the same queue. After Ctrl-C running jobs go on, and
    waiting ones stay queued for the next engine.

    Args:
        follow_: shows progress; calls its last argument to let the engine work for about so many seconds.
        settings: of the Engine.

    Raises SwiftError when a service runs the jobs of this home.
    """
    lock = ServiceLock(home)
    engine = Engine(home, Store(home.store), **settings)
    try:
        group = engine.submit(
            submission.name, submission.source, submission.specs, submission.sweep, submission.environment
        )

        def work(seconds: float) -> None:
            engine.wait(min(seconds, engine.tick()))

        engine.tick()
        return group.name, follow_(home, engine.store, group.name, work)
    finally:
        engine.close()
        lock.release()
