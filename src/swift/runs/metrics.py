"""``metrics.jsonl``: one JSON object a line, appended while the run goes on.

Keys of a training line: ``step, epoch, loss, grad_norm, learning_rate, tokens_per_second, step_time,
num_tokens, gpu_mem_usage``; of an evaluation line: ``step, epoch, eval_*``. Every line is valid JSON: a
value that is not finite is written as null, and ``nonfinite`` tells what it was (``{"loss": "nan"}``).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift.core.errors import DataError
from swift.core.files import atomic_write_text

__all__ = ["MetricsLog", "finite", "last_evaluation", "read_metrics"]


class MetricsLog:
    """Appends to ``metrics.jsonl``; opening repairs the line that a kill has cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = self._open()

    def _open(self) -> int:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        size = os.fstat(descriptor).st_size
        if size:
            whole = _end_of_last_line(descriptor, size)
            if whole < size:
                os.ftruncate(descriptor, whole)
        return descriptor

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write one line in one go. On a full disk nothing of the line stays, and OSError is raised."""
        line = (json.dumps(finite(metrics), ensure_ascii=False, allow_nan=False) + "\n").encode()
        start = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) != len(line):
                os.write(self._descriptor, b"")  # asks the disk once more, for the error behind a short write
                raise OSError(f"only a part of a line could be written to {self.path}")
        except OSError:
            os.ftruncate(self._descriptor, start)
            raise

    def truncate_after(self, step: int) -> int:
        """Drop the lines of later steps (a resumed run writes them again); returns how many."""
        rows = read_metrics(self.path)
        kept = [row for row in rows if row.get("step", 0) <= step]
        if len(kept) < len(rows):
            self.close()
            atomic_write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
            self._descriptor = self._open()
        return len(rows) - len(kept)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _end_of_last_line(descriptor: int, size: int) -> int:
    """Offset just behind the last newline among ``size`` bytes; 0 when there is none."""
    end, block = size, 65536
    while end > 0:
        start = max(0, end - block)
        at = os.pread(descriptor, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that JSON can hold: scalars of tensors as numbers, NaN as null plus ``nonfinite``."""
    row: dict[str, Any] = {}
    lost: dict[str, str] = {}
    for key, value in metrics.items():
        if not isinstance(value, (str, bool, int, float)) and hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            lost[key] = str(value)
            value = None
        row[key] = value
    if lost:
        row["nonfinite"] = {**row.get("nonfinite", {}), **lost}
    return row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line without its newline is still being written, or was cut, and is left
    out.

    Returns an empty list when the file does not exist. Raises DataError (``file:line``) for a broken line.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError("not a JSON line", where=f"{path}:{number}", why=str(error)) from None
        if not isinstance(row, dict):
            raise DataError("not a JSON object", where=f"{path}:{number}")
        rows.append(row)
    return rows


def last_evaluation(metrics: Path) -> dict[str, float]:
    """The newest evaluation on file: a resumed run may end before it evaluates again."""
    for row in reversed(read_metrics(metrics)):
        found = {key: value for key, value in row.items() if key.startswith("eval_")}
        if found:
            return found
    return {}
