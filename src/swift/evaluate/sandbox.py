"""Programs that a model wrote, run where they can do little harm.

Each is a process of its own, in a folder of its own, with limits on CPU time, memory, file sizes, open files and
processes, a deadline, no input and a fixed small environment. Where the kernel allows it (Linux namespaces) it also has
no network, sees and leaves behind no processes but its own, and can write nowhere but into its folder. `Sandbox.walls`
says what stands on this machine. It is no jail for an attacker who knows a hole in the kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift.core.errors import SwiftError

__all__ = ["ProgramResult", "Sandbox"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_WALLS = ("network, processes", "sight of processes", "files")
_KEPT_BYTES = 4000
_DYING_SECONDS = 10.0


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended.

    Attributes:
        passed: exit code 0 before the deadline.
        reason: in words, "" when it passed: ``timeout``, ``killed by SIGXCPU``, or the last line it wrote to stderr.
        stdout, stderr: the first and the last characters.
        walls: what kept it in, beside the limits.
    """

    passed: bool
    reason: str
    stdout: str = ""
    stderr: str = ""
    walls: tuple[str, ...] = ()


@dataclass
class Sandbox:
    """Limits of one program.

    Attributes:
        timeout_seconds: wall clock, then everything it started is killed. CPU time is limited to a second more.
        memory_mb: address space of each of its processes.
        file_mb: largest file; with a folder of its own in memory, all files together.
        processes: of its user, where it is not root's (root gives its rights away first).
        namespaces: False leaves the walls out, for machines whose kernel forbids them halfway.
    """

    timeout_seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 64
    processes: int = 64
    namespaces: bool = True
    _walls: tuple[str, ...] | None = field(default=None, repr=False)

    def run(self, program: str) -> ProgramResult:
        """Run Python source to its end or its deadline. Raises SwiftError when this machine cannot run any."""
        with tempfile.TemporaryDirectory(prefix="swift-sandbox-") as folder:
            os.chmod(folder, 0o777)  # noqa: PTH101  the program may be another user than we are
            inside = Path(folder) / "work"
            inside.mkdir()
            inside.chmod(0o777)
            source = Path(folder) / "program.py"
            source.write_text(program, encoding="utf-8", errors="replace")
            return self._run(inside, source, Path(folder))

    def walls(self) -> tuple[str, ...]:
        """What stands here beside the limits; found out by running an empty program once."""
        if self._walls is None:
            result = self.run("import math, re, typing")
            if not result.passed:
                raise SwiftError(
                    "programs cannot be run here", why=result.reason, fix="leave the metric pass_at_k out"
                )
            self._walls = result.walls
        return self._walls

    def missing(self) -> str:
        """What does not stand here, in words; "" when all does."""
        gone = [wall for wall in _WALLS if wall not in self.walls()]
        return ", ".join(gone)

    def _run(self, inside: Path, source: Path, folder: Path) -> ProgramResult:
        reader, writer = os.pipe()
        settings: dict[str, Any] = {
            "folder": str(inside),
            "program": str(source),
            "report_fd": writer,
            "cpu_seconds": max(1, int(self.timeout_seconds) + 1),
            "memory_mb": self.memory_mb,
            "file_mb": self.file_mb,
            "processes": self.processes,
            "namespaces": self.namespaces,
        }
        with (folder / "stdout").open("w+b") as stdout, (folder / "stderr").open("w+b") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(_CHILD), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=inside,
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": str(inside), "PYTHONHASHSEED": "0"},
                pass_fds=[writer],
                start_new_session=True,
            )
            os.close(writer)
            try:
                process.wait(self.timeout_seconds)
                timed_out = False
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                _kill_group(process)
            with os.fdopen(reader, "rb", buffering=0) as report:
                said = _read_to_end(report).partition(b"\n")[0]
            walls = tuple(json.loads(said)) if said else ()
            out, err = _part(stdout, from_end=False), _part(stderr, from_end=True)
        if timed_out:
            return ProgramResult(False, f"timeout after {self.timeout_seconds:g} s", out, err, walls)
        return ProgramResult(process.returncode == 0, _reason(process.returncode, err), out, err, walls)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Everything in the program's session, the program itself included; then wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _read_to_end(pipe: Any) -> bytes:
    """What was written; it ends when every process that holds the other end has. Those killed take a moment."""
    said = b""
    deadline = time.monotonic() + _DYING_SECONDS
    while (left := deadline - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
        part = pipe.read(65536)
        if not part:
            break
        said = (said + part)[:_KEPT_BYTES]
    return said


def _part(file: Any, *, from_end: bool) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _KEPT_BYTES) if from_end else 0)
    return str(file.read(_KEPT_BYTES).decode("utf-8", "replace"))


def _reason(code: int, stderr: str) -> str:
    if code == 0:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = stderr.strip().splitlines()
    return lines[-1][:300] if lines else f"exit code {code}"
