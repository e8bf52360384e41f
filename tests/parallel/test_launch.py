"""``swift sft`` with several processes, as a user starts it: ends, deaths and hangs of the launcher and of ranks."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from swift.runs.metrics import read_metrics

DEADLINE_SECONDS = 150
COMMON = (
    "--max_length 160 --per_device_train_batch_size 2 --global_batch_size 8 --learning_rate 1e-2 --logging_steps 1 "
    "--lora_dropout 0.1 --save_steps 2 --lr_scheduler_type constant --device cpu"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model_dir):
    """A folder with data; returns (folder, words that every command begins with)."""
    folder, generator = tmp_path_factory.mktemp("launch"), random.Random(3)
    words = "one two three red blue green cat dog bird".split()
    with (folder / "chat.jsonl").open("w") as file:
        for _ in range(60):
            turns = [
                {
                    "role": role,
                    "content": " ".join(generator.choice(words) for _ in range(generator.randint(1, 16))),
                }
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return folder, ["--model", str(tiny_model_dir), "--dataset", str(folder / "chat.jsonl"), *COMMON]


class Started:
    """A command in the background, its output in a file."""

    def __init__(self, folder, words, launcher=("-m", "swift.cli.main")):
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        environment |= {"SWIFT_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "sft", *words],
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def end(self):
        """Exit code and output."""
        try:
            code = self.process.wait(DEADLINE_SECONDS)
        finally:
            if self.process.poll() is None:
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    child.kill()
                self.process.kill()
        return code, self.output.read_text()

    def wait_for(self, condition):
        """Until ``condition()`` is something; its value."""
        end = time.monotonic() + DEADLINE_SECONDS
        while not (found := condition()):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < end, self.output.read_text()
            time.sleep(0.02)
        return found

    def rank(self, run, number):
        """The process of a rank."""
        status = run / "ranks" / str(number) / "status.json" if number else run / "status.json"
        self.wait_for(status.is_file)
        return psutil.Process(json.loads(status.read_text())["pid"])


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


@pytest.mark.slow
def test_a_killed_rank_is_restarted_to_the_same_losses(place):
    folder, words = place
    words = [*words, "--output_dir", "out", "--nproc_per_node", "2", "--max_steps", "30", "--fsdp", "full"]
    code, text = Started(folder, [*words, "--run_name", "whole"]).end()
    assert code == 0, text
    assert text.count("-- done") == 1, "one terminal"
    run = folder / "out" / "cut"
    cut = Started(folder, [*words, "--run_name", "cut"])
    cut.wait_for((run / "checkpoint-4").is_dir)
    cut.rank(run, 1).kill()
    code, text = cut.end()
    assert code == 0, text
    assert "the process of rank 1 was ended by SIGKILL; starting all processes again" in text
    assert losses(run) == losses(folder / "out" / "whole")


@pytest.mark.slow
def test_workers_end_with_the_launcher_and_a_signal_saves(place):
    folder, words = place
    words = [*words, "--output_dir", "out", "--dp_size", "2", "--max_steps", "100000"]
    run = folder / "out" / "killed"
    started = Started(folder, [*words, "--run_name", "killed"])
    started.wait_for((run / "checkpoint-2").is_dir)
    ranks = [started.rank(run, number) for number in (0, 1)]
    started.process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    run = folder / "out" / "stopped"
    started = Started(folder, [*words, "--run_name", "stopped"])
    started.wait_for((run / "checkpoint-2").is_dir)
    started.process.send_signal(signal.SIGTERM)
    code, text = started.end()
    assert code == 143, text
    assert "stopped by SIGTERM after step" in text and "swift resume" in text
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    assert (run / f"checkpoint-{status['step']}" / "state.json").is_file()


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_stage_and_stack(place):
    folder, words = place
    (folder / "hang.py").write_text(
        "import time\nfrom swift.train.callbacks.base import Callback\n\n\n"
        "class Hang(Callback):\n    def on_step_end(self, run):\n        if run.state.step == 3:\n"
        "            wait_for_godot()\n\n\ndef wait_for_godot():\n    time.sleep(600)\n"
    )
    words = [
        *words,
        "--output_dir",
        "out",
        "--run_name",
        "hang",
        "--nproc_per_node",
        "2",
        "--max_steps",
        "10",
    ]
    words += ["--callbacks", str(folder / "hang.py"), "--ddp_timeout", "30", "--max_restarts", "0"]
    code, text = Started(folder, words).end()
    assert code == 1, text
    assert "rank 0: in stage 'train', step 2" in text or "rank 0: in stage 'train', step 3" in text
    assert "in wait_for_godot" in text
    assert "rank 1 has lost the other processes" in text


@pytest.mark.slow
def test_what_is_wrong_is_said_once_and_not_tried_again(place):
    folder, words = place
    (folder / "wrong.py").write_text(
        "from swift.core.errors import SwiftError\nfrom swift.train.callbacks.base import Callback\n\n\n"
        "class Wrong(Callback):\n    def on_step_end(self, run):\n        raise SwiftError('this is wrong')\n"
    )
    words = [
        *words,
        "--output_dir",
        "out",
        "--run_name",
        "wrong",
        "--nproc_per_node",
        "2",
        "--max_steps",
        "10",
    ]
    code, text = Started(folder, [*words, "--callbacks", str(folder / "wrong.py")]).end()
    assert code == 1, text
    assert text.count("error: this is wrong") == 1
    assert "again" not in text


@pytest.mark.slow
def test_torchrun_and_two_machines_work_too(place):
    folder, words = place
    words = [*words, "--output_dir", "out", "--max_steps", "3"]
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "swift.cli.main",
    )
    code, text = Started(folder, [*words, "--run_name", "torchrun"], launcher).end()
    assert code == 0, text
    several = [*words, "--run_name", "machines", "--nnodes", "2", "--nproc_per_node", "1"]
    several += ["--master_addr", "localhost", "--master_port", "29517"]
    nodes = [Started(folder, [*several, "--node_rank", str(number)]) for number in (0, 1)]
    for node in nodes:
        code, text = node.end()
        assert code == 0, text
    assert losses(folder / "out" / "machines") == losses(folder / "out" / "torchrun")
