"""Which process is meant (a pid alone can be reused, a pid with its start time cannot), who descends from whom, and
signals that cannot hit a stranger.

Linux gives two guarantees that supervision builds on: a *child subreaper* becomes the parent of every descendant whose
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = [
    "ProcessIdentity",
    "become_subreaper",
    "descendants",
    "die_with_parent",
    "identify",
    "kill_until_gone",
    "send_signal",
]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(int(psutil.boot_time()))


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, unmistakably: pid, start time (seconds since the epoch) and the boot it belongs to."""

    pid: int
    start_time: float
    boot_id: str

    @classmethod
    def of(cls, pid: int | None = None) -> ProcessIdentity:
        """The identity of ``pid`` (default: this process). Raises psutil.NoSuchProcess."""
        process = psutil.Process(pid)
        return cls(process.pid, process.create_time(), _boot_id())

    def is_alive(self) -> bool:
        """True while this very process runs; a zombie or a reused pid does not count."""
        if self.boot_id != _boot_id():
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.start_time) < 0.05
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
