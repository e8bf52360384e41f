"""Real services with shell scripts as jobs. ``python -m tests.experiments.services HOME`` is such a service.

With ``COMMANDS`` in its environment jobs are the commands of swift that they say they are.
"""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

from swift.experiments import runner
from swift.experiments.client import find_service
from swift.experiments.home import Home
from swift.experiments.runner import observe
from swift.experiments.store import Store
from swift.experiments.types import FINISHED, JobSpec, Launch, Needs

DEADLINE_SECONDS = 90.0
ROOT = Path(__file__).parents[2]


def build(home, job, base_env, inventory=None, *, grace_seconds=30.0):
    """The job's words are a shell script; its first and last acts are to say that it ran."""
    script = f'echo start {job.id} >> "$RAN"; {job.spec.words[0]}; echo end {job.id} >> "$RAN"'
    argv = ["/bin/sh", "-c", script]
    return Launch(
        argv=argv, cwd=job.spec.cwd, env=dict(base_env), log="output.log", grace_seconds=grace_seconds
    )


def wait_for(condition, what, seconds=DEADLINE_SECONDS):
    """Poll until ``condition()`` is true and return its value; the deadline fails the test."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"deadline: {what}"
        time.sleep(0.01)
    return value


GATE = 'while ! test -e "$GATE"; do sleep 0.02; done'
"""A job that goes on when the test opens the gate."""


class Services:
    """A home, services that come and go, and what their jobs did."""

    def __init__(self, root):
        self.root = root
        self.home = Home.find(root / "home")
        self.store = Store(self.home.store)
        self.mark = uuid.uuid4().hex
        self.ran_file = root / "ran"
        self.gate = root / "gate"
        self.env = {
            **os.environ, "TEST_MARK": self.mark, "RAN": str(self.ran_file), "GATE": str(self.gate),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.process = None

    def submit(self, count, script="sleep 0.05", group="g"):
        specs = [
            JobSpec(f"{group}{n}", f"{group}{n}", "doctor", words=[script], cwd=str(self.root),
                    needs=Needs(memory_bytes=2**20))
            for n in range(count)
        ]  # fmt: skip
        return self.store.add_group(group, "", specs)

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.experiments.services", str(self.home.root)],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=(self.root / "service.err").open("ab"),
            start_new_session=True,
        )
        return self.process

    def started(self):
        """Start, and wait until it answers."""
        self.start()
        return wait_for(lambda: find_service(self.home), "the service")

    def kill(self):
        """As ``kill -9`` does it."""
        self.process.kill()
        self.process.wait()

    def states(self):
        return {job.spec.name: job.state for job in self.store.jobs()}

    def all_ended(self):
        return all(job.state in FINISHED for job in self.store.jobs())

    def ran(self, word):
        lines = self.ran_file.read_text().splitlines() if self.ran_file.exists() else []
        return [line.split()[1] for line in lines if line.startswith(word)]

    def alive(self):
        """Every living process of ours, but for the service."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("TEST_MARK") == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE and process.pid != self.process.pid:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self):
        """Leave nothing behind, whatever a test did."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for folder in self.home.root.glob("jobs/*/attempt-*"):
            if (folder / "supervisor.json").exists():
                number = int(folder.name.removeprefix("attempt-"))
                runner.stop(folder.parent, number, grace_seconds=0)
                wait_for(
                    lambda job=folder.parent, n=number: observe(job, n).state in ("ended", "vanished"),
                    "a job to end",
                )


def main():
    from swift.experiments.scheduler import Policy
    from swift.experiments.service import serve
    from swift.experiments.types import Device, Inventory

    count = int(os.environ.get("SLOTS", "4"))
    commands = {} if os.environ.get("COMMANDS") else {"build": build}
    slots = tuple(Device("cpu", number, "cpu", 2**34, 2**34) for number in range(count))
    sys.exit(
        serve(
            Home.find(sys.argv[1]),
            **commands,
            take=lambda *_: Inventory(slots, count, 2**36),
            schedule=Policy(preempt_after_seconds=float(os.environ.get("PREEMPT_AFTER", "300"))),
            warm=False,
            least_free_bytes=0,
        )
    )


if __name__ == "__main__":
    main()
