"""Losses of text embeddings, on vectors of length 1.

A sample is an anchor, its positive text and, with InfoNCE, its negatives. The pair losses are those of
sentence-transformers (its CosineSimilarityLoss, ContrastiveLoss and OnlineContrastiveLoss, with cosine distance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from swift.objectives.measures import correlations
from swift.objectives.pooled import LossTerms, PooledLoss, group_starts

__all__ = ["InfonceLoss", "MatryoshkaLoss", "PairLoss"]

_BLOCK_ROWS = 1024


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1)


def _cosines(values: Tensor) -> Tensor:
    """``[num_pairs]`` of ``[2 * num_pairs, size]``: sequences 2i and 2i + 1 are a pair."""
    unit = _unit(values)
    return (unit[0::2] * unit[1::2]).sum(-1)


@dataclass(frozen=True)
class PairLoss:
    """Losses of the cosine c of a pair and its label y.

    - cosine_similarity: ``(c - y)^2``;
    - contrastive (Hadsell et al., CVPR 2006): ``(y d^2 + (1 - y) max(0, margin - d)^2) / 2`` with ``d = 1 - c``;
    - online_contrastive: of a micro-batch only the pairs of label 1 that are farther apart than the nearest of
      label 0, and those of label 0 nearer than the farthest of label 1: ``sum d^2 + sum max(0, margin - d)^2``, one
      term. Where the other kind has at most one pair, the mean of the own kind takes the place of that border.
    """

    kind: Literal["cosine_similarity", "contrastive", "online_contrastive"]
    margin: float = 0.5

    decides = False

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        cosines, wanted = _cosines(values), labels[:, 0].to(values.dtype)
        if self.kind == "cosine_similarity":
            return LossTerms((cosines - wanted).square())
        distances = 1 - cosines
        if self.kind == "online_contrastive":
            return LossTerms(self._hard_pairs(distances, wanted > 0.5))
        far = F.relu(self.margin - distances).square()
        return LossTerms((wanted * distances.square() + (1 - wanted) * far) / 2)

    def _hard_pairs(self, distances: Tensor, alike: Tensor) -> Tensor:
        if not len(distances):
            return distances
        near, far = distances[alike], distances[~alike]
        if len(far):
            far = far[far < (near.max() if len(near) > 1 else far.mean())]
        others = distances[~alike]
        if len(near):
            near = near[near > (others.min() if len(others) > 1 else near.mean())]
        return (near.square().sum() + F.relu(self.margin - far).square().sum())[None]

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        return min(1, len(groups)) if self.kind == "online_contrastive" else len(groups)

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        return correlations(_cosines(values)[:, None], labels)


@dataclass(frozen=True)
class InfonceLoss:
    """InfoNCE (arXiv 1807.03748): ``-log(exp(s(q, d+) / t) / sum over d of exp(s(q, d) / t))``, a term for each anchor.

    The sum runs over the anchor's positive and negatives and, with ``in_batch``, over the texts of all samples of the
    micro-batch. ``include_qq`` and ``include_dd`` add the similarities of the anchor to the other anchors, and of its
    positive to all other texts (Qwen3-Embedding, arXiv 2506.05176, section 3). ``fake_margin`` leaves out whatever is
    more similar than the positive by that margin, which is probably another right answer.
    """

    temperature: float = 0.1
    in_batch: bool = True
    fake_margin: float | None = None
    include_qq: bool = False
    include_dd: bool = False

    decides = True

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        if not groups:
            return LossTerms(values.new_zeros(0), torch.zeros(0, dtype=torch.bool, device=values.device))
        anchors, texts, owners, positives = _parts(values, groups)
        rows = torch.arange(len(anchors), device=values.device)
        similar = anchors @ texts.T
        allowed = torch.ones_like(similar, dtype=torch.bool) if self.in_batch else owners == rows[:, None]
        blocks, masks = [similar], [allowed]
        if self.include_qq:
            blocks.append(anchors @ anchors.T)
            masks.append(rows != rows[:, None])
        if self.include_dd:
            blocks.append(texts[positives] @ texts.T)
            masks.append(torch.arange(len(texts), device=values.device) != positives[:, None])
        every, kept = torch.cat(blocks, 1), torch.cat(masks, 1)
        wanted = similar[rows, positives]
        if self.fake_margin is not None:
            kept = kept & ~(every > wanted[:, None] + self.fake_margin)
        scores = (every / self.temperature).masked_fill(~kept, -torch.inf)
        losses = scores.logsumexp(1) - wanted / self.temperature
        return LossTerms(losses, scores.argmax(1) == positives)

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        return len(groups)

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        """Mean similarity to the positive and to the negatives, and positive minus the nearest negative.

        Negatives are the row's own where every row has some, else the positives of all other rows.
        """
        anchors, texts, owners, positives = _parts(values, groups)
        wanted = (anchors * texts[positives]).sum(-1).double()
        own = min(groups) > 2
        totals = nearest = 0.0
        count = 0
        for start in range(0, len(anchors), _BLOCK_ROWS):
            rows = torch.arange(start, min(start + _BLOCK_ROWS, len(anchors)), device=values.device)
            mine = owners == rows[:, None]
            is_positive = torch.zeros(len(texts), dtype=torch.bool, device=values.device)
            is_positive[positives] = True
            negative = (mine & ~is_positive) if own else (~mine & is_positive)
            similar = (anchors[rows] @ texts.T).double()
            totals += float(similar[negative].sum())
            count += int(negative.sum())
            nearest += float(similar.masked_fill(~negative, -torch.inf).max(1).values.sum())
        mean = float(wanted.mean())
        if not count:
            return {"mean_positive": mean, "mean_negative": float("nan"), "margin": float("nan")}
        return {
            "mean_positive": mean,
            "mean_negative": totals / count,
            "margin": mean - nearest / len(anchors),
        }


def _parts(values: Tensor, groups: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit anchors ``[B, size]``, unit texts ``[D, size]``, each text's sample ``[D]``, places of positives ``[B]``."""
    unit = _unit(values)
    starts = group_starts(groups)
    texts = [
        place for start, size in zip(starts, groups, strict=True) for place in range(start + 1, start + size)
    ]
    owners = [sample for sample, size in enumerate(groups) for _ in range(size - 1)]
    positives = [start - sample for sample, start in enumerate(starts)]
    # No masks: what they select is known here, so a device need not be waited for.
    places = [torch.tensor(numbers, dtype=torch.int64, device=values.device) for numbers in (starts, texts)]
    others = [
        torch.tensor(numbers, dtype=torch.int64, device=values.device) for numbers in (owners, positives)
    ]
    return unit[places[0]], unit[places[1]], others[0], others[1]


@dataclass(frozen=True)
class MatryoshkaLoss:
    """The mean of a loss over vectors cut to their first ``dims`` (Matryoshka, arXiv 2205.13147)."""

    loss: PooledLoss
    dims: tuple[int, ...] = field(default=())

    @property
    def decides(self) -> bool:
        return self.loss.decides

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        """Decisions are those of the largest size."""
        terms = {dim: self.loss(values[:, :dim], labels, groups) for dim in self.dims}
        mean = torch.stack([one.losses for one in terms.values()]).mean(0)
        return LossTerms(mean, terms[max(self.dims)].num_correct)

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        return self.loss.num_terms(labels, groups)

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        """Metrics of the whole vectors, and of each cut under a name with its size."""
        measured = self.loss.measure(values, labels, groups)
        for dim in self.dims:
            cut = self.loss.measure(values[:, :dim], labels, groups)
            measured.update({f"{name}_dim_{dim}": value for name, value in cut.items()})
        return measured
