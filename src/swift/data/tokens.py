"""Token storage: columnar arrays on disk, opened as memory maps, and the data set that training reads.

A store is a folder::

    ids.npy      int32 [tokens]       all samples, one after another
    learned.npy  bool  [tokens]       True where the token itself is learned
    weights.npy  float32 [tokens]     loss weight of each token; present only when some weight differs from 1
    offsets.npy  int64 [samples + 1]  sample i is ids[offsets[i]:offsets[i + 1]]
    rows.npy     int64 [samples, 2]   where sample i comes from: (index into "files", 1-based number)
    meta.json    version, files, report, size and CRC-32 of every array file

meta.json is written last and the folder is renamed into place, so that a store is either whole or absent.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from swift.core.files import atomic_directory

__all__ = [
    "IGNORE",
    "CorruptStoreError",
    "DataReport",
    "EncodedLike",
    "TokenDataset",
    "TokenStore",
    "TokenWriter",
]

IGNORE = -100
_VERSION = 1
_ARRAYS = ("ids", "learned", "weights", "offsets", "rows")


class EncodedLike(Protocol):
    """What a template returns for one sample: token ids, unshifted labels (-100: not learned), weights."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def labels(self) -> list[int]: ...
    @property
    def weights(self) -> list[float] | None: ...


class CorruptStoreError(Exception):
    """A store on disk is damaged: truncated, missing a file, or written by another version."""


