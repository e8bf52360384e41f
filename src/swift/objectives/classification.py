"""Sequence classification and regression, with the losses of transformers' ``*ForSequenceClassification``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from swift.objectives.measures import correlations, f1_scores, mean_absolute_error, one_hot
from swift.objectives.pooled import LossTerms

__all__ = ["MultiLabelLoss", "RegressionLoss", "SingleLabelLoss"]


@dataclass(frozen=True)
class SingleLabelLoss:
    """``-log softmax(scores)[label]``; one term a sample."""

    decides = True

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        classes = labels[:, 0].long()
        return LossTerms(F.cross_entropy(values, classes, reduction="none"), values.argmax(1) == classes)

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        return len(groups)

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        classes, predicted = labels[:, 0].long(), values.argmax(1)
        count = values.shape[1]
        macro, micro = f1_scores(one_hot(predicted, count), one_hot(classes, count))
        accuracy = float((predicted == classes).double().mean())
        return {"accuracy": accuracy, "macro_f1": macro, "micro_f1": micro}


@dataclass(frozen=True)
class MultiLabelLoss:
    """Binary cross-entropy of every class on its own; one term for each class of each sample."""

    decides = True

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        losses = F.binary_cross_entropy_with_logits(values, labels.to(values.dtype), reduction="none")
        return LossTerms(losses.flatten(), ((values > 0) == (labels > 0.5)).flatten())

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        return labels.numel()

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        """``accuracy``: samples of which every class is right."""
        predicted, wanted = values > 0, labels > 0.5
        macro, micro = f1_scores(predicted, wanted)
        accuracy = float((predicted == wanted).all(1).double().mean())
        return {"accuracy": accuracy, "macro_f1": macro, "micro_f1": micro}


@dataclass(frozen=True)
class RegressionLoss:
    """``(score - label)^2``; one term for each value."""

    decides = False

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        return LossTerms((values - labels.to(values.dtype)).square().flatten())

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        return labels.numel()

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        return {**correlations(values, labels), "mae": mean_absolute_error(values, labels)}
