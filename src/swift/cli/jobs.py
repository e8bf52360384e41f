"""``swift stop``, ``pause`` and ``retry``: name jobs, ask the service, say what became of them."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from swift.cli.arguments import ArgumentParser

__all__ = ["control", "has_job", "pause", "report", "retry", "stop"]


def control(action: str, description: str, argv: list[str], *, grace: bool = True) -> int:
    """Run one control command. Exit 0, or 1 when some of several jobs refused."""
    parser = ArgumentParser(prog=f"swift {action}", description=description)
    parser.add_argument("jobs", nargs="+", metavar="ID|NAME", help="jobs, or a group's name for all its jobs")
    if grace:
        parser.add_argument(
            "--grace", type=float, metavar="SECONDS", help="time to save a checkpoint; 0: kill"
        )
    options = parser.parse(argv)
    from swift.experiments.client import Client
    from swift.experiments.home import Home
    from swift.experiments.lookup import find_jobs

    home = Home.find()
    find_jobs(home, options.jobs)
    fields = {"grace_seconds": options.grace} if grace else {}
    return report(Client(home).control(action, options.jobs, **fields))


stop = partial(
    control, "stop", "Cancel jobs. A running one saves a checkpoint first; swift retry goes on from it."
)
pause = partial(control, "pause", "Save a checkpoint, free the devices and wait for swift resume.")
retry = partial(
    control, "retry", "Queue failed or cancelled jobs again, from their last checkpoint.", grace=False
)


def report(answer: dict[str, Any]) -> int:
    """Print what was done, and to stderr what was refused."""
    for job in answer["jobs"]:
        print(f"{job['id']}  {job['name']}: {job['state']} ({job['reason']})")
    for entry in answer.get("refused", []):
        print(f"{entry['message']}", file=sys.stderr)
    return 1 if not answer["jobs"] else 0


def has_job(word: str) -> bool:
    """Whether the store knows a job or group of this name."""
    from swift.core.errors import UsageError
    from swift.experiments.home import Home
    from swift.experiments.lookup import find_jobs

    try:
        return bool(find_jobs(Home.find(), [word]))
    except UsageError:
        return False
