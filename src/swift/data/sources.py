"""Rows from files, each with the place it stands at, so that every complaint can name it.

Known file types: .jsonl/.ndjson, .json (a list of objects, one object, or JSON Lines), .csv, .tsv, .parquet,
.txt, and folders of them (all such files below the folder in the order of their names; hidden files are left
out).

Any of them may be compressed with gzip (.jsonl.gz).

A .txt file holds documents separated by blank lines: taking each line as a document would tear paragraphs
apart, and taking the file as one would make a corpus a single sample. A document's place is its first line.

A row that cannot be read is a ``Row`` with ``error`` set: the caller decides whether that stops the run.
Nothing here touches the network: a data set of a hub is looked for in the hub client's cache, and is an error when it
is not there.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from swift.config.policy_rules import TASK_PREFIX
from swift.core.errors import DataError
from swift.core.registry import closest, looks_like_hub_name
from swift.data.mapping import NO_MAPPING, ColumnMapping
from swift.data.readers import READERS
from swift.data.registry import DatasetEntry, find_dataset, nearest_dataset, split_hub
from swift.data.repository import choose_files
from swift.data.rows import Row, location_of
from swift.data.tasks import task_file
from swift.hubs.clients import find_hub, wants_hf
from swift.hubs.fetch import find_cached
from swift.hubs.names import is_repo_name
from swift.hubs.types import Repo

__all__ = [
    "DatasetSpec",
    "Row",
    "cached_folder",
    "find_files",
    "first_rows",
    "hub_repo",
    "lazy_rows",
    "location_of",
    "parse_dataset_spec",
    "read_rows",
    "row_numbers",
]


@dataclass(frozen=True)
class DatasetSpec:
    """What a name like ``alpaca-zh#500``, ``HF::owner/name:subset#500`` or ``a.jsonl`` stands for.

    Attributes:
        text: as written.
        path: the local file or folder; for a name on a hub the name itself.
        num_rows: how many rows to take (None: all).
        subsets: those named.
        hub: ``hf`` or ``ms`` where a prefix says which.
        entry: what the registry knows about it; None for local paths and unknown names.
        mapping: how its columns change.
    """

    text: str
    path: Path
    num_rows: int | None
    subsets: tuple[str, ...] = ()
    hub: str | None = None
    entry: DatasetEntry | None = None
    mapping: ColumnMapping = NO_MAPPING

    @property
    def is_local(self) -> bool:
        """True when it is, or can only be, a path of this machine."""
        if self.entry is not None:
            return self.entry.path is not None
        return self.hub is None and (self.path.exists() or not is_repo_name(str(self.path)))


def parse_dataset_spec(text: str) -> DatasetSpec:
    """Read ``NAME[:SUBSET[/SUBSET]][#N]``: a local path first, then a short name, then a hub's id.

    ``task:NAME:OPTION=VALUE#N`` is made here (`swift.data.tasks`). A file that really has ``#N`` in its name wins.
    Raises DataError for ``#0``.
    """
    if text.startswith(TASK_PREFIX):
        return DatasetSpec(text, task_file(text), None)
    if Path(text).expanduser().exists():
        return DatasetSpec(text, Path(text).expanduser(), None)
    found = re.fullmatch(r"(.+)#(\d+)", text)
    name, num_rows = (found[1], int(found[2])) if found else (text, None)
    if num_rows == 0:
        raise DataError("0 rows asked for", where=text, fix=f"{name}#100 takes 100 rows")
    if Path(name).expanduser().exists():
        return DatasetSpec(text, Path(name).expanduser(), num_rows)
    hub, rest = split_hub(name)
    bare, _, listed = rest.partition(":")
    subsets = tuple(part for part in listed.split("/") if part)
    entry = None if Path(bare).suffix.lower() in READERS else find_dataset(f"{hub}::{bare}" if hub else bare)
    if entry is None:
        path = Path(bare).expanduser()
        return DatasetSpec(text, path if subsets or hub else Path(name).expanduser(), num_rows, subsets, hub)
    path = Path(entry.path) if entry.path else Path(entry.name)
    return DatasetSpec(text, path, num_rows, subsets, hub, entry, entry.mapping)


def find_files(source: Path | DatasetSpec) -> list[Path]:
    """The data files that a path or a data set's name stands for: itself, or those in its folder.

    Raises DataError when nothing is there (with the nearest existing name), when a file's type is not known,
    or when a folder holds no data file.
    """
    if isinstance(source, DatasetSpec):
        return _files_of(source)
    path = source
    if path.is_dir():
        files = _files_below(path)
        if not files:
            fix = f"known types: {_known_types()}"
            raise DataError("the folder holds no data file", where=str(path), fix=fix)
        return files
    if not path.exists():
        raise _missing(path)
    if _type(path) not in READERS:
        raise DataError(
            f"unknown file type {path.suffix!r}", where=str(path), fix=f"known types: {_known_types()}"
        )
    return [path]


def _files_of(spec: DatasetSpec) -> list[Path]:
    entry = spec.entry
    if spec.is_local and (entry is None or not spec.path.is_dir()) and not spec.subsets:
        return find_files(spec.path)
    folder = spec.path if spec.is_local else cached_folder(spec)
    if folder is None:
        raise DataError(
            "this data set is not on this machine",
            where=spec.text,
            fix=f"swift download {spec.entry.name if spec.entry else spec.path} --type dataset"
            + (" --use_hf true" if spec.hub == "hf" else ""),
        )
    return choose_files(
        folder,
        _files_below(folder),
        subsets=spec.subsets or ((entry.subset,) if entry and entry.subset else ()),
        split=entry.split if entry else "train",
        patterns=entry.files if entry and not spec.subsets else (),
    )


def hub_repo(spec: DatasetSpec) -> Repo:
    """The repository of a data set on the hub that is meant. Raises DataError when it is known not to be there."""
    if spec.entry is None:
        return Repo("dataset", str(spec.path))
    name = spec.entry.hub_id(_hub_of(spec))
    if name is None:
        other = "MS" if _hub_of(spec) == "hf" else "HF"
        raise DataError(
            "not on this hub",
            where=spec.text,
            fix=f"write {other}::{spec.entry.name}, or leave the prefix out",
        )
    return Repo("dataset", name)


def cached_folder(spec: DatasetSpec) -> Path | None:
    """Where the hub client's cache holds a data set; None when it is not on this machine."""
    found = find_cached(find_hub(_hub_of(spec) == "hf"), hub_repo(spec))
    return None if found is None else found.folder


def _hub_of(spec: DatasetSpec) -> str:
    """The hub of the prefix, else the environment's, else the only one that has it."""
    if spec.hub is not None:
        return spec.hub
    hub, other = ("hf", "ms") if wants_hf(None) else ("ms", "hf")
    return other if spec.entry is not None and spec.entry.hub_id(hub) is None else hub


def _files_below(folder: Path) -> list[Path]:
    """All data files below a folder in the order of their names, hidden ones left out."""
    inside = [file for file in sorted(folder.rglob("*")) if _type(file) in READERS and file.is_file()]
    return [file for file in inside if not any(part[0] == "." for part in file.relative_to(folder).parts)]


def _type(path: Path) -> str:
    """The ending that says how to read a file: ``.jsonl`` of ``a.jsonl.gz``."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _known_types() -> str:
    return ", ".join(sorted(READERS))


def _missing(path: Path) -> DataError:
    parent = path.parent
    if looks_like_hub_name(str(path)) and path.suffix.lower() not in READERS:
        return DataError(
            "no such file or folder",
            where=str(path),
            why="nor is it a data set that is downloaded or known by name (swift data ls)",
            fix=f"swift download {path} --type dataset",
        )
    if not parent.is_dir():
        return DataError(
            "no such file or folder",
            where=str(path),
            why=f"there is no folder {parent}",
            fix="give the path of a file or folder on this machine",
        )
    # By the name without its ending: all names alike in ".jsonl" are not alike.
    entries = [
        entry for entry in sorted(parent.iterdir()) if entry.suffix.lower() in READERS or entry.is_dir()
    ]
    by_stem = {entry.stem: entry for entry in entries}
    stem = closest(path.stem, by_stem)
    near = by_stem[stem] if stem else None
    if near is None and not path.suffix and str(path) == path.name:
        known = nearest_dataset(path.name)
        fix = (
            f"did you mean {known}? (swift data ls)"
            if known
            else "swift data ls shows the names that are known"
        )
        return DataError("no such file or folder, and no data set of this name", where=str(path), fix=fix)
    fix = f"did you mean {near}?" if near else "give the path of a file or folder on this machine"
    return DataError("no such file or folder", where=str(path), fix=fix)


def read_rows(
    path: Path | str,
    columns: Mapping[str, str] | None = None,
    wanted: Container[int] | None = None,
    mapping: ColumnMapping = NO_MAPPING,
) -> Iterator[Row]:
    """The rows of one file, in order.

    Args:
        columns: rename columns, old -> new; after ``mapping``.
        wanted: take only the rows with these numbers (see ``Row.number``); the others are not even parsed.

    A file that cannot be opened gives one row with an error, like an empty one.
    """
    for number, make in lazy_rows(path, columns, mapping):
        if wanted is None or number in wanted or number == 0:
            yield make()


def first_rows(spec: DatasetSpec, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a data set in order; of ``FILE#N`` the first N. Raises DataError when a file is missing."""
    rows = (row for file in find_files(spec) for row in read_rows(file, columns, mapping=spec.mapping))
    return islice(rows, spec.num_rows)


def lazy_rows(
    path: Path | str, columns: Mapping[str, str] | None = None, mapping: ColumnMapping = NO_MAPPING
) -> Iterator[tuple[int, Callable[[], Row]]]:
    """(number, what makes the row) for every row of a file: rows that are not made are not parsed."""
    path = Path(path)
    found = False
    try:
        with _open(path) as file:
            for number, make in READERS[_type(path)](file, str(path)):
                found = True
                yield number, partial(_make, make, columns, mapping)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        fault = Row({}, f"{path}:", 0, f"cannot be read: {reason}")
        yield 0, lambda: fault
        return
    if not found:
        yield 0, lambda: Row({}, f"{path}:", 0, "the file is empty")


def _make(make: Callable[[], Row], columns: Mapping[str, str] | None, mapping: ColumnMapping) -> Row:
    row = mapping.apply(make())
    return _rename(row, columns) if columns and row.error is None else row


def row_numbers(path: Path | str) -> list[int]:
    """The numbers of all rows of a file, without parsing what need not be parsed. A file that cannot be read
    or is empty counts as one row with number 0, as in ``read_rows``."""
    path = Path(path)
    try:
        with _open(path) as file:
            return [number for number, _ in READERS[_type(path)](file, str(path))] or [0]
    except (OSError, EOFError, zlib.error):
        return [0]


def _rename(row: Row, columns: Mapping[str, str]) -> Row:
    values = {columns.get(name, name): value for name, value in row.values.items()}
    if len(values) != len(row.values):
        twice = next(new for old, new in columns.items() if old in row.values and new in row.values)
        return Row({}, row.source, row.number, f'renaming by --columns gives "{twice}" twice')
    return Row(values, row.source, row.number)
