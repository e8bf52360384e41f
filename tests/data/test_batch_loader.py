"""The loader serves the schedule's order, whoever prepares the batches and wherever it starts."""

from __future__ import annotations

import multiprocessing
import threading

import numpy as np
import psutil
import pytest
import torch
from data_fakes import FakeEncoded

from swift.core.errors import SwiftError
from swift.data.batching import BatchSchedule, Mode
from swift.data.loader import BatchLoader
from swift.data.store import TokenStore
from swift.data.tokens import TokenDataset

ACCUMULATION = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    generator = np.random.default_rng(0)
    samples = [
        FakeEncoded(ids := generator.integers(1, 90, int(size)).tolist(), ids)
        for size in generator.integers(2, 30, 90)
    ]
    memory = TokenDataset.from_samples(samples)
    return TokenDataset([TokenStore.write(tmp_path_factory.mktemp("tokens") / "store", memory.stores)])


def plan(dataset: TokenDataset, mode: Mode) -> BatchSchedule:
    return BatchSchedule(dataset.lengths, batch_size=4, mode=mode, max_length=32, seed=1)


def ids(loader: BatchLoader, epoch: int, start: int = 0) -> list[list[list[list[int]]]]:
    return [[batch.input_ids.tolist() for batch in step] for step in loader.steps(epoch, ACCUMULATION, start)]


@pytest.mark.parametrize("mode", ["padded", "padding_free", "packed"])
def test_workers_change_nothing(dataset: TokenDataset, mode: Mode) -> None:
    schedule = plan(dataset, mode)
    with BatchLoader(dataset, schedule, num_workers=0) as loader:
        alone = [ids(loader, 0), ids(loader, 1), ids(loader, 1, 2)]
    before = torch.random.get_rng_state()
    with BatchLoader(dataset, schedule, num_workers=2) as loader:
        next(loader.steps(0, ACCUMULATION))  # an epoch left in the middle must not disturb the next
        workers = [ids(loader, 0), ids(loader, 1), ids(loader, 1, 2)]
    assert workers == alone
    assert torch.equal(before, torch.random.get_rng_state()), "dropout would depend on the number of workers"
    sizes = [len(step) for step in alone[0]]
    assert sum(sizes) == schedule.num_micro_batches
    assert all(size == ACCUMULATION for size in sizes[:-1])


@pytest.mark.parametrize("epoch", [0, 1])
def test_resume_at_any_step(dataset: TokenDataset, epoch: int) -> None:
    schedule = plan(dataset, "padded")
    loader = BatchLoader(dataset, schedule)
    everything = ids(loader, epoch)
    assert len(everything) == schedule.num_steps(ACCUMULATION) == 8
    for start in range(len(everything) + 1):
        assert ids(loader, epoch, start) == everything[start:]


def test_nothing_is_left_running(dataset: TokenDataset) -> None:
    threads = threading.active_count()
    me = psutil.Process()
    loader = BatchLoader(dataset, plan(dataset, "padded"), num_workers=2)
    next(loader.steps(0, ACCUMULATION))
    assert len([child for child in multiprocessing.active_children() if child.is_alive()]) == 2
    loader.close()
    assert multiprocessing.active_children() == []
    steps = BatchLoader(dataset, plan(dataset, "padded")).steps(0, ACCUMULATION)
    next(steps)
    assert threading.active_count() > threads
    del steps
    assert threading.active_count() == threads
    # What may remain are the forkserver and the resource tracker, which end with this process.
    assert len(me.children(recursive=True)) <= 2


class Broken(TokenDataset):
    """A data set whose disk is gone."""

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        raise OSError(5, "Input/output error")


class Stuck(TokenDataset):
    """A data set whose disk does not answer until ``answer`` is set."""

    answer = threading.Event()

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        self.answer.wait()
        return super().__getitem__(i)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_reach_the_training_loop(dataset: TokenDataset, num_workers: int) -> None:
    broken = BatchLoader(Broken(dataset.stores), plan(dataset, "padded"), num_workers=num_workers)
    with broken, pytest.raises(OSError, match="Input/output error"):
        next(broken.steps(0, ACCUMULATION))


def test_a_batch_that_does_not_come_is_an_error_with_a_name(dataset: TokenDataset) -> None:
    loader = BatchLoader(Stuck(dataset.stores), plan(dataset, "padded"), deadline_seconds=0.05)
    try:
        with pytest.raises(SwiftError, match="data loading: no batch for") as caught:
            next(loader.steps(0, ACCUMULATION))
        assert caught.value.why is not None
        assert "the loading thread is stuck" in caught.value.why
    finally:
        Stuck.answer.set()


def test_a_killed_worker_is_an_error_with_a_fix(dataset: TokenDataset) -> None:
    with BatchLoader(dataset, plan(dataset, "padded"), num_workers=1) as loader:
        steps = loader.steps(0, 1)
        next(steps)
        [worker] = multiprocessing.active_children()
        worker.kill()
        worker.join()
        with pytest.raises(SwiftError, match="data loading: a worker process died") as caught:
            for _ in steps:
                pass
        assert caught.value.fix is not None
