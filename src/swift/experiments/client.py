"""Talking to the experiment service, which is started when it is not there. Standard library only, to be quick."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from swift.core.errors import SwiftError, UsageError
from swift.core.process import ProcessIdentity, send_signal
from swift.experiments.home import Home
from swift.experiments.processes import TOKEN_VARIABLE
from swift.experiments.runner import log_tail
from swift.experiments.submission import Submission
from swift.experiments.supervisor import EXIT_LOCKED

__all__ = ["Client", "find_service", "stop_service"]

START_SECONDS = 30.0
ANSWER_SECONDS = 60.0


def find_service(home: Home) -> dict[str, Any] | None:
    """``service.json`` of the service that runs for this home; None when none does."""
    try:
        record = json.loads(home.service_file.read_text(encoding="utf-8"))
        return record if _identity(record).is_alive() else None
    except (OSError, ValueError, KeyError):
        return None


def _identity(record: dict[str, Any]) -> ProcessIdentity:
    return ProcessIdentity(record["pid"], record["start_time"], record["boot_id"])


def stop_service(home: Home, deadline_seconds: float = 30.0) -> bool:
    """End the service; jobs go on. False when none runs. Raises SwiftError when it does not end in time."""
    record = find_service(home)
    if record is None:
        return False
    identity = _identity(record)
    send_signal(identity, signal.SIGTERM)
    deadline = time.monotonic() + deadline_seconds
    while identity.is_alive():
        if time.monotonic() > deadline:
            raise SwiftError(
                f"the service (pid {identity.pid}) did not end within {deadline_seconds:.0f} s",
                fix=f"kill -9 {identity.pid}: jobs go on, and the next service adopts them",
            )
        time.sleep(0.05)
    return True


class Client:
    """Sends requests to the service of ``home``.

    Args:
        start: start the service when none runs.

    Raises SwiftError when it cannot be started (with the end of its log) or does not answer in time.
    """

    def __init__(self, home: Home, *, start: bool = True) -> None:
        self.home = home
        record = find_service(home)
        if record is None:
            if not start:
                raise SwiftError("no service runs", where=str(home.root), fix="swift service start")
            record = _start(home)
        self.record = record
        self._token = home.token_file.read_text(encoding="utf-8").strip()

    def request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON answer. An error of the service becomes the SwiftError it was there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.record["port"], timeout=ANSWER_SECONDS)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            with contextlib.closing(connection):
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise SwiftError(
                "the service does not answer",
                where=self.record["url"],
                why=str(error) or type(error).__name__,
                fix="swift service status; its log is " + str(self.home.service_log),
            ) from error
        if answer.status >= 400:
            raise _error(answer.status, text)
        answer_fields: dict[str, Any] = json.loads(text)
        return answer_fields

    def submit(self, submission: Submission) -> dict[str, Any]:
        """Queue jobs; returns ``{"group", "jobs"}`` once they are recorded."""
        return self.request("POST", "/submit", submission.to_dict())

    def control(self, action: str, words: Sequence[str], **fields: Any) -> dict[str, Any]:
        """stop, pause, resume, retry: ``{"jobs", "refused"}``."""
        return self.request("POST", f"/{action}", {"jobs": list(words), **fields})

    def clone(self, word: str, name: str | None = None) -> dict[str, Any]:
        """The same job once more: ``{"group", "jobs"}``."""
        return self.request("POST", "/clone", {"job": word, "name": name})

    def job(self, word: str) -> dict[str, Any]:
        """One job with its snapshot."""
        return self.request("GET", f"/jobs/{quote(word, safe='')}")


def _error(status: int, text: str) -> SwiftError:
    try:
        fields = json.loads(text)
        kind = UsageError if fields["exit_code"] == 2 else SwiftError
        return kind(fields["message"], where=fields["where"], why=fields["why"], fix=fields["fix"])
    except (ValueError, KeyError, TypeError):
        return SwiftError(f"the service answered with HTTP {status}", why=text.strip()[:500] or None)


def _start(home: Home) -> dict[str, Any]:
    """Start the service apart from this process and wait until it can be reached."""
    try:
        log = home.service_log.open("ab")
    except OSError as error:
        raise home.unusable("the service cannot be started: its home cannot be written", error) from error
    with log:
        before = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "swift.experiments.service", "--home", str(home.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=home.root,
            env={name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE},
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while (record := find_service(home)) is None:
        code = process.poll()
        # Another client may have started one at the same moment: then ours gives up and theirs will do.
        if code is not None and code != EXIT_LOCKED:
            raise _not_started(home.service_log, log_tail(home.service_log, 8, before) or "")
        if time.monotonic() > deadline:
            raise SwiftError(
                f"the service could not be reached within {START_SECONDS:.0f} s",
                where=str(home.service_log),
                why=log_tail(home.service_log, 5, before),
                fix="the machine may be overloaded: swift service status, then try again",
            )
        time.sleep(0.02)
    return record


def _not_started(log: Path, said: str) -> SwiftError:
    """The service's own error, as far as it came to say one."""
    why, _, fix = said.rpartition("error: ")[2].partition("\n  fix: ")
    return SwiftError(
        "the service could not be started",
        where=str(log),
        why=" ".join(why.replace("\n  cause: ", "; ").split()) or None,
        fix=" ".join(fix.split()) or "swift service start, once that is mended",
    )
