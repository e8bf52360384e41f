"""Rows for tasks over whole sequences: one row becomes a group of sequences, each read as a whole.

- seq_cls: ``messages`` and ``label``: a class; a list of classes (multi_label_classification); a number or a list of
  numbers (regression).
- embedding: ``messages`` and one conversation in ``positive_messages`` (or an assistant message behind the question);
  with infonce any number of ``negative_messages``, else a ``label``: a similarity, or (contrastive) 0 and 1.
- reranker, generative_reranker: the query as ``messages``, the documents in ``positive_messages`` and
  ``negative_messages``.

A conversation of a list may be a list of messages or a text; ``positive`` and ``negative`` are other names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from swift.config.sections.task import TaskSection
from swift.core.errors import DataError
from swift.data.batching import random_generator
from swift.data.formats import RowError, Sample, to_messages, to_sample
from swift.data.rows import Row

__all__ = [
    "Group",
    "SequenceTemplate",
    "TaskFormat",
    "encode_group",
    "read_group",
    "read_texts",
    "task_format",
]

Messages = list[dict[str, Any]]

RERANKER_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
RERANKER_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""The prompt of Qwen3-Reranker, from its model card; a system message of the row replaces the instruction."""


class SequenceTemplate(Protocol):
    """What is needed of ``swift.models.template.Template``."""

    def encode_sequence(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        end_token: bool = False,
    ) -> list[int]: ...


@dataclass(frozen=True)
class TaskFormat:
    """What of the task decides how a row is read; its ``repr`` is part of the token cache's key."""

    task_type: str
    loss_type: str | None
    problem_type: str | None
    num_labels: int
    num_positives: int
    num_negatives: int | None


@dataclass
class Group:
    """The conversations of one row, and its labels.

    ``labels``: seq_cls: the class, 0 or 1 for each class, or the values; embedding: the label of the pair, 1 without
    one; rerankers: how many documents are relevant (they come before the others).
    """

    conversations: list[Messages]
    labels: list[float]


class _FaultError(Exception):
    """What is wrong with a row; `encode_group` adds where."""


def task_format(section: TaskSection) -> TaskFormat | None:
    """None for causal_lm."""
    if section.task_type == "causal_lm":
        return None
    ranks = section.task_type in ("reranker", "generative_reranker")
    return TaskFormat(
        section.task_type,
        section.loss_type,
        section.problem_type,
        section.num_labels or 1,
        section.max_positive_samples if ranks else 1,
        section.max_negative_samples if ranks else section.infonce_hard_negatives,
    )


def encode_group(
    row: Row, template: SequenceTemplate, task: TaskFormat
) -> tuple[list[list[int]], list[float]]:
    """Token ids of the sequences of a row, and its labels. Raises RowError with location and reason."""
    sample = to_sample(row)
    try:
        group = read_group(sample, task, row.number)
        sequences = [
            template.encode_sequence(messages, sample.tools, end_token=task.task_type == "embedding")
            for messages in group.conversations
        ]
        if not all(sequences):
            raise _FaultError(f"text {1 + [bool(one) for one in sequences].index(False)} is empty")
    except _FaultError as fault:
        raise RowError(row.location, str(fault)) from None
    except DataError as error:  # the template refuses a conversation
        raise RowError(
            row.location, f"{error.message} ({error.why})" if error.why else error.message
        ) from None
    return sequences, group.labels


def read_group(sample: Sample, task: TaskFormat, number: int) -> Group:
    """The conversations and labels of a row; ``number`` of the row decides which documents are drawn."""
    if task.task_type == "seq_cls":
        return Group([sample.messages], _class_labels(sample, task))
    if task.task_type == "embedding":
        return _embedding_group(sample, task)
    return _ranking_group(sample, task, number)


def read_texts(sample: Sample, task_type: str) -> list[Messages]:
    """The conversations of a row that is to be scored or embedded: labels are not asked for, nothing is drawn.

    seq_cls: the conversation; embedding: it and every other text of the row; rerankers: one for each document, those
    under ``positive`` before those under ``negative``. Raises DataError for a row that has none.
    """
    try:
        documents = [*_documents(sample, "positive"), *_documents(sample, "negative")]
    except _FaultError as fault:
        raise DataError(str(fault)) from None
    if task_type in ("reranker", "generative_reranker"):
        if not documents:
            raise DataError('no document under "positive_messages" or "negative_messages"')
        write = _judging if task_type == "generative_reranker" else _answering
        return [write(sample.messages, document) for document in documents]
    return [sample.messages, *documents] if task_type == "embedding" else [sample.messages]


