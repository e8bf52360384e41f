"""Start a supervisor, ask how its attempt goes, and tell it to stop: the service's side of a job folder.

Everything is files and signals to recorded identities, so it makes no difference whether the caller is the
process that launched the attempt or one that was started an hour later.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from swift.core.errors import SwiftError
from swift.core.files import atomic_write_json
from swift.core.process import ProcessIdentity, send_signal
from swift.experiments.home import Home
from swift.experiments.supervisor import EXIT_LOCKED, clear_leftovers, read_json, take_lock, write_exit
from swift.experiments.types import Launch

__all__ = ["AlreadyRunning", "Exit", "Observation", "Runner", "Supervisors", "launch", "observe", "stop"]

DEADLINE_SECONDS = 10.0
STARTING_SECONDS = 30.0
"""An attempt without supervisor counts as starting for so long while its launcher lives,"""
HANDOVER_SECONDS = 2.0
"""and for so long when that is dead: the supervisor may be on its way."""
SUPERVISOR_LOG = "supervisor.log"


class AlreadyRunning(SwiftError):
    """Another supervisor has the job, or this attempt was begun before. Nothing was started."""


@dataclass(frozen=True)
class Exit:
    """How an attempt ended (``exit.json``).

    Attributes:
        exit_code, signal: one of them, or neither when the job never began or its end was not seen.
        reason: ``exited`` by itself; ``stopped`` as asked; ``killed`` because it did not stop, or as asked;
            ``time_limit``, ``memory_limit``; ``lost``: the supervisor died (kill -9, reboot); ``not_begun``: the
            launcher died before a supervisor came to life.
        ended: seconds since the epoch.
        peak_memory_bytes: of all its processes together; cpu_seconds: likewise.
    """

    exit_code: int | None
    signal: int | None
    reason: str
    ended: float
    peak_memory_bytes: int | None = None
    cpu_seconds: float | None = None

    @property
    def code(self) -> int | None:
        """As a shell has it: 128 + signal for a process that a signal ended."""
        return self.exit_code if self.signal is None else 128 + self.signal


@dataclass(frozen=True)
class Observation:
    """What can be seen of an attempt.

    Attributes:
        state: ``starting`` (no child yet), ``running``, ``ended`` (see ``exit``), ``vanished``: the supervisor
            is dead without a last word, or never lived; what was left of the job has been killed, and the
            attempt can never begin again.
        pid: the job's first process.
    """

    state: Literal["starting", "running", "ended", "vanished"]
    exit: Exit | None = None
    pid: int | None = None


def launch(
    home: Home,
    job_id: str,
    attempt: int,
    wanted: Launch,
    warm: bool,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> None:
    """Begin an attempt; returns when its supervisor has the job (``supervisor.json`` exists).

    With ``warm`` a worker that has already imported everything runs it, where it fits and one can be had;
    otherwise a cold one, and the log's header line says why.

    Raises:
        AlreadyRunning: nothing was started.
        SwiftError: the supervisor did not come up in time or failed, with the end of its log.
    """
    folder = home.attempt_dir(job_id, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # launch.json holds the whole environment of the job
    if not (folder / "supervisor.json").exists():
        atomic_write_json(folder / "launcher.json", ProcessIdentity.of().to_dict(), durable=False)
        atomic_write_json(folder / "launch.json", wanted.to_dict())
    note = "cold"
    if warm:
        from swift.experiments.warm import submit

        refusal = submit(home, folder, wanted, deadline_seconds)
        if refusal is None:
            return
        note = f"cold ({refusal})"
    try:
        _launch_cold(home, folder, note, deadline_seconds)
    except AlreadyRunning:
        # A warm worker may have taken the job after we had lost patience with it.
        if not warm or not _is_warm(folder):
            raise


def _launch_cold(home: Home, folder: Path, note: str, deadline_seconds: float) -> None:
    log = folder / SUPERVISOR_LOG
    command = [sys.executable, "-P", "-m", "swift.experiments.supervisor"]
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [*command, str(folder), "--detach", "--note", note],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            cwd=home.root,
            start_new_session=True,
        )
    try:
        code = process.wait(deadline_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if _began(folder):
            return
        raise SwiftError(
            f"the supervisor did not start within {deadline_seconds:g} s",
            where=str(folder),
            why=log_tail(log),
            fix="the machine may be overloaded; try again",
        ) from None
    if code == EXIT_LOCKED:
        raise AlreadyRunning("the job is running already", where=str(folder), why=log_tail(log))
    if code != 0:
        raise SwiftError(f"the supervisor failed with exit code {code}", where=str(folder), why=log_tail(log))


def _is_warm(folder: Path) -> bool:
    record = read_json(folder / "supervisor.json")
    return record is not None and record["note"] == "warm"


def _began(folder: Path) -> bool:
    """Whether the supervisor has begun after all; if not, it never will."""
    lock = take_lock(folder.parent)
    if lock is None:
        return True
    try:
        if not (folder / "supervisor.json").exists():
            write_exit(folder, "not_begun")
            return False
        return True
    finally:
        os.close(lock)


def log_tail(log: Path, lines: int = 12, start: int = 0) -> str | None:
    """The last lines of a log from byte ``start`` on, None when there are none."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            return b"".join(deque(file, lines)).decode(errors="replace").rstrip() or None
    except FileNotFoundError:
        return None


