"""One small process for each attempt at a job: ``python -m swift.experiments.supervisor ATTEMPT_DIR``.

It takes the job's lock before it starts anything (cannot: exit code 75), owns the job's processes, writes who
they are, a heartbeat and in the end ``exit.json``, and outlives whoever started it. Everything it knows comes
from ``launch.json`` and ``control.json``, everything it says is a file in the attempt's folder, so a restarted
service reads on where the dead one stopped.

What holds at any moment, whoever is killed:

- A job runs at most once: the lock is held before the spawn; an attempt that has been begun (``supervisor.json``)
  or declared lost (``exit.json``) is never begun again; leftovers of earlier attempts are killed first.
- The child does nothing before its identity is on disk, and dies with the supervisor (Linux).
- When the child ends, what it left behind is ended too: the supervisor is the reaper of all its descendants.

Imports the standard library, psutil and swift.core only, to stay small: one of these lives for each running job.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import resource
import select
import shlex
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from swift.core.files import atomic_write_json
from swift.core.process import (
    ProcessIdentity,
    become_subreaper,
    descendants,
    die_with_parent,
    identify,
    kill_until_gone,
)
from swift.experiments.limits import ControlGroup, resident_bytes
from swift.experiments.processes import TOKEN_VARIABLE, find_leftovers
from swift.experiments.types import Launch

__all__ = ["EXIT_LOCKED", "EXIT_NO_RECORD", "Supervisor", "clear_leftovers", "main", "take_lock"]

EXIT_LOCKED = 75
"""Another supervisor has the job, or this attempt was begun before: nothing was started."""
EXIT_NO_RECORD = 74
"""The attempt's folder cannot be written: nothing was started."""

HEARTBEAT_SECONDS = 2.0
MEMORY_WATCH_SECONDS = 0.5
LOCK_WAIT_SECONDS = 2.0
"""The supervisor of the previous attempt holds the lock for a moment after its exit.json."""
LEFTOVER_GRACE_SECONDS = 2.0
"""For what a job leaves behind, between SIGTERM and SIGKILL."""


