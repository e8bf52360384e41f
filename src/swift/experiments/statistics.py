"""How sure a mean over rows is, whether two means differ, and which parameters a metric depends on."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

__all__ = ["Importance", "Interval", "bootstrap", "paired_bootstrap", "parameter_importance"]

RESAMPLES = 1000
LEVEL = 0.95
_MOST_AT_ONCE = 4_000_000
"""Row numbers drawn at a time, so that many rows need no gigabytes."""
_FEWEST_TRIALS = 4


@dataclass(frozen=True)
class Interval:
    """A mean (or a difference of two) over ``num_rows`` rows, and where it would lie with other rows."""

    mean: float
    low: float
    high: float
    num_rows: int


@dataclass(frozen=True)
class Importance:
    """Parameter -> share of the metric's variance, and in words how it was found."""

    shares: dict[str, float]
    method: str


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


def parameter_importance(
    points: Sequence[Mapping[str, Any]], values: Sequence[float], *, seed: int = 0
) -> Importance | None:
    """How much of the metric's variance each parameter accounts for.

    Optuna's fANOVA (Hutter et al. 2014) where it and scikit-learn are installed, else the share of variance that each
    parameter explains by itself. Parameters that not all points have are left out. None with fewer than four points,
    with equal values, or without parameters: then there is nothing to tell.
    """
    shared = set.intersection(*(set(point) for point in points)) if points else set()
    names = [name for name in (points[0] if points else ()) if name in shared and _distinct(points, name) > 1]
    if len(points) < _FEWEST_TRIALS or not names or len(set(values)) == 1:
        return None
    if importlib.util.find_spec("optuna") and importlib.util.find_spec("sklearn"):
        shares = _fanova(points, names, values, seed)
        return Importance(_ordered(shares), "fANOVA of Optuna")
    shares = {name: _explained([point[name] for point in points], values) for name in names}
    return Importance(
        _ordered(shares),
        "share of variance explained by each parameter alone (fANOVA needs pip install 'swift-forge[sweep]')",
    )


def _distinct(points: Sequence[Mapping[str, Any]], name: str) -> int:
    return len({repr(point[name]) for point in points})


def _ordered(shares: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def is_number(value: Any) -> bool:
    """A finite number that is not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fanova(
    points: Sequence[Mapping[str, Any]], names: Sequence[str], values: Sequence[float], seed: int
) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {}
    for name in names:
        column = [point[name] for point in points]
        if all(map(is_number, column)):
            log = min(column) > 0 and max(column) / min(column) >= 10
            space[name] = optuna.distributions.FloatDistribution(min(column), max(column), log=log)
        else:
            space[name] = optuna.distributions.CategoricalDistribution(sorted(set(map(repr, column))))
    study = optuna.create_study()
    for point, value in zip(points, values, strict=True):
        numeric = optuna.distributions.FloatDistribution
        chosen = {n: point[n] if isinstance(space[n], numeric) else repr(point[n]) for n in names}
        study.add_trial(optuna.trial.create_trial(params=chosen, distributions=space, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in shares.items()}


def _explained(column: Sequence[Any], values: Sequence[float]) -> float:
    """Share of variance between groups of equal parameter values, epsilon squared (Kelley 1935), at least 0.

    Plain eta squared would reward parameters that took many values. Where nearly every value is new, numbers are put
    into groups of neighbours; words that never repeat explain nothing that could be told from chance.
    """
    groups: dict[Any, list[float]] = {}
    keys = _neighbours(column) if all(map(is_number, column)) else [repr(entry) for entry in column]
    for key, value in zip(keys, values, strict=True):
        groups.setdefault(key, []).append(value)
    count, mean = len(values), sum(values) / len(values)
    if len(groups) < 2 or len(groups) == count:
        return 0.0
    total = sum((value - mean) ** 2 for value in values)
    within = sum(sum((value - sum(group) / len(group)) ** 2 for value in group) for group in groups.values())
    noise = within / (count - len(groups))
    return max(0.0, (total - within - (len(groups) - 1) * noise) / total)


def _neighbours(column: Sequence[float]) -> list[int]:
    """The group of each value: the value itself where values repeat, else thirds or halves by rank."""
    levels = sorted(set(column))
    most = max(2, len(column) // 3)
    if len(levels) <= most:
        return [levels.index(value) for value in column]
    return [levels.index(value) * min(3, most) // len(levels) for value in column]
