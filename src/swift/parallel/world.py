"""The processes of a run and how they agree. With one process there is no process group, and nothing is sent.

Every method that talks to the others must be called by all of them.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from swift.core.backends.base import backend_of
from swift.core.errors import SwiftError, TransientError
from swift.parallel.engine import StepCounts
from swift.parallel.layout import Layout
from swift.parallel.mesh import build_mesh

__all__ = ["World", "join", "said_by_main"]

T = TypeVar("T")

PREPARE_SECONDS = 24 * 3600
_CALLS = itertools.count()
"""Of `World.main_first` and `World.together`, the same on all ranks."""


@dataclass(frozen=True)
class World:
    """All processes of a run, seen by one of them.

    Attributes:
        rank: which one this is; 0 writes the run folder and has the terminal.
        layout: along which dimensions they work.
        mesh: the device mesh; None for one process.
        saving: the processes once more, for a thread that writes checkpoints while training goes on.
    """

    rank: int = 0
    layout: Layout = field(default_factory=Layout)
    mesh: DeviceMesh | None = None
    saving: distributed.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return self.layout.world_size

    @property
    def local_rank(self) -> int:
        """Which of the processes of this machine this is."""
        return int(os.environ.get("LOCAL_RANK", "0")) if self.mesh is not None else 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of the data is ours, of ``layout.dp``."""
        return self.layout.data_rank(self.rank)

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums of ``values`` over all parts of the data; float64 on the host, so that counts are exact.

        Ranks that share a row (cp, tp) have the same values: a part of the data counts once.
        """
        if self.mesh is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor, group=self.mesh["dp"].get_group())
        return tensor.tolist()

    def total(self, counts: StepCounts) -> StepCounts:
        """The counts of all parts of the data together."""
        if self.mesh is None:
            return counts
        known = {key: value for key, value in asdict(counts.denominators).items() if value is not None}
        *sums, tokens, targets = self.sums([*known.values(), counts.num_tokens, counts.num_targets])
        # Weights are real numbers, all else are counts.
        summed = {
            key: total if isinstance(value, float) else round(total)
            for (key, value), total in zip(known.items(), sums, strict=True)
        }
        denominators = replace(counts.denominators, **summed)  # type: ignore[arg-type]
        return StepCounts(denominators, round(tokens), round(targets))

    def largest(self, value: int) -> int:
        """The largest of what all processes say."""
        if self.mesh is None:
            return value
        tensor = torch.tensor([value])
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return int(tensor.item())

    def from_main(self, value: T) -> T:
        """What rank 0 says."""
        return value if self.mesh is None else said_by_main(value)

    def collect(self, value: T) -> list[T]:
        """What the ranks of all parts of the data say, in order of the parts."""
        if self.mesh is None:
            return [value]
        group = self.mesh["dp"].get_group()
        found: list[Any] = [None] * self.layout.dp
        distributed.all_gather_object(found, value, group=group)
        return found

    def wait(self) -> None:
        """Wait until all are here."""
        if self.mesh is not None:
            distributed.barrier()

    def main_first(self, work: Callable[[], T]) -> T:
        """``work`` on rank 0, which fills caches, then on the others; when it fails there, it fails everywhere.

        The work (reading data) may take longer than ranks otherwise wait for one another: up to `PREPARE_SECONDS`.
        Raises whatever ``work`` raises; on other ranks SwiftError with the exit code of rank 0's error.
        """
        if self.mesh is None:
            return work()
        store, key = distributed.distributed_c10d._get_default_store(), f"swift/main-first/{next(_CALLS)}"
        if not self.is_main:
            store.wait([key], datetime.timedelta(seconds=PREPARE_SECONDS))
            code = int(store.get(key))
            if code:
                error = SwiftError("rank 0 has failed")
                error.exit_code = code
                raise error
            return work()
        try:
            result = work()
        except BaseException as error:
            store.set(key, str(getattr(error, "exit_code", 1)))
            raise
        store.set(key, "0")
        return result

    def together(self, work: Callable[[], T], *, stage: str, seconds: float) -> list[T]:
        """``work`` on every rank at once; what all of them return, by rank.

        For work that may take some ranks much longer than others: they wait up to ``seconds`` instead of as long as
        ranks otherwise wait for one another. When it fails on a rank, it fails on all of them, for the same reason.

        Raises:
            SwiftError: what the first rank to fail raised, or that some were not done in time.
            BaseException: what ``work`` raises on this rank.
        """
        if self.mesh is None:
            return [work()]
        store, call = distributed.distributed_c10d._get_default_store(), next(_CALLS)
        keys = [f"swift/together/{call}/{rank}" for rank in range(self.size)]
        try:
            result = work()
        except BaseException as error:
            store.set(keys[self.rank], json.dumps(_told(error, self.rank, stage)))
            raise
        store.set(keys[self.rank], "null")
        deadline = time.monotonic() + seconds
        for rank, key in enumerate(keys):
            try:
                store.wait([key], datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.1)))
            except (distributed.DistStoreError, RuntimeError) as error:
                raise TransientError(
                    f"rank {rank} is not done after {seconds:.0f} s, or is gone", where=stage, why=str(error)
                ) from error
            if told := json.loads(store.get(key)):
                kind = TransientError if told["may_pass"] else SwiftError
                failure = kind(told["message"], where=told["where"], why=told["why"], fix=told["fix"])
                failure.exit_code = told["exit_code"]
                raise failure
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, result)
        store.delete_key(keys[self.rank])  # all have read it: they have come to the exchange
        return found

    def by_main(self, work: Callable[[], T], *, stage: str, seconds: float) -> T:
        """What ``work`` returns on rank 0, for all of them; see `together`."""
        own: Callable[[], Any] = work if self.is_main else lambda: None
        result: T = self.together(own, stage=stage, seconds=seconds)[0]
        return result


def said_by_main(value: T) -> T:
    """What rank 0 of the processes that have met says."""
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def _told(error: BaseException, rank: int, stage: str) -> dict[str, Any]:
    """Of what other ranks raise for it."""
    if not isinstance(error, SwiftError):
        error = TransientError(f"rank {rank} has failed", where=stage, why=f"{type(error).__name__}: {error}")
    names = ("message", "where", "why", "fix", "exit_code")
    return {name: getattr(error, name) for name in names} | {"may_pass": isinstance(error, TransientError)}


def join(layout: Layout, device_type: str, timeout_seconds: int) -> World:
    """Meet the other processes that the layout names; returns at once for one process.

    Raises SwiftError when this process was not started as one of several.
    """
    if layout.world_size == 1:
        return World()
    if "RANK" not in os.environ:
        raise SwiftError(
            f"the layout ({layout.describe()}) takes {layout.world_size} processes, this is one",
            fix=f"swift sft starts them; or torchrun --nproc_per_node {layout.world_size} your_script.py",
        )
    if not distributed.is_initialized():
        backend = backend_of(device_type).communication
        if backend != "gloo":  # counts are on the host
            backend = f"cpu:gloo,{device_type}:{backend}"
        distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
    saving = distributed.new_group(backend="gloo")
    return World(distributed.get_rank(), layout, build_mesh(layout, device_type), saving)
