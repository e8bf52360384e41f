"""Metrics of classifiers, regressions and rankings, as plain functions of predictions and labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "correlations",
    "f1_scores",
    "mean_absolute_error",
    "ndcg",
    "one_hot",
    "pearson",
    "reciprocal_rank",
    "spearman",
]


def one_hot(classes: Tensor, count: int) -> Tensor:
    """``[n]`` class numbers as ``[n, count]`` bool."""
    return classes[:, None] == torch.arange(count, device=classes.device)


def f1_scores(predicted: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(macro, micro) F1 from ``[n, classes]`` bool.

    ``F1 = 2 TP / (2 TP + FP + FN)``. Macro: the mean over the classes that are wanted or predicted at all; micro: from
    the counts of all classes together.
    """
    hits = (predicted & wanted).sum(0).double()
    misses = (predicted ^ wanted).sum(0).double()
    present = (predicted | wanted).any(0)
    if not present.any():
        return 0.0, 0.0
    macro = (2 * hits / (2 * hits + misses))[present].mean()
    return float(macro), float(2 * hits.sum() / (2 * hits.sum() + misses.sum()))


def pearson(first: Tensor, second: Tensor) -> float:
    """Correlation of two ``[n]``; nan when one of them is constant."""
    one, other = first.double() - first.double().mean(), second.double() - second.double().mean()
    spread = float(one.norm() * other.norm())
    return float(one @ other) / spread if spread > 0 else math.nan


def spearman(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(first), _ranks(second))


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[places]


def correlations(values: Tensor, labels: Tensor) -> dict[str, float]:
    """Pearson and Spearman of ``[n, K]`` with ``[n, K]``, the mean over the K columns."""
    columns = list(zip(values.T, labels.T, strict=True))
    return {
        "pearson": sum(pearson(*pair) for pair in columns) / len(columns),
        "spearman": sum(spearman(*pair) for pair in columns) / len(columns),
    }


def mean_absolute_error(values: Tensor, labels: Tensor) -> float:
    """Mean of ``|value - label|``."""
    return float((values.double() - labels.double()).abs().mean())


def reciprocal_rank(relevant: Tensor, others: Tensor) -> float:
    """1 / rank of the best relevant document, from the scores of both kinds; an equal score of another one counts."""
    return 1 / (1 + int((others >= relevant.max()).sum()))


def ndcg(relevant: Tensor, others: Tensor, k: int) -> float:
    """Normalised discounted cumulative gain of the first ``k`` (Jarvelin & Kekalainen 2002), gains 0 and 1.

    ``sum over relevant ranks r <= k of 1 / log2(r + 1)``, divided by the same of a perfect order. Among equal scores
    the relevant documents come last.
    """
    ordered = relevant.sort(descending=True).values
    ranks = [place + int((others >= score).sum()) for place, score in enumerate(ordered, start=1)]
    gain = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= k)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(len(ranks), k) + 1))
