"""Rewards computed in processes that can be killed, so that none of them can hold up or end a training."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from swift.core import errors
from swift.core.errors import SwiftError
from swift.core.logging import get_logger
from swift.rl.reward_functions import RewardBatch

__all__ = ["WORKER", "RewardFailure", "RewardPool", "RewardResult"]

logger = get_logger(__name__)

START_SECONDS = 120.0
WORKER = "SWIFT_REWARD_WORKER"
"""Set in the environment of processes that compute rewards."""


@dataclass(frozen=True)
class RewardFailure:
    """What went wrong with one answer: ``hung``, ``died``, ``raised`` or ``failed``, and more about it."""

    kind: str
    why: str


RewardResult = tuple[list[float], dict[int, RewardFailure]]
"""A reward of every answer (NaN: does not apply, or it failed), and the failures by their places."""


@dataclass
class _Task:
    """A call that is to be made, and of which answers."""

    function: int
    batch: RewardBatch
    places: list[int]


class _Worker:
    """One process."""

    def __init__(self, functions: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "swift.rl.reward_worker", str(theirs.fileno()), str(os.getpid())]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                start_new_session=True, env={**os.environ, WORKER: "1"},
            )  # fmt: skip
        self.connection = Connection(ours.detach())
        self.task: _Task | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self.is_loading = True
        self.connection.send(("load", list(functions)))

    def give(self, task: _Task, seconds: float) -> None:
        self.task, self.deadline = task, time.monotonic() + seconds
        with contextlib.suppress(OSError):  # it has just ended: found when its answer is read
            self.connection.send(("call", (task.function, task.batch)))

    def end(self) -> None:
        """Kill the process and what it has started."""
        self.connection.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
        self.process.wait()


class RewardPool:
    """Calls reward functions.

    All answers are given to a function at once. Where that takes longer than the deadline, dies or raises, each
    answer is given to it alone: those that fail again are named, the others have their rewards.

    Args:
        functions: texts of ``reward_funcs`` with their options.
        timeout: seconds for one answer, and for a call with all of them.
        num_processes: most of them at a time.

    Raises SwiftError when a function cannot be found or made.
    """

    def __init__(
        self, functions: Sequence[tuple[str, Mapping[str, Any]]], *, timeout: float, num_processes: int
    ) -> None:
        self.functions, self.timeout, self.num_processes = list(functions), timeout, num_processes
        self._workers: list[_Worker] = []
        self._is_slow: set[int] = set()
        self._start(1)

    def __call__(self, batch: RewardBatch) -> list[RewardResult]:
        """Of each function, in their order. Raises SwiftError for a function that returns the wrong shape."""
        results: list[RewardResult] = [([math.nan] * len(batch), {}) for _ in self.functions]
        alone: list[_Task] = []
        whole: list[_Task] = []
        for number in range(len(self.functions)):
            if number in self._is_slow and len(batch) > 1:
                alone += self._singles(number, batch)
            else:
                whole.append(_Task(number, batch, list(range(len(batch)))))
        failed = self._run(whole, results)
        for task, failure in failed:
            if len(task.places) == 1:
                results[task.function][1][task.places[0]] = failure
            else:
                logger.warning(
                    "reward %s %s with %d answers at once (%s); each is tried alone",
                    self.functions[task.function][0], failure.kind, len(batch), failure.why,
                )  # fmt: skip
                alone += self._singles(task.function, batch)
        timed_out = {task.function for task, failure in failed if failure.kind == "hung"}
        for task, failure in self._run(alone, results):
            results[task.function][1][task.places[0]] = failure
        # Slow as a whole, but no answer hangs: not tried as a whole again.
        self._is_slow |= {number for number in timed_out if not results[number][1]}
        return results

    @staticmethod
    def _singles(number: int, batch: RewardBatch) -> list[_Task]:
        return [_Task(number, batch.part(place), [place]) for place in range(len(batch))]

    def _run(self, tasks: Sequence[_Task], results: list[RewardResult]) -> list[tuple[_Task, RewardFailure]]:
        """Carry the tasks out; fills ``results``, returns what failed."""
        waiting, failed = deque(tasks), []
        for worker in [one for one in self._workers if one.process.poll() is not None]:
            worker.end()  # killed from outside while it had nothing to do: no answer's fault
            self._workers.remove(worker)
        self._start(min(self.num_processes, len(tasks)))
        while waiting or any(worker.task for worker in self._workers):
            for worker in self._workers:
                if waiting and worker.task is None and not worker.is_loading:
                    worker.give(waiting.popleft(), self.timeout)
            busy = [worker for worker in self._workers if worker.task or worker.is_loading]
            left = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(0.0, left))
            for worker in busy:
                failure = None
                if worker.connection in ready:
                    failure = self._take(worker, results)
                elif time.monotonic() > worker.deadline:
                    failure = RewardFailure("hung", f"no result within {self.timeout:g} s")
                if failure is not None:
                    task = self._lose(worker, failure)
                    if task is not None:
                        failed.append((task, failure))
                    if waiting:
                        self._start(min(self.num_processes, len(waiting)))
        return failed

    def _take(self, worker: _Worker, results: list[RewardResult]) -> RewardFailure | None:
        """A message of a worker; a failure after which it must be replaced is returned."""
        task = worker.task
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.wait(5.0)
            return RewardFailure("died", f"its process ended with code {worker.process.returncode}")
        if kind == "error":
            name, message, where, why, fix = content
            self.close()
            raise getattr(errors, name, SwiftError)(message, where=where, why=why, fix=fix)
        if worker.is_loading:
            worker.is_loading = False
            return None
        assert task is not None
        if kind == "raised":
            return RewardFailure("raised", content)
        name = self.functions[task.function][0]
        if kind == "shape":
            self.close()
            raise SwiftError(
                f"the reward {name} {content}", where="--reward_funcs", fix="one number for each answer"
            )
        for place, value in zip(task.places, content, strict=True):
            if isinstance(value, str):
                results[task.function][1][place] = RewardFailure("failed", value)
            else:
                results[task.function][0][place] = value
        worker.task = None
        return None

    def _lose(self, worker: _Worker, failure: RewardFailure) -> _Task | None:
        """After a failure: the task it was. A process that only raised goes on."""
        task, worker.task = worker.task, None
        if failure.kind != "raised":
            worker.end()
            self._workers.remove(worker)
        if worker.is_loading:
            self.close()
            raise SwiftError(
                "rewards cannot be loaded",
                where=", ".join(text for text, _ in self.functions),
                why=failure.why,
            )
        return task

    def _start(self, count: int) -> None:
        while len(self._workers) < count:
            self._workers.append(_Worker(self.functions))

    def check(self) -> None:
        """Wait until the functions are found and made. Raises SwiftError when one cannot be."""
        while any(worker.is_loading for worker in self._workers):
            self._run_loading()

    def _run_loading(self) -> None:
        worker = next(worker for worker in self._workers if worker.is_loading)
        if not wait([worker.connection], max(0.0, worker.deadline - time.monotonic())):
            self._lose(worker, RewardFailure("hung", f"not ready within {START_SECONDS:g} s"))
        failure = self._take(worker, [])
        if failure is not None:
            self._lose(worker, failure)

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
