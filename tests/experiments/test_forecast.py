"""The course of a file's jobs on paper, on two devices that take one job each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from swift.core.errors import ConfigError
from swift.experiments.forecast import forecast, impossible
from swift.experiments.submission import Submission, check_machine
from swift.experiments.types import Dependency, Device, Inventory, JobSpec, Needs

GIB = 1 << 30
INVENTORY = Inventory(
    tuple(Device("cuda", index, "card", 8 * GIB, 8 * GIB) for index in range(2)), 4, 16 * GIB
)


def job(
    name: str, tokens: int | None = 1000, after: Sequence[Dependency] = (), key: str = "k", **needs: int
) -> JobSpec:
    estimate = {"tokens": tokens, "memory_key": key, "memory_bytes": 5 * GIB}  # one a device
    return JobSpec(name, name, "sft", needs=Needs(**needs), after=list(after), estimate=estimate)


def test_order_times_and_reasons() -> None:
    specs = [
        job("a", 1000),
        job("b", 3000),
        job("c", 1000),
        job("d", 500, [Dependency("a")]),
        job("e", devices=2),
    ]
    plan = forecast(specs, INVENTORY, speeds={"k": 10.0})
    rows = {row["name"]: row for row in plan["jobs"]}
    assert [(rows[name]["order"], rows[name]["start_seconds"]) for name in "abcde"] == [
        (1, 0.0), (2, 0.0), (3, 100.0), (4, 200.0), (5, 300.0),
    ]  # fmt: skip
    assert plan["seconds"] == 400.0
    assert rows["a"]["wait"] is None
    assert rows["c"]["wait"].startswith("waits for room on a device: 5.8 GiB needed; 1.8 GiB free on cuda:0")
    assert rows["d"]["wait"].startswith("waits for a; waits for room on a device: ")
    assert rows["e"]["placement"] == {"kind": "cuda", "devices": [0, 1], "threads": 4}
    assert rows["e"]["memory_bytes"] == 5 * GIB


def test_unknown_speed_gives_an_order_and_no_times() -> None:
    specs = [job("a", key="new"), job("b"), job("c"), job("d", None, [Dependency("c")])]
    plan = forecast(specs, INVENTORY, speeds={"k": 500.0})
    rows = {row["name"]: row for row in plan["jobs"]}
    assert [rows[name]["order"] for name in "abcd"] == [1, 2, 3, 4]
    assert (rows["a"]["start_seconds"], rows["a"]["seconds"]) == (0.0, None)
    assert rows["c"]["start_seconds"] is None and rows["c"]["seconds"] == 2.0
    assert plan["seconds"] is None


def test_stages_for_failures_do_not_start_and_impossible_jobs_are_named() -> None:
    specs = [job("a"), job("sorry", after=[Dependency("a", "failure")]), job("huge", devices=8)]
    rows = {row["name"]: row for row in forecast(specs, INVENTORY)["jobs"]}
    assert rows["sorry"]["order"] is None and rows["sorry"]["wait"] == "runs only when a fails"
    assert rows["huge"]["order"] is None
    assert rows["huge"]["problems"] == ["asks for 8 devices, this machine has 2 alike with 5.0 GiB"]


def test_what_a_problem_says_is_no_warning_as_well() -> None:
    spec = job("a")
    spec.estimate.update(
        problems=["x.jsonl: no such file\n  fix: y"], warnings=["x.jsonl: no such file", "other"]
    )
    (row,) = forecast([spec], INVENTORY)["jobs"]
    assert row["warnings"] == ["other"]


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ({"devices": 8}, "asks for 8 devices, this machine has 2 alike"),
        ({"threads": 64}, "asks for 64 threads, this machine has 4 cores"),
        # As the scheduler sees it: a part of the device's 8 GiB is never given away.
        ({"memory_bytes": 8 * GIB}, "needs 8.0 GiB on a device, at most 7.6 GiB can be used here"),
    ],
)
def test_impossible_requests_are_the_schedulers(needs: dict[str, int], says: str) -> None:
    spec = job("b", **needs)
    assert impossible(job("a"), INVENTORY) is None
    assert says in forecast([spec], INVENTORY)["jobs"][0]["problems"][0]
    submission = Submission("g", "", [job("a"), spec])
    with pytest.raises(ConfigError, match=re.escape(f"b: {says}")) as caught:
        check_machine(submission, INVENTORY)
    assert "--wait" in (caught.value.fix or "")
    assert ("memory: 7782MiB; or" in (caught.value.fix or "")) == ("memory_bytes" in needs)
    (warning,) = check_machine(replace(submission, wait=True), INVENTORY)
    assert warning.startswith(f"b: {says}")
