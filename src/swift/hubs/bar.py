"""Progress in bytes: a bar on a terminal, a line at each tenth of something large elsewhere."""

from __future__ import annotations

import sys
import threading

from swift.core.format import format_bytes

__all__ = ["Bar"]

_LARGE = 256 << 20


class Bar:
    """Counts bytes from several threads.

    Attributes:
        received: bytes added, those thrown away taken off.
    """

    def __init__(self, name: str, total: int, held: int = 0) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        self._live = console.is_terminal
        self._progress = Progress(
            *columns,
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._progress.add_task(name, total=total, completed=held)
        self._name, self._total, self._held = name, total, held
        self._lock = threading.Lock()
        self._tenth = 10 * held // total if total else 10
        self.received = 0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def add(self, num_bytes: int) -> None:
        """``num_bytes`` more."""
        self._progress.update(self._task, advance=num_bytes)
        with self._lock:
            self.received += num_bytes
            done = self._held + self.received
            tenth = 10 * done // self._total if self._total else 10
            tell = not self._live and self._total >= _LARGE and tenth > self._tenth
            self._tenth = max(self._tenth, tenth)
        if tell:
            text = f"{self._name}: {format_bytes(done)} of {format_bytes(self._total)}"
            print(text, file=sys.stderr, flush=True)
