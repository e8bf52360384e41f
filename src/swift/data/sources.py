"""Rows from files, each with the place it stands at, so that every complaint can name it.

Known file types: .jsonl/.ndjson, .json (a list of objects, one object, or JSON Lines), .csv, .tsv, .parquet,
.txt, and folders of them (all such files below the folder in the order of their names; hidden files are left
out).

A .txt file holds documents separated by blank lines: taking each line as a document would tear paragraphs
apart, and taking the file as one would make a corpus a single sample. A document's place is its first line.

A row that cannot be read is a ``Row`` with ``error`` set: the caller decides whether that stops the run.
Nothing here touches the network; a name that is not on disk is an error.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from swift.core.errors import DataError
from swift.core.registry import closest, looks_like_hub_name
from swift.data.readers import READERS
from swift.data.rows import Row, location_of

__all__ = [
    "DatasetSpec",
    "Row",
    "find_files",
    "location_of",
    "parse_dataset_spec",
    "read_rows",
    "row_numbers",
]


@dataclass(frozen=True)
class DatasetSpec:
    """``a.jsonl#500``: a path and how many rows to take of it (None: all)."""

    text: str
    path: Path
    num_rows: int | None


def parse_dataset_spec(text: str) -> DatasetSpec:
    """Read ``PATH`` or ``PATH#N``; a file that really has ``#N`` in its name wins. Raises DataError for
    ``#0``."""
    found = re.fullmatch(r"(.+)#(\d+)", text)
    if found is None or Path(text).exists():
        return DatasetSpec(text, Path(text).expanduser(), None)
    num_rows = int(found[2])
    if num_rows == 0:
        raise DataError("0 rows asked for", where=text, fix=f"{found[1]}#100 takes 100 rows")
    return DatasetSpec(text, Path(found[1]).expanduser(), num_rows)


def find_files(path: Path) -> list[Path]:
    """The data files that ``path`` stands for: itself, or those in the folder.

    Raises DataError when nothing is there (with the nearest existing name), when a file's type is not known,
    or when a folder holds no data file.
    """
    if path.is_dir():
        inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in READERS]
        files = [
            file
            for file in inside
            if file.is_file() and not any(part[0] == "." for part in file.relative_to(path).parts)
        ]
        if not files:
            fix = f"known types: {_known_types()}"
            raise DataError("the folder holds no data file", where=str(path), fix=fix)
        return files
    if not path.exists():
        raise _missing(path)
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"unknown file type {path.suffix!r}", where=str(path), fix=f"known types: {_known_types()}"
        )
    return [path]


def _known_types() -> str:
    return ", ".join(sorted(READERS))


def _missing(path: Path) -> DataError:
    parent = path.parent
    if looks_like_hub_name(str(path)) and path.suffix.lower() not in READERS:
        local = path.name
        return DataError(
            "no such file or folder",
            where=str(path),
            why="data sets are files on disk; names on a hub come with a later version",
            fix=f"hf download {path} --repo-type dataset --local-dir {local}; then --dataset {local}",
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
    fix = f"did you mean {near}?" if near else "give the path of a file or folder on this machine"
    return DataError("no such file or folder", where=str(path), fix=fix)


def read_rows(
    path: Path | str, columns: Mapping[str, str] | None = None, wanted: Container[int] | None = None
) -> Iterator[Row]:
    """The rows of one file, in order.

    Args:
        columns: rename columns, old -> new.
        wanted: take only the rows with these numbers (see ``Row.number``); the others are not even parsed.

    A file that cannot be opened gives one row with an error, like an empty one.
    """
    path = Path(path)
    reader = READERS[path.suffix.lower()]
    found = False
    try:
        with path.open("rb") as file:
            for number, make in reader(file, str(path)):
                found = True
                if wanted is not None and number not in wanted:
                    continue
                row = make()
                if columns and row.error is None:
                    row = _rename(row, columns)
                yield row
    except OSError as error:
        yield Row({}, f"{path}:", 0, f"cannot be read: {error.strerror or error}")
        return
    if not found:
        yield Row({}, f"{path}:", 0, "the file is empty")


def row_numbers(path: Path | str) -> list[int]:
    """The numbers of all rows of a file, without parsing what need not be parsed. A file that cannot be read
    or is empty counts as one row with number 0, as in ``read_rows``."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return [number for number, _ in READERS[path.suffix.lower()](file, str(path))] or [0]
    except OSError:
        return [0]


def _rename(row: Row, columns: Mapping[str, str]) -> Row:
    values = {columns.get(name, name): value for name, value in row.values.items()}
    if len(values) != len(row.values):
        twice = next(new for old, new in columns.items() if old in row.values and new in row.values)
        return Row({}, row.source, row.number, f'renaming by --columns gives "{twice}" twice')
    return Row(values, row.source, row.number)
