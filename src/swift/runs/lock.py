"""One writer for one folder."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from pathlib import Path

from swift.core.errors import SwiftError
from swift.core.process import ProcessIdentity

__all__ = ["FolderLock"]

LOCK_NAME = ".lock"
_held: set[int] = set()


def _forget_in_child() -> None:
    # A forked child (a data loader's worker) shares the parent's lock and would keep it after the parent's
    # death.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class FolderLock:
    """The write lock of ``folder``, held until ``release`` or the end of the process, however it ends.

    Raises SwiftError naming the holder when another process (or another object of this one) has it, and
    OSError when the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise self._refusal(folder) from None
        _held.add(self._descriptor)
        holder = {"host": platform.node(), **ProcessIdentity.of().to_dict()}
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, json.dumps(holder).encode())

    def release(self) -> None:
        """Let others in. A second call does nothing."""
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)

    def _refusal(self, folder: Path) -> SwiftError:
        try:
            holder = json.loads(self.path.read_text())
            who, stop = f"process {holder['pid']} on {holder['host']}", f" or stop it: kill {holder['pid']}"
        except (OSError, ValueError, KeyError):  # the holder is between taking the lock and writing its name
            who, stop = "another process", ""
        return SwiftError(
            f"this run is being written by {who}", where=str(folder), fix=f"wait until it ends{stop}"
        )
