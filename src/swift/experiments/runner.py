"""What the engine needs of the supervisors; tests put a fake in its place."""

from __future__ import annotations

import os
from typing import Protocol

from swift.core.process import ProcessIdentity
from swift.experiments.home import Home
from swift.experiments.launch import Observation, kill, launch, observe, stop
from swift.experiments.supervisor import read_json
from swift.experiments.types import Launch

__all__ = ["Runner", "Supervisors"]


class Runner(Protocol):
    """Starts, watches and stops attempts."""

    def launch(self, job_id: str, attempt: int, launch: Launch, warm: bool) -> None:
        """Begin an attempt; returns when somebody is responsible for it. Raises SwiftError."""

    def observe(self, job_id: str, attempt: int) -> Observation:
        """How the attempt goes."""

    def stop(self, job_id: str, attempt: int, grace_seconds: float) -> None:
        """Ask it to end; returns at once. Zero seconds: kill it."""

    def watch(self, job_id: str, attempt: int) -> int | None:
        """A descriptor that becomes readable when the attempt has ended; None where there is no such thing."""


class Supervisors:
    """The real one: a supervisor process for each attempt."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def launch(self, job_id: str, attempt: int, launch_: Launch, warm: bool) -> None:
        launch(self.home, job_id, attempt, launch_, warm)

    def observe(self, job_id: str, attempt: int) -> Observation:
        return observe(self.home.job_dir(job_id), attempt)

    def stop(self, job_id: str, attempt: int, grace_seconds: float) -> None:
        if grace_seconds > 0:
            stop(self.home.job_dir(job_id), attempt, grace_seconds)
        else:
            kill(self.home.job_dir(job_id), attempt)

    def watch(self, job_id: str, attempt: int) -> int | None:
        record = read_json(self.home.attempt_dir(job_id, attempt) / "supervisor.json")
        if record is None or not hasattr(os, "pidfd_open"):
            return None
        identity = ProcessIdentity(**record["identity"])
        try:
            descriptor = os.pidfd_open(identity.pid)
        except OSError:
            return None
        if identity.is_alive():  # asked after opening: the descriptor pins the process
            return descriptor
        os.close(descriptor)
        return None
