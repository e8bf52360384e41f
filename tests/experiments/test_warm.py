"""Warm workers: the same result as a cold start, the same isolation, and independence of the template."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.experiments.supervised import Jobs, wait_for
from tests.train.conftest import chat_file

from swift.experiments.processes import TOKEN_VARIABLE
from swift.experiments.runner import launch, observe, stop
from swift.experiments.supervisor import read_json
from swift.experiments.types import Launch
from swift.experiments.warm import template_key
from swift.runs.metrics import read_metrics

__all__ = ["chat_file"]

WITNESS = """
import json, os, sys, threading
from pathlib import Path
import torch
from swift.train.callbacks.base import Callback

class Witness(Callback):
    def on_train_begin(self, run):
        mask = os.umask(0)
        os.umask(mask)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        seen = {
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "arguments": sys.argv,
            "path": sys.path,
            "umask": mask,
            "main": sys.modules["__main__"].__spec__.name,
            "blocked": status["SigBlk"], "ignored": status["SigIgn"],
            "files": sorted({os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                             if os.path.exists(f"/proc/self/fd/{n}")}),
            "leader": os.getpgrp() == os.getpid(), "own_session": os.getsid(0) == os.getppid(),
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "torch_threads": torch.get_num_threads(),
            "torch_seed_of_a_new_generator": torch.Generator().initial_seed(),
            "collection": __import__("gc").isenabled(),
            "children": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
        }
        Path("seen.json").write_text(json.dumps(seen))
"""


class Runs(Jobs):
    """Trainings of a tiny model, each in a folder of its own."""

    def __init__(self, root, model, data):
        super().__init__(root)
        self.env = {
            **{name: value for name, value in os.environ.items() if name not in ("RUN_NAME", "TMPDIR")},
            **self.env,
            "SWIFT_HOME": str(self.home.root),
            "OMP_NUM_THREADS": "1",
        }
        self.model, self.data = model, data

    def train(self, name, *words, warm=True, **fields):
        options = [
            "sft", "--model", str(self.model), "--dataset", str(self.data), "--output_dir", "runs",
            "--run_name", "run", "--max_length", "160", "--per_device_train_batch_size", "4",
            "--logging_steps", "1", "--max_steps", "6", "--lora_dropout", "0.1", *words,
        ]  # fmt: skip
        folder = self.root / name
        folder.mkdir()
        self.swift(name, *options, warm=warm, cwd=str(folder), **fields)
        return folder

    def swift(self, name, *words, warm=True, **fields):
        argv = [sys.executable, "-m", "swift", *words]
        values = {"cwd": str(self.root), "env": self.env, "log": "output.log", **fields}
        launch(self.home, name, 1, Launch(argv=argv, **values), warm)

    def header(self, name):
        return self.log(name).splitlines()[0]

    def templates(self):
        return list(self.home.root.glob("warm-*.sock"))

    def close(self):
        super().close()
        for socket in self.templates():
            template_of(socket).kill()


def template_of(socket):
    """The process that holds a template's lock."""
    inode = socket.with_suffix(".lock").stat().st_ino
    for process in psutil.process_iter():
        try:
            if any(file.stat().st_ino == inode for file in Path(f"/proc/{process.pid}/fd").iterdir()):
                return process
        except OSError:
            continue
    raise AssertionError(f"nobody holds {socket}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_dir, chat_file):
    made = Runs(tmp_path_factory.mktemp("warm"), tiny_model_dir, chat_file)
    yield made
    made.close()


@pytest.fixture
def own_runs(tmp_path, tiny_model_dir, chat_file):
    """A home with a template of its own, for tests that kill it."""
    made = Runs(tmp_path, tiny_model_dir, chat_file)
    yield made
    made.close()


def rows(folder):
    return [
        (row["step"], row["loss"], row["grad_norm"])
        for row in read_metrics(folder / "runs" / "run" / "metrics.jsonl")
    ]


def test_a_warm_job_is_a_cold_one_to_the_last_bit_and_as_isolated(runs):
    witness = runs.root / "witness.py"
    witness.write_text(WITNESS)
    folders = {}
    for name, warm in (("cold", False), ("first", True), ("second", True)):
        folders[name] = runs.train(name, "--callbacks", str(witness), warm=warm)
        assert runs.end(name).code == 0, runs.log(name)
        assert f", {'warm' if warm else 'cold'}: " in runs.header(name)
    assert len(rows(folders["cold"])) == 6
    assert rows(folders["first"]) == rows(folders["second"]) == rows(folders["cold"])
    seen = {}
    for name, folder in folders.items():
        found = json.loads((folder / "seen.json").read_text().replace(f"/{name}", "/NAME"))
        found["files"].sort()
        assert len(found["environment"].pop(TOKEN_VARIABLE)) == 32
        seen[name] = found
    assert seen["first"] == seen["cold"]
    assert seen["second"] == seen["cold"]
    assert seen["cold"]["leader"] and seen["cold"]["own_session"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--version"], 0, "swift 0."),
        (["sft", "--lora_rnk", "8"], 2, "did you mean"),
        (["sft", "--model", "/no/such/model", "--dataset", "x.jsonl"], 1, "/no/such/model"),
    ],
)
def test_exit_codes_and_messages_are_those_of_the_command(runs, words, code, text):
    name = f"code{code}"
    runs.swift(name, *words)
    assert runs.end(name).exit_code == code
    assert ", warm: " in runs.header(name)
    assert text in runs.log(name)


