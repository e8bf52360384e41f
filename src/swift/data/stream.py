"""Training data that is read while it is used: rows, not data sets, fit in memory.

The stream is cut into windows of ``shuffle_buffer_size`` rows. The rows of a window are tokenised, and batches are
made of them as of a small data set of their own (shuffled, grouped by length, joined or packed). So a window is a
function of the files, the seed and its number, and a run goes on exactly from (epoch, window, micro-batches used of
it): the rows before that window are passed over without being parsed. No batch spans two windows; the last one of a
window may be small.

Data sets follow one another, or are drawn from by ``dataset_weights``; then the epoch ends when the first of them is
used up (``first_exhausted``) or when all are (``all_exhausted``: the others begin again).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from swift.config.schema import Resolved
from swift.config.sections.data import DataSection
from swift.core.errors import DataError
from swift.data.batching import BatchSchedule, deal, random_generator
from swift.data.collate import Batch, batch_of
from swift.data.groups import task_format
from swift.data.layout import lay_out
from swift.data.load import LoadedData, load_data, note_report
from swift.data.loader import ahead
from swift.data.mode import batch_mode
from swift.data.persona import dataset_specs
from swift.data.report import StreamReport
from swift.data.rows import Row
from swift.data.samples import bad_rows_error
from swift.data.sources import find_files, lazy_rows
from swift.data.store import TokenStore
from swift.data.tokenise import Encoder, TemplateLike, encode_rows
from swift.data.tokens import TokenDataset

__all__ = ["Stream", "StreamLoader", "Window", "open_stream", "stream_notes"]

_CHUNK_ROWS = 256
_AHEAD = 4


LazyRow = Callable[[], Row]


@dataclass
class Window:
    """Some rows of the stream as a data set."""

    number: int
    dataset: TokenDataset


class Stream:
    """The training rows in the order of the files, or mixed by weight.

    Args:
        section: the data options; ``data_seed`` is set.
        batch_size: rows of a micro-batch.
        split: pieces that each micro-batch is cut into (see ``BatchSchedule``).

    Raises DataError for files that are missing.
    """

    def __init__(self, section: DataSection, encoder: Encoder, batch_size: int, split: int = 1) -> None:
        self.section, self.encoder, self.batch_size, self.split = section, encoder, batch_size, split
        self.specs = dataset_specs(section, section.dataset)
        self.files = [find_files(spec) for spec in self.specs]
        weights = np.asarray(section.dataset_weights, float)
        self._shares = weights / weights.sum() if len(weights) else weights
        self._first: list[Window] = []

    def first(self) -> Window | None:
        """The first window with a sample; it is kept, with those before it, for the first epoch."""
        for window in self.windows(0):
            self._first.append(window)
            if len(window.dataset):
                break
        return self._first[-1] if self._first else None

    def windows(self, epoch: int, start: int = 0) -> Iterator[Window]:
        """The windows of ``epoch`` from number ``start`` on, also those without a sample."""
        known = list(self._first) if epoch == 0 else []
        yield from known[start:]
        number = max(start, len(known))
        lazy = self._rows(epoch)
        size = self.section.shuffle_buffer_size
        for _ in islice(lazy, number * size):
            pass  # passed over: nothing of these rows is parsed
        while rows := list(islice(lazy, size)):
            yield Window(number, TokenDataset([self._encode(rows)]))
            number += 1

    def schedule(self, dataset: TokenDataset) -> BatchSchedule:
        """How the samples of a window go together."""
        section = self.section
        return BatchSchedule(
            dataset.lengths,
            batch_size=self.batch_size,
            split=self.split,
            mode=batch_mode(section),
            max_length=section.max_length or 0,
            group_by_length=section.group_by_length,
            shuffle=section.dataset_shuffle,
            seed=section.data_seed or 0,
        )

    def _encode(self, rows: Sequence[LazyRow]) -> TokenStore:
        parts = []
        for start in range(0, len(rows), _CHUNK_ROWS):
            made = [make() for make in rows[start : start + _CHUNK_ROWS]]
            part = encode_rows(made, self.encoder)
            if part.report.bad_rows and self.section.on_bad_rows == "error":
                texts = [spec.text for spec in self.specs]
                raise bad_rows_error(part.report.bad_rows, len(made), texts, at_least=True)
            parts.append(part)
        return TokenStore.join(parts)

    def _rows(self, epoch: int) -> Iterator[LazyRow]:
        """All rows of an epoch, not yet parsed."""
        sources = [self._source(number) for number in range(len(self.specs))]
        if not len(self._shares):
            for source in sources:
                yield from source
            return
        generator = random_generator("interleave", self.section.data_seed, epoch)
        exhausted = {number for number, share in enumerate(self._shares) if share == 0}
        while True:
            for number in generator.choice(len(sources), 1024, p=self._shares).tolist():
                item = next(sources[number], None)
                if item is None:
                    exhausted.add(number)
                    if self.section.stopping_strategy == "first_exhausted" or len(exhausted) == len(sources):
                        return
                    sources[number] = self._source(number)
                    item = next(sources[number], None)
                if item is not None:
                    yield item

    def _source(self, number: int) -> Iterator[LazyRow]:
        """The rows of one data set; ``#N`` takes the first N."""
        spec, columns = self.specs[number], self.section.columns
        rows = (make for file in self.files[number] for _, make in lazy_rows(file, columns, spec.mapping))
        return islice(rows, spec.num_rows)


