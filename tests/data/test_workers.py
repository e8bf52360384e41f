"""Worker pools: results in order, errors as they are, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from swift.core.errors import DataError, SwiftError
from swift.data.workers import WorkerPool


def multiply(state: int, item: int) -> int:
    if item == 13:
        raise DataError("thirteen", where="here")
    if item == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 1000:
        threading.Event().wait()  # stuck for ever; closing the pool ends the process
    return state * item


def pool(deadline_seconds: float = 60.0) -> WorkerPool[int, int]:
    return WorkerPool(multiply, 10, 2, stage="counting", fix="count less", deadline_seconds=deadline_seconds)


@pytest.fixture
def workers() -> Iterator[WorkerPool[int, int]]:
    made = pool()
    yield made
    made.close()
    assert multiprocessing.active_children() == []


def test_order_and_laziness(workers: WorkerPool[int, int]) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(12):
            taken.append(number)
            yield number

    results = workers.map(items(), ahead=2)
    assert next(results) == 0
    assert len(taken) == 4  # two per process are under way, the rest is not even read
    assert list(results) == [10 * number for number in range(1, 12)]
    assert list(workers.map([], ahead=1)) == []


def test_an_error_of_the_function_arrives_as_it_is(workers: WorkerPool[int, int]) -> None:
    results = workers.map([1, 13, 2], ahead=2)
    assert next(results) == 10
    with pytest.raises(DataError, match="here: thirteen"):
        next(results)
    assert list(workers.map([5], ahead=1)) == [50]  # the pool goes on


def test_a_dead_process_is_named(workers: WorkerPool[int, int]) -> None:
    with pytest.raises(SwiftError, match="counting: a worker process died") as caught:
        list(workers.map([1, 99], ahead=1))
    assert caught.value.fix == "count less"


def test_a_stuck_process_is_named() -> None:
    stuck = pool()
    list(stuck.map([1, 2], ahead=1))
    stuck.deadline_seconds = 0.5  # only now: processes take a while to start
    with pytest.raises(SwiftError, match="counting: no result for"):
        list(stuck.map([1000], ahead=1))
    stuck.close()
    assert multiprocessing.active_children() == []


def wait_until_ignored(pid: int, number: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        ignored = next(line for line in status.splitlines() if line.startswith("SigIgn:"))
        if int(ignored.split()[1], 16) >> (number - 1) & 1:
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} does not ignore signal {number}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_signals_to_the_group_are_left_to_the_parent(workers: WorkerPool[int, int]) -> None:
    results = workers.map(range(1, 9), ahead=1)
    assert next(results) == 10
    for child in multiprocessing.active_children():
        assert child.pid is not None
        wait_until_ignored(child.pid, signal.SIGTERM)  # the second process may still be starting
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    assert list(results) == [20, 30, 40, 50, 60, 70, 80]


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import multiprocessing
import test_workers

if __name__ == "__main__":
    pool = test_workers.pool()
    results = list(pool.map([1, 2], ahead=1))
    print(results, [child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_kill_9_leaves_no_worker_behind(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)), encoding="utf-8")
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        line = parent.stdout.readline()
        assert line.startswith("[10, 20] [")
        processes = [psutil.Process(int(word)) for word in line.partition("] [")[2].strip("]\n").split(",")]
        assert processes
        parent.kill()
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert alive == []
