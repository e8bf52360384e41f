"""``status.json``: what a run is doing, and whether it still lives.

The file names its process unmistakably (pid, start time, boot), so that a reader can tell a run that goes on
from one that was killed, without any service. A thread renews the heartbeat; ``updated`` is the trainer's
own last word, so a run that hangs has a young ``heartbeat`` and an old ``updated``.
"""

from __future__ import annotations

import datetime
import json
import platform
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

from swift.core.files import atomic_write_json
from swift.core.logging import get_logger
from swift.core.process import ProcessIdentity

__all__ = ["Eta", "State", "StatusFile", "read_status"]

State = Literal["starting", "running", "saving", "succeeded", "failed", "stopped"]
STATUS_NAME = "status.json"
LIVING = ("starting", "running", "saving")
HEARTBEAT_SECONDS = 2.0
LOST_AFTER_SECONDS = 60.0
"""On another machine a pid says nothing: there a heartbeat older than this means lost."""

logger = get_logger(__name__)


class Eta:
    """Seconds to go, from the pace of this process's last ``window`` updates (not of the run it resumes)."""

    def __init__(self, window: int = 50) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=window)

    def update(self, step: int, total_steps: int, now: float | None = None) -> float | None:
        """Record that ``step`` is done; returns the estimate, None until two different steps were seen."""
        now = time.monotonic() if now is None else now
        if not self._marks or step > self._marks[-1][1]:
            self._marks.append((now, step))
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        if last_step == first_step:
            return None
        pace = (last_time - first_time) / (last_step - first_step)
        return max(0.0, pace * (total_steps - step))


class StatusFile:
    """Writes ``status.json`` of a run folder.

    A failed write never stops a run: it is logged once, and tried again with the next heartbeat.
    """

    def __init__(self, folder: Path, *, total_steps: int = 0) -> None:
        self.path = folder / STATUS_NAME
        self._eta = Eta()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._complained = False
        self._fields: dict[str, Any] = {
            "state": "starting",
            "host": platform.node(),
            **ProcessIdentity.of().to_dict(),
            "step": 0,
            "total_steps": total_steps,
            "progress": 0.0,
            "eta_seconds": None,
            "stage": "",
            "message": "",
            "failure": None,
        }
        self.update()

    @property
    def fields(self) -> dict[str, Any]:
        """A copy of what the file holds."""
        with self._lock:
            return dict(self._fields)

    def update(
        self,
        state: State | None = None,
        *,
        step: int | None = None,
        total_steps: int | None = None,
        eta_seconds: float | None = None,
        stage: str | None = None,
        message: str | None = None,
    ) -> None:
        """Change what is given, derive progress and (unless given) the time to go, and write the file."""
        given = {"state": state, "step": step, "total_steps": total_steps, "stage": stage, "message": message}
        with self._lock:
            self._fields |= {key: value for key, value in given.items() if value is not None}
            total = self._fields["total_steps"]
            if step is not None:
                estimate = self._eta.update(step, total)
                self._fields["eta_seconds"] = None if estimate is None else round(estimate, 1)
            if eta_seconds is not None:
                self._fields["eta_seconds"] = round(eta_seconds, 1)
            if total:
                self._fields["progress"] = min(1.0, round(self._fields["step"] / total, 6))
            self._fields["updated"] = _utc(time.time())
            self._write()

    def start_heartbeat(self, interval: float = HEARTBEAT_SECONDS) -> None:
        """Renew the heartbeat every ``interval`` seconds from a daemon thread, until ``finish``."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._beat, args=(interval,), name="heartbeat", daemon=True
            )
            self._thread.start()

    def finish(
        self,
        state: Literal["succeeded", "failed", "stopped"],
        message: str = "",
        *,
        failure: str | None = None,
    ) -> None:
        """Write the last word and end the heartbeat. ``failure``: the kind (out_of_memory, nonfinite, ...)."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock:
            self._fields["eta_seconds"] = 0.0 if state == "succeeded" else None
            self._fields["failure"] = failure
        self.update(state, stage="", message=message)

    def _beat(self, interval: float) -> None:
        while not self._stopping.wait(interval):
            with self._lock:
                self._write()

    def _write(self) -> None:
        now = time.time()
        self._fields["heartbeat"], self._fields["heartbeat_time"] = _utc(now), round(now, 3)
        try:
            atomic_write_json(self.path, self._fields, durable=False)
        except OSError as error:
            if not self._complained:
                self._complained = True
                logger.warning("cannot write %s: %s", self.path, error)


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


def read_status(folder: Path, *, now: float | None = None) -> dict[str, Any] | None:
    """The status of the run in ``folder``, or None when there is none to read.

    ``state`` is ``lost`` (and ``recorded_state`` what the file says) when the run should live but its
    process is gone; for a run of another machine, when its heartbeat is older than a minute.
    """
    try:
        status = json.loads((folder / STATUS_NAME).read_text(encoding="utf-8"))
        identity = ProcessIdentity(status["pid"], status["start_time"], status["boot_id"])
        if status["state"] not in LIVING:
            return status
        if status["host"] == platform.node():
            alive = identity.is_alive()
        else:
            alive = (time.time() if now is None else now) - status["heartbeat_time"] < LOST_AFTER_SECONDS
    except (OSError, ValueError, KeyError):
        return None
    if not alive:
        status |= {"recorded_state": status["state"], "state": "lost", "eta_seconds": None}
    return status
