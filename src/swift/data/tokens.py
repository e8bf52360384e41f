"""The data set that training reads: samples of token stores in a chosen order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from swift.data.report import DataReport
from swift.data.store import IGNORE, EncodedLike, TokenStore, TokenWriter, encoded_arrays

__all__ = ["TokenDataset"]


class TokenDataset:
    """Samples of one or several stores in a chosen order.

    Args:
        stores: where the tokens are.
        index: sample numbers in the concatenation of the stores, int64 [n]; a number may occur more than
        once.
            Default: all, in order.
        report: what became of the rows; default: the reports of the stores added up.

    Attributes:
        reference: log-probabilities of the answers of each sample under a reference, [n, sequences]; None without.
        mismatched: batches also hold each question with the answer to another one (KTO).
    """

    reference: np.ndarray | None = None
    mismatched: bool = False

    def __init__(
        self,
        stores: Sequence[TokenStore],
        index: np.ndarray | None = None,
        report: DataReport | None = None,
    ) -> None:
        self.stores = list(stores)
        counts = np.asarray([len(store) for store in self.stores], np.int64)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self.index = (
            np.arange(self._starts[-1], dtype=np.int64) if index is None else np.asarray(index, np.int64)
        )
        every = [np.diff(store.offsets) for store in self.stores]
        lengths = np.concatenate(every) if every else np.zeros(0, np.int64)
        self.lengths: np.ndarray = lengths[self.index]
        if report is None:
            report = DataReport()
            for store in self.stores:
                report.merge(store.report)
        self.report = report

    @classmethod
    def from_samples(cls, samples: Iterable[EncodedLike]) -> TokenDataset:
        """A data set in memory from encoded samples, in the given order; for tests and small experiments."""
        writer, report = TokenWriter(), DataReport()
        for number, sample in enumerate(samples, start=1):
            ids, learned, weights = encoded_arrays(sample)
            writer.add(ids, learned, weights, (0, number))
            report.num_tokens += len(ids)
            report.num_targets += int(learned[1:].sum())
        report.rows_read = report.samples = len(writer)
        return cls([writer.build(["memory"], report)])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(ids int32 [t], labels int32 [t] unshifted with -100 where not learned, weights float32 [t])."""
        store, number = self._locate(i)
        start, end = store.offsets[number], store.offsets[number + 1]
        ids = store.ids[start:end]
        labels = np.where(store.learned[start:end], ids, np.int32(IGNORE))
        return ids, labels, None if store.weights is None else store.weights[start:end]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        return (self[i] for i in range(len(self)))

    @property
    def has_weights(self) -> bool:
        """True when some sample carries loss weights."""
        return any(store.weights is not None for store in self.stores)

    @property
    def num_labels(self) -> int:
        """Labels of a sample when samples are groups of sequences (see ``swift.data.groups``); else 0."""
        return max((store.labels.shape[1] for store in self.stores if store.labels is not None), default=0)

    def group(self, i: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
        """([(ids int32 [t], targets int64 [t]) of each sequence], labels float32 [K]) of a sample that is a group.

        Targets are those of `swift.data.layout`: the next token where the answer is learned, else one at the end.
        """
        store, number = self._locate(i)
        assert store.labels is not None
        start, end = store.offsets[number], store.offsets[number + 1]
        learned = store.learned[start:end]
        ends = learned if store.ends is None else store.ends[start:end]
        borders = np.flatnonzero(ends)[:-1] + 1
        ids = np.split(store.ids[start:end], borders)
        parts = []
        for tokens, mask in zip(ids, np.split(learned, borders), strict=True):
            targets = np.full(len(tokens), IGNORE, np.int64)
            if store.ends is None:
                targets[-1] = 0
            else:
                targets[:-1] = np.where(mask[1:], tokens[1:], IGNORE)
            parts.append((tokens, targets))
        return parts, store.labels[number]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def row(self, i: int) -> tuple[str, int]:
        """(``Row.source``, ``Row.number``) of the row that sample ``i`` comes from."""
        store, number = self._locate(i)
        file, line = store.rows[number]
        return store.files[file], int(line)

    def _locate(self, i: int) -> tuple[TokenStore, int]:
        sample = self.index[i]
        part = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return self.stores[part], int(sample - self._starts[part])
