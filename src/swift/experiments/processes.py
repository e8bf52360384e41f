"""Processes of one job: who descends from whom, who is left over, and signals that cannot hit a stranger.

Linux gives two guarantees the rest builds on: a *child subreaper* becomes the parent of every descendant whose
own parent died (so nothing can leave the supervisor's tree by a double fork), and a *parent-death signal* ends
the child when the supervisor is killed. Elsewhere both are absent and the process group has to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from swift.core.process import ProcessIdentity

__all__ = [
    "TOKEN_VARIABLE",
    "become_subreaper",
    "descendants",
    "die_with_parent",
    "find_leftovers",
    "identify",
    "kill_until_gone",
    "send_signal",
]

TOKEN_VARIABLE = "SWIFT_ATTEMPT_TOKEN"
"""Names the attempt in the environment of everything the job starts."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def become_subreaper() -> None:
    """From now on orphaned descendants become children of this process (Linux; elsewhere nothing happens)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent``, which forked it, dies (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def identify(pid: int) -> ProcessIdentity | None:
    """The identity of ``pid``, None when it is gone."""
    try:
        return ProcessIdentity.of(pid)
    except psutil.NoSuchProcess:
        return None


def send_signal(identity: ProcessIdentity, number: int) -> bool:
    """Signal this very process; False when it no longer lives. A reused pid is never hit (on Linux)."""
    if not hasattr(os, "pidfd_open"):
        if not identity.is_alive():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(identity.pid, number)
        return True
    try:
        descriptor = os.pidfd_open(identity.pid)
    except OSError:
        return False
    try:
        # The descriptor pins the process: whoever is alive now is the one that gets the signal.
        if not identity.is_alive():
            return False
        signal.pidfd_send_signal(descriptor, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)


def descendants(pid: int) -> list[int]:
    """Every living process below ``pid``, parents before children; zombies may be among them."""
    found, position = _children(pid), 0
    while position < len(found):
        found += _children(found[position])
        position += 1
    return found


def _children(pid: int) -> list[int]:
    """Direct children. The kernel's own list where there is one: a scan of all processes costs 100 x more."""
    if sys.platform != "linux":
        return _scan_children(pid)
    try:
        found: list[int] = []
        for thread in Path(f"/proc/{pid}/task").iterdir():
            try:
                text = (thread / "children").read_text()
            except ProcessLookupError:
                continue  # the thread ended
            found += map(int, text.split())
        return found
    except FileNotFoundError:
        # The process or a thread of it ended just now, or a kernel without CONFIG_PROC_CHILDREN.
        return _scan_children(pid)


def _scan_children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


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


def kill_until_gone(
    find: Callable[[], Iterable[ProcessIdentity]], seconds: float = 10.0
) -> list[ProcessIdentity]:
    """SIGKILL what ``find`` returns until it returns nothing; returns those that live after ``seconds``."""
    deadline = time.monotonic() + seconds
    while remaining := [identity for identity in find() if identity.is_alive()]:
        for identity in remaining:
            send_signal(identity, signal.SIGKILL)
        if time.monotonic() > deadline:
            return remaining
        time.sleep(0.02)
    return []
