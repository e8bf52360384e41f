"""The progress line: one line that renews itself on a terminal; elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO, Any

from swift.core.format import format_duration
from swift.runs.status import Eta
from swift.train.callbacks.base import Callback, RunView

__all__ = ["ProgressLine"]

PLAIN_SECONDS = 10.0
"""Without a terminal: at most one line in this time, so that a log file stays readable."""


class ProgressLine(Callback):
    """Step, loss, learning rate, speed and time to go, from the metric lines (so it costs no device sync).

    Args:
        file: where to; default stdout.
        clock: seconds that only grow; for tests.
    """

    def __init__(self, file: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.file = file or sys.stdout
        self.clock = clock
        self._eta = Eta()
        self._progress: Any = None
        self._task: Any = None
        self._last_line = float("-inf")
        self._values = ""

    def on_train_begin(self, run: RunView) -> None:
        self._eta.update(run.state.step, run.total_steps, self.clock())
        if self.file.isatty():
            self._start(run)

    def on_step_end(self, run: RunView) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=run.state.step)

    def on_log(self, run: RunView, metrics: dict[str, Any]) -> None:
        step, now = run.state.step, self.clock()
        self._values = describe(metrics, self._eta.update(step, run.total_steps, now))
        if self._progress is not None:
            self._progress.update(self._task, completed=step, values=self._values)
        elif now - self._last_line >= PLAIN_SECONDS or step >= run.total_steps:
            self._last_line = now
            self._say(f"step {step}/{run.total_steps}  {self._values}")

    def on_evaluate(self, run: RunView, metrics: dict[str, Any]) -> None:
        numbers = [
            f"{name.removeprefix('eval_').replace('_', ' ')} {metrics[name]:.4g}"
            for name in metrics
            if name.startswith("eval_") and name != "eval_seconds" and metrics[name] is not None
        ]
        self._say(f"step {run.state.step}/{run.total_steps}  evaluation: {', '.join(numbers)}")

    def on_train_end(self, run: RunView, summary: dict[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _start(self, run: RunView) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[values]}"))
        console = Console(file=self.file, highlight=False)
        self._progress = Progress(*columns, console=console, refresh_per_second=4)
        self._task = self._progress.add_task(
            "train", total=run.total_steps, completed=run.state.step, values=""
        )
        self._progress.start()

    def _say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line)
        else:
            print(line, file=self.file, flush=True)


def describe(metrics: dict[str, Any], eta_seconds: float | None) -> str:
    """``loss 1.2345  lr 1e-04  812 tok/s  3m05s left``; what is not known is left out."""
    parts = []
    if metrics.get("reward") is not None:  # the loss of a policy is near 0, whatever it learns
        parts.append(f"reward {metrics['reward']:.4f}")
    elif metrics.get("loss") is not None:
        parts.append(f"loss {metrics['loss']:.4f}")
    if metrics.get("failed_rewards"):
        parts.append(f"{metrics['failed_rewards']:.3g} answers whose reward failed (log.txt)")
    if metrics.get("learning_rate") is not None:
        parts.append(f"lr {metrics['learning_rate']:.2e}")
    if metrics.get("tokens_per_second"):
        parts.append(f"{metrics['tokens_per_second']:,.0f} tok/s")
    if eta_seconds is not None:
        parts.append(f"{format_duration(eta_seconds)} left")
    return "  ".join(parts)
