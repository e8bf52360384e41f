"""A process in an environment of its own that ends with its owner, whose output is kept, and that is never waited for
without a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from swift.core.errors import SwiftError

__all__ = ["Child", "ToolchainError", "clean_environment"]

GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
GUARD_SECONDS = 15.0
"""How long the guard may take, beyond the grace, to end what it guards."""
TAIL_LINES = 30

_FOREIGN = re.compile(r"(PYTHON|PIP_|UV_|VIRTUAL_ENV|CONDA_|__PYVENV_LAUNCHER__).*")
"""Variables that belong to the environment this process runs in, and would leak into another one."""


class ToolchainError(SwiftError):
    """A toolchain is missing, cannot be installed, or what ran in it failed."""


def clean_environment(environment: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a process of the virtual environment ``environment``: nothing of ours leaks into it."""
    kept = {key: value for key, value in os.environ.items() if not _FOREIGN.fullmatch(key)}
    return {
        **kept,
        "VIRTUAL_ENV": str(environment),
        "PATH": os.pathsep.join([str(environment / "bin"), os.environ.get("PATH", os.defpath)]),
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }


class Child:
    """A command under guard (``guard.py``): it and all it starts end with this object, or with this process.

    Args:
        command: program and arguments.
        environment: all its variables.
        log: file that gets its output (appended); None: nobody but ``lines`` sees it.
        stream: True when ``lines`` will be read; the output goes to the log from there.
        grace_seconds: between SIGTERM and SIGKILL.
        held: a descriptor (a lock) that is closed when the command has ended.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path | None = None,
        stream: bool = False,
        cwd: Path | None = None,
        grace_seconds: float = GRACE_SECONDS,
        held: int | None = None,
    ) -> None:
        self._held = held
        self.grace_seconds = grace_seconds
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.log = log
        self._log = log.open("ab") if log else None
        self._partial = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "swift.toolchains.guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if stream or self._log is None else self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        order = {
            "command": list(command),
            "environment": dict(environment),
            "cwd": str(cwd) if cwd else None,
            "grace_seconds": grace_seconds,
        }
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Process id of the guard, the head of the session."""
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code of the command, None while it runs."""
        return self._process.poll()

    def follow(self, seconds: float, on_line: Callable[[str], None] | None = None) -> int:
        """Read the output until the command ends; returns its exit code.

        Raises TimeoutError after ``seconds``; the command runs on until ``stop``.
        """
        output = self._process.stdout
        assert output is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                if selector.select(left):
                    part = os.read(output.fileno(), 65536)
                    self._take(part, on_line)
                    if not part:
                        break
        try:
            return self._process.wait(max(deadline - time.monotonic(), GUARD_SECONDS))
        except subprocess.TimeoutExpired:
            raise TimeoutError from None

    def _take(self, part: bytes, on_line: Callable[[str], None] | None) -> None:
        if self._log is not None:
            self._log.write(part)
            self._log.flush()
        # A progress bar returns the carriage and never ends its line.
        *lines, self._partial = re.split(rb"[\r\n]+", self._partial + part)
        if not part and self._partial:
            lines, self._partial = [self._partial], b""
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            if text:
                self.tail.append(text)
                if on_line is not None:
                    on_line(text)

    def log_tail(self) -> str:
        """The last lines of output."""
        if not self.tail and self.log is not None:
            with self.log.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 16384))
                lines = file.read().decode(errors="replace").splitlines()
            return "\n".join(lines[-TAIL_LINES:])
        return "\n".join(self.tail)

    def stop(self) -> int:
        """End the command, all it started, and the guard. A second call does nothing. Returns the exit code."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            code = self._process.wait(self.grace_seconds + GUARD_SECONDS)
        except subprocess.TimeoutExpired:  # the guard itself hangs: the kernel takes the command along
            self._process.kill()
            code = self._process.wait()
        for file in (self._process.stdout, self._log):
            if file is not None:
                file.close()
        if self._held is not None:
            os.close(self._held)
            self._held = None
        return code

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
