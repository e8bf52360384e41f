"""Which trainings run fused, what a group takes of the machine, and what becomes of its members."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from engines import GIB, World
from hypothesis import given
from hypothesis import strategies as st

from swift.config.bind import resolve
from swift.experiments.fuse_choice import PLANS, TOLERANCE, Choice, choose, shape_of
from swift.experiments.fused_member import EXIT_HOST_DIED
from swift.experiments.fusing import apply_verdicts, fuse_fields, told_verdicts
from swift.experiments.home import Home
from swift.experiments.types import Device, Needs

MEMORY = {"memory_bytes": 3 * GIB, "memory_key": "sft/lora/x"}


def fusable(world, name, plan="fused", key="k", **fields):
    """A training that says of itself what `fuse_fields` and a verdict would."""
    fuse = {"key": key, "weights_bytes": 2 * GIB, "plan": plan, "why": "measured"}
    fields = {"needs": Needs(), "estimate": MEMORY, **fields}
    return world.training(name, fuse=fuse, **fields)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def launched(world):
    return {job: launch for job, _, launch in world.runner.launched}


def test_a_group_is_one_process_and_a_job_for_each_member(world):
    world.submit(*(fusable(world, name) for name in "abc"))
    started = launched(world)
    assert set(started) == {"fused-j1-1", "j1", "j2", "j3"}
    host = started["fused-j1-1"]
    assert host.argv[-3:] == ["fuse", "--group", str(world.home.job_dir("fused-j1-1"))]
    assert host.env["OMP_NUM_THREADS"] == "2"  # all cores of a machine without accelerators
    assert json.loads((world.home.job_dir("fused-j1-1") / "group.json").read_text()) == {
        "members": ["j1", "j2", "j3"],
        "processes": 1,
    }
    for job, name in (("j1", "a"), ("j2", "b"), ("j3", "c")):
        member = started[job]
        assert member.argv[2:4] == ["-m", "swift.experiments.fused_member"] and member.memory_bytes is None
        request = json.loads(Path(member.argv[-1]).read_text())
        assert request["job"] == job and request["name"] == name and request["words"][0] == "sft"
        assert world.job(name).placement.fused == "fused-j1-1" and world.job(name).state == "starting"
    world.tick()
    assert [world.job(name).state for name in "abc"] == ["running"] * 3
    assert "fused with 2 more on one base: measured" in str(world.store.events(job="j2"))


def test_memory_of_a_group_is_the_base_once_and_everybody_s_own_parts(world):
    """3 GiB each, 2 GiB of which are the base: 3 + 1 + 1, with the margin of an estimate nobody has checked yet."""
    world.submit(*(fusable(world, name) for name in "abc"))
    placement = world.job("a").placement
    total = placement.memory_bytes * len(placement.devices)
    assert total == pytest.approx(3 * 3.0 * GIB * 1.15 - 2 * 2 * GIB, rel=1e-6)


def test_the_place_of_a_group_is_held_until_its_last_member_has_ended(tmp_path):
    world = World(tmp_path, devices=(Device("cuda", 0, "gpu", 12 * GIB, 12 * GIB),))
    world.submit(*(fusable(world, name) for name in "ab"))
    world.tick()
    world.submit(world.training("later", needs=Needs(memory_bytes=8 * GIB)), group="other")
    assert world.job("later").state == "queued"
    world.end("a")
    assert world.job("a").state == "succeeded"
    world.tick(10)
    assert world.job("later").state == "queued"
    world.end("b")
    world.tick(10)
    assert world.job("later").state in ("starting", "running")


def test_members_that_do_not_fit_together_make_more_groups(tmp_path):
    """Of 15.2 GiB: 3.45 for the first, 1.45 for each further one; nine fit, the others wait as a group of their own,
    or for somebody of the first to leave."""
    world = World(tmp_path, devices=(Device("cuda", 0, "gpu", 16 * GIB, 16 * GIB),))
    world.submit(*(fusable(world, f"m{at}") for at in range(11)))
    hosts = [world.job(f"m{at}").placement for at in range(11)]
    assert [place.fused if place else None for place in hosts] == ["fused-j1-1"] * 9 + [None] * 2
    for at in range(8):
        world.end(f"m{at}")
    world.tick(10)
    assert {world.job(f"m{at}").placement.fused for at in (8, 9, 10)} == {"fused-j1-1"}


def test_a_queued_job_joins_a_group_that_runs(world):
    """Later, by itself, from another submission: what was measured says that a group of three is faster."""
    world.submit(*(fusable(world, name) for name in "ab"))
    late = {**fusable(world, "c").fuse}
    del late["plan"], late["why"]
    known = replace(fusable(world, "c"), fuse=late)
    members = [fusable(world, name) for name in "abc"]
    shape = shape_of(members)
    world.home.root.joinpath("fused-speeds.json").write_text(
        json.dumps({shape: {"fused": 1.0, "separate": 2.0, "sequence": 3.0}})
    )
    world.tick()
    world.submit(known, group="later")
    joined = world.job("c")
    assert joined.placement.fused == "fused-j1-1" and joined.state == "starting"
    assert "joins 2 more on one base, which run already: measured: fused is fastest" in str(
        world.store.events(job="j3")
    )
    assert [job for job, _, _ in world.runner.launched].count("fused-j1-1") == 1, "there is one process"
    assert launched(world)["j3"].argv[2:4] == ["-m", "swift.experiments.fused_member"]
    world.tick()
    for name in "ab":
        world.end(name)
    assert world.job("c").state == "running" and world.job("c").placement.fused == "fused-j1-1"
    world.checkpoint("c")
    world.end("c", EXIT_HOST_DIED, log="the process of the fused group died; the run goes on alone")
    world.tick(60)
    assert world.job("c").placement.fused == ""
    assert launched(world)["j3"].argv[3:5] == ["resume", world.job("c").spec.run_dir]


@pytest.mark.parametrize(
    ("fields", "speeds"),
    [
        ({"key": "other"}, None),
        ({"priority": 1}, None),
        ({"plan": "separate"}, None),
        ({"plan": None}, {"fused": 1.0, "separate": 0.9, "sequence": 3.0}),
        ({"plan": None}, None),
        ({"max_parallel": 0}, None),
    ],
    ids=["base", "priority", "verdict", "slower", "unknown", "max_parallel"],
)
def test_who_does_not_join_a_group(world, fields, speeds):
    world.submit(*(fusable(world, name) for name in "ab"))
    world.tick()
    job = fusable(world, "c", **{"plan": "fused", **fields})
    if fields.get("plan", "") is None:
        job = replace(job, fuse={key: value for key, value in job.fuse.items() if key not in ("plan", "why")})
    if speeds is not None:
        shape = shape_of([fusable(world, name) for name in "abc"])
        world.home.root.joinpath("fused-speeds.json").write_text(json.dumps({shape: speeds}))
    world.submit(job, group="later")
    placement = world.job("c").placement
    assert placement is None or placement.fused == ""


def test_a_group_takes_in_what_its_process_has_memory_for(tmp_path):
    """A group of two, 4.9 of 16 GiB, beside which others may run, has no room for a third before one has left."""
    world = World(tmp_path, devices=(Device("cuda", 0, "gpu", 16 * GIB, 16 * GIB),))
    world.submit(*(fusable(world, name) for name in "ab"))
    world.tick()
    world.submit(fusable(world, "c"), group="later")
    assert world.job("c").placement.fused == ""
    world.end("a")
    world.submit(fusable(world, "d"), group="last")
    assert world.job("d").placement.fused == "fused-j1-1"


def test_other_keys_priorities_submissions_and_plans_do_not_mix(world):
    world.submit(
        fusable(world, "a"),
        fusable(world, "b", key="other"),
        fusable(world, "c", priority=1),
        fusable(world, "d", plan="separate"),
        world.training("e"),
    )
    world.submit(fusable(world, "f"), group="h")
    assert not any(job.startswith("fused") for job in launched(world))


def test_a_group_counts_for_max_parallel(world):
    world.submit(*(fusable(world, name, max_parallel=2) for name in "abcd"))
    assert set(launched(world)) == {"fused-j1-1", "j1", "j2"}
    assert [world.job(name).state for name in "cd"] == ["queued"] * 2


def test_after_a_crash_of_the_common_process_every_member_goes_on_alone(world):
    world.submit(*(fusable(world, name) for name in "ab"))
    world.checkpoint("b")
    for name in "ab":
        world.end(name, EXIT_HOST_DIED, log="the process of the fused group died; the run goes on alone")
    assert [world.job(name).state for name in "ab"] == ["queued"] * 2
    world.tick(60)
    placements = [world.job(name).placement for name in "ab"]
    assert [place.fused for place in placements] == ["", ""]
    words = {job: launch.argv[3:] for job, attempt, launch in world.runner.launched if attempt == 2}
    assert words["j1"][0] == "sft" and words["j2"][:2] == ["resume", world.job("b").spec.run_dir]


def test_one_member_is_stopped_or_fails_and_the_others_run_on(world):
    world.submit(*(fusable(world, name) for name in "abc"))
    world.tick()
    world.engine.stop("j1")
    assert ("j1", 1) in [(job, attempt) for job, attempt, _ in world.runner.stopped]
    world.end("a", 143)
    world.end("b", 1, log="error: the loss is not finite at step 3", status={"failure": "nonfinite"})
    assert [world.job(name).state for name in "abc"] == ["cancelled", "failed", "running"]


def test_one_after_another_takes_all_cores(world):
    world.submit(*(fusable(world, name, plan="sequence") for name in "ab"))
    assert world.job("a").placement.threads == 2 and world.job("b").state == "queued"


TIMES = st.floats(0.01, 100.0)


@given(st.fixed_dictionaries({"fused": TIMES, "sequence": TIMES}, optional={"separate": TIMES}))
def test_no_plan_is_chosen_that_is_slower_than_the_tolerance(seconds):
    plan, why = choose(seconds)
    assert min(seconds.values()) / seconds[plan] >= TOLERANCE
    assert "fastest here" in why and plan in PLANS


def test_of_equal_plans_the_one_with_processes_of_its_own_is_taken():
    assert choose({"fused": 1.0, "separate": 1.01, "sequence": 1.0})[0] == "separate"
    assert choose({"fused": 1.0, "separate": 1.1, "sequence": 1.01})[0] == "fused"


def test_a_shape_is_measured_once_and_then_known(tmp_path, world):
    home, said, asked = Home.find(tmp_path / "home"), [], []

    def measure(specs):
        asked.append(len(specs))
        return {"fused": 1.0, "separate": 2.0, "sequence": 3.0}

    specs = [fusable(world, name) for name in "abcd"]
    for _ in range(2):
        plan, why = Choice(home, measure, said.append)(specs)
        assert plan == "fused" and "2.00x the time" in why
    assert asked == [4] and len(said) == 1
    assert Choice(home)(specs)[0] == "fused"  # the service itself measures nothing, but it knows
    assert Choice(home, measure)([fusable(world, name, options={"lora_rank": 64}) for name in "ab"])
    assert asked == [4, 2]
    unknown = [fusable(world, name, options={"lora_rank": 3}) for name in "ab"]
    assert Choice(home)(unknown)[0] == "separate"


def test_a_submission_that_nobody_judged_is_fused_when_its_shape_is_known(world):
    specs = [world.training(name, fuse={"key": "k"}, estimate=MEMORY, needs=Needs()) for name in "ab"]
    world.submit(*specs)
    assert [world.job(name).placement.fused for name in "ab"] == ["", ""]
    assert world.job("a").spec.fuse["why"] == "it was not measured whether fusing pays"
    for name in "ab":
        world.end(name)
    Choice(world.home, lambda members: {"fused": 1.0, "separate": 2.0, "sequence": 2.0})(specs)
    world.submit(*(replace(spec, name=f"{spec.name}2") for spec in specs), group="again")
    assert {world.job(name).placement.fused for name in ("a2", "b2")} == {"fused-j3-1"}


def test_the_plan_of_a_file_tells_whether_its_trainings_run_fused(world):
    specs = [fusable(world, name) for name in "abc"]
    (line,) = told_verdicts(apply_verdicts(specs, "auto", Choice(world.home)))
    assert line == "3 trainings on one base model: separate (it was not measured whether fusing pays)"
    Choice(world.home, lambda members: {"fused": 1.0, "separate": 2.0, "sequence": 3.0})(specs)
    (line,) = told_verdicts(apply_verdicts(specs, "auto", Choice(world.home)))
    assert line.startswith("3 trainings on one base model: fused (measured: fused is fastest here")


def test_short_work_is_not_measured(tmp_path, world):
    specs = [fusable(world, name, estimate={**MEMORY, "seconds": 50.0}) for name in "ab"]
    plan, why = Choice(Home.find(tmp_path / "home"), lambda members: {"fused": 1.0})(specs)
    assert plan == "separate" and why.startswith("100 s of work in all")
    longer = [fusable(world, name, estimate={**MEMORY, "seconds": 70.0}) for name in "ab"]
    assert Choice(Home.find(tmp_path / "home"), lambda members: {"fused": 1.0})(longer)[0] == "fused"


def test_a_measurement_that_fails_leaves_things_as_they_were(tmp_path, world):
    def measure(specs):
        raise ValueError("no room")

    plan, why = Choice(Home.find(tmp_path / "home"), measure)([fusable(world, "a"), fusable(world, "b")])
    assert plan == "separate" and "no room" in why


def config(**options):
    return resolve("sft", values={"model": "/m", "dataset": "d", **options}, planning=True)


def test_the_key_is_that_of_the_model_not_of_adapter_data_and_optimization():
    def key(**options):
        return fuse_fields(config(**options), {}, {}).get("key")

    first = key()
    assert first == key(lora_rank=3, learning_rate=1.0, dataset="e", seed=3, per_device_train_batch_size=7)
    others = [
        key(model="/n"),
        key(torch_dtype="bfloat16"),
        key(quant_bits=4),
        key(gradient_checkpointing=True),
    ]
    assert len({first, *others}) == 5
    assert "LoRA" in fuse_fields(config(tuner_type="full"), {}, {})["problem"]
    assert fuse_fields(config(), {"A": "1"}, {})["key"] != first


@pytest.mark.parametrize("kind,is_fused", [("dpo", True), ("kto", True), ("rm", False), ("grpo", False)])
def test_preferences_are_fused_and_other_reinforcement_is_not(kind, is_fused):
    values = {"model": "/m", "dataset": "d", "rlhf_type": kind, "per_device_train_batch_size": 8}
    fields = fuse_fields(resolve("rlhf", values=values, planning=True), {}, {})
    assert ("key" in fields) is is_fused and ("problem" in fields) is not is_fused


@pytest.mark.parametrize("mode,plan", [("always", "fused"), ("never", "separate"), ("auto", "sequence")])
def test_the_user_s_word_goes_before_the_measurement(world, mode, plan):
    specs = [world.training(name, fuse={"key": "k"}) for name in "ab"] + [
        world.training("c", fuse={"key": "l"})
    ]
    done = apply_verdicts(specs, mode, lambda members: ("sequence", f"{len(members)} measured"))
    assert [spec.fuse.get("plan") for spec in done] == [plan, plan, None if mode == "auto" else plan]


class FakeHost:
    """The other end of a member's connection."""

    def __init__(self, folder):
        self.path = folder / "fused.sock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.path))
        self.listener.listen(1)
        self.listener.settimeout(60)

    def member(self, folder):
        request = folder / "request.json"
        request.write_text(json.dumps({"job": "j1", "words": ["sft", "x.yaml"]}))
        return subprocess.Popen(
            [sys.executable, "-m", "swift.experiments.fused_member", str(self.path), str(request)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def short_folder(tmp_path):
    assert len(os.fsencode(tmp_path)) < 80
    return tmp_path


def test_a_member_hands_its_run_over_and_ends_as_the_run_ended(short_folder):
    host = FakeHost(short_folder)
    process = host.member(short_folder)
    connection, _ = host.listener.accept()
    lines = connection.makefile("rb")
    assert json.loads(lines.readline())["words"] == ["sft", "x.yaml"]
    connection.sendall(b'{"text": "step 1"}\n{"text": "no", "error": true}\n')
    assert process.stdout.readline() == "step 1\n"
    process.send_signal(signal.SIGTERM)
    assert json.loads(lines.readline()) == {"stop": int(signal.SIGTERM)}
    connection.sendall(b'{"exit": 143}\n')
    assert process.wait(30) == 143 and process.stderr.read() == "no\n"


def test_a_member_whose_host_dies_says_so_by_its_exit_code(short_folder):
    host = FakeHost(short_folder)
    process = host.member(short_folder)
    thread = threading.Thread(target=lambda: host.listener.accept()[0].close())
    thread.start()
    assert process.wait(30) == EXIT_HOST_DIED
    thread.join(30)
    assert "died" in process.stderr.read()
