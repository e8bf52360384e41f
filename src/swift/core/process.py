"""Which process is meant: a pid alone can be reused, a pid with its start time cannot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["ProcessIdentity"]


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
