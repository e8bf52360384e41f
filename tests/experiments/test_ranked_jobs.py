"""Jobs of several processes each, side by side under the service; one of their processes is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.experiments.services import Services, wait_for

from swift.experiments.client import Client
from swift.experiments.submission import from_mapping
from swift.runs.metrics import read_metrics

SECONDS = 400.0


def ranks_of(run: Path) -> list[psutil.Process]:
    """The processes of both ranks, when they have come to their first step."""
    found = []
    for folder in (run, run / "ranks" / "1"):
        try:
            status = json.loads((folder / "status.json").read_text())
            if status["state"] != "running" or not status["step"]:
                return []
            found.append(psutil.Process(status["pid"]))
        except (OSError, ValueError, psutil.Error):
            return []
    return found


def measured(run: Path) -> list[tuple[int, float, float]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


@pytest.mark.slow
def test_two_jobs_of_two_ranks_run_at_once_and_a_killed_rank_costs_no_step(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data = tmp_path / "train.jsonl"
    turns = [[("user", f"Add {n} and {n}."), ("assistant", str(2 * n))] for n in range(24)]
    messages = [[{"role": role, "content": text} for role, text in row] for row in turns]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages))
    defaults: dict[str, Any] = {
        "command": "sft", "model": str(tiny_model_dir), "dataset": str(data), "nproc_per_node": 2, "device": "cpu",
        "per_device_train_batch_size": 2, "global_batch_size": 8, "max_steps": 60, "save_steps": 5,
        "logging_steps": 1, "learning_rate": 1e-2, "lora_dropout": 0.1, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    experiments: dict[str, Any] = {"cut": {"fsdp": "full"}, "whole": {"fsdp": "full", "save_total_limit": 3}}
    services = Services(tmp_path)
    services.env |= {"COMMANDS": "1", "SLOTS": "4"}
    try:
        services.started()
        client = Client(services.home, start=False)
        client.submit(from_mapping({"defaults": defaults, "experiments": experiments}, tmp_path))
        runs = {job.spec.name: Path(job.spec.run_dir or "") for job in services.store.jobs()}

        def both() -> list[list[psutil.Process]]:
            found = [ranks_of(run) for run in runs.values()]
            return found if all(found) and not services.all_ended() else []

        first, _ = wait_for(both, "four ranks at work", SECONDS)
        placements = [set(job.placement.devices) for job in services.store.jobs() if job.placement]
        assert [len(one) for one in placements] == [2, 2] and not placements[0] & placements[1]
        wait_for((runs["cut"] / "checkpoint-5").is_dir, "a checkpoint", SECONDS)
        first[1].kill()
        wait_for(services.all_ended, "both jobs to end", SECONDS)
        jobs = services.store.jobs()
        assert [(job.state, job.attempt) for job in jobs] == [("succeeded", 1)] * 2, jobs
        logs = {job.spec.name: (services.home.job_dir(job.id) / "output.log").read_text() for job in jobs}
        assert "the process of rank 1 was ended by SIGKILL; starting all processes again" in logs["cut"]
        assert "again" not in logs["whole"]
        # The same training twice, once with a death in it.
        assert measured(runs["cut"]) == measured(runs["whole"])
        assert [row[0] for row in measured(runs["cut"])] == list(range(1, 61))
        left = [one for one in services.alive() if services.process not in one.parents()]
        assert not left, left
    finally:
        services.close()
