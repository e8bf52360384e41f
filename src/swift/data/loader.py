"""Batches made ahead of the training loop, by a thread or by worker processes, always in the same order."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import threading
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from swift.core.errors import SwiftError
from swift.data.batching import BatchSchedule, MicroBatch, Mode
from swift.data.collate import Batch, collate
from swift.data.tokens import TokenDataset

__all__ = ["BatchLoader"]

_AHEAD = 4  # micro-batches prepared in advance by the thread, and by each worker process


class BatchLoader:
    """Serves the micro-batches of each optimizer step.

    Args:
        dataset: the samples.
        schedule: which samples go together; it alone decides the order, so ``num_workers`` does not.
        mode: how rows are laid out, normally ``schedule.mode``.
        num_workers: processes that prepare batches; 0: one thread.
        pad_token_id: what fills rows at their right end.
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
        deadline_seconds: float = 300.0,
    ) -> None:
        self.dataset = dataset
        self.schedule = schedule
        self.mode: Mode = mode or schedule.mode
        self.num_workers = num_workers
        self.pad_token_id = pad_token_id
        self.deadline_seconds = deadline_seconds
        self._order = _Order()
        self._workers: DataLoader[Batch] | None = None

    def steps(self, epoch: int, accumulation: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step of ``epoch``, from step ``start_step`` (0-based) on.

        The last step of an epoch may have fewer than ``accumulation``. Raises SwiftError when a batch does
        not arrive in time or a worker dies; what a worker raises is raised here.
        """
        todo = self.schedule.micro_batches(epoch)[start_step * accumulation :]
        batches = self._from_processes(todo) if self.num_workers else self._from_thread(todo)
        with contextlib.closing(batches):
            for start in range(0, len(todo), accumulation):
                yield [next(batches) for _ in todo[start : start + accumulation]]

    def close(self) -> None:
        """End the worker processes."""
        self._workers = None  # the DataLoader ends its processes when it is collected

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _from_thread(self, todo: list[MicroBatch]) -> Generator[Batch, None, None]:
        ready: queue.Queue[Batch | BaseException] = queue.Queue(_AHEAD)
        stop = threading.Event()

        def put(item: Batch | BaseException) -> bool:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return True
            return False

        def work() -> None:
            try:
                for rows in todo:
                    if not put(collate(self.dataset, rows, self.mode, self.pad_token_id)):
                        return
            except (
                BaseException
            ) as error:  # whatever it is, it belongs to the thread that waits for the batch
                put(error)

        thread = threading.Thread(target=work, name="swift-batches", daemon=True)
        thread.start()
        try:
            for _ in todo:
                try:
                    item = ready.get(timeout=self.deadline_seconds)
                except queue.Empty:
                    raise self._late() from None
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join(timeout=self.deadline_seconds)

    def _from_processes(self, todo: list[MicroBatch]) -> Generator[Batch, None, None]:
        self._order.rows = todo
        if self._workers is None:
            self._workers = self._start_workers()
        try:
            yield from self._workers
        except RuntimeError as error:
            if "timed out" in str(error):
                raise self._late() from error
            if "exited unexpectedly" in str(error):
                raise SwiftError(
                    "a data worker process died",
                    why=str(error),
                    fix="look for a memory limit, or use --dataloader_num_workers 0",
                ) from error
            raise

    def _start_workers(self) -> DataLoader[Batch]:
        # forkserver: a plain fork would copy this process with its threads and its CUDA context.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["swift.data.collate"])
        return DataLoader(
            _Collated(self.dataset, self.mode, self.pad_token_id),
            batch_size=None,
            sampler=self._order,
            num_workers=self.num_workers,
            prefetch_factor=_AHEAD,
            persistent_workers=True,
            multiprocessing_context=context,
            timeout=self.deadline_seconds,
            worker_init_fn=_one_thread,
            # Without a generator of its own the DataLoader would draw its seed from the global one, and
            # dropout would depend on the number of workers.
            generator=torch.Generator().manual_seed(0),
        )

    def _late(self) -> SwiftError:
        who = f"{self.num_workers} worker processes" if self.num_workers else "the loading thread"
        return SwiftError(
            f"no batch arrived for {self.deadline_seconds:.0f} s",
            where="data loading",
            why=f"{who} did not finish the next batch: the disk that holds the tokens may be slow or gone",
        )


class _Order(Sampler[Any]):
    """Hands the DataLoader the rows of each micro-batch; ``rows`` changes from epoch to epoch."""

    def __init__(self) -> None:
        self.rows: list[MicroBatch] = []

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class _Collated(Dataset[Batch]):
    """Makes a batch from the rows of a micro-batch, in a worker process."""

    def __init__(self, dataset: TokenDataset, mode: Mode, pad_token_id: int) -> None:
        self.dataset, self.mode, self.pad_token_id = dataset, mode, pad_token_id

    def __getitem__(self, rows: MicroBatch) -> Batch:
        return collate(self.dataset, rows, self.mode, self.pad_token_id)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
