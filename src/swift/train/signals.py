"""Ctrl-C and SIGTERM end a run at the next step boundary, with a checkpoint; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopSignals"]


class StopSignals:
    """While active, remembers the first stop signal instead of dying from it.

    Args:
        group: takes the signals of this process for several runs; what it receives counts here as well.
    """

    HANDLED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, group: StopSignals | None = None) -> None:
        self._received: int | None = None
        self._group = group
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only the main thread may set handlers; a run inside a thread is stopped through Trainer.stop().
        if self._group is None and threading.current_thread() is threading.main_thread():
            for number in self.HANDLED:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def received(self) -> int | None:
        """The signal number, or None."""
        return self._received or (self._group.received if self._group else None)

    def receive(self, number: int) -> None:
        """Ask this run alone to stop, as a signal would."""
        self._received = number

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name if self.received else ""