def observe(job_dir: Path, attempt: int) -> Observation:
    """How this attempt goes.

    When its supervisor has died without a last word, what is left of the job is killed and the attempt is
    recorded as ``lost`` (or ``not_begun``) first; this is done under the job's lock, so never to a job that lives.

    Raises SwiftError when leftovers of a lost attempt cannot be killed.
    """
    folder = job_dir / f"attempt-{attempt}"
    found = _look(folder)
    if found is not None:
        return found
    if _may_be_coming(folder):
        return Observation("starting")
    lock = take_lock(job_dir, wait_seconds=0.0) if job_dir.is_dir() else None
    if lock is None:  # a supervisor at its very beginning, or another observer
        return Observation("starting" if folder.is_dir() else "vanished")
    try:
        found = _look(folder)  # it may have ended while we took the lock
        if found is not None:
            return found
        survivors = clear_leftovers(job_dir)
        if survivors:
            pids = ", ".join(str(identity.pid) for identity in survivors)
            raise SwiftError(
                "processes of a lost job cannot be killed", where=str(folder), why=f"pids {pids}"
            )
        if (folder / "supervisor.json").exists():
            heard = folder / "heartbeat"  # of the dead supervisor
            write_exit(folder, "lost", ended=heard.stat().st_mtime if heard.exists() else time.time())
        elif folder.is_dir():
            write_exit(folder, "not_begun")
    finally:
        os.close(lock)
    return _look(folder) or Observation("vanished")


def _look(folder: Path) -> Observation | None:
    """What the files say; None when no living supervisor and no last word is to be seen."""
    ended = read_json(folder / "exit.json")
    if ended is not None:
        known = {key: ended[key] for key in Exit.__dataclass_fields__ if key in ended}
        vanished = ended["reason"] in ("lost", "not_begun")
        return Observation("vanished" if vanished else "ended", Exit(**known))
    supervisor = _supervisor(folder)
    if supervisor is None:
        return None
    if not supervisor.is_alive():
        # It may have written its last word between our two looks.
        return _look(folder) if (folder / "exit.json").exists() else None
    child = read_json(folder / "child.json")
    return Observation("starting") if child is None else Observation("running", pid=child["pid"])


def _may_be_coming(folder: Path) -> bool:
    """Whether somebody is about to start the supervisor of this attempt, or has just done so.

    A wrong answer is harmless: an attempt that was declared lost never begins.
    """
    if not folder.is_dir() or (folder / "supervisor.json").exists():
        return False
    written = folder / "launcher.json"
    record = read_json(written)
    if record is None:
        return abs(time.time() - folder.stat().st_mtime) < HANDOVER_SECONDS
    patience = STARTING_SECONDS if ProcessIdentity(**record).is_alive() else HANDOVER_SECONDS
    return abs(time.time() - written.stat().st_mtime) < patience


def _supervisor(folder: Path) -> ProcessIdentity | None:
    record = read_json(folder / "supervisor.json")
    return None if record is None else ProcessIdentity(**record["identity"])


def stop(job_dir: Path, attempt: int, grace_seconds: float) -> None:
    """Ask for a stop: SIGTERM (a training saves a checkpoint), SIGKILL after ``grace_seconds`` (0: at once). Does
    not wait.

    A later call can only shorten the time. An attempt that has ended is left alone; one that has not begun
    yet ends without starting its command.
    """
    folder = job_dir / f"attempt-{attempt}"
    if (folder / "exit.json").exists():
        return
    wish = {"action": "stop", "grace_seconds": grace_seconds, "time": time.time()}
    atomic_write_json(folder / "control.json", wish)
    supervisor = _supervisor(folder)
    if supervisor is not None:
        send_signal(supervisor, signal.SIGUSR1)  # else it reads the file with its next heartbeat


class Runner(Protocol):
    """Starts, watches and stops attempts: what the engine needs; tests put a fake in its place."""

    def launch(self, job_id: str, attempt: int, wanted: Launch, warm: bool) -> None:
        """Begin an attempt; returns when somebody is responsible for it. Raises SwiftError."""

    def observe(self, job_id: str, attempt: int) -> Observation:
        """How the attempt goes."""

    def stop(self, job_id: str, attempt: int, grace_seconds: float) -> None:
        """Ask it to end; returns at once. Zero seconds: kill it."""

    def watch(self, job_id: str, attempt: int) -> int | None:
        """A descriptor that becomes readable when the attempt has ended; None where there is no such thing."""


class Supervisors:
    """The real one: a supervisor process for each attempt."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def launch(self, job_id: str, attempt: int, wanted: Launch, warm: bool) -> None:
        launch(self.home, job_id, attempt, wanted, warm)

    def observe(self, job_id: str, attempt: int) -> Observation:
        return observe(self.home.job_dir(job_id), attempt)

    def stop(self, job_id: str, attempt: int, grace_seconds: float) -> None:
        stop(self.home.job_dir(job_id), attempt, grace_seconds)

    def watch(self, job_id: str, attempt: int) -> int | None:
        identity = _supervisor(self.home.attempt_dir(job_id, attempt))
        if identity is None or not hasattr(os, "pidfd_open"):
            return None
        try:
            descriptor = os.pidfd_open(identity.pid)
        except OSError:
            return None
        if identity.is_alive():  # asked after opening: the descriptor pins the process
            return descriptor
        os.close(descriptor)
        return None
