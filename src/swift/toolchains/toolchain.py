"""An installed toolchain: found by its name, asked to run a script of ours, or to serve.

>>> toolchain = find_toolchain("gptqmodel")
>>> toolchain.run(Path("quantise.py"), {"model": "..."}, deadline_seconds=3600)   # quantise.py has main(payload)
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.core.errors import UsageError
from swift.core.home import swift_home
from swift.core.registry import suggest
from swift.toolchains.child import GRACE_SECONDS, Child, ToolchainError, clean_environment
from swift.toolchains.lock import toolchain_names

__all__ = [
    "Toolchain",
    "ToolchainError",
    "check_name",
    "find_toolchain",
    "installed_toolchains",
    "toolchain_folder",
]

RECORD = "toolchain.json"
IN_USE = ".in-use"
INSIDE = Path(__file__).with_name("inside.py")


def check_name(name: str) -> str:
    """The toolchain's name as we spell it (``lm_eval`` is ``lm-eval``). Raises UsageError with the nearest one."""
    name = name.replace("_", "-").lower()
    if name not in toolchain_names():
        raise UsageError(
            f"unknown toolchain {name!r}",
            why=f"known: {', '.join(toolchain_names())}",
            fix=suggest(name, toolchain_names()),
        )
    return name


def toolchain_folder(name: str) -> Path:
    """Where a toolchain lives: its record, its environments, its logs. Not made here."""
    return swift_home() / "toolchains" / name


@dataclass(frozen=True)
class Toolchain:
    """One installed environment.

    Attributes:
        name: ``vllm``, ``gptqmodel``...
        environment: folder of the virtual environment.
        record: what was installed, when and how it was tested (``toolchain.json``).
    """

    name: str
    environment: Path
    record: dict[str, Any]

    @property
    def variant(self) -> str:
        """``cpu`` or ``cuda``."""
        return str(self.record["variant"])

    @property
    def versions(self) -> dict[str, str]:
        """Distribution -> version, for everything in it."""
        versions: dict[str, str] = self.record["versions"]
        return versions

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.environment / "bin" / "python"

    def run(
        self,
        script: Path | str,
        payload: Mapping[str, Any],
        *,
        deadline_seconds: float,
        on_line: Callable[[str], None] | None = None,
        stage: str | None = None,
        log: Path | None = None,
        variables: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> dict[str, Any]:
        """Call ``main(payload)`` of a Python file (or of a module of the environment) inside, and return its answer.

        Payload and answer travel as JSON files, so stdout is free for progress. The process, and whatever it starts,
        ends with this call: at the deadline, on Ctrl-C, or when this process dies.

        Args:
            script: a file with ``main(payload: dict) -> dict`` that imports nothing of swift, or a module's name.
            payload: anything JSON can hold.
            deadline_seconds: longest time the script may take.
            on_line: called with each line of output as it comes (a progress bar's states count as lines).
            stage: what is being done, for errors; default: the script's name.
            log: file that gets all output, appended.
            variables: environment variables to set.
            cwd: its working folder; default: this process's.

        Raises:
            ToolchainError: the script raised, died, or took too long; the cause has its last lines.
        """
        stage = stage or Path(script).stem
        with tempfile.TemporaryDirectory(prefix="swift-toolchain-") as scratch:
            request, result = Path(scratch) / "request.json", Path(scratch) / "result.json"
            request.write_text(json.dumps(dict(payload)), encoding="utf-8")
            # -P: the folder of our script must not hide the environment's modules.
            words = [self.python, "-P", "-s", "-u", INSIDE, script, request, result]
            with Child(
                [str(word) for word in words],
                environment=self._variables(variables),
                log=log,
                stream=True,
                cwd=cwd,
                held=self._in_use(),
            ) as child:
                try:
                    code = child.follow(deadline_seconds, on_line)
                except TimeoutError:
                    raise self._failure(
                        f"{stage} took longer than {deadline_seconds:g} s and was stopped", child
                    ) from None
            if not result.exists():
                how = f"was killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
                raise self._failure(f"{stage} {how}", child)
            return self._answer(result, stage)

    def _answer(self, result: Path, stage: str) -> dict[str, Any]:
        """What the script returned. Raises ToolchainError for what it raised."""
        answer = json.loads(result.read_text(encoding="utf-8"))
        if "error" in answer:
            error = answer["error"]
            where = "".join(error["traceback"]).strip().splitlines()[-3:]
            raise ToolchainError(
                f"{stage} failed: {error['type']}: {error['message']}",
                where=f"toolchain {self.name}",
                why="\n".join(where),
                fix=f"swift toolchain doctor {self.name} tests the toolchain itself",
            )
        value: dict[str, Any] = answer["value"]
        return value

    def spawn(
        self,
        arguments: Sequence[str],
        *,
        log: Path,
        variables: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        grace_seconds: float = GRACE_SECONDS,
    ) -> Child:
        """Start a server inside: ``spawn(["-m", "vllm.entrypoints.openai.api_server", ...], log=...)``.

        Args:
            arguments: of the environment's Python.
            log: file that gets its output.
            variables: environment variables to set.
            cwd: its working folder.
            grace_seconds: time between SIGTERM and SIGKILL.

        Returns:
            The child; it ends at ``stop()``, or with this process.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [str(self.python), "-P", "-s", "-u", *arguments]
        return Child(
            command,
            environment=self._variables(variables),
            log=log,
            cwd=cwd,
            grace_seconds=grace_seconds,
            held=self._in_use(),
        )

    def _variables(self, extra: Mapping[str, str] | None) -> dict[str, str]:
        return clean_environment(self.environment, {**self.record["variables"], **(extra or {})})

    def _failure(self, message: str, child: Child) -> ToolchainError:
        return ToolchainError(message, where=f"toolchain {self.name}", why=child.log_tail() or None)

    def _in_use(self) -> int:
        """A lock that keeps ``swift toolchain rm`` and updates from deleting the environment meanwhile."""
        descriptor = os.open(self.environment / IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor


def find_toolchain(name: str) -> Toolchain:
    """The installed toolchain of this name.

    Raises:
        UsageError: there is no such toolchain.
        ToolchainError: it is not installed, with the command that installs it.
    """
    name = check_name(name)
    folder = toolchain_folder(name)
    fix = f"swift toolchain install {name}"
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ToolchainError(f"the toolchain {name} is not installed", where=str(folder), fix=fix) from None
    toolchain = Toolchain(name, folder / record["environment"], record)
    if not toolchain.python.exists():
        raise ToolchainError(
            f"the toolchain {name} is broken",
            where=str(toolchain.python),
            why="its Python is gone, or was deleted with the Python it was made from",
            fix=f"swift toolchain rm {name} && {fix}",
        )
    return toolchain


def installed_toolchains() -> dict[str, Toolchain]:
    """All installed toolchains by name; broken ones are left out."""
    found = {}
    for name in toolchain_names():
        try:
            found[name] = find_toolchain(name)
        except ToolchainError:
            continue
    return found
