"""From samples to arrays: shifted targets, positions that restart with every document, right padding.

There is no attention mask. A causal model never looks to the right, so padding at the end of a row changes
nothing before it; documents in one row are told apart by position ids and ``document_lengths``.
Only numpy is needed here, so that worker processes start fast and stay small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swift.data.batching import MicroBatch, Mode
from swift.data.store import IGNORE
from swift.data.tokens import TokenDataset

__all__ = ["Layout", "Sequence", "lay_out", "lay_out_in_worker", "lay_out_sequences"]


@dataclass
class Layout:
    """A micro-batch as numpy arrays; the fields are those of ``swift.data.collate.Batch``."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None
    document_lengths: list[list[int]] | None
    num_tokens: int
    num_targets: int
    sample_ids: list[int]
    samples_per_row: list[int]
    groups: list[int] | None = None
    labels: np.ndarray | None = None
    target_counts: list[int] | None = None
    reference: np.ndarray | None = None
    mismatched: Layout | None = None
    document_continues: list[list[bool]] | None = None


def lay_out(dataset: TokenDataset, rows: MicroBatch, mode: Mode, pad_token_id: int) -> Layout:
    """Arrays for the samples in ``rows``.

    The width is that of the longest row. An empty ``rows`` (a rank without work at the end of an epoch) gives
    one padding token without a target: it can be run like any batch and contributes nothing.
    """
    if dataset.num_labels:
        return _lay_out_groups(dataset, rows, mode, pad_token_id)
    lengths = [[int(dataset.lengths[sample]) for sample in row] for row in rows] or [[]]
    used = [sum(row) for row in lengths]
    width = max(*used, 1)
    shape = (len(lengths), width)
    ids = np.full(shape, pad_token_id, np.int64)
    targets = np.full(shape, IGNORE, np.int64)
    weights = np.zeros(shape, np.float32) if dataset.has_weights else None
    positions = np.empty(shape, np.int64)
    counting = np.arange(width)
    for number, row in enumerate(rows or [[]]):
        start = 0
        for sample in row:
            tokens, labels, sample_weights = dataset[sample]
            end = start + len(tokens)
            ids[number, start:end] = tokens
            targets[number, start : end - 1] = labels[1:]
            positions[number, start:end] = counting[: len(tokens)]
            if weights is not None:
                target_weights = 1.0 if sample_weights is None else sample_weights[1:]
                weights[number, start : end - 1] = np.where(labels[1:] != IGNORE, target_weights, 0.0)
            start = end
        padding_position = start if mode == "padded" else 0
        positions[number, start:] = counting[padding_position : padding_position + width - start]
    documents = None
    if mode != "padded":
        documents = [
            row + ([width - total] if total < width else []) for row, total in zip(lengths, used, strict=True)
        ]
    return Layout(
        input_ids=ids,
        position_ids=positions,
        targets=targets,
        weights=weights,
        document_lengths=documents,
        num_tokens=sum(used),
        num_targets=int((targets != IGNORE).sum()),
        sample_ids=[sample for row in rows for sample in row],
        samples_per_row=[len(row) for row in rows],
    )


Sequence = tuple[np.ndarray, np.ndarray]
"""Ids and targets, [t] each."""


def _lay_out_groups(dataset: TokenDataset, rows: MicroBatch, mode: Mode, pad_token_id: int) -> Layout:
    """The sequences of all samples, laid out by `lay_out_sequences`."""
    samples = [[dataset.group(sample) for sample in row] for row in rows]
    found = [[sequence for group, _ in row for sequence in group] for row in samples]
    layout = lay_out_sequences(found, mode, pad_token_id)
    numbers = layout.sample_ids = [sample for row in rows for sample in row]
    layout.samples_per_row = [len(row) for row in rows]
    layout.groups = [len(group) for row in samples for group, _ in row]
    labels = [values for row in samples for _, values in row]
    layout.labels = np.stack(labels) if labels else np.zeros((0, dataset.num_labels), np.float32)
    if dataset.reference is not None:
        layout.reference = dataset.reference[numbers].reshape(-1).astype(np.float32)
    if dataset.mismatched and len(numbers) > 1:
        layout.mismatched = lay_out_sequences(_mismatch(found), mode, pad_token_id)
    return layout


Document = tuple[np.ndarray, np.ndarray, int, bool]
"""Ids and targets [t], the position of the first token, and whether it continues the last document that does not."""

