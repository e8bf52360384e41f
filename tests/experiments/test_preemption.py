"""Preemption: who leaves for whom, what never leaves, and a real job that goes on from where it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.experiments.engines import World
from tests.experiments.services import Services, wait_for
from tests.experiments.test_scheduler import EXACT, GIB, gpus, job, machine, slots

from swift.core.errors import UsageError
from swift.experiments.preemption import Preemption, preempt
from swift.experiments.scheduler import Placed, Policy, QueuedJob, decide
from swift.experiments.types import Inventory, JobSpec, Needs, Placement

NOW = 1000.0


def runs(number: int, gib: float, *devices: int, kind: str = "cuda", **changes: object) -> Placed:
    placement = Placement(kind, devices, round(gib * GIB), 1)
    return Placed(
        **{"job_id": f"r{number}", "group": "r", "placement": placement, "resumable": True, **changes}
    )  # type: ignore[arg-type]


def chosen(
    queue: list[QueuedJob], running: list[Placed], inventory: Inventory, policy: Policy = EXACT
) -> Preemption | None:
    decisions = decide(queue, inventory, running, NOW, policy)
    return preempt(queue, decisions, inventory, running, NOW, policy)


URGENT = job(9, 40, priority=5, submitted=NOW)


def test_the_fewest_leave_and_the_reason_names_them() -> None:
    running = [runs(1, 25, 0), runs(2, 25, 0), runs(3, 25, 0), runs(4, 60, 1)]
    found = chosen([URGENT], running, machine(gpus(2)))
    assert found == Preemption("j9", ("r4",), "j9 has priority 5 and finds no room beside r4 (priority 0)")
    # One whole device is needed: the device with one job on it is cleared, not the one with three.
    whole = replace(URGENT, needs=Needs(exclusive=True))
    assert chosen([whole], running, machine(gpus(2))).victims == ("r4",)  # type: ignore[union-attr]


def test_of_equal_sets_the_lowest_priority_and_then_the_shortest_run_leave() -> None:
    running = [
        runs(1, 70, 0, priority=2),
        runs(2, 70, 1, priority=1, started=10.0),
        runs(3, 70, 2, priority=1, started=500.0),
    ]
    assert chosen([URGENT], running, machine(gpus(3))).victims == ("r3",)  # type: ignore[union-attr]
    several = replace(URGENT, needs=Needs(devices=2))
    assert set(chosen([several], running, machine(gpus(3))).victims) == {"r2", "r3"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes",
    [
        {"priority": 5},
        {"resumable": False},
        {"started": NOW - 299},
        {"leaving": ""},
        {"leaving": "j9"},
        {"leaving": "j8"},
    ],
)
def test_what_is_never_preempted(changes: dict[str, object]) -> None:
    assert chosen([URGENT], [runs(1, 70, 0, **changes)], machine(gpus(1))) is None


def test_age_alone_never_preempts_and_neither_does_who_may_not() -> None:
    old = job(1, 40, submitted=NOW - 1e6)
    running = [runs(1, 70, 0)]
    assert chosen([old], running, machine(gpus(1))) is None
    assert chosen([replace(URGENT, needs=Needs(preemption=False))], running, machine(gpus(1))) is None
    assert chosen([URGENT], running, machine(gpus(1)), replace(EXACT, preemption=False)) is None
    # An old job in front changes nothing for the urgent one: the room is made for it.
    assert chosen([old, URGENT], running, machine(gpus(1))).job_id == "j9"  # type: ignore[union-attr]


def test_nobody_leaves_in_vain() -> None:
    running = [runs(1, 40, 0), runs(2, 40, 0, resumable=False)]
    assert chosen([job(9, 50, priority=5)], running, machine(gpus(1))) is None
    limited = replace(URGENT, max_parallel=1, group="r")
    assert chosen([limited], running, machine(gpus(1))) is None
    # What fits by itself, or once those that leave have left, preempts nobody.
    assert chosen([URGENT], [runs(1, 40, 0)], machine(gpus(1))) is None
    assert chosen([URGENT], [runs(1, 70, 0, leaving=""), runs(2, 70, 1)], machine(gpus(2))) is None


def test_room_that_is_being_made_for_one_is_not_counted_for_another() -> None:
    running = [runs(1, 70, 0, leaving="j8"), runs(2, 70, 1), runs(3, 9, 0)]
    queue = [job(8, 70, priority=5, first=True), URGENT]
    found = chosen(queue, running, machine(gpus(2)))
    assert found is not None and (found.job_id, found.victims) == ("j9", ("r2",))


def test_cpu_slots_are_cleared_too() -> None:
    running = [runs(n, 1, n, kind="cpu", priority=n) for n in range(3)]
    urgent = job(9, 1, priority=7, threads=2)
    assert set(chosen([urgent], running, slots(3)).victims) == {"r0", "r1"}  # type: ignore[union-attr]


def test_the_one_room_is_made_for_goes_first_and_a_preempted_job_counts_its_age_anew() -> None:
    from swift.experiments.scheduler import schedule_order

    old = job(1, submitted=0.0)
    back = job(2, submitted=0.0, returned=NOW)
    urgent = job(3, priority=1, submitted=NOW, first=True)
    later = job(4, priority=1, submitted=NOW)
    order = [entry.job_id for entry in schedule_order([back, later, urgent, old], NOW + 60, 600)]
    assert order == ["j3", "j1", "j4", "j2"]


# The engine


@pytest.fixture
def world(tmp_path):  # type: ignore[no-untyped-def]
    return World(tmp_path, slots=1, schedule=Policy(preempt_after_seconds=0), clock=lambda: 4e9)


def test_a_job_makes_room_and_goes_on_from_its_checkpoint(world) -> None:  # type: ignore[no-untyped-def]
    world.submit(world.training("low"))
    world.tick()
    world.submit(world.spec("urgent", priority=5), world.spec("other", priority=5), group="h")
    low, urgent = world.job("low"), world.job("urgent")
    assert (low.state, low.preempted["by"], low.to_dict()["preempted_by"]) == (
        "pausing",
        urgent.id,
        urgent.id,
    )
    assert world.runner.stopped == [(low.id, 1, 30.0)]
    assert urgent.reason == f"waits until {low.id} of lower priority has saved a checkpoint"
    assert world.events("urgent", "preempts")[0]["jobs"] == [low.id]
    assert "urgent" not in world.events("low", "intent")[0]["reason"]
    for _ in range(3):
        world.tick(10)
    assert len(world.runner.stopped) == 1, "one at a time"
    world.checkpoint("low")
    world.end("low", 143, reason="stopped")
    assert world.states() == {"low": "queued", "urgent": "starting", "other": "queued"}
    assert "goes on from its checkpoint" in world.events("low", "state")[-1]["reason"]
    world.tick()
    world.end("urgent")
    assert world.states() == {"low": "queued", "urgent": "succeeded", "other": "starting"}
    world.end("other")
    assert world.argv("low") == ["resume", world.job("low").spec.run_dir]
    low = world.job("low")
    assert (low.state, low.attempt, low.retries, low.preempted) == ("starting", 2, [], None)


def test_a_wish_of_the_user_counts_more_than_a_preemption(world) -> None:  # type: ignore[no-untyped-def]
    world.submit(world.training("low"))
    world.tick()
    world.engine.stop(world.job("low").id)
    world.submit(world.spec("urgent", priority=5), group="h")
    assert not world.events("urgent", "preempts")
    world.end("low", 143, reason="stopped")
    assert world.states() == {"low": "cancelled", "urgent": "starting"}


def test_a_job_that_is_paused_while_it_makes_room_ends_paused(world) -> None:  # type: ignore[no-untyped-def]
    world.submit(world.training("low"))
    world.tick()
    world.submit(world.spec("urgent", priority=5), group="h")
    low = world.job("low")
    paused = world.engine.pause(low.id, grace_seconds=7)
    assert (paused.state, paused.reason) == ("pausing", "paused by the user; saves a checkpoint")
    assert world.runner.stopped == [(low.id, 1, 30.0), (low.id, 1, 7)]
    assert "has saved a checkpoint" in world.job("urgent").reason, "the room is still being made"
    world.checkpoint("low")
    world.engine = world.new_engine()
    world.end("low", 143, reason="stopped")
    assert world.states() == {"low": "paused", "urgent": "starting"}
    world.tick()
    world.end("urgent")
    world.tick()
    low = world.job("low")
    assert (low.state, low.reason, low.placement) == ("paused", "paused by the user", None)
    with pytest.raises(UsageError, match="is paused already"):
        world.engine.pause(low.id)
    world.engine.resume(low.id)
    world.tick()
    assert (world.state("low"), world.argv("low")) == ("starting", ["resume", low.spec.run_dir])


def test_a_pause_that_comes_when_the_room_is_made_finds_the_job_in_the_queue(world) -> None:  # type: ignore[no-untyped-def]
    world.submit(world.training("low"))
    world.tick()
    world.submit(world.spec("urgent", priority=5), group="h")
    tell = world.runner.stop

    def over(*_: object) -> None:
        world.runner.stop = tell
        world.store.transition("j1", "pausing", "queued", "preempted")

    world.runner.stop = over
    assert world.engine.pause(world.job("low").id).state == "paused"


def test_a_stop_after_a_pause_while_it_makes_room_counts(world) -> None:  # type: ignore[no-untyped-def]
    world.submit(world.training("low"))
    world.tick()
    world.submit(world.spec("urgent", priority=5), group="h")
    world.engine.pause(world.job("low").id)
    world.engine.stop(world.job("low").id)
    world.end("low", 143, reason="stopped")
    assert world.state("low") == "cancelled"


def test_jobs_that_cannot_go_on_stay(world) -> None:  # type: ignore[no-untyped-def]
    world.submit(world.spec("doctor"))
    world.tick()
    world.submit(world.spec("urgent", priority=5), group="h")
    assert world.states() == {"doctor": "running", "urgent": "queued"}


def test_an_engine_killed_before_it_told_the_job_is_made_up_for(world) -> None:  # type: ignore[no-untyped-def]
    world.submit(world.training("low"))
    world.tick()
    low, tell = world.job("low"), world.runner.stop
    world.runner.stop = lambda *_: None  # the kill comes after the record and before the signal
    world.submit(world.spec("urgent", priority=5), group="h")
    assert (world.state("low"), world.runner.stopped) == ("pausing", [])
    world.runner.stop, world.engine = tell, world.new_engine()
    world.tick()
    world.tick()
    assert world.runner.stopped == [(low.id, 1, 30.0)]


# Real processes

TRAINING = """
trap 'kill $!; exit 143' TERM
n=$(cat "$STEPS" 2>/dev/null || echo 0)
echo "from $n" >> "$STEPS.log"
while [ "$n" -lt 40 ] || ! test -e seen; do
  sleep 0.05 & wait $!; n=$((n+1)); echo $n > "$STEPS.new"; mv "$STEPS.new" "$STEPS"
