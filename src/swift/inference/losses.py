"""Loss of given answers under a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from swift.models.load import ModelBundle
from swift.models.template import Encoded

__all__ = ["AnswerLoss", "answer_losses"]

_IGNORED = -100


@dataclass(frozen=True)
class AnswerLoss:
    """Cross-entropy of one sample, summed over its learned tokens (nats)."""

    total: float
    num_tokens: int


@torch.inference_mode()
def answer_losses(bundle: ModelBundle, samples: Sequence[Encoded]) -> list[AnswerLoss]:
    """The loss of each sample's learned tokens, all samples in one batch.

    Rows are padded on the right, which causal attention never sees. Weights are not applied.
    """
    if not samples:
        return []
    device = bundle.model.device
    width = max(len(sample.input_ids) for sample in samples)
    pad = bundle.tokenizer.pad_token_id
    ids = [sample.input_ids + [pad] * (width - len(sample.input_ids)) for sample in samples]
    labels = [sample.labels + [_IGNORED] * (width - len(sample.labels)) for sample in samples]
    logits = bundle.model(input_ids=torch.tensor(ids, device=device), use_cache=False).logits
    targets = torch.tensor(labels, device=device)[:, 1:]
    losses = []
    for row, target in zip(logits[:, :-1], targets, strict=True):
        learned = target != _IGNORED
        total = F.cross_entropy(row[learned].float(), target[learned], reduction="sum")
        losses.append(AnswerLoss(total.item(), int(learned.sum())))
    return losses
