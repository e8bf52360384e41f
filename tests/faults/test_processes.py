"""Real `swift` processes that are killed: nothing lost, nothing left running, and a command that goes on."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from swift.runs.folder import RunFolder
from swift.runs.metrics import read_metrics
from swift.runs.status import read_status

DEADLINE_SECONDS = 120


def command(*words):
    return [sys.executable, "-m", "swift", *words]


def options(model, data, output, name):
    return [
        "--model", str(model), "--dataset", str(data), "--output_dir", str(output), "--run_name", name,
        "--max_length", "160", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
        "--save_steps", "5", "--logging_steps", "1", "--max_steps", "40", "--lora_dropout", "0.1",
        "--dataloader_num_workers", "1",
    ]  # fmt: skip


def wait_for(condition, process):
    """Poll until ``condition()``; the deadline fails the test instead of hanging it."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "deadline"
        time.sleep(0.02)


def start(tmp_path, words):
    environment = {**os.environ, "SWIFT_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def reached(folder, step):
    def check():
        status = read_status(folder)
        return status is not None and status["step"] >= step

    return check


def losses(folder):
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")]


def test_kill_9_loses_nothing_and_leaves_no_process(tiny_model_dir, chat_file, tmp_path):
    process = start(tmp_path, ["sft", *options(tiny_model_dir, chat_file, tmp_path, "cut")])
    folder = tmp_path / "cut"
    wait_for(reached(folder, 7), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert read_status(folder)["state"] == "lost"
    assert RunFolder(folder).latest_checkpoint() is not None

    resumed = start(tmp_path, ["resume", str(folder)])
    text, errors = resumed.communicate(timeout=DEADLINE_SECONDS)
    assert resumed.returncode == 0, errors
    assert "swift infer --adapters" in text
    whole = start(tmp_path, ["sft", *options(tiny_model_dir, chat_file, tmp_path, "whole")])
    whole.communicate(timeout=DEADLINE_SECONDS)
    assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_print_the_resume_command(tiny_model_dir, chat_file, tmp_path, number, code):
    words = [
        *options(tiny_model_dir, chat_file, tmp_path, "cut"),
        "--max_steps",
        "2000",
        "--save_steps",
        "1000",
    ]
    process = start(tmp_path, ["sft", *words])
    folder = tmp_path / "cut"
    wait_for(reached(folder, 3), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == code, errors
    assert f"swift resume {folder}" in errors
    assert "Traceback" not in errors
    assert RunFolder(folder).latest_checkpoint() is not None
    assert read_status(folder)["state"] == "stopped"
