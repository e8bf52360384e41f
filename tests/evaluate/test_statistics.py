"""Intervals and tests of differences against figures worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from swift.evaluate import statistics
from swift.evaluate.statistics import bootstrap, paired_bootstrap, sign_flip_p


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


@pytest.mark.parametrize(("wins", "losses"), [(5, 0), (6, 2), (7, 7), (12, 3), (30, 10)])
def test_the_sign_test_of_right_and_wrong_is_mcnemars(wins: int, losses: int) -> None:
    """The exact p-value is a binomial tail; rows that both have right or wrong do not count."""
    ours = [1.0] * wins + [0.0] * losses + [1.0] * 9
    theirs = [0.0] * wins + [1.0] * losses + [1.0] * 9
    number = wins + losses
    tail = sum(math.comb(number, k) for k in range(max(wins, losses), number + 1)) / 2**number
    found = sign_flip_p(ours, theirs)
    # Up to 15 rows are counted out; of more, 10,000 random signs have a standard error of at most 0.005.
    assert found == pytest.approx(min(1.0, 2 * tail), abs=1e-12 if number <= 15 else 0.004)


def test_equal_scores_are_no_evidence() -> None:
    assert sign_flip_p([0.25] * 4, [0.25] * 4) == 1.0
    assert sign_flip_p([], []) is None


def test_weights_count_in_the_test_too() -> None:
    # Differences x weight: 10, -1, -1, -1; of 16 signs 10 + anything is as far from 0 as 7 in 8 cases of each sign.
    assert sign_flip_p([2.0, 0, 0, 0], [1.0, 1, 1, 1], [10.0, 1, 1, 1], [10.0, 1, 1, 1]) == 1.0
    assert sign_flip_p([2.0, 0, 0, 0], [1.0, 1, 1, 1], [1.0, 1, 1, 1], [1.0, 1, 1, 1]) == 10 / 16


def test_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    """300 samples of 60 rows with a true mean of 0.3: a 95 % interval holds it about 285 times (5 sigma: 19)."""
    generator = np.random.default_rng(7)
    held = paired = 0
    for _ in range(300):
        rows = (generator.random(60) < 0.3).astype(float)
        interval = bootstrap(list(rows))
        assert interval is not None
        held += interval.low <= 0.3 <= interval.high
        # The other model is right 0.2 more often, on rows that are as hard.
        hard = generator.normal(size=60)
        difference = paired_bootstrap(list(hard + 0.2 + generator.normal(size=60)), list(hard))
        assert difference is not None
        paired += difference.low <= 0.2 <= difference.high
    assert 0.95 * 300 - 19 <= held <= 300
    assert 0.95 * 300 - 19 <= paired <= 300
