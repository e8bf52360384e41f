"""Token storage: columnar arrays on disk, opened as memory maps.

A store is a folder::

    ids.bin      int32 [tokens]       all samples, one after another
    learned.bin  bool  [tokens]       True where the token itself is learned
    weights.bin  float32 [tokens]     loss weight of each token; empty when all weights are 1
    offsets.bin  int64 [samples + 1]  sample i is ids[offsets[i]:offsets[i + 1]]
    labels.bin   float32 [samples, K] labels of tasks over whole sequences (``groups``), for which ``learned`` is
                                      the last token of each sequence; empty otherwise
    ends.bin     bool  [tokens]       the last token of each sequence of groups whose answers are learned; empty
                                      otherwise
    rows.bin     int64 [samples, 2]   where sample i comes from: (index into "files", number of the row)
    meta.json    version, files, report, size and CRC-32 of every array file

meta.json is written last and the folder is renamed into place, so that a store is either whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np

from swift.core.files import atomic_directory
from swift.data.report import DataReport

__all__ = ["IGNORE", "CorruptStoreError", "EncodedLike", "TokenStore", "TokenWriter", "encoded_arrays"]

IGNORE = -100
_VERSION = 3
_DTYPES = {
    "ids": np.dtype(np.int32),
    "learned": np.dtype(np.bool_),
    "weights": np.dtype(np.float32),
    "offsets": np.dtype(np.int64),
    "rows": np.dtype(np.int64),
    "labels": np.dtype(np.float32),
    "ends": np.dtype(np.bool_),
}


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


class TokenWriter:
    """Collects encoded samples as compact arrays; ``build`` turns them into a store in memory or on disk."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._learned: list[np.ndarray] = []
        self._weights: list[np.ndarray | None] = []
        self._rows: list[tuple[int, int]] = []
        self._labels: list[Sequence[float]] = []
        self._ends: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self,
        ids: np.ndarray,
        learned: np.ndarray,
        weights: np.ndarray | None,
        row: tuple[int, int],
        labels: Sequence[float] | None = None,
        ends: np.ndarray | None = None,
    ) -> None:
        """One sample: int32 ids, bool mask, float32 weights (None: all 1), (file index, number).

        Of a group also its labels and, where ``learned`` does not tell, the ends of its sequences.
        """
        self._ids.append(ids)
        self._learned.append(learned)
        self._weights.append(weights)
        self._rows.append(row)
        if labels is not None:
            self._labels.append(labels)
        if ends is not None:
            self._ends.append(ends)

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
        return TokenStore(
            ids=_concatenate(self._ids, np.int32),
            learned=_concatenate(self._learned, np.bool_),
            weights=weights,
            offsets=offsets,
            rows=np.asarray(self._rows, np.int64).reshape(-1, 2),
            files=list(files),
            report=report,
            labels=np.asarray(self._labels, np.float32) if self._labels else None,
            ends=np.concatenate(self._ends) if self._ends else None,
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
    labels: np.ndarray | None = None
    ends: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sequence_lengths(self, number: int) -> list[int]:
        """Tokens of each sequence of a sample that is a group."""
        ends = self.learned if self.ends is None else self.ends
        places = np.flatnonzero(ends[self.offsets[number] : self.offsets[number + 1]])
        return [int(length) for length in np.diff(places, prepend=-1)]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process reopens the maps: pickling a memory map would copy all of it.
        return {"path": self.path} if self.path is not None else dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        source = TokenStore.open(state["path"], verify=False).__dict__ if len(state) == 1 else state
        self.__dict__.update(source)

    @classmethod
    def write(cls, path: Path, parts: Iterable[TokenStore]) -> TokenStore:
        """Write the parts, one after another as they come, as one store to the folder ``path`` and open it.

        Only one part is in memory at a time. Raises OSError when the disk is full or not writable.
        """
        with atomic_directory(path) as folder:
            files: dict[str, int] = {}
            report = DataReport()
            offset = 0
            columns = {name: _ColumnFile(folder / f"{name}.bin") for name in _DTYPES}
            with contextlib.ExitStack() as stack:
                for column in columns.values():
                    stack.enter_context(column)
                columns["offsets"].append(np.zeros(1, np.int64))
                for part in parts:
                    report.merge(part.report)
                    columns["ids"].append(part.ids)
                    columns["learned"].append(part.learned)
                    if part.weights is not None or columns["weights"].size:
                        columns["weights"].append(np.ones(offset - columns["weights"].size, np.float32))
                        ones = np.ones(len(part.ids), np.float32)
                        columns["weights"].append(ones if part.weights is None else part.weights)
                    columns["offsets"].append(part.offsets[1:] + offset)
                    columns["rows"].append(part.global_rows(files))
                    if part.labels is not None:
                        columns["labels"].append(part.labels)
                    if part.ends is not None:
                        columns["ends"].append(part.ends)
                    offset += len(part.ids)
            sums = {name: [column.size, column.crc] for name, column in columns.items()}
            meta = {"version": _VERSION, "files": list(files), "sums": sums, "report": report.to_dict()}
            (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
        return cls.open(path, verify=False)

    @classmethod
    def join(cls, parts: Iterable[TokenStore]) -> TokenStore:
        """The parts as one store in memory."""
        files: dict[str, int] = {}
        report = DataReport()
        collected = []
        for part in parts:
            report.merge(part.report)
            collected.append((part, part.global_rows(files)))
        stores = [part for part, _ in collected]
        lengths = [np.diff(part.offsets) for part in stores]
        weights = None
        if any(part.weights is not None for part in stores):
            weights = _concatenate(
                [np.ones(len(p.ids), np.float32) if p.weights is None else p.weights for p in stores],
                np.float32,
            )
        return cls(
            ids=_concatenate([part.ids for part in stores], np.int32),
            learned=_concatenate([part.learned for part in stores], np.bool_),
            weights=weights,
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(_concatenate(lengths, np.int64))]),
            rows=_concatenate([rows for _, rows in collected], np.int64).reshape(-1, 2),
            files=list(files),
            report=report,
            labels=_join([store.labels for store in stores]),
            ends=_join([store.ends for store in stores]),
        )

    def global_rows(self, files: dict[str, int]) -> np.ndarray:
        """``rows`` with file numbers from ``files`` (file -> number), to which new files are added."""
        numbers = np.asarray([files.setdefault(file, len(files)) for file in self.files], np.int64)
        rows = self.rows.copy()
        if len(rows):
            rows[:, 0] = numbers[rows[:, 0]]
        return rows

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
            arrays: dict[str, Any] = {}
            for name, dtype in _DTYPES.items():
                size, crc = meta["sums"][name]
                file = path / f"{name}.bin"
                if file.stat().st_size != size * dtype.itemsize or (verify and _crc(file) != crc):
                    raise CorruptStoreError(f"{file} is damaged")
                arrays[name] = (
                    np.memmap(file, dtype, "r") if size else np.zeros(0, dtype)
                )  # no map of nothing
            arrays["rows"] = arrays["rows"].reshape(-1, 2)
            arrays["weights"] = arrays["weights"] if len(arrays["weights"]) else None
            samples = len(arrays["rows"])
            arrays["labels"] = arrays["labels"].reshape(samples, -1) if len(arrays["labels"]) else None
            arrays["ends"] = arrays["ends"] if len(arrays["ends"]) else None
            report = DataReport.from_dict(meta["report"])
            return cls(**arrays, files=meta["files"], report=report, path=path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptStoreError(f"{path}: {error}") from error


class _ColumnFile:
    """A column written piece by piece; knows its size in elements and its CRC-32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self.crc = 0
        self._file: BinaryIO

    def __enter__(self) -> _ColumnFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).data
        if array.size:
            self._file.write(data)
            self.crc = zlib.crc32(data, self.crc)
            self.size += array.size


def _concatenate(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _join(columns: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Stores without a sample have no labels and no ends."""
    present = [column for column in columns if column is not None]
    return np.concatenate(present) if present else None


def _crc(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


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
