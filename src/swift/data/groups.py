"""Rows for tasks over whole sequences: one row becomes a group of sequences, each read as a whole.

- seq_cls: ``messages`` and ``label``: a class; a list of classes (multi_label_classification); a number or a list of
  numbers (regression).
- embedding: ``messages`` and one conversation in ``positive_messages`` (or an assistant message behind the question);
  with infonce any number of ``negative_messages``, else a ``label``: a similarity, or (contrastive) 0 and 1.
- preference (``swift rlhf``): the chosen conversation as ``messages`` (or ``chosen``), the other one as
  ``rejected_messages``, or only its answer as ``rejected_response`` (or ``rejected``); ``margin`` for a reward model.
- kto: ``messages`` and ``label``, whether the answer is desirable.
- prompt (policy optimisation): ``messages``, up to where the answer begins; an answer at the end is left out.
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

from swift.config.schema import Config
from swift.config.sections.rlhf import PREFERENCE_TYPES
from swift.core.errors import DataError
from swift.data.batching import random_generator
from swift.data.formats import FaultError, RowError, Sample, to_messages, to_sample
from swift.data.rows import Row
from swift.data.store import EncodedLike, encoded_arrays

__all__ = [
    "EncodedGroup",
    "Group",
    "GroupTemplate",
    "TaskFormat",
    "encode_group",
    "question_of",
    "read_group",
    "read_texts",
    "sequences_of",
    "task_format",
]

_RLHF_DATA = {"kto": "kto", "rm": "reward"}
"""Kinds of data of swift rlhf; all others are pairs, of which the answers are learned."""

Messages = list[dict[str, Any]]

RERANKER_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
RERANKER_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""The prompt of Qwen3-Reranker, from its model card; a system message of the row replaces the instruction."""


class GroupTemplate(Protocol):
    """What is needed of ``swift.models.template.Template``."""

    def encode_many(
        self, samples: Sequence[tuple[list[dict[str, Any]], list[Any] | None]], /
    ) -> Sequence[EncodedLike]: ...

    def encode_prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None
    ) -> list[int]: ...

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

    @property
    def learns_answers(self) -> bool:
        """The answers' tokens are read, not the ends of the sequences."""
        return self.task_type in ("preference", "kto")


@dataclass
class Group:
    """The conversations of one row, and its labels.

    ``labels``: seq_cls: the class, 0 or 1 for each class, or the values; embedding: the label of the pair, 1 without
    one; rerankers: how many documents are relevant (they come before the others).
    """

    conversations: list[Messages]
    labels: list[float]


def task_format(config: Config) -> TaskFormat | None:
    """None where a row is one text to be learned."""
    section, kind = config.task, config.rlhf.rlhf_type
    if config.rlhf.is_policy:
        return TaskFormat("prompt", None, None, 1, 1, 1)
    if kind in PREFERENCE_TYPES:
        return TaskFormat(_RLHF_DATA.get(kind, "preference"), None, None, 1, 1, 1)
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


def sequences_of(task: TaskFormat | None) -> int:
    """How many sequences a row becomes; where rows may differ (negatives), as many as one may have, or usually has."""
    if task is None or task.task_type in ("kto", "seq_cls"):
        return 1
    if task.task_type in ("preference", "reward"):
        return 2
    if task.task_type == "embedding":
        return 2 + (task.num_negatives or 0)
    return task.num_positives + (task.num_negatives or 0)


@dataclass
class EncodedGroup:
    """The sequences of a row.

    Attributes:
        sequences: token ids of each.
        learned: for each, which of its tokens are learned; None: the sequences are read at their ends.
        labels: of the row.
    """

    sequences: list[np.ndarray]
    learned: list[np.ndarray] | None
    labels: list[float]


def encode_group(row: Row, template: GroupTemplate, task: TaskFormat) -> EncodedGroup:
    """The token ids and labels of a row. Raises RowError with location and reason."""
    sample = to_sample(row)
    try:
        group = read_group(sample, task, row.number)
        if task.learns_answers:
            pairs = [(messages, sample.tools) for messages in group.conversations]
            encoded = [encoded_arrays(one) for one in template.encode_many(pairs)]
            return EncodedGroup(
                [ids for ids, _, _ in encoded], [learned for _, learned, _ in encoded], group.labels
            )
        sequences = [_encode(messages, sample, template, task) for messages in group.conversations]
        if not all(len(one) for one in sequences):
            raise FaultError(f"text {1 + [len(one) > 0 for one in sequences].index(False)} is empty")
    except FaultError as fault:
        raise RowError(row.location, str(fault)) from None
    except DataError as error:  # the template refuses a conversation
        raise RowError(
            row.location, f"{error.message} ({error.why})" if error.why else error.message
        ) from None
    return EncodedGroup(sequences, None, group.labels)


def _encode(messages: Messages, sample: Sample, template: GroupTemplate, task: TaskFormat) -> np.ndarray:
    if task.task_type == "prompt":
        return np.asarray(template.encode_prompt(messages, sample.tools), np.int32)
    ids = template.encode_sequence(messages, sample.tools, end_token=task.task_type == "embedding")
    return np.asarray(ids, np.int32)


def question_of(messages: Messages) -> Messages:
    """A conversation up to where the answer begins; raises FaultError when there is no question."""
    question = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not question:
        raise FaultError("there is no question before the answer")
    return question


