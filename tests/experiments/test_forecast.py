"""The course of a file's jobs on paper, with a scheduler small enough to check by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from swift.core.errors import ConfigError
from swift.experiments.forecast import Choice, forecast, impossible
from swift.experiments.submission import Submission, check_machine
from swift.experiments.types import Dependency, Device, Inventory, JobSpec, Needs, Placement

GIB = 1 << 30
INVENTORY = Inventory(
    tuple(Device("cuda", index, "card", 8 * GIB, 8 * GIB) for index in range(2)), 4, 16 * GIB
)


def one_a_device(
    ready: Sequence[JobSpec], running: Sequence[tuple[JobSpec, Placement]], now: float
) -> list[Choice]:
    free = [index for index in range(2) if not any(index in place.devices for _, place in running)]
    choices = []
    for spec in ready:
        if len(free) >= spec.needs.devices:
            devices = tuple(free[: spec.needs.devices])
            free = free[spec.needs.devices :]
            choices.append(Choice(spec.name, Placement("cuda", devices, GIB, 1)))
        else:
            choices.append(Choice(spec.name, None, f"{spec.needs.devices} devices wanted, {len(free)} free"))
    return choices


def job(
    name: str, tokens: int | None = 1000, after: Sequence[Dependency] = (), key: str = "k", **needs: int
) -> JobSpec:
    estimate = {"tokens": tokens, "memory_key": key, "memory_bytes": GIB}
    return JobSpec(name, name, "sft", needs=Needs(**needs), after=list(after), estimate=estimate)


def test_order_times_and_reasons() -> None:
    specs = [
        job("a", 1000),
        job("b", 3000),
        job("c", 1000),
        job("d", 500, [Dependency("a")]),
        job("e", devices=2),
    ]
    plan = forecast(specs, INVENTORY, one_a_device, {"k": 10.0})
    rows = {row["name"]: row for row in plan["jobs"]}
    assert [(rows[name]["order"], rows[name]["start_seconds"]) for name in "abcde"] == [
        (1, 0.0), (2, 0.0), (3, 100.0), (4, 200.0), (5, 300.0),
    ]  # fmt: skip
    assert plan["seconds"] == 400.0
    assert rows["a"]["wait"] is None
    assert rows["c"]["wait"] == "1 devices wanted, 0 free"
    assert rows["d"]["wait"] == "waits for a; 1 devices wanted, 0 free"
    assert rows["e"]["placement"] == {"kind": "cuda", "devices": [0, 1], "threads": 1}
    assert rows["e"]["memory_bytes"] == GIB


def test_unknown_speed_gives_an_order_and_no_times() -> None:
    specs = [job("a", key="new"), job("b"), job("c"), job("d", None, [Dependency("c")])]
    plan = forecast(specs, INVENTORY, one_a_device, {"k": 500.0})
    rows = {row["name"]: row for row in plan["jobs"]}
    assert [rows[name]["order"] for name in "abcd"] == [1, 2, 3, 4]
    assert (rows["a"]["start_seconds"], rows["a"]["seconds"]) == (0.0, None)
    assert rows["c"]["start_seconds"] is None and rows["c"]["seconds"] == 2.0
    assert plan["seconds"] is None


def test_stages_for_failures_do_not_start_and_impossible_jobs_are_named() -> None:
    specs = [job("a"), job("sorry", after=[Dependency("a", "failure")]), job("huge", devices=8)]
    rows = {row["name"]: row for row in forecast(specs, INVENTORY, one_a_device)["jobs"]}
    assert rows["sorry"]["order"] is None and rows["sorry"]["wait"] == "runs only when a fails"
    assert rows["huge"]["order"] is None
    assert rows["huge"]["problems"] == ["asks for 8 devices, this machine has 2 alike with 1.0 GiB"]


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
    assert says in forecast([spec], INVENTORY, one_a_device)["jobs"][0]["problems"][0]
    submission = Submission("g", "", [job("a"), spec])
    with pytest.raises(ConfigError, match=re.escape(f"b: {says}")) as caught:
        check_machine(submission, INVENTORY)
    assert "--wait" in (caught.value.fix or "")
    assert ("memory: 7782MiB; or" in (caught.value.fix or "")) == ("memory_bytes" in needs)
    (warning,) = check_machine(replace(submission, wait=True), INVENTORY)
    assert warning.startswith(f"b: {says}")
