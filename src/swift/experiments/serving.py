"""Jobs that serve: they go on until somebody stops them, and their group does not wait for that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from swift.core.files import read_json
from swift.core.process import ProcessIdentity
from swift.experiments.home import Home
from swift.experiments.types import FINISHED, Job

__all__ = ["SERVING", "is_settled", "ready_file", "service_of", "serving_line"]

SERVING = ("deploy",)
"""Commands that are done with what their group wants of them once they answer."""
_SERVING_AT = "serving at"


def ready_file(home: Home, job: Job) -> Path:
    """Where the job says that it answers (``--ready_file``)."""
    return Path(job.spec.options.get("ready_file") or home.job_dir(job.id) / "serving.json")


def service_of(home: Home, job: Job) -> dict[str, Any] | None:
    """What a job that answers requests now says about itself (``url``, ``pid``...), else None."""
    if job.spec.command not in SERVING or job.state != "running":
        return None
    record = read_json(ready_file(home, job))
    try:
        identity = ProcessIdentity(record["pid"], record["start_time"], record["boot_id"])
    except KeyError:
        return None
    return record if identity.is_alive() else None


def serving_line(home: Home, job: Job) -> str | None:
    """The reason of a job that answers: where."""
    record = service_of(home, job)
    return None if record is None else f"{_SERVING_AT} {record['url']}; swift stop {job.id} ends it"


def is_settled(jobs: Sequence[Job]) -> bool:
    """Whether all has come to an end that does so by itself.

    A job that serves has done its part (the engine has given it its ``serving_line``), and one that only waits for a
    place beside others that serve may wait for ever.
    """
    open_ = [job for job in jobs if job.state not in FINISHED and job.state != "paused"]
    waiting = [job for job in open_ if not (job.state == "running" and job.reason.startswith(_SERVING_AT))]
    return not waiting or (len(waiting) < len(open_) and _only_places(waiting))


def _only_places(jobs: Iterable[Job]) -> bool:
    return all(job.spec.command in SERVING and job.state == "queued" for job in jobs)