def _class_labels(sample: Sample, task: TaskFormat) -> list[float]:
    if "label" not in sample.extra:
        raise _FaultError('no "label"')
    label, count = sample.extra["label"], task.num_labels
    if task.problem_type == "regression":
        values = [_number(value) for value in (label if isinstance(label, list) else [label])]
        if len(values) != count:
            raise _FaultError(f'"label" has {len(values)} values, num_labels is {count}')
        return values
    if task.problem_type == "multi_label_classification":
        classes = [_class(value, count) for value in (label if isinstance(label, list) else [label])]
        return [float(place in classes) for place in range(count)]
    if isinstance(label, list):
        raise _FaultError('"label" is a list: several classes need problem_type multi_label_classification')
    return [float(_class(label, count))]


def _class(value: Any, count: int) -> int:
    number = _number(value)
    if not number.is_integer() or not 0 <= number < count:
        raise _FaultError(f'"label" {value!r} is no class from 0 to {count - 1} (num_labels {count})')
    return int(number)


def _number(value: Any) -> float:
    """A number; CSV files carry numbers as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _FaultError(f'"label" {value!r} is not a number')
    return number


def _embedding_group(sample: Sample, task: TaskFormat) -> Group:
    anchor, positives = sample.messages, _documents(sample, "positive")
    if not positives and anchor[-1]["role"] == "assistant":
        anchor, positives = anchor[:-1], [[{"role": "user", "content": anchor[-1]["content"]}]]
    if len(positives) != 1 or not anchor:
        raise _FaultError(f'"positive_messages" has {len(positives)} conversations; embedding takes one')
    negatives = _documents(sample, "negative")
    if task.loss_type == "infonce":
        return Group([anchor, *positives, *negatives[: task.num_negatives]], [1.0])
    if negatives:
        raise _FaultError(f'"negative_messages" are for loss_type infonce, not {task.loss_type}')
    if "label" not in sample.extra:
        raise _FaultError(f'no "label", which loss_type {task.loss_type} learns')
    label = _number(sample.extra["label"])
    if task.loss_type != "cosine_similarity" and label not in (0.0, 1.0):
        raise _FaultError(f'"label" {label:g} is neither 0 nor 1, as loss_type {task.loss_type} needs')
    return Group([anchor, *positives], [label])


def _ranking_group(sample: Sample, task: TaskFormat, number: int) -> Group:
    positives, negatives = _documents(sample, "positive"), _documents(sample, "negative")
    if not positives:
        raise _FaultError('no "positive_messages": no document is relevant')
    generator = random_generator("documents", number)
    chosen = []
    for documents, most in ((positives, task.num_positives), (negatives, task.num_negatives)):
        if most is not None and len(documents) > most:
            places = sorted(generator.permutation(len(documents))[:most].tolist())
            documents = [documents[place] for place in places]
        chosen.append(documents)
    write = _judging if task.task_type == "generative_reranker" else _answering
    conversations = [write(sample.messages, document) for documents in chosen for document in documents]
    return Group(conversations, [float(len(chosen[0]))])


def _answering(query: Messages, document: Messages) -> Messages:
    """The document as the answer to the query."""
    return [
        *query,
        *({**message, "role": "assistant"} for message in document if message["role"] != "system"),
    ]


def _judging(query: Messages, document: Messages) -> Messages:
    """The question whether the document answers the query."""
    instructions = [_text([one]) for part in (document, query) for one in part if one["role"] == "system"]
    asked = _text([message for message in query if message["role"] != "system"])
    given = _text([message for message in document if message["role"] != "system"])
    instruction = next(iter(instructions), RERANKER_INSTRUCTION)
    content = f"<Instruct>: {instruction}\n<Query>: {asked}\n<Document>: {given}"
    return [{"role": "system", "content": RERANKER_SYSTEM}, {"role": "user", "content": content}]


def _text(messages: Iterable[dict[str, Any]]) -> str:
    contents = (message["content"] for message in messages)
    return "\n".join(
        content if isinstance(content, str) else "".join(part["text"] for part in content)
        for content in contents
    )


def _documents(sample: Sample, name: str) -> list[Messages]:
    column = f"{name}_messages" if f"{name}_messages" in sample.extra else name
    value = sample.extra.get(column)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _FaultError(f'"{column}" is not a list of conversations')
    documents: list[Messages] = []
    for place, entry in enumerate(value, start=1):
        if isinstance(entry, str):
            documents.append([{"role": "user", "content": entry}])
        elif isinstance(entry, list):
            try:
                documents.append(to_messages(entry, column))
            except ValueError as fault:
                raise _FaultError(f'"{column}" {place}: {fault}') from None
        else:
            raise _FaultError(f'"{column}" {place} is neither a list of messages nor a text')
    return documents


def end_mask(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """True at the last token of each sequence, over all of them joined."""
    ends = np.zeros(sum(map(len, sequences)), np.bool_)
    ends[np.cumsum([len(sequence) for sequence in sequences]) - 1] = True
    return ends
