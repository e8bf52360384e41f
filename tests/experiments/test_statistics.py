"""Intervals and importances against figures worked out by hand."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from swift.experiments import statistics
from swift.experiments.statistics import bootstrap, paired_bootstrap, parameter_importance


@pytest.mark.parametrize(
    ("values", "interval"),
    [
        # 27 resamples; 0 and 5 are the mean of one each, 3.7 % of all, more than the 2.5 % cut off at an end.
        ([0.0, 1.0, 5.0], (2.0, 0.0, 5.0)),
        # Means are binomial(4, 1/4) / 4: 94.9 % are at most 0.5, 99.6 % at most 0.75.
        ([0.0, 0.0, 0.0, 1.0], (0.25, 0.0, 0.75)),
    ],
)
def test_intervals_of_few_rows_by_hand(values: list[float], interval: tuple[float, float, float]) -> None:
    found = bootstrap(values)
    assert found is not None and found.num_rows == len(values)
    assert (found.mean, found.low, found.high) == interval


def test_two_rows_reach_from_one_to_the_other() -> None:
    # Means 0, 0.5 and 1 with 1/4, 1/2, 1/4: both percentiles lie in the outer quarters.
    found = bootstrap([0.0, 1.0])
    assert found is not None
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_equal_rows_have_no_width_and_one_row_no_interval() -> None:
    found = bootstrap([0.3] * 7)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(0.3), pytest.approx(0.3))
    assert bootstrap([0.3]) is None
    assert bootstrap([]) is None


def test_many_rows_agree_with_the_normal_approximation() -> None:
    values = [1.0] * 120 + [0.0] * 280
    found = bootstrap(values)
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert found is not None
    assert found.low == pytest.approx(0.3 - half, abs=0.006)
    assert found.high == pytest.approx(0.3 + half, abs=0.006)


def test_weights_count_tokens() -> None:
    found = bootstrap([1.0, 4.0], [300.0, 100.0])
    assert found is not None
    assert (found.mean, found.low, found.high) == (1.75, 1.0, 4.0)


def test_the_seed_decides_and_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(3).normal(size=50))
    whole = bootstrap(values)
    assert whole == bootstrap(values) != bootstrap(values, seed=1)
    monkeypatch.setattr(statistics, "_MOST_AT_ONCE", 500)
    assert bootstrap(values) == whole


def test_pairs_cancel_what_makes_a_row_hard() -> None:
    hard = list(np.random.default_rng(0).normal(size=40) * 10)
    better = [value + 0.5 for value in hard]
    difference = paired_bootstrap(better, hard)
    assert difference is not None
    assert (difference.mean, difference.low, difference.high) == tuple([pytest.approx(0.5)] * 3)
    alone = bootstrap(hard)
    assert alone is not None and alone.high - alone.low > 2


def test_a_difference_that_may_be_chance_holds_zero() -> None:
    one, other = [1.0, 0.0] * 20, [0.0, 1.0] * 20
    difference = paired_bootstrap(one, other)
    assert difference is not None
    assert difference.mean == 0.0 and difference.low < 0 < difference.high
    with pytest.raises(ValueError, match="40 rows against 39"):
        paired_bootstrap(one, other[:-1])


@pytest.mark.slow
def test_importance_finds_the_parameter_that_matters() -> None:
    points = [
        {"rate": rate, "rank": rank, "kind": kind}
        for rate, rank, kind in itertools.product((1, 2), (4, 8), ("a", "b"))
    ]
    found = parameter_importance(points, [10.0 * point["rate"] + 0.1 * point["rank"] for point in points])
    assert found is not None and found.method == "fANOVA of Optuna"
    assert next(iter(found.shares)) == "rate" and found.shares["rate"] > 0.9
    assert found.shares["kind"] < 0.05
    assert sum(found.shares.values()) == pytest.approx(1.0)


def test_importance_without_scikit_learn_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    points = [{"rate": rate, "rank": rank} for rate, rank in itertools.product((1, 2), (4, 8))]
    found = parameter_importance(points, [10.0 * point["rate"] for point in points])
    assert found is not None and "swift-forge[sweep]" in found.method
    assert found.shares == {"rate": 1.0, "rank": 0.0}


def test_explained_variance_by_hand() -> None:
    # Groups {1, 3} and {5, 7}: total 20, within 4; noise 4 / 2; (20 - 4 - 1 * 2) / 20.
    assert statistics._explained(["a", "a", "b", "b"], [1.0, 3.0, 5.0, 7.0]) == pytest.approx(0.7)
    # Words that never repeat explain everything, which says nothing.
    assert statistics._explained(["a", "b", "c", "d"], [1.0, 3.0, 5.0, 7.0]) == 0.0
    # Numbers that never repeat are put into neighbours: halves of four, groups {1, 3} and {5, 7} again.
    assert statistics._explained([0.1, 0.2, 0.3, 0.4], [1.0, 3.0, 5.0, 7.0]) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("points", "values"),
    [
        ([], []),
        ([{"a": 1}] * 3, [1.0, 2.0, 3.0]),
        ([{"a": n} for n in range(5)], [1.0] * 5),
        ([{"a": 1}] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]),
        ([{"a": 1}, {"b": 2}, {"a": 3}, {"b": 4}], [1.0, 2.0, 3.0, 4.0]),
    ],
    ids=["nothing", "few", "equal values", "equal parameters", "nothing in common"],
)
def test_no_importance_where_nothing_can_be_told(points: list[dict[str, int]], values: list[float]) -> None:
    assert parameter_importance(points, values) is None
