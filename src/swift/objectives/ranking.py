"""Rerankers: documents of a query, the relevant ones first, with one score each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swift.objectives.measures import ndcg, reciprocal_rank
from swift.objectives.pooled import LossTerms, group_starts

__all__ = ["ListwiseLoss", "PointwiseLoss", "split_documents"]


def split_documents(scores: Tensor, labels: Tensor, groups: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """For each query the scores of its relevant and of its other documents, from ``scores [num_documents, 1]``."""
    relevant = labels[:, 0].long().tolist()
    return [
        (scores[start : start + count, 0], scores[start + count : start + size, 0])
        for start, size, count in zip(group_starts(groups), groups, relevant, strict=True)
    ]


def _measure(values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
    """Means over the queries."""
    lists = split_documents(values, labels, groups)
    return {
        "mrr": sum(reciprocal_rank(*pair) for pair in lists) / len(lists),
        "ndcg_at_10": sum(ndcg(*pair, k=10) for pair in lists) / len(lists),
    }


@dataclass(frozen=True)
class PointwiseLoss:
    """Binary cross-entropy of each score: ``-log sigmoid(s)`` of relevant documents, ``-log sigmoid(-s)`` of others.

    With ``s = logit(yes) - logit(no)`` it is the cross-entropy of the two answers.
    """

    decides = True

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        relevant = torch.zeros(len(values), dtype=values.dtype, device=values.device)
        for start, count in zip(group_starts(groups), labels[:, 0].long().tolist(), strict=True):
            relevant[start : start + count] = 1
        scores = values[:, 0]
        losses = F.binary_cross_entropy_with_logits(scores, relevant, reduction="none")
        return LossTerms(losses, (scores > 0) == (relevant > 0))

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        return sum(groups)

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        return _measure(values, labels, groups)


@dataclass(frozen=True)
class ListwiseLoss:
    """``-log softmax([s_p, s_n1, s_n2, ...] / temperature)[p]``, a term for each relevant document p of a query.

    The others of the softmax are the query's irrelevant documents. Lists shorter than ``min_group_size`` are left out.
    It is ListNet's top-one loss (Cao et al., ICML 2007) with one relevant document.
    """

    temperature: float = 1.0
    min_group_size: int = 2

    decides = True

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        losses, correct = [values.new_zeros(0)], [torch.zeros(0, dtype=torch.bool, device=values.device)]
        for relevant, others in split_documents(values, labels, groups):
            if 1 + len(others) < self.min_group_size:
                continue
            lists = torch.cat([relevant[:, None], others.expand(len(relevant), -1)], 1)
            losses.append(-(lists / self.temperature).log_softmax(1)[:, 0])
            correct.append(relevant > others.max() if len(others) else relevant == relevant)
        return LossTerms(torch.cat(losses), torch.cat(correct))

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        counts = labels[:, 0].long().tolist()
        return sum(
            count
            for count, size in zip(counts, groups, strict=True)
            if 1 + size - count >= self.min_group_size
        )

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        return _measure(values, labels, groups)
