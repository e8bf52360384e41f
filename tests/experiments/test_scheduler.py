"""Placement: who starts where, who waits and why, and what is kept free for whom."""

from __future__ import annotations

import pytest

from swift.experiments.demand import estimate_memory, memory_key, placed, queued
from swift.experiments.scheduler import (
    Decision,
    Placed,
    Policy,
    QueuedJob,
    check_possible,
    decide,
    schedule_order,
)
from swift.experiments.types import Device, Inventory, Job, JobSpec, Needs, Placement

GIB = 1 << 30
EXACT = Policy(usable=1.0)


def gpus(count: int, gib: int = 80, free: int | None = None, name: str = "A100") -> list[Device]:
    return [
        Device("cuda", index, name, gib * GIB, (gib if free is None else free) * GIB)
        for index in range(count)
    ]


def machine(devices: list[Device], cores: int = 64) -> Inventory:
    return Inventory(tuple(devices), cores, 512 * GIB)


def slots(count: int, gib_each: int = 4, cores: int | None = None) -> Inventory:
    devices = tuple(Device("cpu", index, "CPU", gib_each * GIB, gib_each * GIB) for index in range(count))
    return Inventory(devices, cores or count, count * gib_each * GIB)


def job(number: int, gib: float | None = 10, devices: int = 1, **changes: object) -> QueuedJob:
    needs = {name: changes.pop(name) for name in ("exclusive", "threads") if name in changes}
    memory = None if gib is None else round(gib * GIB)
    values = {"group": "g", "order": number, "needs": Needs(devices=devices, **needs), "memory_bytes": memory}  # type: ignore[arg-type]
    return QueuedJob(**{"job_id": f"j{number}", **values, **changes})  # type: ignore[arg-type]


def holds(number: int, gib: float, *devices: int, whole: bool = False, started: float = 0.0) -> Placed:
    placement = Placement("cuda", devices, round(gib * GIB), 1)
    return Placed(f"r{number}", "other", placement, whole, started)


def places(decisions: list[Decision]) -> dict[str, tuple[int, ...] | None]:
    return {entry.job_id: entry.placement.devices if entry.placement else None for entry in decisions}


def reason(decisions: list[Decision], job_id: str) -> str:
    return next(entry.reason for entry in decisions if entry.job_id == job_id)


def test_few_jobs_get_a_device_each() -> None:
    decisions = decide([job(n) for n in range(4)], machine(gpus(8)), [], 0.0, EXACT)
    assert places(decisions) == {"j0": (0,), "j1": (1,), "j2": (2,), "j3": (3,)}
    assert reason(decisions, "j0") == "cuda:0 is idle: 10.0 GiB needed, 80.0 GiB free"
    assert decisions[0].placement == Placement("cuda", (0,), 10 * GIB, 8)


def test_jobs_share_a_device_where_they_fit_best() -> None:
    running = [holds(1, 50, 0), holds(2, 60, 1)]
    decisions = decide([job(5, 15), job(6, 25)], machine(gpus(2)), running, 0.0, EXACT)
    assert places(decisions) == {"j5": (1,), "j6": (0,)}
    assert reason(decisions, "j5") == "best fit: 15.0 GiB needed, 20.0 GiB free on cuda:1 beside 1 job"


def test_small_jobs_leave_idle_devices_to_a_job_that_wants_them_whole() -> None:
    running = [holds(1, 20, 0)]
    both = [job(1, 10), job(2, 40, devices=3)]
    assert places(decide(both, machine(gpus(4)), running, 0.0, EXACT)) == {"j1": (0,), "j2": (1, 2, 3)}
    alone = [job(1, 10)]
    assert places(decide(alone, machine(gpus(4)), running, 0.0, EXACT)) == {"j1": (1,)}


@pytest.mark.parametrize("demand", [{"devices": 2}, {"exclusive": True}, {"gib": None}])
def test_whole_devices_are_shared_with_nobody(demand: dict[str, object]) -> None:
    first = job(1, **{"gib": 5, **demand})  # type: ignore[arg-type]
    decisions = decide([first, job(2, 5)], machine(gpus(2)), [], 0.0, EXACT)
    mine = places(decisions)["j1"]
    assert mine is not None and not set(mine) & set(places(decisions)["j2"] or ())
    assert decisions[0].placement is not None and decisions[0].placement.memory_bytes == 80 * GIB
    shared = decide([first], machine(gpus(2)), [holds(1, 1, 0), holds(2, 1, 1)], 0.0, EXACT)
    assert places(shared) == {"j1": None}