def read_group(sample: Sample, task: TaskFormat, number: int) -> Group:
    """The conversations and labels of a row; ``number`` of the row decides which documents are drawn."""
    if task.task_type == "prompt":
        return Group([question_of(sample.messages)], [0.0])
    if task.task_type == "seq_cls":
        return Group([sample.messages], _class_labels(sample, task))
    if task.task_type == "kto":
        return Group([sample.messages], [_desirable(sample)])
    if task.task_type in ("preference", "reward"):
        return _preference_pair(sample)
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
    except FaultError as fault:
        raise DataError(str(fault)) from None
    if task_type in ("reranker", "generative_reranker"):
        if not documents:
            raise DataError('no document under "positive_messages" or "negative_messages"')
        write = _judging if task_type == "generative_reranker" else _answering
        return [write(sample.messages, document) for document in documents]
    return [sample.messages, *documents] if task_type == "embedding" else [sample.messages]


def _class_labels(sample: Sample, task: TaskFormat) -> list[float]:
    if "label" not in sample.extra:
        raise FaultError('no "label"')
    label, count = sample.extra["label"], task.num_labels
    if task.problem_type == "regression":
        values = [_number(value) for value in (label if isinstance(label, list) else [label])]
        if len(values) != count:
            raise FaultError(f'"label" has {len(values)} values, num_labels is {count}')
        return values
    if task.problem_type == "multi_label_classification":
        classes = [_class(value, count) for value in (label if isinstance(label, list) else [label])]
        return [float(place in classes) for place in range(count)]
    if isinstance(label, list):
        raise FaultError('"label" is a list: several classes need problem_type multi_label_classification')
    return [float(_class(label, count))]


def _class(value: Any, count: int) -> int:
    number = _number(value)
    if not number.is_integer() or not 0 <= number < count:
        raise FaultError(f'"label" {value!r} is no class from 0 to {count - 1} (num_labels {count})')
    return int(number)


def _number(value: Any, column: str = "label") -> float:
    """A number; CSV files carry numbers as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise FaultError(f'"{column}" {value!r} is not a number')
    return number


def _desirable(sample: Sample) -> float:
    label = sample.extra.get("label")
    words = {"true": True, "false": False}
    value = words.get(label.strip().lower(), label) if isinstance(label, str) else label
    if "label" not in sample.extra or value not in (0, 1, "0", "1"):
        raise FaultError(f'"label" {label!r} is neither true nor false: is the answer desirable?')
    return float(value)


def _preference_pair(sample: Sample) -> Group:
    """Chosen and rejected conversation, and the margin."""
    chosen, extra = sample.messages, sample.extra
    if chosen[-1]["role"] != "assistant":
        raise FaultError("the last message is not an answer of the assistant, so nothing is chosen")
    start = next((at for at in range(len(chosen), 0, -1) if chosen[at - 1]["role"] in ("user", "tool")), 0)
    name = next(
        (one for one in ("rejected_messages", "rejected_response", "rejected") if extra.get(one)), None
    )
    if name is None:
        raise FaultError('no "rejected_response" (or rejected_messages, or chosen and rejected)')
    rejected = extra[name]
    if isinstance(rejected, str) and name != "rejected_messages":
        messages = [{"role": "assistant", "content": rejected}]
    else:
        try:
            messages = to_messages(rejected if isinstance(rejected, list) else [rejected], name)
        except FaultError as fault:
            raise FaultError(f'"{name}": {fault}') from None
    other = messages if name == "rejected_messages" else [*chosen[:start], *messages]
    if other[0]["role"] != "system" and chosen[0]["role"] == "system":
        other = [chosen[0], *other]
    if other == chosen:
        raise FaultError("the rejected answer is the chosen one")
    margin = extra.get("margin")
    return Group([chosen, other], [0.0 if margin is None else _number(margin, "margin")])


def _embedding_group(sample: Sample, task: TaskFormat) -> Group:
    anchor, positives = sample.messages, _documents(sample, "positive")
    if not positives and anchor[-1]["role"] == "assistant":
        anchor, positives = anchor[:-1], [[{"role": "user", "content": anchor[-1]["content"]}]]
    if len(positives) != 1 or not anchor:
        raise FaultError(f'"positive_messages" has {len(positives)} conversations; embedding takes one')
    negatives = _documents(sample, "negative")
    if task.loss_type == "infonce":
        return Group([anchor, *positives, *negatives[: task.num_negatives]], [1.0])
    if negatives:
        raise FaultError(f'"negative_messages" are for loss_type infonce, not {task.loss_type}')
    if "label" not in sample.extra:
        raise FaultError(f'no "label", which loss_type {task.loss_type} learns')
    label = _number(sample.extra["label"])
    if task.loss_type != "cosine_similarity" and label not in (0.0, 1.0):
        raise FaultError(f'"label" {label:g} is neither 0 nor 1, as loss_type {task.loss_type} needs')
    return Group([anchor, *positives], [label])


def _ranking_group(sample: Sample, task: TaskFormat, number: int) -> Group:
    positives, negatives = _documents(sample, "positive"), _documents(sample, "negative")
    if not positives:
        raise FaultError('no "positive_messages": no document is relevant')
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
        raise FaultError(f'"{column}" is not a list of conversations')
    documents: list[Messages] = []
    for place, entry in enumerate(value, start=1):
        if isinstance(entry, str):
            documents.append([{"role": "user", "content": entry}])
        elif isinstance(entry, list):
            try:
                documents.append(to_messages(entry, column))
            except FaultError as fault:
                raise FaultError(f'"{column}" {place}: {fault}') from None
        else:
            raise FaultError(f'"{column}" {place} is neither a list of messages nor a text')
    return documents


def end_mask(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """True at the last token of each sequence, over all of them joined."""
    ends = np.zeros(sum(map(len, sequences)), np.bool_)
    ends[np.cumsum([len(sequence) for sequence in sequences]) - 1] = True
    return ends