def take_lock(job_dir: Path, wait_seconds: float = LOCK_WAIT_SECONDS) -> int | None:
    """The job's lock as a descriptor (not inherited by exec), or None when somebody else holds it."""
    descriptor = os.open(job_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(0.02)


def read_json(path: Path) -> Any:
    """The content of a JSON file; None when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def clear_leftovers(job_dir: Path) -> list[ProcessIdentity]:
    """Kill what lives of attempts whose supervisor died without a last word; returns what could not be killed.

    Call it with the job's lock held: then no supervisor of this job is alive, but for the caller.
    """
    survivors: list[ProcessIdentity] = []
    for attempt in job_dir.glob("attempt-*"):
        record = read_json(attempt / "supervisor.json")
        if record is not None and not (attempt / "exit.json").exists():
            find = partial(
                find_leftovers, record["identity"], read_json(attempt / "child.json"), record["token"]
            )
            survivors += kill_until_gone(find)
    return survivors


def write_exit(attempt: Path, reason: str, **fields: Any) -> None:
    """``exit.json``: the last word about an attempt."""
    record: dict[str, Any] = {"exit_code": None, "signal": None, "reason": reason, "ended": time.time()}
    atomic_write_json(attempt / "exit.json", record | fields)


class Supervisor:
    """One attempt at one job.

    Args:
        attempt: its folder, with ``launch.json``.
        run_child: becomes the job, in the forked child, and never returns; by default it executes the command.
        note: how the job is started, for the header line of the log.
    """

    def __init__(
        self, attempt: Path, run_child: Callable[[Launch], NoReturn] | None = None, note: str = "cold"
    ) -> None:
        self.attempt = attempt
        self.job_dir = attempt.parent
        self.launch = Launch(**read_json(attempt / "launch.json"))
        self.run_child = run_child or execute
        self.note = note
        self.token = uuid.uuid4().hex
        self.lock: int | None = None
        self.group: ControlGroup | None = None
        self.child = 0
        self.status: int | None = None
        self.reason = "exited"
        self.kill_at: float | None = None
        self.limit_at: float | None = None
        self.peak_bytes = 0
        self._recorded: set[int] = set()
        self._control: Any = None
        self._terminated = False
        self._used_bytes = 0
        self._measure_at = 0.0
        self._wake_read = self._wake_write = -1

    def run(self, ready: Callable[[], None] = lambda: None) -> int:
        """Start the job and stay until it has ended and exit.json is written. Returns the exit code.

        ``ready`` is called once the supervisor has the job and has said so in ``supervisor.json``.
        """
        refusal = self._claim()
        if refusal:
            return refusal
        ready()
        self._follow_control()
        if self.reason == "exited":  # nobody asked for a stop before it began
            self._spawn()
        while self.child and self.status is None:
            self._wait()
            self._reap()
            self._follow_control()
            self._enforce()
        survivors = self._clear()
        self._finish(survivors)
        return 0

    # Beginning

    def _claim(self) -> int:
        """Lock, checks, signal handlers, supervisor.json; 0, or the exit code with which to give up."""
        self.lock = take_lock(self.job_dir)
        if self.lock is None:
            return _refuse("another supervisor has the lock of this job")
        if any((self.attempt / name).exists() for name in ("supervisor.json", "exit.json")):
            return _refuse("this attempt was begun before")
        remaining = clear_leftovers(self.job_dir)
        if remaining:
            return _refuse(f"processes of an earlier attempt cannot be killed: {remaining}")
        become_subreaper()
        self._install_signals()
        record = {"identity": ProcessIdentity.of().to_dict(), "token": self.token, "note": self.note}
        try:
            (self.attempt / "heartbeat").touch()
            atomic_write_json(self.attempt / "supervisor.json", record)
        except OSError as error:
            print(f"{self.attempt} cannot be written: {error}", file=sys.stderr)
            return EXIT_NO_RECORD
        return 0

    def _install_signals(self) -> None:
        """All signals only wake the loop; what to do is read from waitpid and control.json."""
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_terminate)

    def _on_terminate(self, *_: object) -> None:
        self._terminated = True

    def _spawn(self) -> None:
        """Fork the child; it goes on once its identity is recorded."""
        if self.launch.memory_bytes is not None:
            name = f"swift-{self.job_dir.name}-{self.attempt.name}-{self.token[:8]}"
            self.group = ControlGroup.create(name, self.launch.memory_bytes)
        gate_read, gate_write = os.pipe2(os.O_CLOEXEC)
        me = os.getpid()
        self.child = os.fork()
        if self.child == 0:
            try:
                self._become_child(me, gate_read, gate_write)
            except BaseException:  # whatever it is: a forked child must never go on as a second supervisor
                traceback.print_exc()
            finally:
                os._exit(126)
        os.close(gate_read)
        with contextlib.suppress(OSError):  # the child does the same: whoever is first
            os.setpgid(self.child, self.child)
        self._record_processes()
        if self.launch.time_limit_seconds is not None:
            self.limit_at = time.monotonic() + self.launch.time_limit_seconds
        os.write(gate_write, b"1")
        os.close(gate_write)

    def _become_child(self, supervisor: int, gate_read: int, gate_write: int) -> NoReturn:
        die_with_parent(supervisor)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        os.close(gate_write)
        if os.read(gate_read, 1) != b"1":
            os._exit(1)
        os.close(gate_read)
        assert self.lock is not None
        for descriptor in (self.lock, self._wake_read, self._wake_write):
            os.close(descriptor)
        if self.group is not None:
            self.group.enter()
        # When the machine runs out of memory, the kernel shall take jobs before the service and supervisors.
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")
        _reset_signals()
        _redirect(self.job_dir / self.launch.log, self._header())
        env = {**self.launch.env, TOKEN_VARIABLE: self.token}
        self.run_child(Launch(**{**self.launch.to_dict(), "env": env}))

    def _header(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        return f"=== {self.attempt.name}, {when}, {self.note}: {shlex.join(self.launch.argv)}\n"

    # While it runs

    def _wait(self) -> None:
        """Sleep until a signal comes or the next look is due; renew the heartbeat."""
        pause = self._pause()
        now = time.monotonic()
        for moment in (self.kill_at, self.limit_at):
            if moment is not None:
                pause = min(pause, max(0.0, moment - now))
        if select.select([self._wake_read], [], [], pause)[0]:
            with contextlib.suppress(BlockingIOError):
                while os.read(self._wake_read, 4096):
                    pass
        with contextlib.suppress(OSError):  # a lost heartbeat is not worth a job
            os.utime(self.attempt / "heartbeat")

    def _pause(self) -> float:
        """Seconds between two looks."""
        watched = self.launch.memory_bytes is not None and self.group is None
        return MEMORY_WATCH_SECONDS if watched else HEARTBEAT_SECONDS

    def _reap(self) -> None:
        """Collect everything that ended: the child, and orphans that came to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child:
                self.status = status

    def _follow_control(self) -> None:
        """Do what control.json asks, once; a SIGTERM to the supervisor asks for a stop as well."""
        if self._terminated:
            self._terminated = False
            self._stop("stopped", self.launch.grace_seconds)
        try:
            wish = read_json(self.attempt / "control.json")
            if wish is None or wish == self._control:
                return
            self._control = wish
            self._stop("stopped", float(wish["grace_seconds"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"control.json: {error!r}", file=sys.stderr)  # a bad request must not cost the job

    def _stop(self, reason: str, grace_seconds: float) -> None:
        """SIGTERM to the child's group (the first time), SIGKILL ``grace_seconds`` later."""
        if self.reason == "exited":
            self.reason = reason
            if grace_seconds > 0:
                self._signal_group(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        self.kill_at = deadline if self.kill_at is None else min(self.kill_at, deadline)

    def _enforce(self) -> None:
        """Time and memory limits, and the end of a grace period."""
        if self.status is not None:
            return
        now = time.monotonic()
        if self.limit_at is not None and now >= self.limit_at:
            self.limit_at = None
            self._stop("time_limit", self.launch.grace_seconds)
        if now >= self._measure_at:
            self._measure(now)
        limit = self.launch.memory_bytes
        if limit is not None and self.group is None and self._used_bytes > limit:
            self._stop("memory_limit", 0.0)
        if self.kill_at is not None and time.monotonic() >= self.kill_at:
            if self.reason == "stopped":
                self.reason = "killed"
            self._kill_all()
            self.kill_at = now + 1.0

    def _measure(self, now: float) -> None:
        self._measure_at = now + self._pause()
        pids = descendants(os.getpid())
        self._used_bytes = resident_bytes(pids)
        self.peak_bytes = max(self.peak_bytes, self._used_bytes)
        if not self._recorded.issuperset(pids):
            self._record_processes(pids)

    def _record_processes(self, pids: list[int] | None = None) -> None:
        """``child.json``: who belongs to the job, for whoever must clean up after a killed supervisor."""
        pids = [self.child] if pids is None else pids
        known = [identity.to_dict() for identity in map(identify, pids) if identity is not None]
        record = {"pid": self.child, "pgid": self.child, "processes": known}
        try:
            atomic_write_json(self.attempt / "child.json", record, durable=False)
            self._recorded = set(pids)
        except OSError as error:
            # Tried again at the next look; session and token identify the job's processes meanwhile.
            print(f"child.json: {error}", file=sys.stderr)

    # The end

    def _signal_group(self, number: int) -> None:
        if self.child and self.status is None:  # not reaped, so its number cannot belong to anybody else
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child, number)

    def _kill_all(self) -> None:
        """SIGKILL to the group and to every descendant that left it."""
        self._signal_group(signal.SIGKILL)
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _clear(self) -> list[int]:
        """End what the child left behind: SIGTERM, then SIGKILL. Returns what cannot be killed."""
        asked = self.kill_at is not None
        start = time.monotonic()
        while remaining := self._remaining():
            waited = time.monotonic() - start
            if waited > LEFTOVER_GRACE_SECONDS + 10:
                return remaining
            if not asked:
                asked = True
                for pid in remaining:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGTERM)
            elif waited > LEFTOVER_GRACE_SECONDS or self.kill_at is not None:
                self._kill_all()
            select.select([self._wake_read], [], [], 0.05)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        return []

    def _remaining(self) -> list[int]:
        self._reap()
        return descendants(os.getpid())

    def _finish(self, survivors: list[int]) -> None:
        """Write exit.json; a full disk is waited for, since nobody else knows how the job ended."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        largest = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        fields: dict[str, Any] = {
            "ended": time.time(),
            "peak_memory_bytes": max(self.peak_bytes, largest),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 3),
        }
        if self.group is not None:
            fields["peak_memory_bytes"] = self.group.peak_bytes() or fields["peak_memory_bytes"]
            if self.group.ran_out():
                self.reason = "memory_limit"
            self.group.remove()
        if self.status is not None and os.WIFSIGNALED(self.status):
            fields["signal"] = os.WTERMSIG(self.status)
        elif self.status is not None:
            fields["exit_code"] = os.WEXITSTATUS(self.status)
        if survivors:
            fields["survivors"] = survivors
        complained = False
        while True:
            try:
                write_exit(self.attempt, self.reason, **fields)
                return
            except OSError as error:
                if not complained:
                    complained = True
                    print(f"exit.json: {error}; trying again", file=sys.stderr)
            with contextlib.suppress(OSError):
                os.utime(self.attempt / "heartbeat")
            time.sleep(0.5)


def execute(launch: Launch) -> NoReturn:
    """Replace this process by the job's command; the exit codes for what cannot be run are a shell's."""
    try:
        os.chdir(launch.cwd)
        os.execvpe(launch.argv[0], launch.argv, launch.env)
    except OSError as error:
        print(f"cannot run {launch.argv[0]!r} in {launch.cwd}: {error}", file=sys.stderr, flush=True)
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _reset_signals() -> None:
    """As a process has them that nobody prepared; ignored ones would be inherited by the command."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):  # those of the C library's own
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _redirect(log: Path, header: str) -> None:
    """Standard input from nowhere, output and errors to the end of the log."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with contextlib.suppress(OSError):  # a full disk
        os.write(output, header.encode())
    for source, target in ((nowhere, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    for descriptor in {nowhere, output} - {0, 1, 2}:
        os.close(descriptor)


def _refuse(why: str) -> int:
    print(f"not started: {why}", file=sys.stderr)
    return EXIT_LOCKED


def detach() -> Callable[[], None]:
    """Fork; the parent stays until the child is ready or gives up, and exits. Returns "I am ready" to the child.

    So whoever started us gets an exit code soon and has no child to wait for later.
    """
    heard, said = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child:
        os.close(said)
        if os.read(heard, 1) == b"1":
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
    os.close(heard)

    def ready() -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(said, b"1")
        os.close(said)

    return ready


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m swift.experiments.supervisor")
    parser.add_argument("attempt", type=Path)
    parser.add_argument("--detach", action="store_true", help="return as soon as the job is taken")
    parser.add_argument("--note", default="cold", help="how it is started, for the log")
    options = parser.parse_args(argv)
    ready = detach() if options.detach else lambda: None
    with contextlib.suppress(PermissionError):  # started as leader of a group by a shell
        os.setsid()
    return Supervisor(options.attempt.absolute(), note=options.note).run(ready)


if __name__ == "__main__":
    sys.exit(main())