_SHORTEST_SHARED = 8
"""Tokens that are worth a document of their own."""


def lay_out_sequences(
    rows: list[list[Sequence]], mode: Mode, pad_token_id: int, *, share: bool = False
) -> Layout:
    """Padded: a line for each sequence; else the sequences of a row one after another.

    With ``share`` the beginning that neighbours have in common is there once, as a document without targets that the
    rest of each of them continues: a prompt is computed once for all of its answers.
    """
    lines = [[sequence] for row in rows for sequence in row] if mode == "padded" else rows
    lines = lines or [[]]
    branches = share and mode != "padded"
    documents = [_branches(line) if branches else [(*one, 0, False) for one in line] for line in lines]
    used = [sum(len(document[0]) for document in line) for line in documents]
    shape = (len(lines), max(*used, 1))
    ids = np.full(shape, pad_token_id, np.int64)
    targets = np.full(shape, IGNORE, np.int64)
    positions = np.empty(shape, np.int64)
    for number, line in enumerate(documents):
        if used[number] < shape[1] and mode != "padded":
            rest = np.full(shape[1] - used[number], pad_token_id)
            line.append((rest, np.full(len(rest), IGNORE), 0, False))
        end = 0
        for tokens, wanted, first, _ in line:
            start, end = end, end + len(tokens)
            ids[number, start:end], targets[number, start:end] = tokens, wanted
            positions[number, start:end] = np.arange(first, first + len(tokens))
        positions[number, end:] = np.arange(end, shape[1])
    continues = [[goes_on for *_, goes_on in line] for line in documents]
    counts = [int(np.count_nonzero(wanted != IGNORE)) for line in lines for _, wanted in line]
    return Layout(
        input_ids=ids,
        position_ids=positions,
        targets=targets,
        weights=None,
        document_lengths=None if mode == "padded" else [[len(one[0]) for one in line] for line in documents],
        num_tokens=sum(len(tokens) for line in lines for tokens, _ in line),
        num_targets=sum(counts),
        sample_ids=[],
        samples_per_row=[],
        target_counts=counts,
        document_continues=continues if any(map(any, continues)) else None,
    )


def _branches(line: list[Sequence]) -> list[Document]:
    """Sequences as documents, in their order: where neighbours begin alike, the beginning and what follows it."""
    documents: list[Document] = []
    start = 0
    while start < len(line):
        end, shared = start + 1, 0
        while end < len(line):
            found = _shared_tokens(line[start], line[end])
            if found < _SHORTEST_SHARED or (shared and found != shared):
                break
            end, shared = end + 1, found
        if shared:
            ids, targets = line[start]
            documents.append((ids[:shared], targets[:shared], 0, False))
        documents += [
            (ids[shared:], targets[shared:], shared, shared > 0) for ids, targets in line[start:end]
        ]
        start = end
    return documents


def _shared_tokens(one: Sequence, other: Sequence) -> int:
    """How many tokens two sequences begin with that are the same and have no target; of each at least one is left."""
    size = min(len(one[0]), len(other[0])) - 1
    same = (one[0][:size] == other[0][:size]) & (one[1][:size] == IGNORE) & (other[1][:size] == IGNORE)
    return size if same.all() else int(same.argmin())


def _mismatch(rows: list[list[Sequence]]) -> list[list[Sequence]]:
    """Each question with the answer to the next one of the micro-batch (KTO, arXiv 2402.01306, section 4.1)."""
    flat = [sequence for row in rows for sequence in row]
    answers = [int(np.flatnonzero(targets != IGNORE)[0]) + 1 for _, targets in flat]
    mixed = iter(
        (
            np.concatenate([ids[:start], other_ids[other:]]),
            np.concatenate([targets[: start - 1], other_targets[other - 1 :]]),
        )
        for (ids, targets), start, (other_ids, other_targets), other in zip(
            flat, answers, flat[1:] + flat[:1], answers[1:] + answers[:1], strict=True
        )
    )
    return [[next(mixed) for _ in row] for row in rows]


def lay_out_in_worker(state: tuple[TokenDataset, Mode, int], rows: MicroBatch) -> Layout:
    """``lay_out`` for a worker pool; ``state`` is (data set, mode, padding token)."""
    dataset, mode, pad_token_id = state
    return lay_out(dataset, rows, mode, pad_token_id)
