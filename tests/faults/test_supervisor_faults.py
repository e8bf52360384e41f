"""Supervisors and launchers that are killed: no job runs twice, none leaves a process behind."""

import random
import signal
import subprocess
import sys
import time

import pytest
from tests.experiments.supervised import Jobs, wait_for

from swift.experiments.runner import AlreadyRunning

# A job with everything that is hard to find again: a child, a daemon in its own session, one without parent.
FAMILY = "sleep 600 & setsid sleep 600 & (setsid sh -c 'sleep 600 & sleep 600' &); sleep 600"


@pytest.fixture
def jobs(tmp_path):
    made = Jobs(tmp_path)
    yield made
    made.close()


def kill_at_random_moments(jobs, rounds, seed):
    """Start the same job again and again, killing its supervisor after 0 to 0.25 seconds; later where that is too
    early for any job to begin (a busy machine)."""
    moments = random.Random(seed)
    began, latest = 0, 0.25
    for attempt in range(1, rounds + 1):
        before = len(jobs.ran())
        supervisor = jobs.spawn(FAMILY, attempt=attempt)
        time.sleep(moments.uniform(0, latest))
        supervisor.kill()
        supervisor.communicate(timeout=30)
        if attempt % 2:  # every other time, the next supervisor has to clear up
            end = jobs.end(attempt=attempt)
            begun = (jobs.folder(attempt=attempt) / "supervisor.json").exists()
            assert (end.reason, end.code) == ("lost" if begun else "not_begun", None)
            assert jobs.alive() == []
        assert len(jobs.ran()) - before <= 1
        began += len(jobs.ran()) - before
        latest = latest if began else min(5.0, 1.3 * latest)
    return began


def check_kill_9(jobs, rounds, seed):
    began = kill_at_random_moments(jobs, rounds, seed)
    assert 0 < began <= rounds
    jobs.begin("exit 7", attempt=rounds + 1)
    assert jobs.end(attempt=rounds + 1).code == 7
    assert jobs.alive() == []


def test_kill_9_of_the_supervisor_at_20_random_moments(jobs):
    check_kill_9(jobs, 20, seed=1)


@pytest.mark.slow
def test_kill_9_of_the_supervisor_at_100_random_moments(jobs):
    check_kill_9(jobs, 100, seed=2)


def test_the_next_attempt_finds_nothing_of_the_last_one_running(jobs):
    jobs.begin(FAMILY)
    wait_for(lambda: len(jobs.alive()) >= 6, "the family to be complete")
    jobs.supervisor().kill()
    count = 'tr "\\0" "\\n" < /proc/$p/environ 2>/dev/null'
    jobs.begin(
        f'n=0; for p in $(ls /proc | grep "^[0-9]"); do {count} | grep -q "RAN=$RAN" && '
        f'grep -q "^sleep" /proc/$p/comm && n=$((n+1)); done; echo others $n',
        attempt=2,
    )
    assert jobs.end(attempt=2).code == 0
    assert jobs.log().endswith("others 0\n")


def test_a_frozen_supervisor_keeps_the_job(jobs):
    jobs.begin("sleep 600")
    supervisor = jobs.supervisor()
    wait_for(lambda: jobs.observe().state == "running")
    supervisor.send_signal(signal.SIGSTOP)
    try:
        assert jobs.observe().state == "running"
        with pytest.raises(AlreadyRunning):
            jobs.begin("exit 0", attempt=2)
    finally:
        supervisor.send_signal(signal.SIGCONT)
    assert len(jobs.ran()) == 1


def test_jobs_outlive_their_killed_launcher(jobs, tmp_path):
    launcher = f"""
import sys, time
from pathlib import Path
from tests.experiments.supervised import Jobs
jobs = Jobs(Path({str(tmp_path)!r}))
jobs.mark = {jobs.mark!r}
jobs.env["TEST_MARK"] = jobs.mark
for number in range(3):
    jobs.begin(f"read line < gate{{number}}; exit {{10 + number}}", job=f"j{{number}}")
print("ready", flush=True)
time.sleep(600)
"""
    for number in range(3):
        subprocess.run(["mkfifo", str(tmp_path / f"gate{number}")], check=True)
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.communicate()
    wait_for(lambda: len(jobs.ran()) == 3)
    assert {jobs.observe(f"j{number}").state for number in range(3)} == {"running"}
    for number in range(3):
        (tmp_path / f"gate{number}").write_text("go\n")
    assert [jobs.end(f"j{number}").code for number in range(3)] == [10, 11, 12]
    assert len(jobs.ran()) == 3


def test_kill_9_of_the_launcher_while_it_launches(jobs, tmp_path):
    launcher = f"""
from pathlib import Path
from tests.experiments.supervised import Jobs
jobs = Jobs(Path({str(tmp_path)!r}))
jobs.env["TEST_MARK"] = {jobs.mark!r}
print("ready", flush=True)
for number in range(100):
    jobs.begin("sleep 600", job=f"j{{number}}")
"""
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    wait_for(lambda: len(jobs.ran()) >= 5)
    process.kill()
    process.communicate()
    names = [folder.name for folder in (tmp_path / "home" / "jobs").iterdir()]

    def settled():
        return {jobs.observe(name).state for name in names} <= {"running", "vanished"}

    wait_for(settled, "every attempt to be running or lost")
    running = [name for name in names if jobs.observe(name).state == "running"]
    wait_for(lambda: len(jobs.ran()) == len(running), "every running job to say so")
    assert len(running) >= len(names) - 1