def test_a_job_never_spans_different_devices() -> None:
    mixed = machine([*gpus(1), Device("cuda", 1, "H100", 80 * GIB, 80 * GIB), *gpus(3)[2:]])
    assert places(decide([job(1, devices=2)], mixed, [], 0.0, EXACT)) == {"j1": (0, 2)}
    decision = decide([job(1, devices=3)], mixed, [], 0.0, EXACT)[0]
    assert decision.impossible and "this machine has 2 alike" in decision.reason


def test_the_smallest_sufficient_devices_are_taken() -> None:
    mixed = machine([*gpus(2), *(Device("cuda", n, "L4", 24 * GIB, 24 * GIB) for n in (2, 3))])
    queue = [job(1, 20), job(2, 20, devices=2), job(3, 30)]
    assert places(decide(queue, mixed, [], 0.0, EXACT)) == {"j1": (2,), "j2": (0, 1), "j3": None}
    assert places(decide(queue[1:], mixed, [], 0.0, EXACT)) == {"j2": (2, 3), "j3": (0,)}


def test_other_peoples_processes_take_their_part() -> None:
    busy = Device("cuda", 0, "A100", 80 * GIB, 5 * GIB, foreign=((77, 75 * GIB),))
    decision = decide([job(1, 8)], machine([busy]), [], 0.0, EXACT)[0]
    assert (decision.placement, decision.impossible) == (None, False)
    assert decision.reason == (
        "waits for room on a device: 8.0 GiB needed; 5.0 GiB free on cuda:0"
        " (other people's processes hold 75.0 GiB)"
    )


def test_a_share_of_memory_is_never_given_away() -> None:
    assert places(decide([job(1, 77)], machine(gpus(1)), [], 0.0, Policy(usable=0.95))) == {"j1": None}
    assert places(decide([job(1, 76)], machine(gpus(1)), [], 0.0, Policy(usable=0.95))) == {"j1": (0,)}


def test_jobs_on_one_device_are_limited_in_number() -> None:
    decisions = decide([job(n, 1) for n in range(5)], machine(gpus(1)), [], 0.0, Policy(jobs_per_device=3))
    assert [place for place in places(decisions).values() if place] == [(0,)] * 3


@pytest.mark.parametrize(
    ("asked", "inventory", "why", "fix"),
    [
        (
            job(1, devices=8),
            slots(2),
            "asks for 8 devices, this machine has 2 CPU slots and no",
            "devices: 2",
        ),
        (job(1, devices=8), machine(gpus(4)), "asks for 8 devices, this machine has 4 alike", "devices: 4"),
        (job(1, 90), machine(gpus(4)), "needs 90.0 GiB on a device, at most 76.0 GiB", "smaller batch"),
        (job(1, 9), slots(2), "needs 9.0 GiB of memory, at most 7.6 GiB", "smaller batch"),
        (job(1, 1, threads=5), slots(4), "asks for 5 threads, this machine has 4", "threads: 4"),
    ],
)
def test_the_impossible_is_recognised(asked: QueuedJob, inventory: Inventory, why: str, fix: str) -> None:
    decision = check_possible(asked, inventory)
    assert decision is not None and decision.impossible and decision.placement is None
    assert why in decision.reason and fix in (decision.fix or "")
    # It does not hold up what is behind it.
    decisions = decide([asked, job(2, 1)], inventory, [], 0.0)
    assert places(decisions) == {"j1": None, "j2": (0,)} and decisions[0].impossible


def test_missing_devices_are_counted_and_named() -> None:
    running = [holds(1, 77, 0), holds(2, 10, 1, 2, whole=True)]
    decisions = decide([job(3, 8, devices=3)], machine(gpus(4)), running, 0.0, EXACT)
    assert reason(decisions, "j3") == (
        "waits for 2 more free devices: 8.0 GiB needed on each; cuda:0 runs 1 job, cuda:1 runs 1 job,"
        " cuda:2 runs 1 job; cuda:3, cuda:1, cuda:2 are kept free for it"
    )


