"""Supervised fine-tuning and pre-training: cross-entropy on the target tokens."""

from __future__ import annotations

from collections.abc import Sequence

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
    """

    accuracy: str | None = "token_accuracy"

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
        loss_sum = losses.sum()
        metrics = {"loss_sum": loss_sum.detach(), "num_correct": outputs.is_argmax.sum()}
        return loss_sum / denominators.target_weight, metrics
