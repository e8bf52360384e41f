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
        handled: False where somebody else takes the signals of this process and sets ``received``.

    Attributes:
        received: the signal number, or None.
    """

    HANDLED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, handled: bool = True) -> None:
        self.received: int | None = None
        self._handled = handled
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only the main thread may set handlers; a run inside a thread is stopped through Trainer.stop().
        if self._handled and threading.current_thread() is threading.main_thread():
            for number in self.HANDLED:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name if self.received else ""
