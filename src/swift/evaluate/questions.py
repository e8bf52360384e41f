"""The rows of data files as questions with the data's own answers."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from swift.core.errors import DataError
from swift.data.formats import RowError, to_sample
from swift.data.rows import Row
from swift.data.sources import DatasetSpec, first_rows

__all__ = ["Question", "Questions", "few_shot_messages", "read_questions"]

_CHOICE_COLUMNS = ("choices", "options")
_CORRECT_COLUMNS = ("answer", "label", "correct", "gold", "answer_idx", "answerKey")


@dataclass(frozen=True)
class Question:
    """One row to answer.

    Attributes:
        index: its place among the good rows, from 0.
        location: ``file:line``.
        messages: the conversation up to where the answer begins.
        reference: the data's own answer; None when the row ends with a question.
        tools: OpenAI function descriptions.
        extra: the other columns.
        choices: the answers to choose from, where the row has some.
        correct: the number of the right one, from 0.
    """

    index: int
    location: str
    messages: list[dict[str, Any]]
    reference: str | None
    tools: list[dict[str, Any]] | None
    extra: dict[str, Any]
    choices: tuple[str, ...] = ()
    correct: int | None = None


@dataclass
class Questions:
    """The rows to answer, and the bad ones left out (``file:line: reason``)."""

    good: list[Question] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def read_questions(
    specs: Sequence[DatasetSpec],
    columns: Mapping[str, str],
    on_bad_rows: Literal["error", "skip"] = "error",
    limit: int | None = None,
) -> Questions:
    """The rows of data sets, in order (of ``FILE#N`` the first N), at most ``limit`` of them.

    A row with ``choices`` (or ``options``) says which is right in ``answer`` (or label, correct, gold, answer_idx,
    answerKey): its number from 0, its letter, or its text. That choice is the reference.

    Raises:
        DataError: a file is missing, or a row is bad and ``on_bad_rows`` is ``error``.
    """
    questions = Questions()
    for row in (row for spec in specs for row in first_rows(spec, columns)):
        if limit is not None and len(questions.good) >= limit:
            break
        try:
            question = _question(row, len(questions.good))
        except RowError as error:
            if on_bad_rows == "error":
                raise
            questions.bad.append(f"{error.location}: {error.reason}")
            continue
        questions.good.append(question)
    if not questions.good:
        raise DataError("there is no row to answer", where=", ".join(spec.text for spec in specs))
    return questions


def _question(row: Row, index: int) -> Question:
    row, choices, correct = _take_choices(row)
    sample = to_sample(row)
    messages, reference = _split(sample.messages, row.location)
    if correct is not None:
        reference = choices[correct]
    return Question(index, row.location, messages, reference, sample.tools, sample.extra, choices, correct)


def _split(messages: list[dict[str, Any]], location: str) -> tuple[list[dict[str, Any]], str | None]:
    """(prompt, reference): a last assistant message is the reference."""
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) == 1:
        raise RowError(location, "there is no question before the answer")
    return messages[:-1], _text(messages[-1]["content"])


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or ())


def _take_choices(row: Row) -> tuple[Row, tuple[str, ...], int | None]:
    """The row without the columns of a multiple-choice question, the choices, and the number of the right one."""
    name = next((name for name in _CHOICE_COLUMNS if row.values.get(name)), None)
    if row.error is not None or name is None:
        return row, (), None
    values = dict(row.values)
    raw = values.pop(name)
    labels: Sequence[Any] = string.ascii_uppercase
    if isinstance(raw, Mapping) and set(raw) == {"text", "label"}:  # as ARC has them
        raw, labels = raw["text"], raw["label"]
    elif isinstance(raw, Mapping):
        raw, labels = list(raw.values()), list(raw)
    if not isinstance(raw, list) or len(raw) < 2 or not all(isinstance(text, str) for text in raw):
        raise RowError(row.location, f'"{name}" is not a list of two or more texts')
    key = next((key for key in _CORRECT_COLUMNS if values.get(key) is not None), None)
    if key is None:
        return replace(row, values=values), tuple(raw), None
    return replace(row, values=values), tuple(raw), _correct(values.pop(key), raw, labels, row, key)


def _correct(value: Any, choices: list[str], labels: Sequence[Any], row: Row, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    if value in choices:
        return choices.index(value)
    known = [str(label) for label in labels[: len(choices)]]
    if str(value).strip() in known:
        return known.index(str(value).strip())
    why = (
        f'"{key}" is {value!r}: neither a number from 0 to {len(choices) - 1}, nor {known[0]} to {known[-1]}'
    )
    raise RowError(row.location, f"{why}, nor one of the choices")


def few_shot_messages(
    specs: Sequence[DatasetSpec], columns: Mapping[str, str], number: int
) -> list[dict[str, Any]]:
    """The first ``number`` rows with an answer, as turns of a conversation that a question goes on.

    Raises DataError when there are fewer.
    """
    shots = [
        question
        for question in read_questions(specs, columns, limit=number).good
        if question.reference is not None
    ]
    if len(shots) < number:
        raise DataError(
            f"{number} examples are asked for, {len(shots)} of the first rows have an answer",
            where=", ".join(spec.text for spec in specs),
        )
    turns: list[dict[str, Any]] = []
    for shot in shots:
        turns += [message for message in shot.messages if message["role"] != "system"]
        turns.append({"role": "assistant", "content": shot.reference})
    return turns
