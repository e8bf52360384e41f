"""Where a run stands: everything that a resumed run must know besides weights and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LogWindow", "TrainState"]


@dataclass
class LogWindow:
    """Sums since the last metric line; part of the state so that a resumed run logs the same numbers."""

    loss_sum: float = 0.0
    loss_weight: float = 0.0
    num_correct: float = 0.0
    num_targets: float = 0.0
    groups: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Metric -> (sum, sum of weights): the losses of channels, and what a loss measures beside itself."""

    def add_groups(self, names: Sequence[str], sums: Sequence[Sequence[float]]) -> None:
        """Add one step's sums, [2, names]."""
        for name, loss, weight in zip(names, *sums, strict=True):
            before = self.groups.get(name, (0.0, 0.0))
            self.groups[name] = (before[0] + loss, before[1] + weight)

    @property
    def group_losses(self) -> dict[str, float]:
        """Metric -> mean, of those that had a weight."""
        means = {name: loss / weight for name, (loss, weight) in self.groups.items() if weight}
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():  # of kto: means over different answers
            means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
        return means

    @property
    def loss(self) -> float:
        """Mean loss per unit of target weight over the window."""
        return self.loss_sum / self.loss_weight if self.loss_weight else float("nan")

    @property
    def token_accuracy(self) -> float:
        return self.num_correct / self.num_targets if self.num_targets else float("nan")


@dataclass
class TrainState:
    """The data cursor and the counters.

    Attributes:
        step: optimizer steps done.
        epoch: index of the epoch that the next step belongs to.
        step_in_epoch: steps of that epoch already done; with ``epoch`` the data cursor.
        position: of a stream: window, and micro-batches used of it, in ``epoch``.
        stream_report: of a stream: what became of the rows of its first pass, up to ``position`` (``StreamReport``).
        num_tokens: non-pad tokens the model has been trained on.
        seconds: time spent training, over all resumed parts.
        cursor_fingerprint: hash of what the cursor refers to; a checkpoint of other data is refused.
        order_batch_size: the micro-batch that the run began with, by which the order of the data is made.
        step_size: micro-batches of ``order_batch_size`` in a step, over all processes.
        data_ranks: processes with data of their own whose options gave the step its size; 0: not known.
        best_metric, best_step: of ``metric_for_best_model``.
        stale_evaluations: evaluations since the best one.
        evaluation_owed: a signal cut the run before what was due after ``step``; a resumed run begins with it.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    best_metric: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0
    evaluation_owed: bool = False
    first_loss: float | None = None
    last_loss: float | None = None
    cursor_fingerprint: str = ""
    order_batch_size: int = 0
    step_size: int = 0
    data_ranks: int = 0
    position: tuple[int, int] = (0, 0)
    stream_report: dict[str, Any] = field(default_factory=dict)
    window: LogWindow = field(default_factory=LogWindow)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        position = tuple(values.get("position", (0, 0)))
        window = LogWindow(**values["window"])
        window.groups = {name: (sums[0], sums[1]) for name, sums in window.groups.items()}
        return cls(**{**values, "position": position, "window": window})
