"""The supervisor: one attempt at a job, with real processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.experiments.supervised import Jobs, wait_for

from swift.core.errors import SwiftError
from swift.core.process import ProcessIdentity, send_signal
from swift.experiments.limits import ControlGroup, resident_bytes
from swift.experiments.processes import TOKEN_VARIABLE
from swift.experiments.runner import AlreadyRunning, Observation, launch, stop
from swift.experiments.supervisor import EXIT_LOCKED


@pytest.fixture
def jobs(tmp_path):
    made = Jobs(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("script", "exit_code", "number", "code"),
    [
        ("exit 0", 0, None, 0),
        ("exit 3", 3, None, 3),
        ("kill -9 $$", None, signal.SIGKILL, 137),
        ("kill -SEGV $$", None, signal.SIGSEGV, 139),
        (["/no/such/program"], 127, None, 127),
        (["/"], 126, None, 126),
    ],
)
def test_the_way_a_job_ends_is_recorded(jobs, script, exit_code, number, code):
    jobs.begin(script)
    end = jobs.end()
    assert (end.exit_code, end.signal, end.code, end.reason) == (exit_code, number, code, "exited")


def test_a_missing_working_folder_is_named(jobs):
    jobs.begin("exit 0", cwd="/no/such/folder")
    assert jobs.end().code == 127
    assert "/no/such/folder" in jobs.log()
    assert jobs.ran() == []


def test_each_attempt_adds_to_the_log_under_its_header(jobs):
    jobs.begin("echo out; echo err >&2; exit 1", attempt=1)
    jobs.end(attempt=1)
    jobs.begin("echo again", attempt=2)
    jobs.end(attempt=2)
    lines = jobs.log().splitlines()
    assert lines[0].startswith("=== attempt-1, ")
    assert ", cold: /bin/sh -c " in lines[0]
    assert lines[1:3] == ["out", "err"]
    assert lines[3].startswith("=== attempt-2, ")
    assert lines[4:] == ["again"]


def test_a_job_has_exactly_its_environment_and_reads_nothing(jobs):
    jobs.begin(["/usr/bin/env"])
    assert jobs.end().code == 0
    found = dict(line.split("=", 1) for line in jobs.log().splitlines()[1:])
    assert len(found.pop(TOKEN_VARIABLE)) == 32
    assert found == jobs.env
    jobs.begin("cat; echo end of input", attempt=2)
    assert jobs.end(attempt=2).code == 0
    assert jobs.log().endswith("\nend of input\n")


def test_a_job_has_its_own_session_group_and_default_signals(jobs):
    jobs.begin("grep -E 'Sig(Ign|Blk)' /proc/self/status; sleep 60")
    pid = wait_for(jobs.ran, "the job to run")[0]
    supervisor = jobs.supervisor().pid
    assert os.getpgid(pid) == pid
    assert os.getsid(pid) == supervisor != os.getsid(0)
    assert jobs.observe().state == "running"
    assert jobs.observe().pid == pid
    wait_for(lambda: "SigIgn" in jobs.log())
    masks = [int(line.split()[1], 16) for line in jobs.log().splitlines() if line.startswith("Sig")]
    reserved = (
        1 << 31 | 1 << 32
    )  # signals 32 and 33 belong to the C library, which keeps programs from touching them
    assert len(masks) == 2
    assert all(mask & ~reserved == 0 for mask in masks)


def test_the_supervisor_is_small_and_nobodys_child(jobs):
    before = psutil.Process().children()
    jobs.begin("sleep 60")
    supervisor = jobs.supervisor()
    assert supervisor.memory_info().rss < 20e6
    assert supervisor.ppid() != os.getpid()
    assert psutil.Process().children() == before


def test_a_stop_lets_the_job_save_and_end(jobs):
    jobs.begin("trap 'echo saved; exit 143' TERM; echo ready; while true; do sleep 0.05; done")
    wait_for(lambda: "\nready\n" in jobs.log())
    stop(jobs.home.job_dir("j1"), 1, grace_seconds=60)
    end = jobs.end()
    assert (end.exit_code, end.reason) == (143, "stopped")
    assert "saved" in jobs.log()


def test_a_job_that_ignores_sigterm_is_killed(jobs):
    jobs.begin("trap '' TERM; echo ready; while true; do sleep 0.05; done")
    wait_for(lambda: "\nready\n" in jobs.log())
    stop(jobs.home.job_dir("j1"), 1, grace_seconds=0.2)
    end = jobs.end()
    assert (end.signal, end.reason) == (signal.SIGKILL, "killed")
    assert jobs.alive() == []


def test_a_second_stop_shortens_the_grace_and_kill_ends_it(jobs):
    jobs.begin("trap '' TERM; echo ready; while true; do sleep 0.05; done")
    wait_for(lambda: "\nready\n" in jobs.log())
    stop(jobs.home.job_dir("j1"), 1, grace_seconds=3600)
    stop(jobs.home.job_dir("j1"), 1, grace_seconds=0)
    end = jobs.end()
    assert (end.signal, end.reason) == (signal.SIGKILL, "killed")


def test_sigterm_to_the_supervisor_is_a_stop_and_sighup_nothing(jobs):
    jobs.begin("trap 'exit 143' TERM; echo ready; while true; do sleep 0.05; done")
    wait_for(lambda: "\nready\n" in jobs.log())
    jobs.supervisor().send_signal(signal.SIGHUP)
    jobs.supervisor().terminate()
    end = jobs.end()
    assert (end.exit_code, end.reason) == (143, "stopped")


def test_a_job_stopped_before_it_begins_never_runs(jobs):
    jobs.folder().mkdir(parents=True)
    stop(jobs.home.job_dir("j1"), 1, grace_seconds=1)
    jobs.begin("exit 0")
    end = jobs.end()
    assert (end.exit_code, end.signal, end.reason) == (None, None, "stopped")
    assert jobs.ran() == []


def test_an_unreadable_request_costs_nothing(jobs):
    jobs.begin("trap 'exit 143' TERM; echo ready; while true; do sleep 0.05; done")
    wait_for(lambda: "\nready\n" in jobs.log())
    (jobs.folder() / "control.json").write_text("{not json")
    jobs.supervisor().send_signal(signal.SIGUSR1)
    wait_for(lambda: "control.json" in (jobs.folder() / "supervisor.log").read_text())
    assert jobs.observe().state == "running"
    stop(jobs.home.job_dir("j1"), 1, grace_seconds=60)
    assert jobs.end().code == 143


def test_the_time_limit_stops_a_job(jobs):
    jobs.begin("sleep 600", time_limit_seconds=0.2, grace_seconds=60)
    end = jobs.end()
    assert (end.signal, end.reason) == (signal.SIGTERM, "time_limit")


@pytest.mark.parametrize(
    "script",
    [
        "sleep 600 & exit 4",
        "(setsid sleep 600 &); exit 4",
        "(setsid sh -c 'trap \"\" TERM HUP; (sleep 600; sleep 600) & sleep 600' &) ; exit 4",
    ],
    ids=["forks and exits", "daemon in its own session", "stubborn daemon with children"],
)
def test_what_a_job_leaves_behind_is_ended(jobs, script):
    jobs.begin(script)
    assert jobs.end().exit_code == 4
    assert jobs.alive() == []


def test_memory_above_the_limit_ends_only_that_job(jobs):
    hungry = [sys.executable, "-c", "import time; x = b'1' * 300_000_000; time.sleep(600)"]
    jobs.begin("sleep 600", job="modest", memory_bytes=150_000_000)
    jobs.begin(hungry, job="hungry", memory_bytes=150_000_000)
    end = jobs.end("hungry")
    assert (end.signal, end.reason) == (signal.SIGKILL, "memory_limit")
    assert end.peak_memory_bytes > 150_000_000  # seen somewhere on its way up
    assert jobs.observe("modest").state == "running"


def test_memory_of_a_family_is_added_up(jobs):
    eat = f"{sys.executable} -c 'import time; x = bytes([1]) * 100_000_000; time.sleep(600)'"
    jobs.begin(f"{eat} & {eat} & {eat} & wait", memory_bytes=200_000_000)
    assert jobs.end().reason == "memory_limit"
    assert jobs.alive() == []


def test_pages_of_a_fork_count_once():
    source = (
        "import os, time\nx = b'1' * 100_000_000\n"
        "if os.fork():\n    print('ready', flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children())]
            assert len(family) == 2
            assert 100e6 < resident_bytes(family) < 150e6
        finally:
            for pid in family:
                os.kill(pid, signal.SIGKILL)


def test_peak_memory_and_cpu_time_are_those_of_the_job(jobs):
    jobs.begin([sys.executable, "-c", "x = b'1' * 200_000_000; sum(range(3_000_000))"])
    end = jobs.end()
    assert 200e6 < end.peak_memory_bytes < 260e6
    assert end.cpu_seconds > 0.02


def test_ten_supervisors_start_one_job(jobs):
    launch_file = jobs.spawn("sleep 0.3")
    rivals = [launch_file, *(jobs.spawn("sleep 0.3") for _ in range(9))]
    codes = sorted(rival.wait(60) for rival in rivals)
    for rival in rivals:
        rival.stderr.close()
    assert codes == [0] + [EXIT_LOCKED] * 9
    assert len(jobs.ran()) == 1


def test_an_attempt_begins_once(jobs):
    jobs.begin("sleep 600")
    with pytest.raises(AlreadyRunning, match="running already"):
        jobs.begin("sleep 600")
    with pytest.raises(AlreadyRunning):
        jobs.begin("sleep 600", attempt=2)
    stop(jobs.home.job_dir("j1"), 1, grace_seconds=0)
    jobs.end()
    with pytest.raises(AlreadyRunning, match="begun before"):
        jobs.begin("exit 0")
    assert len(jobs.ran()) == 1


def test_attempts_follow_each_other_at_once(jobs):
    for attempt in range(1, 6):
        jobs.begin("exit 1", attempt=attempt)
        assert jobs.end(attempt=attempt).code == 1
    assert len(jobs.ran()) == 5


def test_a_folder_that_cannot_be_written_starts_nothing(jobs):
    jobs.folder().mkdir(parents=True)
    (jobs.folder() / "heartbeat").symlink_to("/no/such/folder/heartbeat")
    with pytest.raises(SwiftError, match="exit code 74") as caught:
        jobs.begin("exit 0")
    assert "cannot be written" in caught.value.why
    assert jobs.ran() == []


def test_the_end_is_written_when_the_disk_has_room_again(jobs):
    jobs.begin("echo ready; read line < gate; exit 5")
    wait_for(lambda: "ready" in jobs.log() or "gate" in jobs.log())
    jobs.end()
    os.mkfifo(jobs.root / "gate")
    jobs.begin("echo second; read line < gate; exit 5", attempt=2)
    wait_for(lambda: "second" in jobs.log())
    blocked = jobs.folder(attempt=2) / "exit.json"
    blocked.mkdir()  # a rename onto a folder fails
    (jobs.root / "gate").write_text("go\n")
    wait_for(lambda: "trying again" in (jobs.folder(attempt=2) / "supervisor.log").read_text())
    blocked.rmdir()
    assert jobs.end(attempt=2).exit_code == 5


def test_an_attempt_nobody_launched_has_vanished(jobs):
    assert jobs.observe("j9", 1) == Observation("vanished")


def test_an_attempt_whose_launcher_died_never_begins(jobs):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    launcher = ProcessIdentity.of(process.pid)
    jobs.folder().mkdir(parents=True)
    (jobs.folder() / "launcher.json").write_text(json.dumps(launcher.to_dict()))
    assert jobs.observe().state == "starting"
    process.communicate()
    end = jobs.end()
    assert (end.reason, end.code) == ("not_begun", None)
    with pytest.raises(AlreadyRunning):
        jobs.begin("exit 0")
    assert jobs.ran() == []


def test_a_supervisor_that_does_not_come_up_is_an_error(jobs, tmp_path):
    slow = jobs.launch_of("exit 0")
    with pytest.raises(SwiftError, match="did not start within 0 s"):
        launch(jobs.home, "j1", 1, slow, warm=False, deadline_seconds=0)
    assert jobs.end().reason == "not_begun"
    assert jobs.ran() == []


def test_a_signal_never_reaches_another_process_with_the_same_number(jobs):
    jobs.begin("sleep 600")
    identity = ProcessIdentity.of(wait_for(jobs.ran)[0])
    stranger = ProcessIdentity(identity.pid, identity.start_time - 5, identity.boot_id)
    assert not send_signal(stranger, signal.SIGKILL)
    assert not send_signal(ProcessIdentity(identity.pid, identity.start_time, "x"), signal.SIGKILL)
    assert identity.is_alive()
    assert send_signal(identity, signal.SIGKILL)
    assert jobs.end().signal == signal.SIGKILL


def test_after_a_reboot_an_attempt_has_vanished_and_strangers_are_safe(jobs):
    with subprocess.Popen(["sleep", "600"], env={TOKEN_VARIABLE: "t"}, start_new_session=True) as stranger:
        before = {**ProcessIdentity.of(stranger.pid).to_dict(), "boot_id": "the boot before"}
        jobs.folder().mkdir(parents=True)
        record = {"identity": before, "token": "t", "note": "cold"}
        (jobs.folder() / "supervisor.json").write_text(json.dumps(record))
        child = {"pid": stranger.pid, "pgid": stranger.pid, "processes": [before]}
        (jobs.folder() / "child.json").write_text(json.dumps(child))
        found = jobs.observe()
        assert (found.state, found.exit.reason) == ("vanished", "lost")
        assert jobs.observe() == found
        assert stranger.poll() is None
        stranger.kill()


@pytest.fixture
def fake_cgroup(tmp_path):
    """Folders like those of cgroup v2, with our own group as /proc names it."""
    lines = Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []
    own = [line[3:] for line in lines if line.startswith("0::")]
    if not own:
        pytest.skip("no cgroup v2 on this kernel")
    root = tmp_path / "cgroup"
    group = root / own[0].lstrip("/")
    group.mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu memory")
    return root, group


def test_a_control_group_carries_the_limit_where_it_is_allowed(fake_cgroup):
    root, own = fake_cgroup
    (own / "cgroup.subtree_control").write_text("cpu memory\n")
    group = ControlGroup.create("job", 12345, root)
    assert group.path == own / "job"
    assert (own / "job" / "memory.max").read_text() == "12345"
    assert (own / "job" / "memory.swap.max").read_text() == "0"
    (own / "job" / "memory.events").write_text("low 0\noom 1\noom_kill 0\n")
    assert not group.ran_out()
    (own / "job" / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    assert group.ran_out()
    (own / "job" / "memory.peak").write_text("999\n")
    assert group.peak_bytes() == 999


def test_no_control_group_where_the_controller_is_not_handed_down(fake_cgroup, tmp_path):
    root, own = fake_cgroup
    (own / "cgroup.subtree_control").write_text("cpu\n")
    assert ControlGroup.create("job", 12345, root) is None
    assert not (own / "job").exists()
    assert ControlGroup.create("job", 12345, tmp_path) is None