def test_backfill_fills_what_the_reservation_leaves() -> None:
    """j1 wants two whole devices; cuda:1 is idle and kept, cuda:0 (the emptier busy one) too; the rest is open."""
    running = [holds(1, 20, 0), holds(2, 50, 2)]
    decisions = decide(
        [job(1, 10, devices=2), job(2, 10), job(3, 35)], machine(gpus(3)), [*running], 0.0, EXACT
    )
    assert places(decisions)["j1"] is None
    assert places(decisions)["j2"] == (2,)
    assert "kept for j1" in reason(decisions, "j3")


def test_a_job_beside_a_reserved_one_must_leave_room_for_it() -> None:
    running = [holds(1, 40, 0)]
    queue = [job(1, 60), job(2, 15), job(3, 15)]
    decisions = decide(queue, machine(gpus(1)), running, 0.0, EXACT)
    assert places(decisions) == {"j1": None, "j2": (0,), "j3": None}
    after = [Placed("j2", "g", Placement("cuda", (0,), 15 * GIB, 1), started=1.0)]
    assert places(decide([queue[0], queue[2]], machine(gpus(1)), after, 5.0, EXACT)) == {
        "j1": (0,),
        "j3": None,
    }


def test_priority_goes_first_and_age_catches_up() -> None:
    old, urgent = job(1, submitted=0.0), job(2, priority=2, submitted=150.0)
    assert [entry.job_id for entry in schedule_order([old, urgent], 150.0, 100)] == ["j2", "j1"]
    late = job(2, priority=2, submitted=250.0)
    assert [entry.job_id for entry in schedule_order([old, late], 250.0, 100)] == ["j1", "j2"]
    decisions = decide([old, urgent], machine(gpus(1, gib=10)), [], 150.0, Policy(100, usable=1.0))
    assert places(decisions) == {"j2": (0,), "j1": None}


def test_a_clock_set_back_does_not_put_early_jobs_last() -> None:
    queue = [job(1, submitted=9e9), job(2, submitted=9e9 + 5), job(3, submitted=100.0)]
    for now in (101.0, 5000.0, 9e9):
        assert [entry.order for entry in schedule_order(queue, now, 600)] == [1, 2, 3]


def test_limits_of_a_group_and_of_the_whole() -> None:
    queue = [job(n, 1, max_parallel=2, group="sweep") for n in range(3)] + [job(9, 1, group="other")]
    running = [Placed("r", "sweep", Placement("cuda", (0,), GIB, 1))]
    decisions = decide(queue, machine(gpus(8)), running, 0.0, EXACT)
    assert [entry.job_id for entry in decisions if entry.placement] == ["j0", "j9"]
    assert reason(decisions, "j1") == "waits: 2 jobs of sweep run, max_parallel is 2"
    decisions = decide(queue, machine(gpus(8)), running, 0.0, Policy(max_jobs=2))
    assert [entry.job_id for entry in decisions if entry.placement] == ["j0"]
    assert "max_jobs is 2" in reason(decisions, "j9")


def test_cpu_slots_are_limited_by_threads() -> None:
    decisions = decide([job(1, 1), job(2, 1, threads=2), job(3, 1)], slots(4), [], 0.0)
    assert places(decisions) == {"j1": (0,), "j2": (1, 2), "j3": (3,)}
    second = decisions[1].placement
    assert second is not None and (second.kind, second.threads, second.memory_bytes * 2) == ("cpu", 2, GIB)
    full = decide([job(4, 1, threads=3)], slots(4), [Placed("r", "g", second)], 0.0)
    assert reason(full, "j4").startswith("waits for 1 more free CPU slot: 3 needed, 2 free")
    assert places(decide([job(1, 1)], slots(2, cores=8), [], 0.0)) == {"j1": (0,)}
    assert decide([job(1, 1)], slots(2, cores=8), [], 0.0)[0].placement.threads == 4  # type: ignore[union-attr]


