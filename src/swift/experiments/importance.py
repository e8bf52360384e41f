"""Which parameters a metric depends on."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift.evaluate.statistics import is_number

__all__ = ["Importance", "parameter_importance"]

_FEWEST_TRIALS = 4


@dataclass(frozen=True)
class Importance:
    """Parameter -> share of the metric's variance, and in words how it was found."""

    shares: dict[str, float]
    method: str


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
