"""Real trainings in a real queue whose service is killed: the same losses as without, to the last digit."""

import json
import os
import random
import signal

import pytest
import yaml
from tests.experiments.services import wait_for

from swift.experiments.client import Client, find_service, stop_service
from swift.experiments.home import Home
from swift.experiments.store import Store
from swift.experiments.submission import from_mapping
from swift.experiments.types import FINISHED
from swift.runs.metrics import read_metrics

CALLBACK = """
import os, torch
from swift.train.callbacks.base import Callback

class RunsOut(Callback):
    def on_step_end(self, run):
        if run.state.step == 7 and run.config.training.per_device_train_batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    found = Home.find()
    yield found
    for job in Store(found.store).jobs() if find_service(found) else ():
        if job.state not in FINISHED:
            Client(found).control("stop", [job.id], grace_seconds=0)
    stop_service(found)


def experiments(tmp_path, tiny_model_dir, chat_file, output, entries, **defaults):
    values = {
        "model": str(tiny_model_dir),
        "dataset": [str(chat_file)],
        "output_dir": str(tmp_path / output),
        "max_length": 160,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 5,
        "lora_dropout": 0.1,
        "num_threads": 1,
        **defaults,
    }
    return from_mapping({"name": output, "defaults": values, "experiments": entries}, tmp_path)


def losses(run_dir):
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")]


def test_out_of_memory_is_an_event(home, tmp_path, tiny_model_dir, chat_file):
    (tmp_path / "callbacks.py").write_text(CALLBACK)
    entries = {"a": {"callbacks": [f"{tmp_path / 'callbacks.py'}:RunsOut"]}}
    submission = experiments(tmp_path, tiny_model_dir, chat_file, "out", entries, max_steps=12)
    Client(home).submit(submission)
    store = Store(home.store)
    wait_for(lambda: store.job("a").state in FINISHED, "the training to end")
    job = store.job("a")
    assert (job.state, job.attempt) == ("succeeded", 2), job.reason
    assert [entry["change"] for entry in job.retries] == ["micro-batch 4 -> 2, accumulation 1 -> 2"]
    run = tmp_path / "out" / "a"
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 13))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["training"]["per_device_train_batch_size"] == 2
    assert json.loads((run / "provenance.json").read_text())["resumed_from"].endswith("checkpoint-5")


@pytest.mark.slow
def test_trainings_survive_the_service(home, tmp_path, tiny_model_dir, chat_file):
    entries = {f"r{rank}": {"lora_rank": rank} for rank in (2, 4, 8)}
    settings = {"max_steps": 60, "num_train_epochs": 10}
    calm = experiments(tmp_path, tiny_model_dir, chat_file, "calm", entries, **settings)
    store = Store(home.store)
    Client(home).submit(calm)
    wait_for(lambda: all(job.state in FINISHED for job in store.jobs()), "the calm trainings to end")
    rough = experiments(tmp_path, tiny_model_dir, chat_file, "rough", entries, **settings)
    Client(home).submit(rough)
    generator = random.Random(1)

    def steps_done():
        runs = [tmp_path / "rough" / name for name in entries]
        return sum(len(losses(run)) for run in runs)

    for target in sorted(generator.sample(range(180), 8)):
        wait_for(lambda wanted=target: steps_done() >= wanted, "some steps")
        os.kill(find_service(home)["pid"], signal.SIGKILL)
        wait_for(lambda: find_service(home) is None, "the service to be dead")
        Client(home)
    wait_for(lambda: all(job.state in FINISHED for job in store.jobs()), "the trainings to end")
    assert {job.state for job in store.jobs()} == {"succeeded"}, [job.reason for job in store.jobs()]
    for name in entries:
        assert losses(tmp_path / "rough" / name) == losses(tmp_path / "calm" / name)
        assert len(losses(tmp_path / "rough" / name)) == 60
