"""Real supervisors with small shell jobs, for the tests of the supervisor and its faults."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

from swift.core.files import atomic_write_json
from swift.experiments import runner
from swift.experiments.home import Home
from swift.experiments.runner import observe
from swift.experiments.supervisor import read_json
from swift.experiments.types import Launch

DEADLINE_SECONDS = 60.0


def wait_for(condition, what="the condition", seconds=DEADLINE_SECONDS):
    """Poll until ``condition()`` is true and return its value; the deadline fails the test."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"deadline: {what}"
        time.sleep(0.01)
    return value


class Jobs:
    """A home with jobs whose processes all carry a mark in their environment."""

    def __init__(self, root: Path) -> None:
        self.home = Home.find(root / "home")
        self.root = root
        self.mark = uuid.uuid4().hex
        self.env = {"PATH": os.environ["PATH"], "TEST_MARK": self.mark, "RAN": str(root / "ran")}

    def launch_of(self, script, **fields):
        """A shell script as a job; its first act is to say that it ran."""
        argv = script if isinstance(script, list) else ["/bin/sh", "-c", f'echo $$ >> "$RAN"; {script}']
        return Launch(**{"argv": argv, "cwd": str(self.root), "env": self.env, "log": "output.log", **fields})

    def begin(self, script, job="j1", attempt=1, **fields):
        runner.launch(self.home, job, attempt, self.launch_of(script, **fields), warm=False)

    def spawn(self, script, job="j1", attempt=1, **fields):
        """Only start the supervisor's process, in the foreground and without waiting for anything."""
        folder = self.folder(job, attempt)
        atomic_write_json(folder / "launch.json", self.launch_of(script, **fields).to_dict())
        return subprocess.Popen(
            [sys.executable, "-m", "swift.experiments.supervisor", str(folder)],
            start_new_session=True,
            stderr=subprocess.PIPE,
        )

    def folder(self, job="j1", attempt=1):
        return self.home.attempt_dir(job, attempt)

    def log(self, job="j1"):
        path = self.home.job_dir(job) / "output.log"
        return path.read_text() if path.exists() else ""

    def ran(self):
        """Process ids of all jobs that ran so far."""
        path = self.root / "ran"
        return [int(word) for word in path.read_text().split()] if path.exists() else []

    def supervisor(self, job="j1", attempt=1):
        return psutil.Process(read_json(self.folder(job, attempt) / "supervisor.json")["identity"]["pid"])

    def observe(self, job="j1", attempt=1):
        return observe(self.home.job_dir(job), attempt)

    def end(self, job="j1", attempt=1):
        """Wait for the end of the attempt and return how it ended."""

        def ended():
            found = self.observe(job, attempt)
            return found if found.state in ("ended", "vanished") else None

        return wait_for(ended, "the end of the job").exit

    def alive(self):
        """Every living process that descends from a job of ours."""
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get("TEST_MARK") == self.mark
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self):
        """Leave nothing behind, whatever a test did."""
        for folder in self.home.root.glob("jobs/*/attempt-*"):
            if (folder / "supervisor.json").exists():
                number = int(folder.name.removeprefix("attempt-"))
                runner.stop(folder.parent, number, grace_seconds=0)
                self.end(folder.parent.name, number)
        wait_for(lambda: not self.alive(), "processes of the test to end")
