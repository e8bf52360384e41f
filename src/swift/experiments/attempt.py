"""One attempt at a job: how it is started, and what its files say afterwards."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from swift.config.commands import COMMANDS
from swift.core.errors import SwiftError
from swift.core.files import atomic_write_text, read_json
from swift.experiments.fusing import FUSED_SOCKET, WHOLE_SHARE
from swift.experiments.home import Home
from swift.experiments.isolation import environment_for
from swift.experiments.progress import OUTPUT_LOG
from swift.experiments.serving import SERVING, ready_file
from swift.experiments.types import TRAINING, Inventory, Job, Launch, Placement
from swift.runs.folder import RunFolder
from swift.runs.status import read_status

__all__ = ["attempt_log", "build_host", "build_launch", "effective_options", "processes_of", "run_status"]

_LOG_BYTES = 32_768
_LEAST_HOST_BYTES = 2 * 2**30


def build_launch(
    home: Home,
    job: Job,
    base_env: Mapping[str, str],
    inventory: Inventory | None = None,
    *,
    grace_seconds: float = 30.0,
) -> Launch:
    """The command line, environment and limits of ``job.attempt``.

    A training goes on from its last checkpoint (``swift resume RUN``). Without one it starts from the snapshot, and
    what an earlier attempt of this job left in the run folder is moved aside to ``RUN.attempt-N``.

    Raises SwiftError when the working folder is gone or a file of the job cannot be written.
    """
    spec, placement = job.spec, job.placement
    assert placement is not None
    if not Path(spec.cwd).is_dir():
        raise SwiftError(
            "the folder the job was submitted from is gone", where=spec.cwd, fix="create it again"
        )
    if placement.fused:
        return _build_member(home, job, base_env, grace_seconds)
    return _placed(
        job,
        _words(home, job),
        environment_for(placement, {**base_env, **spec.env}, home.job_dir(job.id)),
        inventory,
        time_limit_seconds=spec.needs.time_limit_seconds,
        grace_seconds=grace_seconds,
    )


def _build_member(home: Home, job: Job, base_env: Mapping[str, str], grace_seconds: float) -> Launch:
    """The small process that hands the run to the host of its group."""
    assert job.placement is not None
    request = home.attempt_dir(job.id, job.attempt) / "request.json"
    words = {"job": job.id, "name": job.spec.name, "words": _words(home, job)}
    atomic_write_text(request, json.dumps(words))
    address = str(home.job_dir(job.placement.fused) / FUSED_SOCKET)
    return Launch(
        argv=[sys.executable, "-P", "-m", "swift.experiments.fused_member", address, str(request)],
        cwd=job.spec.cwd,
        env={**base_env, **job.spec.env, "PYTHONUNBUFFERED": "1"},
        log=OUTPUT_LOG,
        time_limit_seconds=job.spec.needs.time_limit_seconds,
        grace_seconds=grace_seconds,
    )


def build_host(
    home: Home,
    job: Job,
    base_env: Mapping[str, str],
    inventory: Inventory | None = None,
    *,
    grace_seconds: float = 30.0,
) -> Launch:
    """The process of the fused group that ``job`` belongs to; the placement is that of all members."""
    placement = job.placement
    assert placement is not None and placement.fused
    folder = home.job_dir(placement.fused)
    env = environment_for(placement, {**base_env, **job.spec.env}, folder)
    return _placed(job, ["fuse", "--group", str(folder)], env, inventory, grace_seconds=grace_seconds)


def _placed(
    job: Job, words: list[str], env: Mapping[str, str], inventory: Inventory | None, **limits: Any
) -> Launch:
    """``swift WORDS`` with the threads and the memory of the job's placement."""
    placement = job.placement
    assert placement is not None
    env = {**env, "PYTHONUNBUFFERED": "1"}
    if placement.kind != "cpu" and _is_shared(job, placement, inventory):
        env["SWIFT_DEVICE_MEMORY_BYTES"] = str(placement.memory_bytes)
    return Launch(
        argv=[sys.executable, "-m", "swift", *words],
        cwd=job.spec.cwd,
        env=env,
        log=OUTPUT_LOG,
        threads=placement.threads,
        memory_bytes=_host_limit(job, placement, inventory),
        **limits,
    )


def _is_shared(job: Job, placement: Placement, inventory: Inventory | None) -> bool:
    """Whether the job has a part of its devices only; who has them whole may use all of them."""
    if inventory is None or placement.memory_bytes <= 0 or job.spec.needs.exclusive:
        return False
    sizes = {
        device.index: device.memory_bytes for device in inventory.devices if device.kind == placement.kind
    }
    return any(placement.memory_bytes < WHOLE_SHARE * sizes.get(index, 0) for index in placement.devices)


