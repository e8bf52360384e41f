"""Gloo ranks that live as long as a test module: a pool for each world size, torch and transformers imported.

    def work(rank, factor): ...            # a function of a test module: it is found again by its name
    results = pool(2).run(work, 3)         # [result of rank 0, result of rank 1]

A function gets its rank first. When a rank raises, `run` raises with the ranks' tracebacks; when the deadline passes,
with the stack of every rank that is still at it. Either way that pool is ended, and the next call makes a new one.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

__all__ = ["RanksFailed", "close_pools", "layout_id", "mesh_of", "pool", "slow_but"]

DEADLINE_SECONDS = 120.0
_GRACE_SECONDS = 1.5
"""How long the other ranks may go on when one has failed: they mostly wait for it."""

_MOST_THREADS = 120
"""A group of ranks has threads that wake up a hundred times a second for as long as its process lives: ranks that
have seen many layouts would keep the whole machine busy while they wait. They make room for new ones."""

_PRELOAD = [
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "transformers",
    "swift.parallel.native",
]


def slow_but(kept: list[Any], every: Any) -> list[Any]:
    """Values of a parametrisation: ``kept`` ones guard their dimension in the default tests, the rest is slow."""
    return [one if one in kept else pytest.param(one, marks=pytest.mark.slow) for one in every]


def layout_id(value: Any) -> str | None:
    """How a layout is called among the values of a parametrisation."""
    return value.describe() if hasattr(value, "describe") else None


class RanksFailed(AssertionError):
    """A rank raised, died, or did not come to an end."""


class Pool:
    """Ranks that are connected with one another. Use `pool`."""

    def __init__(self, world_size: int) -> None:
        context = _context()
        self.world_size = world_size
        self.folder = Path(tempfile.mkdtemp(prefix="swift-ranks-"))
        self.connections, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(rank, world_size, str(self.folder), theirs),
                daemon=True,
                name=f"rank{rank}",
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = DEADLINE_SECONDS) -> list[Any]:
        """``function(rank, *args)`` on every rank; the results in the order of the ranks."""
        # Plain pickle: multiprocessing's own would move tensors through shared memory.
        call = pickle.dumps((function, args))
        for connection in self.connections:
            connection.send_bytes(call)
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        end = time.monotonic() + seconds
        while len(results) + len(errors) < self.world_size:
            missing = {
                self.connections[rank]: rank
                for rank in range(self.world_size)
                if rank not in results and rank not in errors
            }
            ready = wait(list(missing), max(0.0, end - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = missing[connection]  # type: ignore[index]
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    succeeded, value = False, "the process died"
                (results if succeeded else errors)[rank] = value
                if not succeeded:
                    end = min(end, time.monotonic() + _GRACE_SECONDS)
        if len(results) == self.world_size:
            if any(threads > _MOST_THREADS for _, threads in results.values()):
                self.close()
            return [results[rank][0] for rank in range(self.world_size)]
        report = self._report(errors, set(range(self.world_size)) - results.keys() - errors.keys(), seconds)
        self.close(kill=True)
        raise RanksFailed(report)

    def _report(self, errors: dict[int, str], late: set[int], seconds: float) -> str:
        parts = [f"--- rank {rank} raised\n{text}" for rank, text in sorted(errors.items())]
        for rank in sorted(late):
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        for rank in sorted(late):
            file = self.folder / f"stack-{rank}"
            end = time.monotonic() + 2
            while not file.stat().st_size and time.monotonic() < end:
                time.sleep(0.02)
            what = "waited for it" if errors else f"did not end in {seconds:.0f} s"
            parts.append(f"--- rank {rank} {what}\n{file.read_text()}")
        return "\n".join(["the ranks failed", *parts])

    def close(self, *, kill: bool = False) -> None:
        """End the ranks."""
        for connection in self.connections:
            if not kill:
                connection.send_bytes(pickle.dumps(None))
        for process in self.processes:
            if kill:
                process.kill()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join(10)
        for connection in self.connections:
            connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        _POOLS.pop(self.world_size, None)


@functools.cache
def _context() -> Any:
    """The way to ranks that have torch from their birth, also where a data loader's server was there first."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


_POOLS: dict[int, Pool] = {}


def pool(world_size: int) -> Pool:
    """The pool of this size; it is made by the first call and lives to the end of the test module."""
    if world_size not in _POOLS:
        _POOLS[world_size] = Pool(world_size)
    return _POOLS[world_size]


@atexit.register
def close_pools() -> None:
    """End the ranks of all pools: idle ones cost processor time."""
    for one in list(_POOLS.values()):
        one.close()


@functools.cache
def mesh_of(layout: Any) -> Any:
    """Inside a rank: the mesh of a layout, made once (its groups are never given back)."""
    from swift.parallel.mesh import build_mesh

    return build_mesh(layout, "cpu")


def _work(rank: int, world_size: int, folder: str, connection: Any) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    stack = (Path(folder) / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    while (call := pickle.loads(connection.recv_bytes())) is not None:
        function, args = call
        try:
            answer = pickle.dumps(
                (True, (function(rank, *args), len(list(Path("/proc/self/task").iterdir()))))
            )
        except BaseException:  # whatever it is, the test has to be told
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)
    # destroy_process_group hangs in forked ranks.
    distributed.barrier()
    os._exit(0)
