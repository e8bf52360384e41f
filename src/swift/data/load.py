"""From the data options to the token data sets of training and validation."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from swift.config.schema import Resolved
from swift.config.sections.data import DataSection
from swift.core.errors import DataError
from swift.core.format import format_count
from swift.data.cache import cached_store, content_key
from swift.data.channels import Channels, number_channels
from swift.data.formats import RowError, to_sample
from swift.data.groups import task_format
from swift.data.mapping import NO_MAPPING, ColumnMapping
from swift.data.mixing import mix, repeat_rows, row_ids, split_rows
from swift.data.persona import dataset_specs
from swift.data.report import DataReport
from swift.data.rows import Row, location_of
from swift.data.samples import Selection, bad_rows_error, select
from swift.data.sources import DatasetSpec, find_files, read_rows
from swift.data.store import TokenStore
from swift.data.tokenise import Encoder, TemplateLike, tokenise
from swift.data.tokens import TokenDataset

__all__ = ["LoadedData", "describe_rows", "load_data", "note_report", "rows_of"]

_PROGRESS_BYTES = 4 << 20
"""From this much data on a progress bar is worth the look."""


@dataclass
class LoadedData:
    """What training reads.

    Attributes:
        train: samples with at least one learned token, none longer than max_length.
        validation: the same for ``val_dataset`` or the split-off rows; None without either.
        validation_rows: the validation rows as messages, tools and extra columns, for ``val_dataset.jsonl``.
        notes: sentences for the user: what was left out, cut, skipped.
        channels: groups of the training and the validation samples; empty unless a loss of each is wanted.
    """

    train: TokenDataset
    validation: TokenDataset | None
    validation_rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    channels: list[Channels] = field(default_factory=list)


def load_data(
    resolved: Resolved, template: TemplateLike, max_length: int | None, *, train: TokenDataset | None = None
) -> LoadedData:
    """Read, tokenise (or find in the cache), mix and split the data sets of ``resolved``.

    ``dataset_weights`` set proportions of samples; as many are taken as the proportions allow without
    repeating any. Without weights the data sets follow one another whole. ``split_dataset_ratio`` counts only
    when there is no ``val_dataset``. With ``train`` only the validation data is loaded.

    Raises DataError for missing files, bad rows (unless ``on_bad_rows=skip``) and when nothing is left to
    learn.
    """
    section = resolved.config.data
    seed = section.data_seed if section.data_seed is not None else resolved.config.training.seed
    if not section.dataset:
        raise DataError("no training data", where="--dataset", fix="--dataset FILE.jsonl")
    task = task_format(resolved.config)
    encoder = Encoder(template, max_length, section.truncation_strategy, task)
    notes: list[str] = []
    # Names first: a missing validation file should not be found after an hour of tokenising.
    specs = dataset_specs(section, section.dataset)
    val_specs = dataset_specs(section, section.val_dataset)
    files = {spec.text: find_files(spec) for spec in [*specs, *val_specs]}
    notes += [
        f"{spec.text}: {spec.entry.note}" for spec in [*specs, *val_specs] if spec.entry and spec.entry.note
    ]

    def load(chosen: list[DatasetSpec], weights: Sequence[float]) -> TokenDataset:
        parts = [_load_one(spec, files[spec.text], section, encoder, seed, notes) for spec in chosen]
        return _combine(parts, weights, seed)

    streamed = train is not None
    if train is None:
        train = load(specs, section.dataset_weights)
    _require_samples(train, section.dataset, max_length)
    note_report(train.report, max_length, section, notes)
    if section.dataset_weights and not streamed:
        notes.append(_mixing_note(train, specs))
    validation = None
    if val_specs:
        validation = load(val_specs, [])
        _require_samples(validation, section.val_dataset, max_length)
        note_report(validation.report, max_length, section, notes, "validation: ")
    elif section.split_dataset_ratio > 0:
        train, validation = _split(train, section.split_dataset_ratio, seed)
    if resolved.config.rlhf.rlhf_type == "kto":
        for dataset in (train, validation):
            if dataset is not None:
                dataset.mismatched = "kto" in resolved.config.rlhf.rlhf_loss_type
    mappings = {str(file): spec.mapping for spec in [*specs, *val_specs] for file in files[spec.text]}
    rows = [] if validation is None else _original_rows(validation, section.columns, mappings)
    channels = []
    if resolved.config.training.enable_channel_loss:
        sets = [train] if validation is None else [train, validation]
        channels = number_channels([_channel_column(part, section.columns, mappings) for part in sets])
    return LoadedData(train, validation, rows, notes, channels)


def _load_one(
    spec: DatasetSpec, files: list[Path], section: DataSection, encoder: Encoder, seed: int, notes: list[str]
) -> tuple[TokenStore, np.ndarray | None]:
    """The tokens of one data set and, when rows are repeated, the sample indices to take (None: all)."""
    selection = select(spec, files, seed)
    repeated = spec.num_rows is not None and spec.num_rows > selection.num_rows
    try:
        key = content_key(
            files,
            (spec.num_rows, spec.path.name, seed) if selection.num_rows == spec.num_rows else None,
            sorted(section.columns.items()),
            *([spec.mapping] if spec.mapping != NO_MAPPING else []),
            encoder.template.fingerprint,
            encoder.max_length,
            encoder.truncation,
            *([encoder.task] if encoder.task is not None else []),
        )
        num_bytes = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise DataError("cannot be read", where=str(error.filename), why=error.strerror) from error

    def make() -> Iterator[TokenStore]:
        parts = tokenise(
            selection.rows(section.columns), selection.num_rows, encoder, section.dataset_num_proc
        )
        watched = (
            _with_progress(parts, selection.num_rows, spec.text) if num_bytes > _PROGRESS_BYTES else parts
        )
        # closing: an error in the middle must end the worker processes at once, not when memory is collected.
        with contextlib.closing(parts):
            for part in watched:
                if part.report.bad_rows and section.on_bad_rows == "error":
                    raise _refusal(selection, section, part.report.bad_rows, spec)
                yield part

    store = cached_store(
        key,
        make,
        reuse=section.load_from_cache_file,
        notes=notes,
        limit_bytes=round(section.token_cache_gib * 2**30),
    )
    if store.report.bad_rows and section.on_bad_rows == "error":  # made by a run that skipped them
        raise bad_rows_error(store.report.bad_rows, selection.num_rows, [spec.text])
    if not repeated or spec.num_rows is None:
        return store, None
    return store, repeat_rows(row_ids([store]), selection.num_rows, spec.num_rows, seed, spec.path.name)


def _refusal(
    selection: Selection, section: DataSection, seen: Sequence[tuple[str, str]], spec: DatasetSpec
) -> DataError:
    """The error that names all bad rows: those that cannot be read, and those seen that the template refuses."""
    bad: list[tuple[str, str]] = []
    for row in selection.rows(section.columns):
        try:
            to_sample(row)
        except RowError as error:
            bad.append((error.location, error.reason))
    refused = [fault for fault in seen if fault not in bad]
    return bad_rows_error([*bad, *refused], selection.num_rows, [spec.text], at_least=bool(refused))


def _with_progress(parts: Iterable[TokenStore], num_rows: int, name: str) -> Iterator[TokenStore]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("tokenising {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)  # standard output may be read by a program
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=num_rows)
        for part in parts:
            progress.advance(task, part.report.rows_read)
            yield part


def _combine(
    parts: Sequence[tuple[TokenStore, np.ndarray | None]], weights: Sequence[float], seed: int
) -> TokenDataset:
    stores = [store for store, _ in parts]
    chosen: list[np.ndarray] = []
    start = 0
    for store, index in parts:
        chosen.append(start + (np.arange(len(store), dtype=np.int64) if index is None else index))
        start += len(store)
    dataset = TokenDataset(stores, mix(chosen, weights, seed))
    return _with_counts(dataset)


def _with_counts(dataset: TokenDataset) -> TokenDataset:
    """The data set with the samples, tokens and targets of its report counted over its index."""
    targets = [_targets_per_sample(store) for store in dataset.stores]
    every = np.concatenate(targets) if targets else np.zeros(0, np.int64)
    dataset.report = replace(
        dataset.report,
        samples=len(dataset),
        num_tokens=dataset.num_tokens,
        num_targets=int(every[dataset.index].sum()),
    )
    return dataset


def _targets_per_sample(store: TokenStore) -> np.ndarray:
    if len(store) == 0:
        return np.zeros(0, np.int64)
    starts = store.offsets[:-1]
    counts = np.add.reduceat(store.learned, starts, dtype=np.int64)
    if store.labels is not None:  # the ends of sequences
        return counts
    return counts - store.learned[starts]  # a first token is never a target


def _split(train: TokenDataset, ratio: float, seed: int) -> tuple[TokenDataset, TokenDataset]:
    rows = row_ids(train.stores)[train.index]
    if len(np.unique(rows)) < 2:
        fix = "give a --val_dataset, or drop --split_dataset_ratio"
        raise DataError("one row cannot be split into training and validation", fix=fix)
    aside = split_rows(rows, ratio, seed)
    # What was left out before the split is told once, in the report of the training part.
    validation = TokenDataset(train.stores, train.index[aside], DataReport())
    train = TokenDataset(train.stores, train.index[~aside], train.report)
    return _with_counts(train), _with_counts(validation)


def _original_rows(
    dataset: TokenDataset, columns: Mapping[str, str], mappings: Mapping[str, ColumnMapping]
) -> list[dict[str, Any]]:
    """The rows of a data set as they were read, once each, in the order of the data set."""
    places = dict.fromkeys(dataset.row(i) for i in range(len(dataset)))
    found = {}
    for place, row in _read_again(places, columns, mappings):
        sample = to_sample(row)
        tools = {} if sample.tools is None else {"tools": sample.tools}
        found[place] = {"messages": sample.messages, **tools, **sample.extra}
    return [found[place] for place in places]


def _channel_column(
    dataset: TokenDataset, columns: Mapping[str, str], mappings: Mapping[str, ColumnMapping]
) -> list[Any]:
    """The ``channel`` of the row each sample comes from; None where there is none."""
    places = [dataset.row(i) for i in range(len(dataset))]
    found = {place: row.values.get("channel") for place, row in _read_again(places, columns, mappings)}
    return [found[place] for place in places]


def rows_of(dataset: TokenDataset, section: DataSection) -> dict[tuple[str, int], Row]:
    """The rows that the samples come from, as they were read: (``Row.source``, ``Row.number``) -> row."""
    mappings: dict[str, ColumnMapping] = {}
    for spec in dataset_specs(section, [*section.dataset, *section.val_dataset]):
        mappings |= {str(file): spec.mapping for file in find_files(spec)}
    places = dict.fromkeys(dataset.row(i) for i in range(len(dataset)))
    return dict(_read_again(places, section.columns, mappings))


def _read_again(
    places: Iterable[tuple[str, int]], columns: Mapping[str, str], mappings: Mapping[str, ColumnMapping]
) -> Iterator[tuple[tuple[str, int], Row]]:
    wanted: dict[str, set[int]] = {}
    for source, number in places:
        wanted.setdefault(source, set()).add(number)
    for source, numbers in wanted.items():
        file = location_of(source, 0)
        for row in read_rows(file, columns, numbers, mappings.get(file, NO_MAPPING)):
            yield (source, row.number), row


def _require_samples(dataset: TokenDataset, texts: Sequence[str], max_length: int | None) -> None:
    if len(dataset):
        return
    report = dataset.report
    deleted, untargeted = report.count("deleted"), report.count("untargeted")
    reasons = [f"{report.rows_read} rows read"]
    if deleted:
        reasons.append(f"{deleted} longer than max_length {max_length}")
    if untargeted:
        reasons.append(f"{untargeted} with no token to learn (no assistant message?)")
    if report.bad_rows:
        reasons.append(f"{len(report.bad_rows)} bad")
    fix = (
        "--truncation_strategy left (or right; pt: split), or a larger --max_length"
        if deleted
        else f"swift data check {shlex.quote(texts[0])}   (what is wrong with it, and which columns are not read)"
    )
    raise DataError("no row is left to learn from", where=", ".join(texts), why=", ".join(reasons), fix=fix)


def describe_rows(places: Mapping[str, Sequence[int]], limit: int = 6, count: int | None = None) -> str:
    """``a.jsonl:3, 7, b.jsonl:1 and 5 more``; ``count``: of all rows, when ``places`` are only the first of them."""
    shown: list[str] = []
    for source, numbers in places.items():
        room = limit - len(shown)
        for place, number in enumerate(numbers[:room]):
            shown.append(location_of(source, number) if place == 0 else str(number))
    total = sum(len(numbers) for numbers in places.values()) if count is None else count
    more = total - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def note_report(
    report: DataReport, max_length: int | None, section: DataSection, notes: list[str], prefix: str = ""
) -> None:
    """Add to ``notes`` a sentence for each reason why rows were left out or cut."""
    how = {"left": "cut at the left", "right": "cut at the right", "split": "split"}
    longer = f"longer than max_length {max_length}"
    for name, fate in (
        ("deleted", f"{longer} were left out"),
        ("truncated", f"{longer} were {how.get(section.truncation_strategy)}"),
        ("untargeted", "have no token to learn and were left out"),
    ):
        if count := report.count(name):
            notes.append(f"{prefix}{count} rows {fate}: {describe_rows(getattr(report, name), count=count)}")
    if report.bad_rows:
        first, reason = report.bad_rows[0]
        notes.append(
            f"{prefix}{report.count('bad_rows')} bad rows were skipped, the first: {first}: {reason}"
        )


def _mixing_note(train: TokenDataset, specs: Sequence[DatasetSpec]) -> str:
    parts = np.searchsorted(np.cumsum([len(store) for store in train.stores]), train.index, side="right")
    counts = np.bincount(parts, minlength=len(specs))
    shares = ", ".join(
        f"{count} of {format_count(len(store))} from {spec.text}"
        for count, store, spec in zip(counts, train.stores, specs, strict=True)
    )
    return f"mixed by weight: {shares}"
