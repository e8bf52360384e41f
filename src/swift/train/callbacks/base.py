"""What a callback may see and do. A user's callback is a file with a subclass of `Callback`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from swift.config.schema import Resolved
    from swift.runs.folder import RunFolder
    from swift.train.state import TrainState

__all__ = ["Callback", "RunView"]


class RunView(Protocol):
    """The run as a callback sees it.

    Attributes:
        state: counters, see `TrainState`; read only.
        folder: the run folder.
        resolved: the configuration.
        total_steps: optimizer steps of the whole run.
    """

    state: TrainState
    folder: RunFolder
    resolved: Resolved
    total_steps: int

    def stop(self, reason: str) -> None:
        """Ask the run to end after the current step (it saves first)."""


class Callback:
    """Override what you need; every method does nothing by default. Exceptions end the run."""

    def on_train_begin(self, run: RunView) -> None:
        """Before the first step (also of a resumed run)."""

    def on_step_end(self, run: RunView) -> None:
        """After each optimizer step. No metric is available here without a device sync; use on_log."""

    def on_log(self, run: RunView, metrics: dict[str, Any]) -> None:
        """After each line of metrics.jsonl that reports training."""

    def on_evaluate(self, run: RunView, metrics: dict[str, Any]) -> None:
        """After each evaluation; keys start with ``eval_``."""

    def on_save(self, run: RunView, path: Path) -> None:
        """After a checkpoint is complete at ``path``."""

    def on_train_end(self, run: RunView, summary: dict[str, Any]) -> None:
        """After the last step, the last save and summary.json."""

    def close(self) -> None:
        """Always called, also when the run failed."""