def open_stream(
    resolved: Resolved, template: TemplateLike, batch_size: int, split: int
) -> tuple[Stream, LoadedData, BatchSchedule]:
    """The stream, its first window as training data (what it holds is checked before the weights are read) and the
    validation data, which is loaded whole; and the schedule of that window.

    Raises DataError for missing files, bad rows, and when the first window holds nothing to learn.
    """
    section = resolved.config.data
    task = task_format(resolved.config)
    encoder = Encoder(template, section.max_length, section.truncation_strategy, task)
    stream = Stream(section, encoder, batch_size, split)
    first = stream.first()
    train = first.dataset if first else TokenDataset([])
    loaded = load_data(resolved, template, section.max_length, train=train)
    loaded.notes.append(f"the rows are streamed; counts are those of the first {train.report.rows_read}")
    return stream, loaded, stream.schedule(train)


def stream_notes(report: dict[str, Any], section: DataSection) -> list[str]:
    """Sentences for the user about rows of the first pass that were left out or cut; of ``StreamLoader.report``."""
    made, notes = StreamReport.from_dict(report), list[str]()
    note_report(made, section.max_length, section, notes, f"of the {made.rows_read} rows streamed: ")
    return notes


@dataclass(frozen=True)
class _Served:
    """A micro-batch (None behind the last one of a pass), where the next begins, and what became of the rows so far."""

    batch: Batch | None
    position: tuple[int, int]
    report: dict[str, Any]


def _with_window(report: dict[str, Any], window: Window) -> dict[str, Any]:
    """The report with a window in it; one that was added before the run was interrupted is not added again."""
    made = StreamReport.from_dict(copy.deepcopy(report))
    if window.number < made.windows:
        return report
    made.merge(window.dataset.report)
    return made.to_dict()


class StreamLoader:
    """Serves the micro-batches of each optimizer step from a stream; a thread makes them ahead.

    Attributes:
        position: (window, micro-batches used of it) behind the step served last; where a resumed run goes on.
        report: what became of the rows of the first pass, of the windows that steps were served from.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        pad_token_id: int = 0,
        share: tuple[int, int] = (0, 1),
        deadline_seconds: float = 600.0,
    ) -> None:
        self.share = share
        self._empty: Batch | None = None
        self.stream, self.pad_token_id, self.deadline_seconds = stream, pad_token_id, deadline_seconds
        self.position = (0, 0)
        self.report: dict[str, Any] = {}

    def steps(
        self,
        epoch: int,
        accumulation: int,
        start_step: int = 0,
        position: tuple[int, int] = (0, 0),
        report: dict[str, Any] | None = None,
    ) -> Iterator[list[Batch]]:
        """Our micro-batches of each optimizer step of ``epoch`` from ``position`` on (``start_step`` only tells whether
        something was served before: an epoch that serves nothing at all is refused). ``report`` is the loader's as it
        was at that position.

        Raises DataError for bad rows and for a stream without anything to learn, SwiftError when a batch is late.
        """
        served, self.report = start_step > 0, report or {}
        ready = ahead(self._batches(epoch, position, self.report), _AHEAD, self.deadline_seconds)
        with contextlib.closing(ready):
            while items := list(islice(ready, accumulation)):
                batches = [item.batch for item in items if item.batch is not None]
                self.report = items[-1].report
                if batches:
                    served, self.position = True, items[-1].position
                    assert self._empty is not None
                    yield deal(batches, self.share, self._empty)
        self.position = (0, 0)
        if not served:
            names = ", ".join(self.stream.section.dataset)
            raise DataError(
                "no row is left to learn from", where=names, fix="swift data check FILE --model FOLDER"
            )

    def _batches(self, epoch: int, position: tuple[int, int], report: dict[str, Any]) -> Iterator[_Served]:
        """The batches, and behind the last of them one more item without a batch."""
        first, used = position
        place_behind = position
        for window in self.stream.windows(epoch, first):
            report = _with_window(report, window) if epoch == 0 else report
            if not len(window.dataset):
                continue
            schedule = self.stream.schedule(window.dataset)
            if self._empty is None:
                self._empty = batch_of(lay_out(window.dataset, [], schedule.mode, self.pad_token_id))
            todo = schedule.micro_batches(epoch * 1_000_003 + window.number)
            for place, rows in enumerate(todo):
                if window.number == first and place < used * schedule.split:
                    continue
                layout = lay_out(window.dataset, rows, schedule.mode, self.pad_token_id)
                place_behind = (window.number, (place + 1) // schedule.split)
                yield _Served(batch_of(layout), place_behind, report)
        yield _Served(None, place_behind, report)

    def close(self) -> None:
        """Nothing to end: the thread ends with the iteration."""
