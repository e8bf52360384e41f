"""The result file of batch inference and evaluation: one JSON line per answered row, safe against being cut off."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from swift.core.errors import ConfigError, DataError, SwiftError
from swift.core.files import atomic_write_json, atomic_write_text
from swift.evaluate.statistics import is_number
from swift.runs.metrics import finite, read_metrics

__all__ = [
    "RESULTS",
    "ROW_KEYS",
    "SAMPLES",
    "ResultFile",
    "read_results",
    "row_key",
    "row_metrics",
    "write_metrics",
]

SAMPLES, RESULTS = "samples.jsonl", "results.json"
"""What a folder of results holds."""

ROW_KEYS = frozenset(
    ("index", "key", "task", "location", "messages", "response", "responses", "finish_reason", "num_tokens", "extra",
     "reference", "choices", "num_loss_tokens", "choice_logprobs", "chosen", "passed", "failure", "judge_says",
     "judge_error", "judge_failures")
)  # fmt: skip
"""What a row holds beside its metrics."""


def row_key(*parts: Any) -> str:
    """Short hash of everything an answer depends on."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a result: its numbers that are nothing else."""
    return {name: float(value) for name, value in result.items() if name not in ROW_KEYS and is_number(value)}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file, in the order of the data. Raises DataError when there are none."""
    rows = [row for row in read_metrics(path) if "index" in row and "messages" in row]
    if not rows:
        raise DataError("there are no results", where=str(path))
    return sorted(rows, key=lambda row: row["index"])


def write_metrics(path: Path, summary: Mapping[str, Any]) -> Path:
    """The summary of a result file beside it, for programs: ``evaluation.jsonl`` -> ``evaluation.json``.

    NaN becomes null. Raises SwiftError when it cannot be written.
    """
    target = path.with_suffix(".summary.json" if path.suffix == ".json" else ".json")
    try:
        atomic_write_json(target, finite(summary))
    except OSError as error:
        raise SwiftError("the summary cannot be written", where=str(target), why=error.strerror) from error
    return target


def _elsewhere(path: Path) -> str:
    """The option that puts results into another file: of swift eval, or of swift infer."""
    return "--eval_name NEW or --eval_output_dir FOLDER" if path.name == SAMPLES else "--result_path NEW_FILE"


def _unwritable(path: Path, error: OSError) -> SwiftError:
    return SwiftError(
        "the results cannot be written",
        where=str(path),
        why=error.strerror,
        fix=f"free some space, or {_elsewhere(path)}; the same command goes on where it stopped",
    )


class ResultFile:
    """Appends results, one JSON object with ``index`` and ``key`` per line, each batch forced to disk.

    An existing file is gone on with: a last line cut in the middle is removed, rows already there are not answered
    again. A file that belongs to other rows or other options is refused, never overwritten.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[int, dict[str, Any]] = {}
        self._file: FileIO | None = None
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        end = 0
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # the writer was killed in the middle of this line
            try:
                result = json.loads(line)
                self.results[result["index"]] = result
                result["key"]
            except (ValueError, KeyError, TypeError) as error:
                raise SwiftError(
                    "this is not a result of swift infer",
                    where=f"{self.path}:{number}",
                    why=str(error),
                    fix=_elsewhere(self.path),
                ) from None
            end += len(line)
        if end < len(content):
            os.truncate(self.path, end)

    def check(self, keys: Mapping[int, str]) -> None:
        """Raise ConfigError when a stored result has another key than the row at its index."""
        for index, result in self.results.items():
            if keys.get(index) != result["key"]:
                raise ConfigError(
                    f"row {index} in this file was answered for other data, another model or other options",
                    where=str(self.path),
                    fix=_elsewhere(self.path),
                )

    def append(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Write results and force them to disk. Raises SwiftError when the disk is full or cannot be written."""
        lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            data = lines.encode()
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.results.update((result["index"], dict(result)) for result in results)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def sort(self) -> None:
        """Put a finished file into the order of the data: engines answer short rows first.

        Raises SwiftError when the disk is full or cannot be written; the file is then as it was.
        """
        self.close()
        order = sorted(self.results)
        if order == list(self.results):
            return
        self.results = {index: self.results[index] for index in order}
        lines = (json.dumps(result, ensure_ascii=False) + "\n" for result in self.results.values())
        try:
            atomic_write_text(self.path, "".join(lines))
        except OSError as error:
            raise _unwritable(self.path, error) from error
