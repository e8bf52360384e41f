"""From rows to tokens, in this process or, when there is much to do, in several."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import numpy as np

from swift.core.errors import DataError
from swift.data.formats import RowError, Sample, to_sample
from swift.data.groups import GroupTemplate, TaskFormat, encode_group, end_mask
from swift.data.report import DataReport
from swift.data.rows import Row
from swift.data.store import EncodedLike, TokenStore, TokenWriter, encoded_arrays
from swift.data.workers import WorkerPool

__all__ = ["Encoder", "TemplateLike", "Truncation", "encode_rows", "tokenise"]

Truncation = Literal["delete", "left", "right", "split"]

_CHUNK_ROWS = 512
_POOL_WORTH_SECONDS = 4.0
"""Starting workers takes about 1 s: below this much remaining work they do not pay."""
_DEADLINE_SECONDS = 600.0
"""How long a chunk may take in a worker before we call it stuck."""


class TemplateLike(GroupTemplate, Protocol):
    """What tokenisation needs of ``swift.models.template.Template``."""

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Encoder:
    """How samples become tokens: the template, the longest sample (None: no limit), what becomes of longer ones.

    With a ``task`` a sample is a group of sequences, and the limit is that of each of them.
    """

    template: TemplateLike
    max_length: int | None
    truncation: Truncation = "delete"
    task: TaskFormat | None = None


def encode_rows(rows: Iterable[Row], encoder: Encoder) -> TokenStore:
    """Encode rows into a store in memory. Bad rows, long rows and rows without a target are in its report."""
    collecting = gc.isenabled()
    gc.disable()  # the many small lists of a chunk die by themselves; looking for cycles among them costs a sixth
    try:
        if encoder.task is not None:
            return _encode_groups(rows, encoder, encoder.task)
        return _encode_rows(rows, encoder)
    finally:
        if collecting:
            gc.enable()


def _encode_rows(rows: Iterable[Row], encoder: Encoder) -> TokenStore:
    report, writer = DataReport(), TokenWriter()
    files: dict[str, int] = {}
    good: list[tuple[Row, Sample]] = []
    for row in rows:
        report.rows_read += 1
        try:
            good.append((row, to_sample(row)))
        except RowError as error:
            report.bad_rows.append((error.location, error.reason))
    for row, encoded in _encode(good, encoder.template, report):
        ids, learned, weights = encoded_arrays(encoded)
        if weights is not None:
            learned = learned & (weights != 0)
        where = (files.setdefault(row.source, len(files)), row.number)
        pieces = _fit(len(ids), encoder)
        if not pieces:
            report.deleted.setdefault(row.source, []).append(row.number)
            continue
        kept = [piece for piece in pieces if learned[piece][1:].any()]
        if not kept:
            report.untargeted.setdefault(row.source, []).append(row.number)
            continue
        if pieces != [slice(0, len(ids))]:
            report.truncated.setdefault(row.source, []).append(row.number)
        for piece in kept:
            writer.add(ids[piece], learned[piece], None if weights is None else weights[piece], where)
            report.num_targets += int(np.count_nonzero(learned[piece][1:]))
            report.num_tokens += len(ids[piece])
    report.samples = len(writer)
    return writer.build(list(files), report)


def _encode_groups(rows: Iterable[Row], encoder: Encoder, task: TaskFormat) -> TokenStore:
    """``encode_rows`` for tasks over whole sequences. A row is deleted when one of its sequences is too long."""
    report, writer = DataReport(), TokenWriter()
    files: dict[str, int] = {}
    for row in rows:
        report.rows_read += 1
        try:
            group = encode_group(row, encoder.template, task)
        except RowError as error:
            report.bad_rows.append((error.location, error.reason))
            continue
        kept = [_kept(len(one), encoder, is_read=group.learned is None) for one in group.sequences]
        where = (files.setdefault(row.source, len(files)), row.number)
        if not all(len(places) for places in kept):
            report.deleted.setdefault(row.source, []).append(row.number)
            continue
        cut = [sequence[places] for sequence, places in zip(group.sequences, kept, strict=True)]
        ends = end_mask(cut)
        if group.learned is None:
            learned = ends
        else:
            masks = [mask[places] for mask, places in zip(group.learned, kept, strict=True)]
            if not all(mask[1:].any() for mask in masks):
                report.untargeted.setdefault(row.source, []).append(row.number)
                continue
            learned = np.concatenate(masks)
        if any(len(one) < len(whole) for one, whole in zip(cut, group.sequences, strict=True)):
            report.truncated.setdefault(row.source, []).append(row.number)
        ids = np.concatenate(cut)
        writer.add(ids, learned, None, where, group.labels, None if group.learned is None else ends)
        report.num_targets += int(np.count_nonzero(learned))
        report.num_tokens += len(ids)
    report.samples = len(writer)
    return writer.build(list(files), report)


def _kept(length: int, encoder: Encoder, *, is_read: bool) -> np.ndarray:
    """The places of a sequence that are kept, none when its row is deleted; the last one, where it is read."""
    places, limit = np.arange(length), encoder.max_length
    if limit is None or length <= limit:
        return places
    if encoder.truncation == "left":
        return places[-limit:]
    if encoder.truncation == "right":
        return np.append(places[: limit - 1], length - 1) if is_read else places[:limit]
    return places[:0]


def _encode(
    samples: list[tuple[Row, Sample]], template: TemplateLike, report: DataReport
) -> Iterable[tuple[Row, EncodedLike]]:
    """Encode all at once; when the template refuses one of them, one by one to find out which."""
    try:
        encoded = template.encode_many([(sample.messages, sample.tools) for _, sample in samples])
        return zip((row for row, _ in samples), encoded, strict=True)
    except DataError as error:
        if len(samples) == 1:
            reason = f"{error.message} ({error.why})" if error.why else error.message
            report.bad_rows.append((samples[0][0].location, reason))
            return []
    return [pair for sample in samples for pair in _encode([sample], template, report)]


def _fit(length: int, encoder: Encoder) -> list[slice]:
    """The pieces of a sample that are kept: none when it is deleted.

    ``split`` lets a piece begin with the last token of the one before: every token but the first of the
    sample is a target exactly once.
    """
    limit = encoder.max_length
    if limit is None or length <= limit:
        return [slice(0, length)]
    if encoder.truncation == "delete":
        return []
    if encoder.truncation == "right":
        return [slice(0, limit)]
    if encoder.truncation == "left":
        return [slice(length - limit, length)]
    return [slice(start, min(start + limit, length)) for start in range(0, length - 1, limit - 1)]


def tokenise(
    rows: Iterable[Row], num_rows: int, encoder: Encoder, num_processes: int | None = None
) -> Generator[TokenStore, None, None]:
    """Encode rows chunk by chunk, in order.

    Args:
        num_rows: how many rows there are, to estimate what remains.
        num_processes: how many processes; None: this one, unless what remains after the first chunk is
            estimated to take longer than starting others would save.

    Raises SwiftError when a worker process dies or is stuck.
    """
    iterator = iter(rows)
    cores = num_processes or _num_cores()
    done = 0
    started = time.process_time()
    while chunk := list(islice(iterator, _CHUNK_ROWS)):
        yield encode_rows(chunk, encoder)
        done += len(chunk)
        remaining = (time.process_time() - started) / done * (num_rows - done)
        wanted = remaining > _POOL_WORTH_SECONDS if num_processes is None else num_rows > done
        if cores > 1 and wanted:
            yield from _in_processes(iterator, encoder, cores)
            return


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(rows: Iterator[Row], encoder: Encoder, num_processes: int) -> Iterator[TokenStore]:
    chunks = iter(lambda: list(islice(rows, _CHUNK_ROWS)), [])
    pool = WorkerPool(
        _encode_in_worker,
        encoder,
        num_processes,
        stage="tokenisation",
        fix="look for a memory limit, or use --dataset_num_proc 1",
        deadline_seconds=_DEADLINE_SECONDS,
    )
    try:
        yield from pool.map(chunks, ahead=2)
    finally:
        pool.close()


def _encode_in_worker(encoder: Encoder, rows: list[Row]) -> TokenStore:
    return encode_rows(rows, encoder)
