"""Answer the rows of data files with a model, compare with the data's own answers, and store the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from swift.config.sections.generation import GenerationSection
from swift.core.errors import DataError
from swift.data.formats import RowError, to_sample
from swift.data.sources import DatasetSpec, find_files, read_rows
from swift.evaluate.metrics import exact_match, rouge
from swift.evaluate.results import ResultFile, row_key
from swift.inference.generate import Answer, Generator
from swift.inference.losses import answer_losses

__all__ = ["Question", "Questions", "answer_limit", "answer_questions", "read_questions", "summarize"]

_WRITTEN_TOGETHER = 16
"""Answers between two writes to disk; as many may be lost when the machine goes down."""


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
    """

    index: int
    location: str
    messages: list[dict[str, Any]]
    reference: str | None
    tools: list[dict[str, Any]] | None
    extra: dict[str, Any]


@dataclass
class Questions:
    """The rows to answer, and the bad ones left out (``file:line: reason``)."""

    good: list[Question] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def read_questions(
    specs: Sequence[DatasetSpec], columns: Mapping[str, str], on_bad_rows: Literal["error", "skip"] = "error"
) -> Questions:
    """The rows of data sets, in order (of ``FILE#N`` the first N).

    Raises:
        DataError: a file is missing, or a row is bad and ``on_bad_rows`` is ``error``.
    """
    questions = Questions()
    for spec in specs:
        taken = 0
        for row in (
            row for file in find_files(spec) for row in read_rows(file, columns, mapping=spec.mapping)
        ):
            if spec.num_rows is not None and taken >= spec.num_rows:
                break
            taken += 1
            try:
                sample = to_sample(row)
                messages, reference = _question(sample.messages, row.location)
            except RowError as error:
                if on_bad_rows == "error":
                    raise
                questions.bad.append(f"{error.location}: {error.reason}")
                continue
            questions.good.append(
                Question(len(questions.good), row.location, messages, reference, sample.tools, sample.extra)
            )
    if not questions.good:
        raise DataError("there is no row to answer", where=", ".join(spec.text for spec in specs))
    return questions


def _question(messages: list[dict[str, Any]], location: str) -> tuple[list[dict[str, Any]], str | None]:
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


def answer_limit(questions: Sequence[Question], tokenizer: Any, most: int) -> int:
    """How long the answers of a trained model may get when nobody said: twice the longest reference and 16 tokens.

    A model that has not learned to stop would use up all of ``most`` on every row. ``most`` itself where a row has no
    reference.
    """
    references = [question.reference for question in questions if question.reference is not None]
    if len(references) < len(questions):
        return most
    longest = max(len(ids) for ids in tokenizer(references, add_special_tokens=False)["input_ids"])
    return min(most, 2 * longest + 16)


def answer_questions(
    generator: Generator,
    questions: Sequence[Question],
    options: GenerationSection,
    path: Path,
    *,
    identity: Sequence[str] = (),
    seed: int | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Answer all questions that ``path`` does not hold yet; returns all results in order.

    A result has ``index``, ``key``, ``location``, ``messages``, ``response``, ``finish_reason``, ``num_tokens``,
    the row's other columns under ``extra`` and, where the data has an answer, ``reference`` and the metrics.

    Args:
        generator: the model.
        questions: what to answer.
        options: sampling, batch size and metrics.
        path: the result file; gone on with when it exists.
        identity: what else the answers depend on (model and adapter folders).
        seed: for sampling; an answer depends on it and on the number of its row.
        on_progress: called with the number of rows done so far.
    """
    fixed = options.model_dump(exclude={"result_path", "metric", "stream"})
    metrics = sorted(options.metric)
    keys = {
        question.index: row_key(
            question.messages, question.tools, question.reference, fixed, metrics, list(identity), seed
        )
        for question in questions
    }
    file = ResultFile(path)
    file.check(keys)
    on_progress(len(file.results))
    waiting = [question for question in questions if question.index not in file.results]
    prompts = [generator.template.encode_prompt(question.messages, question.tools) for question in waiting]
    done: list[tuple[Question, Answer]] = []

    def write() -> None:
        losses = _losses(generator, [question for question, _ in done]) if "loss" in options.metric else {}
        file.append([_result(*pair, options, keys, losses) for pair in done])
        done.clear()
        on_progress(len(file.results))

    def keep(place: int, answer: Answer) -> None:
        done.append((waiting[place], answer))
        if len(done) == _WRITTEN_TOGETHER:
            write()

    try:
        generator.answers(
            prompts, options, seed=seed, numbers=[question.index for question in waiting], on_answer=keep
        )
        if done:
            write()
    finally:
        file.close()
    return [file.results[question.index] for question in questions]


def _result(
    question: Question,
    answer: Answer,
    options: GenerationSection,
    keys: Mapping[int, str],
    losses: Mapping[int, dict[str, Any]],
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "index": question.index,
        "key": keys[question.index],
        "location": question.location,
        "messages": question.messages,
        "response": answer.text,
        "finish_reason": answer.finish_reason,
        "num_tokens": len(answer.token_ids),
    }
    if question.extra:
        result["extra"] = question.extra
    if question.reference is not None:
        result["reference"] = question.reference
        if "exact_match" in options.metric:
            result["exact_match"] = exact_match(answer.text, question.reference)
        if "rouge" in options.metric:
            result.update(rouge(answer.text, question.reference))
        result.update(losses.get(question.index, {}))
    return result


def _losses(generator: Generator, batch: Sequence[Question]) -> dict[int, dict[str, Any]]:
    """Index -> mean loss and number of tokens of the data's own answer (only the last turn counts)."""
    chosen = [question for question in batch if question.reference is not None]
    prompts = [generator.template.encode_prompt(question.messages, question.tools) for question in chosen]
    samples = [
        generator.template.encode(
            [*question.messages, {"role": "assistant", "content": question.reference}], question.tools
        )
        for question in chosen
    ]
    for sample, prompt in zip(samples, prompts, strict=True):
        size = min(len(prompt), len(sample.labels))
        sample.labels[:size] = [-100] * size
    losses = answer_losses(generator.bundle, samples)
    return {
        question.index: {"loss": loss.total / max(loss.num_tokens, 1), "num_loss_tokens": loss.num_tokens}
        for question, loss in zip(chosen, losses, strict=True)
    }


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the rows that have a reference; ``loss`` is the mean over all their tokens.

    ``num_rows``, ``num_references`` and the share of answers cut off by ``max_new_tokens`` are always there.
    """
    summary: dict[str, float] = {
        "num_rows": len(results),
        "num_references": sum("reference" in result for result in results),
        "cut_off": sum(result["finish_reason"] == "length" for result in results) / max(len(results), 1),
    }
    for name in ("exact_match", "rouge1", "rouge2", "rougeL"):
        values = [result[name] for result in results if name in result]
        if values:
            summary[name] = sum(values) / len(values)
    num_tokens = sum(result.get("num_loss_tokens", 0) for result in results)
    if num_tokens:
        total = sum(result["loss"] * result["num_loss_tokens"] for result in results if "loss" in result)
        summary["loss"] = total / num_tokens
        summary["perplexity"] = math.exp(min(summary["loss"], 700.0))
    return summary
