"""What is left over of one attempt at a job whose supervisor died without a last word."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil

from swift.core.process import ProcessIdentity, descendants, identify

__all__ = ["TOKEN_VARIABLE", "find_leftovers"]

TOKEN_VARIABLE = "SWIFT_ATTEMPT_TOKEN"
"""Names the attempt in the environment of everything the job starts."""


def find_leftovers(
    supervisor: dict[str, Any], child: dict[str, Any] | None, token: str
) -> list[ProcessIdentity]:
    """What still lives of an attempt whose supervisor is dead.

    By recorded identity, by the supervisor's session, and by the attempt's token in the environment: a daemon
    that left group and session carries the token, a fork without exec stays in the session or is recorded.
    Nothing of another boot counts.
    """
    recorded = [ProcessIdentity(**entry) for entry in (child or {}).get("processes", [])]
    head = ProcessIdentity(**supervisor)
    found = {identity.pid: identity for identity in recorded if identity.is_alive()}
    now = identify(os.getpid())
    if now is None or now.boot_id != head.boot_id:
        return []
    marker = f"{TOKEN_VARIABLE}={token}".encode()
    for process in psutil.process_iter():
        if process.pid in found or process.pid in (os.getpid(), head.pid):
            continue
        if _in_session(process, head) or _has_marker(process.pid, marker):
            identity = identify(process.pid)
            if identity is not None and identity.is_alive():
                found[identity.pid] = identity
    for pid in [other for top in list(found) for other in descendants(top)]:
        identity = identify(pid)
        if identity is not None:
            found.setdefault(pid, identity)
    return list(found.values())


def _in_session(process: psutil.Process, head: ProcessIdentity) -> bool:
    """Whether ``process`` belongs to the session that the (dead) supervisor led.

    A session id cannot be given to a new process while the session has a member, so the start time only
    has to rule out a later session of the same number.
    """
    try:
        return os.getsid(process.pid) == head.pid and process.create_time() >= head.start_time - 0.05
    except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
        return False


def _has_marker(pid: int, marker: bytes) -> bool:
    try:
        return marker in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, somebody else's, or no /proc
        return False
