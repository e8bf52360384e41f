"""Properties of the real scheduler on a simulated machine: never overcommitted, nobody starves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_simulator import (
    GIB,
    RESTART_SECONDS,
    SAVE_SECONDS,
    SCENARIOS,
    Outcome,
    Work,
    fifo_by_count,
    machine,
    mixed,
    ours,
    simulate,
    small,
)

from swift.experiments.scheduler import Placed, Policy

POLICY = Policy()


def watch_limits(running: Sequence[Placed]) -> None:
    """Memory of every device within its size; whole devices with one job; never more jobs than allowed."""
    memory: Counter[int] = Counter()
    count: Counter[int] = Counter()
    for placed in running:
        assert len(set(placed.placement.devices)) == len(placed.placement.devices)
        for device in placed.placement.devices:
            memory[device] += placed.placement.memory_bytes
            count[device] += 1
    assert all(held <= 80 * GIB for held in memory.values())
    assert all(number <= POLICY.jobs_per_device for number in count.values())
    for placed in running:
        assert not placed.whole or all(count[device] == 1 for device in placed.placement.devices)


def run(work: Sequence[Work]) -> Outcome:
    return simulate(work, ours(POLICY), watch=watch_limits)


jobs = st.builds(
    Work,
    arrival=st.integers(0, 300).map(float),
    seconds=st.integers(1, 100).map(float),
    gib=st.integers(1, 76),
    devices=st.sampled_from([1, 1, 1, 1, 2, 3, 4, 8]),
    compute=st.sampled_from([0.2, 0.5, 1.0]),
    priority=st.integers(0, 2),
    exclusive=st.booleans(),
    group=st.sampled_from(["a", "b"]),
)


@settings(max_examples=60, deadline=None)
@given(work=st.lists(jobs, min_size=1, max_size=40))
def test_any_mix_ends_without_overcommitment(work: list[Work]) -> None:
    outcome = run(work)
    slowest = POLICY.jobs_per_device * max(entry.seconds for entry in work)
    # A job that is first in line waits for jobs that run already; while it waits, what must end only gets less.
    levels = 8 * POLICY.jobs_per_device
    assert all(wait <= levels * slowest + 1e-3 for wait in outcome.heads.values())
    assert (
        outcome.makespan <= max(entry.arrival for entry in work) + sum(entry.seconds for entry in work) + 1e-3
    )


@pytest.mark.parametrize("devices", [2, 8])
def test_a_stream_of_small_jobs_does_not_starve_a_large_one(devices: int) -> None:
    """Small jobs come faster than they can be done, for ever; the large one starts when those before it are through."""
    stream = [Work(float(2 * number), 100.0, 30, compute=1.0) for number in range(500)]
    work = [*stream[:60], Work(120.0, 50.0, 60, devices=devices), *stream[60:]]
    outcome = run(work)
    in_front = sum(entry.seconds for entry in work[:60]) / 8
    assert outcome.heads[60] <= 2 * 100.0
    assert outcome.waits[60] <= in_front + 2 * 100.0
    assert max(outcome.waits[400:]) > outcome.waits[60]


@settings(max_examples=30, deadline=None)
@given(work=st.lists(jobs, min_size=2, max_size=30))
def test_preemption_in_any_mix_is_calm_and_ends(work: list[Work]) -> None:
    policy = Policy(preempt_after_seconds=30, ageing_seconds=20)
    outcome = simulate(work, ours(policy), watch=watch_limits, preemption=policy)
    for victim, by, ran in outcome.preemptions:
        assert work[victim].priority < work[by].priority, "by what was asked for, not by age"
        assert ran >= policy.preempt_after_seconds, "never at once again"


def test_an_urgent_job_gets_its_devices_at_once_and_the_others_go_on() -> None:
    """8 devices are full for four hours; after one, a short job of higher priority needs two of them whole."""
    work = [Work(float(number), 4 * 3600.0, 70) for number in range(8)]
    work += [Work(10.0, 3600.0, 70) for _ in range(4)]  # old by then: they must not take the room
    work += [Work(3600.0, 600.0, 40, devices=2, priority=1)]
    policy = Policy()
    calm, urgent = simulate(work, ours(policy)), simulate(work, ours(policy), preemption=policy)
    assert calm.preemptions == [] and calm.waits[-1] > 3 * 3600
    assert urgent.waits[-1] == SAVE_SECONDS
    # The two that ran shortest left, once. They came back behind the four that had waited longer by then.
    assert sorted(entry[:2] for entry in urgent.preemptions) == [(6, 12), (7, 12)]
    assert urgent.waits[8:12] == [4200.0, 4200.0, 7800.0, 7800.0]
    back = 7800.0 + 10.0 + 3600.0
    left = [4 * 3600.0 - ran + RESTART_SECONDS for _, _, ran in urgent.preemptions]
    assert urgent.makespan == pytest.approx(back + max(left))


def test_a_stream_of_urgent_jobs_does_not_starve_a_patient_one() -> None:
    policy = Policy(ageing_seconds=60)
    work = [Work(0.0, 10.0, 70, devices=8)]
    work += [Work(float(number), 10.0, 60, priority=5) for number in range(600)]
    outcome = simulate(work, ours(policy), watch=watch_limits)
    # Jobs more than 5 x 60 s younger come after it; the others have to be done first, 8 at a time.
    assert outcome.waits[0] <= 300 * 10.0 / 8 + 2 * 10.0
    assert max(outcome.waits[1:]) > 0


def test_a_large_single_device_job_beside_a_stream_of_small_ones() -> None:
    work = [Work(0.0, 90.0, 40, compute=0.2) for _ in range(8)]
    work += [Work(1.0, 10.0, 70)]
    work += [Work(2.0 + number, 90.0, 9, compute=0.2) for number in range(200)]
    assert run(work).waits[8] <= 2 * 90.0


def test_the_articles_scenario_starts_everything_at_once() -> None:
    outcome = run(SCENARIOS["article: 4 QLoRA runs"]())
    assert outcome.waits == [0.0] * 4
    assert outcome.makespan == 2 * 3600.0


def test_a_sweep_ends_earlier_than_with_one_job_a_device() -> None:
    work = SCENARIOS["sweep: 32 QLoRA runs"]()
    assert run(work).makespan < 0.7 * simulate(work, fifo_by_count).makespan


@pytest.mark.parametrize(("make", "wait"), [(mixed, 0.95), (small, 0.5)])
def test_a_day_waits_less_than_by_counting(make: Callable[[int], list[Work]], wait: float) -> None:
    """Over several days together; on a single one luck decides."""
    mine = [run(make(seed)) for seed in range(6)]
    counted = [simulate(make(seed), fifo_by_count) for seed in range(6)]
    assert sum(day.mean_wait for day in mine) < wait * sum(day.mean_wait for day in counted)
    assert sum(day.makespan for day in mine) <= sum(day.makespan for day in counted)


def test_the_simulator_itself() -> None:
    """Two jobs of compute 1 on one device take twice as long; of compute 0.5 they do not."""
    one = machine(1)
    for compute, ends in ((1.0, 20.0), (0.5, 10.0)):
        pair = [Work(0.0, 10.0, 10, compute=compute)] * 2
        outcome = simulate(pair, ours(POLICY), one)
        assert (outcome.makespan, outcome.waits) == (pytest.approx(ends), [0.0, 0.0])
        assert outcome.compute_share == pytest.approx(1.0)
    counted = simulate([Work(0.0, 10.0, 10), Work(1.0, 5.0, 10)], fifo_by_count, one)
    assert counted.waits == [0.0, 9.0] and counted.makespan == 15.0
    with pytest.raises(RuntimeError, match="j0"):
        simulate([Work(0.0, 10.0, 10, devices=2)], ours(POLICY), one)