done
"""


@pytest.mark.slow
def test_a_real_job_is_preempted_and_loses_no_step(tmp_path) -> None:  # type: ignore[no-untyped-def]
    services = Services(tmp_path)
    steps = tmp_path / "steps"
    services.env |= {"STEPS": str(steps), "PREEMPT_AFTER": "0", "SLOTS": "1"}
    needs = Needs(memory_bytes=2**20)
    low = JobSpec(
        "low",
        "low",
        "sft",
        words=[TRAINING.strip()],
        cwd=str(tmp_path),
        run_dir=str(tmp_path / "low"),
        needs=needs,
    )
    urgent = JobSpec(
        "urgent", "urgent", "doctor", words=["cat $STEPS > seen"], cwd=str(tmp_path), needs=needs, priority=3
    )
    try:
        services.store.add_group("low", "", [low])
        services.started()
        wait_for(lambda: steps.exists() and steps.read_text().strip() not in ("", "0"), "the first steps")
        services.store.add_group("urgent", "", [urgent])
        wait_for(services.all_ended, "both jobs to end")
        first, second = services.store.jobs()
        assert (first.state, second.state) == ("succeeded", "succeeded"), (first, second)
        assert (first.attempt, second.attempt) == (2, 1)
        begun = [int(line.split()[1]) for line in (tmp_path / "steps.log").read_text().splitlines()]
        assert begun[0] == 0 and len(begun) == 2
        assert 0 < begun[1] == int((tmp_path / "seen").read_text())
        assert int(steps.read_text()) >= 40
        assert services.ran("start") == ["j1", "j2", "j1"]
    finally:
        services.close()