@dataclass
class DataReport:
    """What became of every row. Locations are kept as file -> 1-based numbers.

    Attributes:
        rows_read: rows read from the sources (after ``#N`` sampling).
        samples: samples kept; ``split`` makes several of one row.
        num_tokens: tokens kept.
        num_targets: tokens that are learned (a first token has nothing before it and never counts).
        deleted: rows left out because they are longer than max_length.
        truncated: rows cut or split at max_length.
        untargeted: rows left out because no token of them would be learned.
        bad_rows: (location, reason) of rows that could not be read (only with ``on_bad_rows=skip``).
    """

    rows_read: int = 0
    samples: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    deleted: dict[str, list[int]] = field(default_factory=dict)
    truncated: dict[str, list[int]] = field(default_factory=dict)
    untargeted: dict[str, list[int]] = field(default_factory=dict)
    bad_rows: list[tuple[str, str]] = field(default_factory=list)

    def merge(self, other: DataReport) -> None:
        """Add the counts and locations of ``other``."""
        self.rows_read += other.rows_read
        self.samples += other.samples
        self.num_tokens += other.num_tokens
        self.num_targets += other.num_targets
        for name in ("deleted", "truncated", "untargeted"):
            mine = getattr(self, name)
            for file, numbers in getattr(other, name).items():
                mine.setdefault(file, []).extend(numbers)
        self.bad_rows.extend(other.bad_rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        return cls(**{**values, "bad_rows": [(where, why) for where, why in values["bad_rows"]]})


class TokenWriter:
    """Collects encoded samples as compact arrays; ``build`` turns them into a store in memory or on disk."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._learned: list[np.ndarray] = []
        self._weights: list[np.ndarray | None] = []
        self._rows: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self, ids: np.ndarray, learned: np.ndarray, weights: np.ndarray | None, row: tuple[int, int]
    ) -> None:
        """One sample: int32 ids, bool mask, float32 weights (None: all 1), (file index, number)."""
        self._ids.append(ids)
        self._learned.append(learned)
        self._weights.append(weights)
        self._rows.append(row)

    def build(self, files: Sequence[str], report: DataReport) -> TokenStore:
        """The collected samples as arrays in memory."""
        lengths = np.fromiter((len(ids) for ids in self._ids), np.int64, len(self._ids))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        weights = None
        if any(part is not None for part in self._weights):
            parts = [
                np.ones(len(ids), np.float32) if part is None else part
                for ids, part in zip(self._ids, self._weights, strict=True)
            ]
            weights = np.concatenate(parts)
        empty = not self._ids
        return TokenStore(
            ids=np.zeros(0, np.int32) if empty else np.concatenate(self._ids),
            learned=np.zeros(0, np.bool_) if empty else np.concatenate(self._learned),
            weights=weights,
            offsets=offsets,
            rows=np.asarray(self._rows, np.int64).reshape(-1, 2),
            files=list(files),
            report=report,
        )


@dataclass
class TokenStore:
    """The samples of one source: arrays in memory, or memory maps of the files in ``path``."""

    ids: np.ndarray
    learned: np.ndarray
    weights: np.ndarray | None
    offsets: np.ndarray
    rows: np.ndarray
    files: list[str]
    report: DataReport
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getstate__(self) -> dict[str, Any]:
        # A worker process reopens the maps: pickling a memory map would copy all of it.
        return {"path": self.path} if self.path is not None else dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        source = TokenStore.open(state["path"], verify=False).__dict__ if len(state) == 1 else state
        self.__dict__.update(source)

    def save(self, path: Path) -> TokenStore:
        """Write the store to the folder ``path`` in one step and return it reopened. Raises OSError."""
        with atomic_directory(path) as folder:
            sums: dict[str, list[int]] = {}
            for name in _ARRAYS:
                array = getattr(self, name)
                if array is None:
                    continue
                file = folder / f"{name}.npy"
                np.save(file, array)
                sums[file.name] = [file.stat().st_size, _crc(file)]
            meta = {"version": _VERSION, "files": self.files, "sums": sums, "report": self.report.to_dict()}
            (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
        return TokenStore.open(path, verify=False)

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> TokenStore:
        """Map the store in ``path``.

        ``verify`` compares the CRC-32 of every file, not only its size. Raises CorruptStoreError when the
        folder is not a whole store, FileNotFoundError when it does not exist.
        """
        if not path.is_dir():
            raise FileNotFoundError(path)
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            if meta["version"] != _VERSION:
                raise CorruptStoreError(f"{path} was written by version {meta['version']}")
            arrays: dict[str, np.ndarray | None] = dict.fromkeys(_ARRAYS)
            for name, (size, crc) in meta["sums"].items():
                file = path / name
                if file.stat().st_size != size or (verify and _crc(file) != crc):
                    raise CorruptStoreError(f"{file} is damaged")
                arrays[file.stem] = np.load(file, mmap_mode="r")
            report = DataReport.from_dict(meta["report"])
            return cls(**arrays, files=meta["files"], report=report, path=path)  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptStoreError(f"{path}: {error}") from error


def _crc(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


class TokenDataset:
    """Samples of one or several stores in a chosen order.

    Args:
        stores: where the tokens are.
        index: sample numbers in the concatenation of the stores, int64 [n]; a number may occur more than
        once.
            Default: all, in order.
        report: what became of the rows; default: the reports of the stores added up.
    """

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
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def row(self, i: int) -> tuple[str, int]:
        """(file, 1-based number) of the row that sample ``i`` comes from."""
        store, number = self._locate(i)
        file, line = store.rows[number]
        return store.files[file], int(line)

    def _locate(self, i: int) -> tuple[TokenStore, int]:
        sample = self.index[i]
        part = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return self.stores[part], int(sample - self._starts[part])


def encoded_arrays(sample: EncodedLike) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """An encoded sample as (int32 ids, bool learned, float32 weights or None).

    Raises ValueError when a learned label is not the token itself: the store keeps a mask, not labels.
    """
    ids = np.asarray(sample.input_ids, np.int32)
    labels = np.asarray(sample.labels, np.int32)
    learned = labels != IGNORE
    if len(ids) != len(labels) or not np.array_equal(labels[learned], ids[learned]):
        raise ValueError("labels must be the token ids themselves, or -100")
    weights = None if sample.weights is None else np.asarray(sample.weights, np.float32)
    return ids, learned, weights
