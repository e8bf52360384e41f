"""Supervised fine-tuning and pre-training: cross-entropy on the target tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swift.objectives.base import Denominators, TargetBatch, TokenOutputs

__all__ = ["SftObjective", "target_weights"]


def target_weights(batch: TargetBatch) -> Tensor | None:
    """Weights of the targets, ``[num_targets]`` in row-major order, or None when all are 1."""
    return None if batch.weights is None else batch.weights[batch.targets != -100]


class SftObjective:
    """``loss = -sum_t w_t log p(y_t) / sum_t w_t`` over the targets of the whole optimizer step.

    With no weights this is the mean over target tokens, as in transformers' ``num_items_in_batch``. A weighted mean
    (and not a sum over the token count) keeps the size of the gradient when all weights are scaled alike.

    Args:
        dynamic: multiply each target's loss by its probability, held constant: dynamic fine-tuning (arXiv
            2508.05629, equation 9), which takes the pull away from targets the model finds very unlikely.
        groups: batch -> [num_targets] int64, the group of each target, for a loss of each group.
        num_groups: how many groups there are.
    """

    accuracy: str | None = "token_accuracy"

    def __init__(
        self, *, dynamic: bool = False, groups: Callable[[Any], Tensor] | None = None, num_groups: int = 0
    ) -> None:
        self.dynamic, self.groups, self.num_groups = dynamic, groups, num_groups

    def denominators(self, batches: Sequence[TargetBatch]) -> Denominators:
        total = 0.0
        for batch in batches:
            weights = target_weights(batch)
            total += float(batch.num_targets) if weights is None else float(weights.double().sum())
        return Denominators(target_weight=max(total, 1e-12))

    def __call__(
        self, outputs: TokenOutputs, batch: TargetBatch, denominators: Denominators
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = target_weights(batch)
        losses = -outputs.logprobs if weights is None else -outputs.logprobs * weights
        if self.dynamic:
            losses = losses * outputs.logprobs.detach().exp()
        loss_sum = losses.sum()
        metrics = {"loss_sum": loss_sum.detach(), "num_correct": outputs.is_argmax.sum()}
        if self.groups is not None:
            metrics["groups"] = self._by_group(losses.detach(), weights, self.groups(batch))
        return loss_sum / denominators.target_weight, metrics

    def _by_group(self, losses: Tensor, weights: Tensor | None, groups: Tensor) -> Tensor:
        """[2, num_groups] float64: sums of losses and of weights."""
        sums = losses.new_zeros(2, self.num_groups, dtype=torch.float64)
        sums[0].index_add_(0, groups, losses.double())
        ones = torch.ones_like(losses) if weights is None else weights
        sums[1].index_add_(0, groups, ones.double())
        return sums
