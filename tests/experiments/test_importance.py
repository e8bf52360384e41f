"""Importances against figures worked out by hand."""

from __future__ import annotations

import itertools
import sys

import pytest

from swift.experiments import importance
from swift.experiments.importance import parameter_importance


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
    assert importance._explained(["a", "a", "b", "b"], [1.0, 3.0, 5.0, 7.0]) == pytest.approx(0.7)
    # Words that never repeat explain everything, which says nothing.
    assert importance._explained(["a", "b", "c", "d"], [1.0, 3.0, 5.0, 7.0]) == 0.0
    # Numbers that never repeat are put into neighbours: halves of four, groups {1, 3} and {5, 7} again.
    assert importance._explained([0.1, 0.2, 0.3, 0.4], [1.0, 3.0, 5.0, 7.0]) == pytest.approx(0.7)


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