def test_a_warm_job_that_is_stopped_saves_a_checkpoint(runs):
    folder = runs.train("stopped", "--max_steps", "100000", "--save_steps", "50000")
    wait_for(lambda: (folder / "runs" / "run" / "metrics.jsonl").exists(), "the first step")
    stop(runs.home.job_dir("stopped"), 1, grace_seconds=60)
    end = runs.end("stopped")
    assert (end.exit_code, end.reason) == (143, "stopped")
    assert (folder / "runs" / "run" / "last").is_symlink()
    assert "swift resume" in runs.log("stopped")


def test_a_warm_job_dies_with_its_supervisor(runs):
    runs.train("cut", "--max_steps", "100000")
    job = wait_for(lambda: runs.observe("cut").pid, "the job's process")
    runs.supervisor("cut").kill()
    assert runs.end("cut").reason == "lost"
    assert not psutil.pid_exists(job) or psutil.Process(job).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"env": {"PYTHONPATH": "/somewhere"}}, "cold (PYTHONPATH differs from the service's)"),
        ({"env": {"LD_PRELOAD": ""}}, "cold (LD_PRELOAD differs from the service's)"),
        ({"argv": ["/usr/bin/env", "-m", "swift"]}, "cold (another Python)"),
        ({"argv": [sys.executable, "-c", "pass"]}, "cold (not a `python -m swift` command)"),
    ],
)
def test_what_does_not_fit_starts_cold_and_says_why(runs, change, reason):
    name = f"misfit{abs(hash(reason))}"
    argv = change.get("argv", [sys.executable, "-m", "swift", "--version"])
    env = {**runs.env, **change.get("env", {})}
    launch(runs.home, name, 1, Launch(argv, str(runs.root), env, "output.log"), warm=True)
    runs.end(name)
    assert reason in runs.header(name)


def test_what_is_read_at_import_makes_another_template(runs):
    def key(**changes):
        return template_key(Launch([sys.executable], "/", {**runs.env, **changes}, ""))

    assert key(HF_HOME="/elsewhere") != key()
    assert key(MKL_DEBUG_CPU_TYPE="5") != key()
    same = {"CUDA_VISIBLE_DEVICES": "3", "TMPDIR": "/x", "TRITON_CACHE_DIR": "/y", "MASTER_PORT": "1"}
    assert key(**same, OMP_NUM_THREADS="7") == key()


def test_a_warm_job_outlives_its_template_and_the_process_that_asked(own_runs):
    words = ["--max_steps", "40", "--logging_steps", "1"]
    asking = f"""
import sys
from tests.experiments.test_warm import Runs
from pathlib import Path
runs = Runs(Path({str(own_runs.root)!r}), {str(own_runs.model)!r}, {str(own_runs.data)!r})
runs.env["TEST_MARK"] = {own_runs.mark!r}
runs.train("long", *{words!r})
print("ready", flush=True)
input()
"""
    process = subprocess.Popen([sys.executable, "-c", asking], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.communicate()
    (socket,) = own_runs.templates()
    template = template_of(socket)
    supervisor = own_runs.supervisor("long")
    assert supervisor.ppid() != template.pid
    template.send_signal(signal.SIGKILL)
    assert own_runs.end("long").code == 0
    assert len(rows(own_runs.root / "long")) == 40
    own_runs.swift("next", "--version")  # a dead template's socket is in the way
    assert own_runs.end("next").code == 0
    assert ", warm: " in own_runs.header("next")


def test_templates_of_other_environments_make_room(own_runs):
    def ready(count):
        sockets = own_runs.templates()
        return sockets if len(sockets) == count else None

    for language in ("C", "C.UTF-8", "POSIX"):
        own_runs.env["LANG"] = language
        own_runs.swift(language, "--version")
        assert own_runs.end(language).code == 0
        assert ", warm: " in own_runs.header(language)
    (socket,) = wait_for(lambda: ready(1), "the others to leave")
    assert template_of(socket).environ()["LANG"] == "POSIX"


def test_a_template_leaves_with_the_process_that_asked(own_runs):
    asking = f"""
from tests.experiments.test_warm import Runs
from pathlib import Path
runs = Runs(Path({str(own_runs.root)!r}), "", "")
runs.swift("short", "--version")
"""
    subprocess.run([sys.executable, "-c", asking], check=True, timeout=120)
    assert observe(own_runs.home.job_dir("short"), 1).state in ("running", "ended")
    assert own_runs.end("short").code == 0
    assert read_json(own_runs.folder("short") / "supervisor.json")["note"] == "warm"
    wait_for(lambda: not own_runs.templates(), "the template to leave")
