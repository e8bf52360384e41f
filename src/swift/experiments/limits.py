"""Memory limits of a job's processes, all of them together.

Two ways, in this order:

1. A control group (cgroup v2), where this process may make one below or beside its own: exact, enforced by the
   kernel, counts page cache that cannot be dropped.
2. Watching: the supervisor adds up the resident memory of the job's processes twice a second and kills the job
   when it is above the limit. A job can overshoot between two looks.

RLIMIT_AS and RLIMIT_DATA are not used: they count address space, of which torch, CUDA and thread stacks reserve
many times what they touch, and they count every process alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["ControlGroup", "resident_bytes"]

CGROUP_ROOT = Path("/sys/fs/cgroup")


def resident_bytes(pids: Sequence[int]) -> int:
    """Memory held by these processes together.

    Of several processes, pages they share count once (proportional set size); one alone is asked for its
    resident size, which is much cheaper to compute.
    """
    return sum(_resident(pid, shared=len(pids) > 1) for pid in pids)


def _resident(pid: int, shared: bool) -> int:
    if shared:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass  # gone, or no such file on this system: then shared pages count for each
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0


@dataclass(frozen=True)
class ControlGroup:
    """A cgroup of version 2 with a memory limit, made for one job."""

    path: Path

    @classmethod
    def create(cls, name: str, limit_bytes: int, root: Path = CGROUP_ROOT) -> ControlGroup | None:
        """A new group with this limit, or None where the system does not allow it.

        A group may only hand the memory controller to groups below it when it holds no process itself, so the
        parent of our own group is asked first (systemd's ``app.slice``), then our own.
        """
        own = _own_group(root)
        if own is None:
            return None
        for parent in (own.parent, own):
            try:
                if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                    continue
                path = parent / name
                path.mkdir()
            except OSError:
                continue  # not ours to write
            group = cls(path)
            try:
                (path / "memory.max").write_text(str(limit_bytes))
                with contextlib.suppress(FileNotFoundError):  # a kernel without swap accounting
                    (path / "memory.swap.max").write_text("0")
                (path / "memory.oom.group").write_text("1")
                return group
            except OSError:
                group.remove()
        return None

    def enter(self) -> None:
        """Move this process in; its later children are born inside."""
        (self.path / "cgroup.procs").write_text("0")

    def ran_out(self) -> bool:
        """Whether the kernel killed for memory in here."""
        try:
            lines = (self.path / "memory.events").read_text().splitlines()
        except OSError:
            return False
        return any(line.startswith("oom_kill ") and line != "oom_kill 0" for line in lines)

    def peak_bytes(self) -> int:
        try:
            return int((self.path / "memory.peak").read_text())
        except (OSError, ValueError):  # kernels before 5.19
            return 0

    def remove(self) -> None:
        """Delete the group, which must be empty; a group that cannot be deleted is harmless."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def _own_group(root: Path) -> Path | None:
    """The folder of our own cgroup when version 2 is mounted at ``root``."""
    if os.name != "posix" or not (root / "cgroup.controllers").is_file():
        return None
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        number, _, path = line.split(":", 2)
        if number == "0":
            return root / path.lstrip("/")
    return None
