"""How long training itself takes."""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """Time spent in training steps since the last metric line, without evaluations and saves."""

    def __init__(self) -> None:
        self.steps = self.tokens = 0
        self._elapsed = 0.0
        self._since = time.perf_counter()

    def restart(self, *, keep_counts: bool = False) -> None:
        self._since = time.perf_counter()
        if not keep_counts:
            self.steps = self.tokens = 0
            self._elapsed = 0.0

    def pause(self) -> None:
        self._elapsed += time.perf_counter() - self._since
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since `restart`, pauses left out."""
        return self._elapsed + time.perf_counter() - self._since
