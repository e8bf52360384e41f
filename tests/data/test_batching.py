"""Batch schedules: nothing lost, nothing twice, the same for everybody, and little waste."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift.data.batching import BatchSchedule, MicroBatch, Mode, deal, pack_best_fit

CAPACITY = 64
lengths = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=120)
modes = st.sampled_from(["padded", "padding_free", "packed"])


def schedule(sizes: list[int] | np.ndarray, mode: Mode = "padded", **settings: int | bool) -> BatchSchedule:
    values = {"batch_size": 4, "max_length": CAPACITY, "seed": 3, **settings}
    return BatchSchedule(sizes, mode=mode, **values)  # type: ignore[arg-type]


def samples(micro_batches: list[MicroBatch]) -> list[int]:
    return [sample for rows in micro_batches for row in rows for sample in row]


@given(lengths, modes, st.integers(1, 7), st.integers(0, 3), st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_sample_exactly_once_per_epoch(
    sizes: list[int], mode: Mode, batch_size: int, epoch: int, shuffle: bool, group: bool
) -> None:
    plan = schedule(sizes, mode, batch_size=batch_size, shuffle=shuffle, group_by_length=group)
    micro_batches = plan.micro_batches(epoch)
    assert sorted(samples(micro_batches)) == list(range(len(sizes)))
    assert len(micro_batches) == plan.num_micro_batches
    assert plan.num_tokens == sum(sizes)
    for rows in micro_batches:
        if mode == "padding_free":
            assert len(rows) == 1
            assert len(rows[0]) <= batch_size
        else:
            assert len(rows) <= batch_size
        for row in rows:
            if mode == "packed":
                assert sum(sizes[sample] for sample in row) <= CAPACITY
            elif mode == "padded":
                assert len(row) == 1


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_dealing_out_gives_everybody_as_much_and_nothing_twice(items: list[int], size: int) -> None:
    shares = [deal(items, (rank, size), None) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    together = [share[turn] for turn in range(len(shares[0])) for share in shares]
    assert together[: len(items)] == items
    assert together[len(items) :] == [None] * (len(together) - len(items))
    assert len(together) - len(items) < size


@given(lengths, modes, st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_pure_function_of_its_arguments(sizes: list[int], mode: Mode, epoch: int) -> None:
    plan = schedule(sizes, mode)
    plan.micro_batches(epoch + 1)  # having been asked something else changes nothing
    assert plan.micro_batches(epoch) == schedule(sizes, mode).micro_batches(epoch)


@pytest.mark.parametrize("mode", ["padded", "padding_free", "packed"])
def test_epochs_and_seeds_differ(mode: Mode) -> None:
    sizes = np.random.default_rng(0).integers(5, 40, 300)
    plan = schedule(sizes, mode)
    assert plan.micro_batches(0) != plan.micro_batches(1)
    assert plan.micro_batches(0) != schedule(sizes, mode, seed=4).micro_batches(0)


def test_order_is_pinned() -> None:
    """A changed order breaks resuming of every run that exists: change this only with a note in CHANGELOG."""
    plan = schedule([5, 9, 2, 7, 3, 8, 4, 6], batch_size=2)
    assert plan.micro_batches(0) == [[[3], [7]], [[0], [6]], [[4], [2]], [[1], [5]]]
    assert plan.micro_batches(1) == [[[4], [2]], [[3], [7]], [[0], [6]], [[1], [5]]]
    packed = schedule([5, 9, 2, 7, 3, 8, 4, 6], "packed", batch_size=2, max_length=12)
    assert packed.micro_batches(0) == [[[1, 4], [3, 0]], [[5, 6], [7, 2]]]
    assert packed.micro_batches(1) == [[[1, 4], [5, 6]], [[3, 0], [7, 2]]]


def test_packed_rows_are_the_same_in_every_epoch() -> None:
    sizes = np.random.default_rng(1).integers(5, 40, 200)
    plan = schedule(sizes, "packed", batch_size=1)
    first = {tuple(rows[0]) for rows in plan.micro_batches(0)}
    assert first == {tuple(rows[0]) for rows in plan.micro_batches(5)}


def test_without_shuffle_the_order_is_that_of_the_file() -> None:
    plan = schedule([5, 9, 2, 7, 3], batch_size=2, shuffle=False, group_by_length=False)
    assert plan.micro_batches(0) == plan.micro_batches(1) == [[[0], [1]], [[2], [3]], [[4]]]
    assert schedule([5, 9, 2, 7, 3], "padding_free", batch_size=2, shuffle=False).micro_batches(0) == [
        [[0, 1]],
        [[2, 3]],
        [[4]],
    ]


def test_largest_micro_batch() -> None:
    schedule = BatchSchedule([3, 9, 4, 8, 2], batch_size=2, mode="padded", seed=1)
    sizes = sorted(
        len(batch) * max(schedule.lengths[row].sum() for row in batch) for batch in schedule.micro_batches(0)
    )
    largest = schedule.largest_micro_batch()
    assert len(largest) * max(schedule.lengths[row].sum() for row in largest) == sizes[-1] == 18


def test_grouping_by_length_wastes_little() -> None:
    sizes = np.random.default_rng(3).lognormal(4.7, 0.6, 2000).astype(int) + 10

    def padding(group: bool) -> float:
        plan = schedule(sizes, batch_size=8, group_by_length=group)
        cells = sum(len(rows) * max(sizes[row[0]] for row in rows) for rows in plan.micro_batches(1))
        return 1 - plan.num_tokens / float(cells)

    assert padding(True) < 0.06 < 0.4 < padding(False)


def first_fit_decreasing(sizes: list[int], capacity: int) -> int:
    spaces: list[int] = []
    for size in sorted(sizes, reverse=True):
        place = next((number for number, space in enumerate(spaces) if space >= size), None)
        if place is None:
            spaces.append(capacity - size)
        else:
            spaces[place] -= size
    return len(spaces)


@pytest.mark.parametrize("seed", range(12))
def test_packing_needs_no_more_rows_than_first_fit_decreasing(seed: int) -> None:
    generator = np.random.default_rng(seed)
    draw = (
        generator.lognormal(5, 0.8, 600),
        generator.uniform(1, 1024, 600),
        generator.exponential(150, 600),
    )
    sizes = (np.clip(draw[seed % 3], 1, 1024)).astype(int).tolist()
    assert len(pack_best_fit(sizes, 1024)) <= first_fit_decreasing(sizes, 1024)


@given(lengths)
@settings(max_examples=100, deadline=None)
def test_no_two_rows_could_be_one(sizes: list[int]) -> None:
    rows = pack_best_fit(sizes, CAPACITY)
    assert Counter(item for row in rows for item in row) == Counter(range(len(sizes)))
    fill = sorted(sum(sizes[item] for item in row) for row in rows)
    assert fill[-1] <= CAPACITY
    if len(fill) > 1:
        assert fill[0] + fill[1] > CAPACITY


def test_packing_by_hand() -> None:
    # 6 opens a row (4 left), 5 another (5 left), 4 fits best with 6, 3 with 5, 2 fills that up.
    assert pack_best_fit([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]
    assert pack_best_fit([10, 10], 10) == [[0], [1]]
    assert pack_best_fit([], 10) == []


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="a sample of 65 tokens does not fit into rows of 64"):
        schedule([3, 65], "packed")
    with pytest.raises(ValueError, match="no samples"):
        schedule([])


def test_steps() -> None:
    plan = schedule([1] * 41, batch_size=4, group_by_length=False)  # 11 micro-batches
    assert [plan.num_steps(accumulation) for accumulation in (1, 4, 11, 20)] == [11, 3, 1, 1]
