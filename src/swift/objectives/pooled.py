"""What objectives of tasks over whole sequences share: summing a pure loss function over a step, and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from swift.objectives.base import Denominators, GroupBatch, PooledOutputs

__all__ = ["LossTerms", "PooledLoss", "PooledObjective", "group_starts"]


class LossTerms(NamedTuple):
    """What a loss function makes of one micro-batch.

    Attributes:
        losses: ``[num_terms]``, differentiable.
        num_correct: which of the terms decide as their label says; None where nothing is decided.
        metrics: ``[names, 2]`` float64, sum and number of each of the loss's ``metric_names``.
    """

    losses: Tensor
    num_correct: Tensor | None = None
    metrics: Tensor | None = None


class PooledLoss(Protocol):
    """A pure function of values, labels and group sizes, and what is measured in an evaluation."""

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        """``values [num_sequences, size]``, ``labels [num_samples, K]``, sequences of each sample."""

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        """How many terms the loss has; known before the model has run."""

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        """Metrics over a whole data set."""

    @property
    def decides(self) -> bool:
        """Whether there are right and wrong answers."""


class PooledObjective:
    """``loss = sum of the terms / number of terms`` over the whole optimizer step.

    For a loss whose terms depend on one sample each this does not depend on how a step is split. In-batch losses
    compare what lies in one micro-batch.
    """

    def __init__(self, loss: PooledLoss) -> None:
        self.loss = loss
        self.accuracy = "accuracy" if loss.decides else None
        self.metric_names: tuple[str, ...] = getattr(loss, "metric_names", ())

    def denominators(self, batches: Sequence[GroupBatch]) -> Denominators:
        count = sum(self.loss.num_terms(*_labels_of(batch)) for batch in batches)
        return Denominators(target_weight=max(float(count), 1e-12), num_answers=count)

    def __call__(
        self, outputs: PooledOutputs, batch: GroupBatch, denominators: Denominators
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses, correct, measured = self.loss(outputs.values, *_labels_of(batch))
        # An empty micro-batch still has a graph: its backward pass gives zeros.
        loss_sum = losses.sum() if len(losses) else outputs.values.sum() * 0
        count = torch.zeros((), device=loss_sum.device) if correct is None else correct.sum()
        metrics = {"loss_sum": loss_sum.detach(), "num_correct": count}
        if measured is not None:
            metrics["groups"] = measured.T
        return loss_sum / denominators.target_weight, metrics


def _labels_of(batch: Any) -> tuple[Tensor, list[int]]:
    if batch.labels is None or batch.groups is None:
        raise ValueError("the batch has no labels: its data was not read for this task")
    return batch.labels, batch.groups


def group_starts(groups: Sequence[int]) -> list[int]:
    """Number of the first sequence of each sample."""
    starts, total = [], 0
    for size in groups:
        starts.append(total)
        total += size
    return starts
