"""Programs that loop, breed, eat memory, write outside, read, call out and hide: all end, and leave nothing behind."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from swift.core.errors import ConfigError, DataError
from swift.evaluate.evaluators import Case, find_evaluators
from swift.evaluate.programs import program_of
from swift.evaluate.questions import Question
from swift.evaluate.sandbox import ProgramResult, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and namespaces are Linux's")


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """No process of a sandbox, no folder, no mount."""
    tmp_path.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert [entry for entry in tmp_path.iterdir() if entry.name.startswith("swift-sandbox-")] == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    for process in psutil.Process().children(recursive=True):
        assert "sandbox_child" not in " ".join(process.cmdline())
    assert not [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(process.info["cmdline"] or ())
    ]


def run(code: str, **limits: Any) -> ProgramResult:
    return Sandbox(**{"timeout_seconds": 20, **limits}).run(code)


def test_programs_that_are_fine() -> None:
    result = run(
        "import json, sys\nprint(json.dumps([1]))\nopen('a.txt', 'w').write('b')\nprint(open('a.txt').read())"
    )
    assert (result.passed, result.reason, result.stdout) == (True, "", "[1]\nb\n")
    assert run("raise ValueError('no')").reason == "ValueError: no"
    assert run("import sys; sys.exit(3)").reason == "exit code 3"
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").reason == "killed by SIGSEGV"
    assert run("def f(:").reason.startswith("SyntaxError")


def test_an_endless_loop_ends_at_the_deadline() -> None:
    assert run("while True: pass", timeout_seconds=1).reason == "timeout after 1 s"
    assert run("import time; time.sleep(3600)", timeout_seconds=1).reason == "timeout after 1 s"


def test_a_fork_bomb_is_bounded() -> None:
    code = """
import os, time
n = 0
try:
    while n < 500:
        if os.fork() == 0:
            time.sleep(60)
        n += 1
except OSError:
    print(n)
"""
    result = run(code, processes=20)
    assert result.passed and int(result.stdout) <= 20
    assert not run("import os\nwhile True:\n    os.fork()", timeout_seconds=2, processes=20).passed


def test_memory_and_files_are_bounded() -> None:
    assert run("x = bytearray(2 << 30)", memory_mb=512).reason == "MemoryError"
    assert "File too large" in run("open('a', 'wb').write(b'x' * (20 << 20))", file_mb=8).reason
    result = run("for n in range(100): open(str(n), 'wb').write(b'x' * (4 << 20))", file_mb=8)
    if "files" in result.walls:  # the folder is a disk of its own
        assert "No space left" in result.reason
    assert "Too many open files" in run("x = [open('a', 'w') for _ in range(100)]").reason


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    target = tmp_path / "outside.txt"
    tmp_path.chmod(0o777)
    result = run(f"open({str(target)!r}, 'w').write('x')")
    if "files" not in result.walls and "root" not in result.walls:
        pytest.skip("this kernel gives no namespaces: said by Sandbox.missing")
    assert not result.passed and not target.exists()


def test_standard_input_is_empty_and_the_environment_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert "EOFError" in run("input()").reason
    assert run("import os; print('OPENAI_API_KEY' in os.environ, sorted(os.environ)[:2])").stdout.startswith(
        "False"
    )


def test_no_network_and_no_other_processes() -> None:
    sandbox = Sandbox()
    if "network, processes" not in sandbox.walls():
        assert "network, processes" in sandbox.missing()
        pytest.skip("this kernel gives no namespaces")
    code = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    assert "Network is unreachable" in run(code).reason
    # Its own pid is small, and the processes outside cannot be named.
    assert run(f"import os; print(os.getpid() < 10); os.kill({os.getpid()}, 0)").stdout == "True\n"
    assert "ProcessLookupError" in run(f"import os; os.kill({os.getpid()}, 0)").reason
    # Nor looked at: command lines may hold keys.
    seen = run("import os; print(sum(name.isdigit() for name in os.listdir('/proc')))").stdout
    assert "sight of processes" in sandbox.walls() and int(seen) < 5


def test_a_program_that_hides_is_found() -> None:
    """A daemon of its own session, with the death signal switched off."""
    hide = "import os, time, ctypes\nif os.fork() == 0:\n    os.setsid()\n    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
    hide += "    if os.fork() == 0:\n        time.sleep(3600)\n"
    assert run(hide).passed
    stay = "import os, time, ctypes\nos.setsid()\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntime.sleep(3600)"
    assert run(stay, timeout_seconds=1).reason == "timeout after 1 s"


# -- pass@k ------------------------------------------------------------------------------------------------


def task(**extra: Any) -> Question:
    messages = [{"role": "user", "content": "def add(a, b):\n"}]
    return Question(0, "f:1", messages, None, None, extra)


HUMANEVAL = {"test": "def check(f):\n    assert f(1, 2) == 3\n", "entry_point": "add"}


def test_programs_are_put_together() -> None:
    body = "    return a + b\n"
    assert "def add(a, b):\n    return a + b" in program_of(body, task(**HUMANEVAL))
    whole = "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    assert program_of(whole, task(**HUMANEVAL)).count("def add") == 1
    assert program_of(whole, task(**HUMANEVAL)).rstrip().endswith("check(add)")
    listed = program_of(
        "x = 1", task(test_list=["assert x == 1", "assert x > 0"], test_setup_code="import math")
    )
    assert listed == "x = 1\n\nimport math\nassert x == 1\nassert x > 0"
    with pytest.raises(DataError, match="no tests"):
        program_of("x = 1", task())


def test_pass_at_k_of_samples() -> None:
    (evaluator,) = find_evaluators(["pass_at_k"], {"pass_at_k": {"k": [1, 2], "timeout_seconds": 20}})
    right, wrong, leaves = "    return a + b\n", "    return a - b\n", "    import os; os._exit(0)\n"
    scores = evaluator.score([Case(task(**HUMANEVAL), [right, wrong, leaves])])
    assert scores[0]["pass_at_1"] == pytest.approx(1 / 3) and scores[0]["pass_at_2"] == pytest.approx(2 / 3)
    assert scores[0]["passed"] == 1 and scores[0]["failure"] == "AssertionError"
    assert (
        evaluator.score([Case(task(**HUMANEVAL), [leaves, leaves])])[0]["failure"]
        == "ended before its tests did"
    )
    with pytest.raises(ConfigError, match="pass@2 needs as many samples"):
        evaluator.score([Case(task(**HUMANEVAL), [right])])
