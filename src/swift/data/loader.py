"""Batches made ahead of the training loop, by a thread or by worker processes, always in the same order."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import TypeVar, cast

from swift.core.errors import TransientError
from swift.data.batching import BatchSchedule, MicroBatch, Mode, deal
from swift.data.collate import Batch, batch_of
from swift.data.layout import Layout, lay_out, lay_out_in_worker
from swift.data.tokens import TokenDataset
from swift.data.workers import WorkerPool

__all__ = ["BatchLoader", "ahead"]

T = TypeVar("T")

_STAGE = "data loading"
_AHEAD = 4  # micro-batches prepared in advance by the thread, and by each worker process


class BatchLoader:
    """Serves the micro-batches of each optimizer step.

    Args:
        dataset: the samples.
        schedule: which samples go together; it alone decides the order, so ``num_workers`` does not.
        mode: how rows are laid out, normally ``schedule.mode``.
        num_workers: processes that prepare batches; 0: one thread.
        pad_token_id: what fills rows at their right end.
        share: (which rank, of how many): each step's micro-batches are dealt out among them.
        deadline_seconds: how long to wait for one batch before giving up.

    Worker processes live until ``close`` (also called at the end of a ``with`` block), and end on their own
    when this process dies.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        schedule: BatchSchedule,
        mode: Mode | None = None,
        num_workers: int = 0,
        *,
        pad_token_id: int = 0,
        share: tuple[int, int] = (0, 1),
        deadline_seconds: float = 300.0,
    ) -> None:
        self.share = share
        self.dataset = dataset
        self.schedule = schedule
        self.mode: Mode = mode or schedule.mode
        self.num_workers = num_workers
        self.pad_token_id = pad_token_id
        self.deadline_seconds = deadline_seconds
        self._pool: WorkerPool[MicroBatch, Layout] | None = None

    def steps(self, epoch: int, accumulation: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Our micro-batches of each optimizer step of ``epoch``, from step ``start_step`` (0-based) on.

        A step has ``accumulation`` micro-batches, all ranks together; the last one of an epoch may have fewer.
        Raises SwiftError when a batch does not arrive in time or a worker dies; what a worker raises is raised here.
        """
        everything = self.schedule.micro_batches(epoch)
        starts = range(start_step * accumulation, len(everything), accumulation)
        steps = [deal(everything[start : start + accumulation], self.share, []) for start in starts]
        todo = [rows for step in steps for rows in step]
        batches = self._from_processes(todo) if self.num_workers else self._from_thread(todo)
        with contextlib.closing(batches):
            for step in steps:
                yield [next(batches) for _ in step]

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _from_thread(self, todo: list[MicroBatch]) -> Generator[Batch, None, None]:
        batches = (batch_of(lay_out(self.dataset, rows, self.mode, self.pad_token_id)) for rows in todo)
        return ahead(batches, _AHEAD, self.deadline_seconds)

    def _from_processes(self, todo: list[MicroBatch]) -> Generator[Batch, None, None]:
        if self._pool is None:
            self._pool = WorkerPool(
                lay_out_in_worker,
                (self.dataset, self.mode, self.pad_token_id),
                self.num_workers,
                stage=_STAGE,
                fix="look for a memory limit, or use --dataloader_num_workers 0",
                deadline_seconds=self.deadline_seconds,
            )
        with contextlib.closing(self._pool.map(todo, _AHEAD)) as layouts:
            for layout in layouts:
                yield batch_of(layout)


class _End:
    """What the thread puts last."""


def ahead(items: Iterator[T], count: int, deadline_seconds: float) -> Generator[T, None, None]:
    """The items, up to ``count`` of them made in advance by a thread, which ends with this generator.

    What the iterator raises is raised here; SwiftError when an item does not arrive in time.
    """
    ready: queue.Queue[T | BaseException | type[_End]] = queue.Queue(count)
    stop = threading.Event()

    def put(item: T | BaseException | type[_End]) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_End)
        except BaseException as error:  # whatever it is, it belongs to the thread that waits for the item
            put(error)

    thread = threading.Thread(target=work, name="swift-batches", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = ready.get(timeout=deadline_seconds)
            except queue.Empty:
                message = f"no batch for {deadline_seconds:.0f} s"
                why = "the loading thread is stuck, or the disk that holds the tokens is"
                raise TransientError(message, where=_STAGE, why=why) from None
            if item is _End:
                return
            if isinstance(item, BaseException):
                raise item
            yield cast(T, item)
    finally:
        stop.set()
        thread.join(timeout=deadline_seconds)
