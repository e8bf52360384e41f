"""status.json tells a living run from a lost one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from swift.runs import status as status_module
from swift.runs.status import Eta, StatusFile, read_status


def test_fields_progress_and_end(tmp_path: Path) -> None:
    status = StatusFile(tmp_path, total_steps=8)
    assert read_status(tmp_path)["state"] == "starting"  # type: ignore[index]
    status.update("running", step=2, stage="train")
    seen = read_status(tmp_path)
    assert seen is not None
    assert (seen["state"], seen["step"], seen["total_steps"], seen["progress"]) == ("running", 2, 8, 0.25)
    assert (seen["pid"], seen["stage"]) == (os.getpid(), "train")
    assert seen["heartbeat"].endswith("+00:00")
    status.finish("succeeded", "done")
    seen = json.loads((tmp_path / "status.json").read_text())
    assert (seen["state"], seen["message"], seen["eta_seconds"]) == ("succeeded", "done", 0.0)


def test_no_status(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text("{")
    assert read_status(tmp_path) is None


def test_killed_run_is_lost(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from swift.runs.status import StatusFile\n"
        "StatusFile(Path(sys.argv[1]), total_steps=5).update('running', step=3)\n"
        "print('ready', flush=True); time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    assert read_status(tmp_path)["state"] == "running"  # type: ignore[index]
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    seen = read_status(tmp_path)
    assert seen is not None
    assert (seen["state"], seen["recorded_state"], seen["step"]) == ("lost", "running", 3)


def test_finished_run_is_not_lost_when_its_process_is_gone(tmp_path: Path) -> None:
    StatusFile(tmp_path).finish("failed", "out of memory")
    record = json.loads((tmp_path / "status.json").read_text())
    record["start_time"] -= 1000  # another process had this pid
    (tmp_path / "status.json").write_text(json.dumps(record))
    assert read_status(tmp_path)["state"] == "failed"  # type: ignore[index]


def test_reused_pid_is_lost(tmp_path: Path) -> None:
    StatusFile(tmp_path).update("running")
    record = json.loads((tmp_path / "status.json").read_text())
    record["start_time"] -= 1000
    (tmp_path / "status.json").write_text(json.dumps(record))
    assert read_status(tmp_path)["state"] == "lost"  # type: ignore[index]


@pytest.mark.parametrize(("age", "state"), [(10, "running"), (61, "lost")])
def test_run_of_another_machine_is_judged_by_its_heartbeat(tmp_path: Path, age: float, state: str) -> None:
    StatusFile(tmp_path).update("running")
    record = json.loads((tmp_path / "status.json").read_text())
    record |= {"host": "elsewhere", "boot_id": "other", "pid": 1}
    (tmp_path / "status.json").write_text(json.dumps(record))
    assert read_status(tmp_path, now=record["heartbeat_time"] + age)["state"] == state  # type: ignore[index]


def test_heartbeat_goes_on_without_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = threading.Semaphore(0)
    write = status_module.atomic_write_json

    def counted(*args: object, **kwargs: object) -> None:
        write(*args, **kwargs)  # type: ignore[arg-type]
        beats.release()

    monkeypatch.setattr(status_module, "atomic_write_json", counted)
    status = StatusFile(tmp_path)
    first = read_status(tmp_path)
    assert first is not None and beats.acquire(timeout=30)
    status.start_heartbeat(interval=0.001)
    assert all(beats.acquire(timeout=30) for _ in range(5))
    later = read_status(tmp_path)
    assert later is not None
    assert later["heartbeat_time"] >= first["heartbeat_time"] and later["updated"] == first["updated"]
    status.finish("stopped")
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_full_disk_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    status = StatusFile(tmp_path / "gone")
    for entry in (tmp_path / "gone").iterdir():
        entry.unlink()
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").write_text("a file where the folder was")
    status.update("running", step=1)
    status.update("running", step=2)
    assert [record.message for record in caplog.records if "cannot write" in record.message] != []
    assert len(caplog.records) == 1


def test_eta_follows_the_recent_pace() -> None:
    eta = Eta(window=3)
    assert eta.update(10, 100, now=0.0) is None
    assert eta.update(11, 100, now=2.0) == 2.0 * 89
    assert eta.update(12, 100, now=3.0) == 1.5 * 88
    assert eta.update(13, 100, now=4.0) == 1.0 * 87  # the first mark has left the window
    assert eta.update(100, 100, now=5.0) == 0.0
