"""What runs in a toolchain: answers, errors, and that nothing outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tests.experiments.supervised import wait_for
from tests.toolchains.fakes import bare_toolchain, exists

from swift.toolchains.toolchain import Toolchain, ToolchainError


@pytest.fixture
def toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolchain:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path))
    return bare_toolchain(tmp_path)


@pytest.fixture
def script(tmp_path: Path):
    def write(body: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(
            "import os, sys, time, signal, subprocess\ndef main(payload):\n" + textwrap.indent(body, "    ")
        )
        return path

    return write


def test_json_goes_in_and_comes_out_and_lines_come_as_they_are_printed(toolchain, script, tmp_path) -> None:
    path = script(
        "print('one')\nsys.stderr.write('10%\\r20%\\rlast')\nreturn {'n': len(payload['text']) + 1}"
    )
    lines: list[str] = []
    log = tmp_path / "log.txt"
    text = "ü" * 200_000
    assert toolchain.run(path, {"text": text}, deadline_seconds=60, on_line=lines.append, log=log) == {
        "n": 200_001
    }
    assert lines == ["one", "10%", "20%", "last"]
    assert log.read_bytes() == b"one\n10%\r20%\rlast"


def test_our_environment_does_not_leak_in(toolchain, script, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "x")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path / "ours"), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("KEPT", "1")
    (tmp_path / "json.py").write_text("raise SystemExit('the folder of the script hides a module')")
    path = script("return dict(os.environ)")
    seen = toolchain.run(path, {}, deadline_seconds=60, variables={"MINE": "2"})
    assert {"PYTHONPATH", "PIP_INDEX_URL"}.isdisjoint(seen)
    assert (seen["KEPT"], seen["OF_LOCK"], seen["MINE"]) == ("1", "1", "2")
    assert seen["PATH"].startswith(str(toolchain.environment / "bin"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "raise ValueError('bad weights')",
            r"script failed: ValueError: bad weights[\s\S]*fix: swift toolchain",
        ),
        ("print('so far'); os.kill(os.getpid(), 9)", r"script was killed by signal 9[\s\S]*so far"),
        ("print('so far'); os._exit(3)", r"script ended with exit code 3[\s\S]*so far"),
        ("return {1j}", "script failed: TypeError"),
    ],
)
def test_failures_tell_what_happened(toolchain, script, body: str, message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        toolchain.run(script(body), {}, deadline_seconds=60)


def test_the_deadline_ends_everything_it_started(toolchain, script, tmp_path) -> None:
    pids = tmp_path / "pids"
    body = f"""
        child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN);"
            "print('ready', flush=True); time.sleep(600)"], stdout=subprocess.PIPE, start_new_session=True)
        child.stdout.readline()
        open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
        time.sleep(600)
    """
    path = script(textwrap.dedent(body))
    with pytest.raises(ToolchainError, match="counting took longer than 4 s and was stopped"):
        toolchain.run(path, {}, deadline_seconds=4, stage="counting")
    assert [exists(int(pid)) for pid in pids.read_text().split()] == [False, False]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_runs_ends_with_its_owner(toolchain, script, tmp_path, number: int) -> None:
    pid_file = tmp_path / "pid"
    path = script(f"open({str(pid_file)!r}, 'w').write(f'{{os.getpid()}}.')\ntime.sleep(600)")
    program = (
        "import sys; from pathlib import Path; from swift.toolchains.toolchain import find_toolchain;"
        "find_toolchain('vllm').run(Path(sys.argv[1]), {}, deadline_seconds=500)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program, str(path)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text().endswith("."))
    finally:
        owner.send_signal(number)
        owner.wait()
    wait_for(lambda: not exists(int(pid_file.read_text()[:-1])))


def test_a_server_writes_its_log_and_stops_when_told(toolchain, tmp_path) -> None:
    program = "import time; print('serving', flush=True); time.sleep(600)"
    log = tmp_path / "logs" / "server.log"
    child = toolchain.spawn(["-c", program], log=log)
    with child:
        wait_for(lambda: "serving" in child.log_tail())
        assert child.poll() is None
        assert child.stop() == 128 + signal.SIGTERM
    assert log.read_text() == "serving\n"
    assert child.stop() == 128 + signal.SIGTERM


def test_a_server_that_ends_by_itself_tells_its_code(toolchain, tmp_path) -> None:
    with toolchain.spawn(["-c", "raise SystemExit(7)"], log=tmp_path / "log") as child:
        wait_for(lambda: child.poll() is not None)
        assert child.poll() == 7
