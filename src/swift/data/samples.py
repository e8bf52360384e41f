"""Rows of data sets chosen and read as samples, without tokens (and without torch)."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swift.core.errors import DataError
from swift.data.mapping import NO_MAPPING, ColumnMapping
from swift.data.mixing import sample_rows
from swift.data.rows import Row
from swift.data.sources import DatasetSpec, parse_dataset_spec, read_rows, row_numbers

__all__ = ["Selection", "bad_rows_error", "select"]


@dataclass
class Selection:
    """The rows of a data set that are taken: files with the numbers wanted of each (None: all)."""

    files: list[tuple[Path, set[int] | None]]
    num_rows: int
    mapping: ColumnMapping = NO_MAPPING

    def rows(self, columns: Mapping[str, str]) -> Iterator[Row]:
        """The rows, in order; bad ones have ``error`` set."""
        for file, wanted in self.files:
            yield from read_rows(file, columns, wanted, self.mapping)


def select(spec: DatasetSpec, files: list[Path], seed: int) -> Selection:
    """The rows of ``files`` that ``spec`` asks for: all, or N without replacement (all, when there are no more)."""
    numbers = [row_numbers(file) for file in files]
    total = sum(len(part) for part in numbers)
    if spec.num_rows is None or spec.num_rows >= total:
        return Selection([(file, None) for file in files], total, spec.mapping)
    chosen = sample_rows(total, spec.num_rows, seed, spec.path.name)
    taken: list[tuple[Path, set[int] | None]] = []
    start = 0
    for file, part in zip(files, numbers, strict=True):
        inside = chosen[(chosen >= start) & (chosen < start + len(part))] - start
        if len(inside):
            taken.append((file, {part[place] for place in inside}))
        start += len(part)
    return Selection(taken, spec.num_rows, spec.mapping)


def bad_rows_error(
    bad: Sequence[tuple[str, str]], total: int, texts: Sequence[str], *, at_least: bool = False
) -> DataError:
    """The refusal of bad rows: the first five, how many there are, and what to do."""
    shown = [f"{location}: {reason}" for location, reason in bad[:5]]
    if len(bad) > 5:
        shown.append(f"and {len(bad) - 5} more")
    files = shlex.join(str(parse_dataset_spec(text).path) for text in texts)
    fix = f"swift data check {files}   (or go on without them: --on_bad_rows skip)"
    if len(bad) == total:
        fix = f"swift data show {files} shows what is there: is it for another command?"
    return DataError(
        f"{'at least ' if at_least and len(bad) < total else ''}{len(bad)} of {total} rows cannot be used",
        where=", ".join(texts),
        why="\n    ".join(shown),
        fix=fix,
    )
