"""The service is killed, started twice, starved: no job may be lost or run twice, and nothing may be left over."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.experiments.services import DEADLINE_SECONDS, GATE, Services, wait_for

from swift.core.errors import SwiftError
from swift.experiments.client import Client, find_service, stop_service
from swift.experiments.home import Home
from swift.experiments.service import EXIT_LOCKED, ServiceLock
from swift.experiments.store import Store


@pytest.fixture
def services(tmp_path):
    made = Services(tmp_path)
    yield made
    made.close()


def kill_again_and_again(services, kills, seed):
    """Kill the service at random moments, also while it starts, until the queue is empty and it was killed enough."""
    generator = random.Random(seed)
    batch, done = 0, 0
    while done < kills:
        if services.all_ended():
            services.submit(20, f"sleep 0.{generator.randrange(1, 4)}", group=f"g{batch}-")
            batch += 1
        process = services.start()
        if generator.random() < 0.8:
            wait_for(lambda: find_service(services.home), "the service")
        pause = generator.random() * 0.8
        with pytest.raises(Exception, match="timed out"):
            process.wait(pause)
        services.kill()
        done += 1
    services.started()
    wait_for(services.all_ended, f"all jobs to end: {services.states()}")
    return batch * 20


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_loses_nothing_and_runs_nothing_twice(services, kills):
    count = kill_again_and_again(services, kills, seed=kills)
    assert set(services.states().values()) == {"succeeded"}
    expected = sorted(job.id for job in services.store.jobs())
    assert len(expected) == count
    assert sorted(services.ran("start")) == expected
    assert sorted(services.ran("end")) == expected
    wait_for(lambda: not services.alive(), "supervisors to leave", seconds=20)


def test_jobs_outlive_the_service_and_their_exit_codes_are_found(services):
    services.submit(2, f"{GATE}; exit 3")
    services.started()
    wait_for(lambda: len(services.ran("start")) == 2, "the jobs to start")
    services.kill()
    services.gate.touch()
    wait_for(lambda: not services.alive(), "the jobs to end by themselves")
    services.started()
    wait_for(
        lambda: {job.exit_code for job in services.store.jobs()} == {3},
        "the exit codes of jobs that ended without a service",
    )
    assert sorted(services.ran("start")) == ["j1", "j2"], "no job ran twice"


def test_a_stopped_service_leaves_its_jobs_running(services):
    services.submit(1, GATE)
    services.started()
    wait_for(lambda: services.ran("start"), "the job to start")
    services.process.send_signal(signal.SIGTERM)
    assert services.process.wait(30) == 0
    assert find_service(services.home) is None
    assert services.alive()
    services.started()
    services.gate.touch()
    wait_for(services.all_ended, "the job to end")
    assert services.ran("start") == services.ran("end") == ["j1"]


def test_after_a_reboot_running_jobs_start_again(services):
    services.submit(1, 'test "$(grep -c start "$RAN")" -gt 1 || sleep 60')
    services.started()
    wait_for(lambda: services.ran("start"), "the job to start")
    services.kill()
    folder = services.home.attempt_dir("j1", 1)
    record = json.loads((folder / "supervisor.json").read_text())
    for process in services.alive():
        process.kill()
    wait_for(lambda: not services.alive(), "everything to be dead")
    record["identity"]["boot_id"] = "another-boot"
    (folder / "supervisor.json").write_text(json.dumps(record))
    services.started()
    wait_for(services.all_ended, "the job to end")
    job = services.store.job("j1")
    assert (job.state, job.attempt) == ("succeeded", 2)
    assert [entry["kind"] for entry in job.retries] == ["lost"]


def test_two_services_on_one_home_are_refused(services):
    services.started()
    command = [sys.executable, "-m", "swift.experiments.service", "--home", str(services.home.root)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert second.returncode == EXIT_LOCKED
    assert "another service runs the jobs of this home" in second.stderr
    assert find_service(services.home)["pid"] == services.process.pid
    with pytest.raises(SwiftError, match="another service"):
        ServiceLock(services.home)


def test_a_store_of_a_newer_version_is_refused_with_its_reason(tmp_path):
    home = Home.find(tmp_path / "home")
    Store(home.store).close()
    with sqlite3.connect(home.store) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(SwiftError) as caught:
        Client(home)
    assert "newer version" in caught.value.why
    assert not home.service_file.exists()


def test_a_home_that_cannot_be_written_is_named():
    # Where nobody may write, not even root.
    home = Home(Path("/proc/self"))
    with pytest.raises(SwiftError) as caught:
        ServiceLock(home)
    assert caught.value.where == "/proc/self"
    assert "SWIFT_HOME" in caught.value.fix
    with pytest.raises(SwiftError, match="cannot be written"):
        Client(home)
    with pytest.raises(SwiftError, match="cannot be made"):
        Home.find("/proc/self/home")


FILE = """
name: calm
experiments:
  one: {command: config, words: [alias, lora_rank]}
  two: {command: config, words: [alias, learning_rate]}
  three: {command: config, words: [alias, nonsense], needs: one}
resources: {max_parallel: 1, cold: true, memory: 1MiB}
"""


@pytest.mark.slow
def test_following_goes_on_when_the_service_is_killed(services):
    (services.root / "calm.yaml").write_text(FILE)
    env = {**services.env, "SWIFT_HOME": str(services.home.root)}
    following = subprocess.Popen(
        [sys.executable, "-m", "swift", "run", "calm.yaml"],
        cwd=services.root, env=env, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    first = wait_for(lambda: find_service(services.home), "the service")
    services.process = psutil.Process(first["pid"])
    wait_for(lambda: services.store.jobs(states=["starting", "running"]), "a job to start")
    services.process.kill()
    try:
        output, _ = following.communicate(timeout=DEADLINE_SECONDS)
        assert following.returncode == 1, output
        assert services.states() == {
            "one": "succeeded", "two": "succeeded", "three": "failed",
        }  # fmt: skip
        assert find_service(services.home)["pid"] != first["pid"]
    finally:
        following.kill()
        stop_service(services.home)
        services.process = None
