"""Vectors and scores of the rows of data files, by a model that reads texts (docs/en/tasks.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from swift.core.errors import DataError
from swift.data.formats import RowError, to_sample
from swift.data.groups import GroupTemplate, read_texts
from swift.data.sources import DatasetSpec, first_rows
from swift.evaluate.results import ResultFile, row_key

__all__ = ["Texts", "read_rows_of_texts", "value_texts"]

_ROWS_TOGETHER = 64


class Values(Protocol):
    """`swift.inference.engines.embedded_core.EmbeddedCore`, as far as it is needed here."""

    def pool(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]: ...


@dataclass(frozen=True)
class Texts:
    """One row: its place among the rows, ``file:line``, its conversations and other columns."""

    index: int
    location: str
    conversations: list[list[dict[str, Any]]]
    extra: dict[str, Any]


def read_rows_of_texts(
    specs: Sequence[DatasetSpec], columns: dict[str, str], task_type: str, on_bad_rows: str = "error"
) -> tuple[list[Texts], list[str]]:
    """The rows in order, and the bad ones left out (``file:line: reason``).

    Raises:
        DataError: a file is missing, or a row is bad and ``on_bad_rows`` is ``error``.
    """
    good: list[Texts] = []
    bad: list[str] = []
    for row in (row for spec in specs for row in first_rows(spec, columns)):
        try:
            sample = to_sample(row)
            conversations = read_texts(sample, task_type)
        except RowError as error:
            if on_bad_rows == "error":
                raise
            bad.append(f"{error.location}: {error.reason}")
        except DataError as error:
            if on_bad_rows == "error":
                raise DataError(error.message, where=row.location) from None
            bad.append(f"{row.location}: {error.message}")
        else:
            good.append(Texts(len(good), row.location, conversations, sample.extra))
    if not good:
        raise DataError("there is no row to read", where=", ".join(spec.text for spec in specs))
    return good, bad


def value_texts(
    model: Values,
    template: GroupTemplate,
    rows: Sequence[Texts],
    task_type: str,
    path: Path,
    *,
    identity: Sequence[str] = (),
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """The values of all rows that ``path`` does not hold yet; returns all results in order.

    A result has ``index``, ``key``, ``location``, the row's other columns under ``extra``, and ``vectors`` (embedding:
    one for each text of the row), ``scores`` (rerankers: one number for each document) or ``scores`` (seq_cls: the
    row's logits, with several the number of the highest under ``class``).
    """
    keys = {row.index: row_key(row.conversations, task_type, list(identity)) for row in rows}
    file = ResultFile(path)
    file.check(keys)
    on_progress(len(file.results))
    waiting = [row for row in rows if row.index not in file.results]
    try:
        for start in range(0, len(waiting), _ROWS_TOGETHER):
            chosen = waiting[start : start + _ROWS_TOGETHER]
            ids = [
                template.encode_sequence(messages, end_token=task_type == "embedding")
                for row in chosen
                for messages in row.conversations
            ]
            values = iter(model.pool(ids))
            file.append(
                [_result(row, keys, [next(values) for _ in row.conversations], task_type) for row in chosen]
            )
            on_progress(len(file.results))
    finally:
        file.close()
    return [file.results[row.index] for row in rows]


def _result(row: Texts, keys: dict[int, str], values: list[list[float]], task_type: str) -> dict[str, Any]:
    result: dict[str, Any] = {"index": row.index, "key": keys[row.index], "location": row.location}
    if row.extra:
        result["extra"] = row.extra
    if task_type == "embedding":
        result["vectors"] = values
    elif task_type in ("reranker", "generative_reranker"):
        result["scores"] = [one[0] for one in values]
    else:
        result["scores"] = values[0]
        if len(values[0]) > 1:
            result["class"] = values[0].index(max(values[0]))
    return result
