"""The progress line of commands that answer rows."""

from __future__ import annotations

import sys

from swift.core.errors import Terminated


class AnswerProgress:
    """A progress line on a terminal, nothing elsewhere; on Ctrl-C and SIGTERM it says how to go on."""

    def __init__(self, go_on: str, total: int | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("answering", total=total)
        self._go_on = go_on

    def __enter__(self) -> AnswerProgress:
        self._bar.start()
        return self

    def update(self, done: int, total: int | None = None) -> None:
        self._bar.update(self._task, completed=done)
        if total is not None:
            self._bar.update(self._task, total=total)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.stop()
        if kind in (KeyboardInterrupt, Terminated):
            print(f"stopped; {self._go_on}", file=sys.stderr)