def test_cpu_memory_is_one_pool_and_kept_for_the_first_in_line() -> None:
    running = [Placed("r1", "g", Placement("cpu", (0,), 6 * GIB, 1))]
    decisions = decide([job(1, 8), job(2, 3), job(3, 7)], slots(4), running, 0.0, EXACT)
    assert places(decisions) == {"j1": (1,), "j2": None, "j3": None}
    decisions = decide([job(1, 12), job(2, 4), job(3, 4)], slots(4), running, 0.0, EXACT)
    assert places(decisions) == {"j1": None, "j2": (1,), "j3": None}
    assert "waits for memory: 12.0 GiB needed, 10.0 GiB free" in reason(decisions, "j1")


def test_jobs_without_devices_use_the_host_beside_accelerators() -> None:
    decisions = decide([job(n, 1, devices=0) for n in range(3)], machine(gpus(1), cores=2), [], 0.0)
    assert places(decisions) == {"j0": (), "j1": (), "j2": None}
    assert decisions[0].placement == Placement("cpu", (), GIB, 1)
    running = [Placed("j0", "g", decisions[0].placement), Placed("j1", "g", decisions[0].placement)]  # type: ignore[arg-type]
    assert "waits for 1 more free core" in reason(
        decide([job(5, 1, devices=0)], machine(gpus(1), 2), running, 0.0), "j5"
    )


def test_a_device_that_disappeared_holds_nothing_up() -> None:
    assert places(decide([job(1)], machine(gpus(1)), [holds(1, 80, 7)], 0.0)) == {"j1": (0,)}


def record(**changes: object) -> Job:
    estimate = {"memory_bytes": 10 * GIB, "memory_key": "sft/lora/Qwen3/7/bf16", "device": "cuda"}
    spec = JobSpec("a", "a", "sft", estimate=estimate, options={"gradient_checkpointing": True})
    return Job(**{"id": "j7", "group": "g", "spec": spec, "state": "queued", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratio", "observations", "factor"),
    [(1.0, 0, 1.15), (1.4, 1, 1.4 * 1.1), (0.7, 1, 0.9 * 1.1), (0.7, 18, 0.73 * 1.05), (0.1, 20, 0.5 * 1.05)],
)
def test_memory_is_corrected_carefully(ratio: float, observations: int, factor: float) -> None:
    estimate = estimate_memory(record(), lambda key: (ratio, observations))
    assert estimate.memory_bytes == pytest.approx(10 * GIB * factor, rel=1e-6)


def test_memory_of_jobs_that_ask_or_ran_out_or_are_unknown() -> None:
    def nothing(key: str) -> tuple[float, int]:
        return 1.0, 0

    asked = JobSpec("a", "a", "sft", needs=Needs(memory_bytes=GIB))
    assert estimate_memory(record(spec=asked), nothing).memory_bytes == GIB
    raised = record(spec=asked, retries=[{"memory_bytes": 2 * GIB}, {"change": "micro-batch"}])
    assert estimate_memory(raised, nothing).memory_bytes == 2 * GIB
    unknown = record(spec=JobSpec("a", "a", "data"))
    assert (estimate_memory(unknown, nothing).memory_bytes, memory_key(unknown)) == (None, None)
    assert memory_key(record()) == "sft/lora/Qwen3/7/bf16/checkpointing/cuda"
    assert (
        memory_key(record(overrides={"gradient_checkpointing": False})) == "sft/lora/Qwen3/7/bf16/plain/cuda"
    )


def test_records_become_what_the_scheduler_sees() -> None:
    waiting = queued(record(priority=3, submitted=5.0), lambda key: (1.0, 5))
    assert (waiting.order, waiting.priority, waiting.submitted) == (7, 3, 5.0)
    assert waiting.memory_bytes == pytest.approx(10.5 * GIB)
    place = Placement("cuda", (1,), GIB, 2)
    assert placed(record()) is None
    assert placed(record(placement=place, started=9.0)) == Placed("j7", "g", place, False, 9.0)
    unknown = placed(record(spec=JobSpec("a", "a", "data"), placement=place))
    assert unknown is not None and unknown.whole
