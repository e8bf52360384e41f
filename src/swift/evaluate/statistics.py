"""How sure a mean over rows is, and whether two means differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

__all__ = ["Interval", "bootstrap", "is_number", "paired_bootstrap", "sign_flip_p"]

RESAMPLES = 1000
LEVEL = 0.95
_MOST_AT_ONCE = 4_000_000
"""Row numbers drawn at a time, so that many rows need no gigabytes."""
_MOST_EXACT = 15


@dataclass(frozen=True)
class Interval:
    """A mean (or a difference of two) over ``num_rows`` rows, and where it would lie with other rows."""

    mean: float
    low: float
    high: float
    num_rows: int


def bootstrap(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """The (weighted) mean with its 95 % percentile interval (Efron & Tibshirani 1993, chapter 13).

    Rows are drawn with replacement ``resamples`` times. None for fewer than two rows, which say nothing about others.
    """
    columns = [_weighted(values, weights)]
    if len(values) < 2:
        return None
    means = _resampled_means(columns, resamples, seed)[0]
    return _interval(_mean(columns[0]), means, len(values))


def paired_bootstrap(
    values: Sequence[float],
    others: Sequence[float],
    weights: Sequence[float] | None = None,
    other_weights: Sequence[float] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Mean of ``values`` minus mean of ``others`` on the same rows, in the same order.

    Each resample draws the same rows for both, so that what makes a row hard does not count. An interval without 0
    says that other rows like these would hardly turn the order around. None for fewer than two rows.
    """
    if len(values) != len(others):
        raise ValueError(f"{len(values)} rows against {len(others)}: pairs are needed")
    if len(values) < 2:
        return None
    columns = [_weighted(values, weights), _weighted(others, other_weights)]
    ours, theirs = _resampled_means(columns, resamples, seed)
    return _interval(_mean(columns[0]) - _mean(columns[1]), ours - theirs, len(values))


def sign_flip_p(
    values: Sequence[float],
    others: Sequence[float],
    weights: Sequence[float] | None = None,
    other_weights: Sequence[float] | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> float | None:
    """Two-sided p-value of "both models are alike": the paired permutation test (Fisher 1935; Good 2005, chapter 3).

    If they are, each row's difference could as well have the other sign. With up to 15 rows that differ, all signs are
    tried; for scores of 0 and 1 that is the exact McNemar test. Beyond, ``resamples`` random signs, the observed ones
    counted among them. None when there are no rows.
    """
    import numpy as np

    if len(values) != len(others):
        raise ValueError(f"{len(values)} rows against {len(others)}: pairs are needed")
    if not values:
        return None
    differences = _weighted(values, weights)[0] - _weighted(others, other_weights)[0]
    differences = differences[differences != 0]
    size = len(differences)
    observed = abs(differences.sum()) * (1 - 1e-12)  # sums in another order must not count as smaller
    if size <= _MOST_EXACT:
        bits = np.arange(1 << size)[:, None] >> np.arange(size) & 1
        return float(np.mean(np.abs((1 - 2 * bits) @ differences) >= observed))
    generator = np.random.default_rng(seed)
    at_once = max(1, _MOST_AT_ONCE // size)
    extreme = 1
    for start in range(0, resamples, at_once):
        signs = generator.integers(2, size=(min(at_once, resamples - start), size)) * 2 - 1
        extreme += int(np.sum(np.abs(signs @ differences) >= observed))
    return extreme / (resamples + 1)


def _weighted(values: Sequence[float], weights: Sequence[float] | None) -> tuple[Array, Array]:
    """(value x weight, weight), both float64 [rows]."""
    import numpy as np

    heights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    return np.asarray(values, dtype=float) * heights, heights


def _mean(column: tuple[Array, Array]) -> float:
    return float(column[0].sum() / column[1].sum())


def _resampled_means(columns: Sequence[tuple[Array, Array]], resamples: int, seed: int) -> list[Array]:
    """For each column the means of all resamples [resamples]; the rows drawn are the same for all columns."""
    import numpy as np

    size = len(columns[0][0])
    parts = [
        [sums[rows].sum(axis=1) / weights[rows].sum(axis=1) for sums, weights in columns]
        for rows in _draws(size, resamples, seed)
    ]
    return [np.concatenate(means) for means in zip(*parts, strict=True)]


def _draws(size: int, resamples: int, seed: int) -> Iterator[Array]:
    import numpy as np

    generator = np.random.default_rng(seed)
    at_once = max(1, _MOST_AT_ONCE // size)
    for start in range(0, resamples, at_once):
        yield generator.integers(size, size=(min(at_once, resamples - start), size))


def _interval(mean: float, means: Array, num_rows: int) -> Interval:
    import numpy as np

    tail = 100 * (1 - LEVEL) / 2
    # nan: a resample of rows without any weight has no mean.
    low, high = np.nanpercentile(means, [tail, 100 - tail])
    return Interval(mean, float(low), float(high), num_rows)


def is_number(value: Any) -> bool:
    """A finite number that is not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