def _host_limit(job: Job, placement: Placement, inventory: Inventory | None) -> int | None:
    """A limit on host memory, so that one job cannot take the machine down.

    What was asked for counts to the byte. An estimate is no promise: where jobs share host memory, a job gets at
    least its slots' share of it.
    """
    if placement.kind != "cpu":
        return None
    slots = max(1, len(placement.devices))
    if job.spec.needs.memory_bytes is not None:
        return max(job.spec.needs.memory_bytes * slots, placement.memory_bytes * slots)
    share = 0
    if inventory is not None:
        count = sum(device.kind == "cpu" for device in inventory.devices) or inventory.cores
        share = inventory.host_memory_bytes * slots // max(1, count)
    return max(placement.memory_bytes * slots, share, _LEAST_HOST_BYTES)


def _words(home: Home, job: Job) -> list[str]:
    """The words after ``swift``."""
    spec = job.spec
    if COMMANDS[spec.command].own_arguments:
        return [spec.command, *spec.words]
    if spec.command in TRAINING and spec.run_dir is not None and job.attempt > 1:
        run = RunFolder(Path(spec.run_dir))
        if run.latest_checkpoint() is not None:
            return ["resume", str(run.path), *_flags(job.overrides)]
        _move_aside(run, job.attempt - 1)
    file = home.attempt_dir(job.id, job.attempt) / "config.yaml"
    values = {"command": spec.command, **spec.options, **job.overrides}
    if spec.command in SERVING:
        values["ready_file"] = str(ready_file(home, job))
    atomic_write_text(file, yaml.safe_dump(values, allow_unicode=True, sort_keys=False))
    return [spec.command, str(file)]


def _flags(overrides: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in overrides.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def _move_aside(run: RunFolder, attempt: int) -> None:
    """Clear the way for a fresh start; nothing that an earlier attempt wrote is deleted."""
    if not run.path.is_dir() or not run.holds_run():
        return
    target, number = run.path.with_name(f"{run.path.name}.attempt-{attempt}"), 1
    while target.exists():
        number += 1
        target = run.path.with_name(f"{run.path.name}.attempt-{attempt}-{number}")
    run.path.rename(target)


def processes_of(home: Home, job: Job) -> list[int]:
    """Process ids recorded for the job's attempt, and for the host of its fused group."""
    folders = [home.attempt_dir(job.id, job.attempt), *_host_attempt(home, job)]
    records = [read_json(folder / "child.json") for folder in folders]
    return [int(entry["pid"]) for record in records for entry in record.get("processes", [])]


def _host_attempt(home: Home, job: Job) -> list[Path]:
    return [home.attempt_dir(job.placement.fused, 1)] if job.placement and job.placement.fused else []


def run_status(home: Home, job: Job) -> dict[str, Any] | None:
    """``status.json`` of the job's run folder, if this attempt wrote it."""
    if job.spec.run_dir is None:
        return None
    status = read_status(Path(job.spec.run_dir))
    folder = (_host_attempt(home, job) or [home.attempt_dir(job.id, job.attempt)])[0]
    child = read_json(folder / "child.json")
    if status is None or not child or status.get("pid") != child["pid"]:
        return None
    return status


def attempt_log(home: Home, job: Job) -> str:
    """The end of what the last attempt printed."""
    try:
        with (home.job_dir(job.id) / OUTPUT_LOG).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LOG_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return text.rpartition(f"=== attempt-{job.attempt},")[2]


def effective_options(job: Job) -> dict[str, Any]:
    """All options in force, flat: as the run recorded them, else as they resolve now; empty for other commands."""
    if job.spec.command not in TRAINING:
        return {}
    try:
        text = (Path(job.spec.run_dir or "") / "config.yaml").read_text(encoding="utf-8")
        record = yaml.safe_load(text)
        found = {
            name: value
            for section in record.values()
            if isinstance(section, dict)
            for name, value in section.items()
        }
        return {**found, **job.overrides}
    except (OSError, yaml.YAMLError, AttributeError):
        from swift.config.bind import resolve

        values = {**job.spec.options, **job.overrides}
        resolved = resolve(job.spec.command, values=values, planning=True, partial=True)
        return {name: resolved.value(name) for name in COMMANDS[job.spec.command].options()}
