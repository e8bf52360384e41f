"""One command, several processes: the workers are started and watched through torch elastic.

The launcher is the command that the user typed. It starts one worker for each process of the layout (each runs the
same command line again), passes stop signals on, and starts all workers again from the last checkpoint when one of
them was killed or has lost another. What a worker *says* is wrong (exit code 1 or 2) is not tried again.
Workers end when the launcher dies: the kernel sends them a signal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from swift.config.sections.parallel import ParallelSection
from swift.core.devices import cpu_count
from swift.core.errors import SwiftError, TransientError
from swift.core.process import descendants, die_with_parent, identify, send_signal
from swift.parallel.late import describe_ranks, leave_stacks_in

__all__ = ["EXIT_LOST", "as_worker", "launch", "note_run_folder", "restart_folder"]

EXIT_LOST = 75
"""A worker that has lost others, or waited in vain for them; the restart is tried."""

_FOLDER = "SWIFT_LAUNCH_FOLDER"
_LAUNCHER = "SWIFT_LAUNCHER_PID"
_RUN = "run"
_LATE = "late.txt"
_SEVERAL_PORT = 29400
_TAIL_LINES = 12
_SHUTDOWN_SECONDS = 10


def launch(words: Sequence[str], section: ParallelSection) -> int:
    """Run ``swift WORDS`` in as many processes as the layout takes on this machine; returns the exit code.

    Raises SwiftError when workers keep dying, or never found one another.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what happened is told below
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="swift-launch-"))
    count = section.nproc_per_node or section.num_processes
    os.environ.update({_FOLDER: str(folder), _LAUNCHER: str(os.getpid())})
    threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    if not threads or "SWIFT_ATTEMPT_TOKEN" in os.environ:  # the service counts a job's, users a process's
        os.environ["OMP_NUM_THREADS"] = str(max(1, (threads or cpu_count()) // count))
    # When one has failed the others wait for it in vain: they are not given long.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN_SECONDS))
    try:
        with _passing_signals_on() as received:
            for attempt in range(section.max_restarts + 1):
                try:
                    elastic_launch(_settings(section, count, attempt), sys.executable)(
                        "-m", "swift.cli.main", *words
                    )
                    return 0
                except ChildFailedError as error:
                    failures = _first_to_fail(error.failures)
                if received:
                    return 128 + received[0]
                said = [
                    failure.exitcode for failure in failures.values() if failure.exitcode not in (EXIT_LOST,)
                ]
                spoken = [code for code in said if code > 0]
                if spoken:
                    _show_tail(folder, failures)
                    return spoken[0]
                what = _describe(failures)
                late = folder / _LATE
                if late.is_file():
                    print(late.read_text(), file=sys.stderr)
                    late.unlink()
                if attempt < section.max_restarts:
                    print(
                        f"{what}; starting all processes again from the last checkpoint "
                        f"({attempt + 1} of {section.max_restarts} times)",
                        file=sys.stderr,
                        flush=True,
                    )
            _show_tail(folder, failures)
            raise SwiftError(
                what,
                where=str(_noted_folder(folder) or "the workers"),
                why=f"it happened {section.max_restarts + 1} times",
                fix="look into logs/ of the run folder; out of memory is the usual cause of SIGKILL",
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settings(section: ParallelSection, count: int, attempt: int) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    endpoint, name = "localhost:0", f"swift-{os.getpid()}-{attempt}"
    if section.nnodes > 1:  # the same on all machines
        endpoint = f"{section.master_addr}:{section.master_port or _SEVERAL_PORT}"
        name = f"swift-{attempt}"
    options: dict[str, Any] = {"timeout": section.ddp_timeout}
    if section.node_rank is not None:
        options["is_host"] = section.node_rank == 0
    return LaunchConfig(
        min_nodes=section.nnodes,
        max_nodes=section.nnodes,
        nproc_per_node=count,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs=options,
        max_restarts=0,  # the agent would also try again what a worker says is wrong
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        local_addr="localhost" if section.nnodes == 1 else None,
        signals_to_handle="SIGQUIT",  # the others are passed on, so that workers can save as long as it takes
    )


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[list[int]]:
    """Send stop signals to the workers, which save and end; yields a list that gets the first one's number."""
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        for pid in descendants(os.getpid()):
            identity = identify(pid)
            if identity is not None and len(received) < 3:
                send_signal(identity, number)
        if len(received) >= 3:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_to_fail(failures: dict[int, Any]) -> dict[int, Any]:
    """Without those that the agent itself has ended, because another one had failed."""
    own = {rank: one for rank, one in failures.items() if one.exitcode != -signal.SIGTERM}
    return own or failures


def _describe(failures: dict[int, Any]) -> str:
    killed = {rank: -one.exitcode for rank, one in failures.items() if one.exitcode < 0}
    if killed:
        rank, number = min(killed.items())
        return f"the process of rank {rank} was ended by {signal.Signals(number).name}"
    return f"rank {min(failures)} lost the others"


def _show_tail(folder: Path, failures: dict[int, Any]) -> None:
    """The last lines of what a failed rank has said, where the terminal did not show it."""
    for rank in sorted(failures):
        for file in (
            folder / f"rank-{rank}.txt",
            (_noted_folder(folder) or folder) / "logs" / f"rank-{rank}.txt",
        ):
            if rank and file.is_file() and (lines := file.read_text(errors="replace").splitlines()):
                print(f"rank {rank} said:", *lines[-_TAIL_LINES:], sep="\n  ", file=sys.stderr)
                return


def _noted_folder(folder: Path) -> Path | None:
    file = folder / _RUN
    return Path(file.read_text()) if file.is_file() else None


# Inside a worker


@contextlib.contextmanager
def as_worker() -> Iterator[None]:
    """Be one of several processes: end with the launcher, leave the terminal to rank 0, tell when others are lost."""
    if "RANK" not in os.environ:
        yield
        return
    parent = int(os.environ.get(_LAUNCHER) or os.getppid())
    die_with_parent(parent)
    rank, folder = int(os.environ["RANK"]), os.environ.get(_FOLDER)
    if rank and folder:
        _redirect(Path(folder) / f"rank-{rank}.txt")
    try:
        yield
    except SwiftError:
        raise
    except Exception as error:
        if not _is_about_others(error):
            raise
        _report_loss(rank)
        raise LostOthers(rank, error) from error
    else:
        _leave()


def _leave() -> None:
    """All have come to the end: take the connections down together."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _report_loss(rank: int) -> None:
    """Leave for the launcher, and say, what every rank is doing: one of them keeps the others waiting, or is gone."""
    folder = Path(os.environ.get(_FOLDER, ""))
    run = _noted_folder(folder)
    if run is None:
        return
    text = describe_ranks(run, rank)
    with contextlib.suppress(FileExistsError), (folder / _LATE).open("x") as file:
        file.write(text)


class LostOthers(TransientError):
    """Another process died, or did not come to where all have to meet."""

    exit_code = EXIT_LOST

    def __init__(self, rank: int, error: BaseException, fix: str | None = None) -> None:
        why = " ".join(str(error).split()).partition(" This is typically")[0][:200]
        super().__init__(f"rank {rank} has lost the other processes", why=why, fix=fix)


def _is_about_others(error: BaseException) -> bool:
    """True for what collectives raise when a peer is gone or late."""
    import torch

    kinds = (torch.distributed.DistError, ConnectionError)
    words = (
        "gloo",
        "nccl",
        "connection closed by peer",
        "timed out waiting",
        "store",
        "broken pipe",
        "process group",
    )
    text = str(error).lower()
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def _redirect(file: Path) -> None:
    """Let everything that this process prints, C libraries included, go to ``file``."""
    sys.stdout.flush()
    sys.stderr.flush()
    with file.open("ab") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)


def note_run_folder(path: Path, rank: int) -> None:
    """The run folder is known: the launcher goes on there after a restart, and other ranks print there."""
    folder = os.environ.get(_FOLDER)
    leave_stacks_in(path, rank)
    if rank:
        _redirect(path / "logs" / f"rank-{rank}.txt")
    elif folder:
        (Path(folder) / _RUN).write_text(str(path))


def restart_folder() -> Path | None:
    """The run that this process goes on with after a restart by the launcher; None: this is the first start."""
    folder = os.environ.get(_FOLDER)
    return _noted_folder(Path(folder)) if folder and "RANK" in os.environ else None
