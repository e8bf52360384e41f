"""Which samples go into which batch. A pure function of its arguments: same arguments, same batches.

Three modes:

- ``padded``: a micro-batch is ``batch_size`` samples, one a row. With ``group_by_length`` the shuffled
  samples are taken in windows of 50 batches, each sorted by length and cut into batches, and the batches are
  shuffled: little padding, still random.
- ``padding_free``: a micro-batch is ``batch_size`` samples joined in one row, in random order.
- ``packed``: samples are packed into rows of ``max_length`` by best-fit decreasing, once for all epochs (so
  that every epoch has as many steps); the order of the rows is shuffled anew in every epoch. A micro-batch is
  ``batch_size`` rows.

With data parallelism the micro-batches of each step are dealt out in turn (`deal`), so what a step sees does not
depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

__all__ = ["BatchSchedule", "MicroBatch", "Mode", "deal", "pack_best_fit"]

Mode = Literal["padded", "padding_free", "packed"]
MicroBatch = list[list[int]]

_WINDOW_BATCHES = 50


def random_generator(*key: object) -> np.random.Generator:
    """A random generator that depends only on ``key``, on every machine and in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def pack_best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing.

    Each item, longest first, goes into the fullest row that still has room for it. Items of equal length are
    taken in the order given. O(n log n): rows are kept by free space, the free spaces in a sorted list.

    Returns the rows as lists of item numbers. Raises ValueError when an item is longer than ``capacity``.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and int(sizes.max()) > capacity:
        raise ValueError(f"a sample of {int(sizes.max())} tokens does not fit into rows of {capacity}")
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free space -> rows with exactly that much
    spaces: list[int] = []  # the keys of by_space, ascending
    order = np.argsort(-sizes, kind="stable")
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(spaces, size)
        if place == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[place]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[place]
        rows[row].append(item)
        space -= size
        if space > 0:
            if space not in by_space:
                by_space[space] = []
                insort(spaces, space)
            by_space[space].append(row)
    return rows


T = TypeVar("T")


def deal(items: Sequence[T], share: tuple[int, int], empty: T) -> list[T]:
    """What one of several gets when ``items`` are dealt out in turn; ``share``: (which one, of how many).

    When they do not divide evenly the last ones get ``empty``: everybody gets as many, and nothing goes out twice.
    """
    rank, size = share
    missing = -len(items) % size
    return [*items, *[empty] * missing][rank::size]


class BatchSchedule:
    """The micro-batches of every epoch.

    Args:
        lengths: tokens of each sample, [n].
        batch_size: rows of a micro-batch (samples, for padding_free).
        split: cut each micro-batch into so many pieces (the last may be empty). ``split`` times the accumulation then
            gives steps of the very same samples in less memory.
        mode: see the module.
        max_length: length of packed rows; not used otherwise.
        group_by_length: only for padded.
        shuffle: new order in every epoch. Without it: the given order (in windows sorted by length when
            ``group_by_length``).
        seed: with the epoch it determines the order.

    Raises ValueError for an empty data set or a sample longer than a packed row.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        split: int = 1,
        mode: Mode = "padded",
        max_length: int = 0,
        group_by_length: bool = True,
        shuffle: bool = True,
        seed: int = 42,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        if len(self.lengths) == 0:
            raise ValueError("there are no samples to make batches of")
        self.batch_size, self.split = batch_size, split
        self.mode: Mode = mode
        self.group_by_length = group_by_length
        self.shuffle = shuffle
        self.seed = seed
        self.num_tokens = int(self.lengths.sum())
        self._packed_rows: list[list[int]] = []
        if mode == "packed":
            self._packed_rows = self._pack(max_length)
        rows = len(self._packed_rows) if mode == "packed" else len(self.lengths)
        self.num_micro_batches = -(-rows // batch_size) * split

    def num_steps(self, accumulation: int) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.num_micro_batches // accumulation)

    def micro_batches(self, epoch: int) -> list[MicroBatch]:
        """The micro-batches of ``epoch``: micro-batch -> rows -> sample numbers."""
        whole = self._whole_micro_batches(epoch)
        return whole if self.split == 1 else [piece for batch in whole for piece in self._pieces(batch)]

    def _pieces(self, batch: MicroBatch) -> list[MicroBatch]:
        """Always ``split`` of them, so that steps begin where they would without splitting."""
        size = -(-self.batch_size // self.split)
        starts = range(0, size * self.split, size)
        if self.mode == "padding_free":
            (row,) = batch
            return [[row[start : start + size]] if row[start : start + size] else [] for start in starts]
        return [batch[start : start + size] for start in starts]

    def _whole_micro_batches(self, epoch: int) -> list[MicroBatch]:
        generator = random_generator("epoch", self.seed, epoch)
        if self.mode == "packed":
            count = len(self._packed_rows)
            order = generator.permutation(count) if self.shuffle else np.arange(count)
            return [[self._packed_rows[row] for row in part] for part in self._cut(order.tolist())]
        count = len(self.lengths)
        order = generator.permutation(count) if self.shuffle else np.arange(count)
        if self.mode == "padding_free":
            return [[part] for part in self._cut(order.tolist())]
        batches = self._cut(self._sort_windows(order) if self.group_by_length else order.tolist())
        if self.group_by_length and self.shuffle:
            batches = [batches[place] for place in generator.permutation(len(batches))]
        return [[[sample] for sample in batch] for batch in batches]

    def largest_micro_batch(self) -> MicroBatch:
        """The micro-batch of the first epoch with most tokens, padding included: what memory must hold."""

        def tokens(micro_batch: MicroBatch) -> int:
            widths = [int(self.lengths[row].sum()) for row in micro_batch]
            return len(widths) * max(widths, default=0)

        return max(self.micro_batches(0), key=tokens)

    def _pack(self, max_length: int) -> list[list[int]]:
        # Equal lengths are packed in random order: neighbours in the file should not end up in one row.
        count = len(self.lengths)
        order = random_generator("pack", self.seed).permutation(count) if self.shuffle else np.arange(count)
        packed = pack_best_fit(self.lengths[order], max_length)
        return [order[row].tolist() for row in packed]

    def _cut(self, items: list[int]) -> list[list[int]]:
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]

    def _sort_windows(self, order: np.ndarray) -> list[int]:
        window = _WINDOW_BATCHES * self.batch_size
        result: list[int] = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            # Longest first, so that the one incomplete batch of an epoch is cut from the shortest samples.
            result.extend(part[np.argsort(-self.lengths[part], kind="stable")].tolist())
        return result
