"""Ask a model the questions of tasks, score the answers, and store every row with its scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.config.sections.generation import GenerationSection
from swift.core.errors import ConfigError, DataError
from swift.evaluate.evaluators import Case, ChosenEvaluator
from swift.evaluate.questions import Question, Questions
from swift.evaluate.results import ResultFile, row_key, row_metrics
from swift.evaluate.statistics import Interval, bootstrap
from swift.evaluate.subjects import Reply, Subject

__all__ = ["Task", "answer_limit", "answer_tasks", "intervals", "score_rows", "summarize"]


_TOGETHER = 16
"""Rows scored and written at once: an interrupted run loses so many at most."""


@dataclass
class Task:
    """Questions, how they are answered, and what is measured.

    Attributes:
        name: "" for the only task of a command without a suite.
        questions: the rows.
        evaluators: what is measured.
        options: sampling; ``num_samples`` answers for each question.
        answers: generate answers also when no evaluator asks for them.
        fixed_length: somebody set ``max_new_tokens``.
    """

    name: str
    questions: Questions
    evaluators: Sequence[ChosenEvaluator]
    options: GenerationSection
    answers: bool = False
    fixed_length: bool = False

    def needs(self, what: str) -> bool:
        """Whether an evaluator needs an ``answer``, a ``loss`` or a ``choice``."""
        return any(entry.row.needs == what for entry in self.evaluators)

    def check(self) -> None:
        """Raise when a metric will have no row to measure."""
        rows = self.questions.good
        where = f"task {self.name}" if self.name else "--val_dataset"
        if self.needs("choice") and not any(row.choices and row.correct is not None for row in rows):
            raise DataError(
                "the metric choice finds no row to measure",
                where=where,
                why="no row has choices and says in answer which is right",
                fix='{"question": "...", "choices": ["...", "..."], "answer": 0}',
            )
        if self.options.num_samples > 1 and self.options.temperature == 0:
            raise ConfigError(
                "several samples of the likeliest answer are all the same",
                where="--num_samples",
                fix="--temperature 0.8",
            )


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


def answer_tasks(
    subject: Subject,
    tasks: Sequence[Task],
    path: Path,
    *,
    seed: int | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Answer all questions that ``path`` does not hold yet; returns all results in order.

    While rows are answered the file holds them in the order of their answers, in the end in that of the data.

    A result has ``index``, ``key``, ``location``, ``messages`` and what the task asks for: ``response``,
    ``finish_reason``, ``num_tokens`` (with several samples also ``responses``), the other columns under ``extra``, and,
    where the data has an answer, ``reference`` and the metrics. With a suite, ``task``.

    Args:
        subject: the model.
        tasks: what to answer.
        path: the result file; gone on with when it exists.
        seed: for sampling; an answer depends on it and on the number of its row.
        on_progress: called with the number of rows done so far.
    """
    entries = list(_entries(tasks))
    keys = {number: _key(subject, task, question, seed) for number, task, question in entries}
    file = ResultFile(path)
    file.check(keys)
    on_progress(len(file.results))
    try:
        for task in tasks:
            waiting = [
                (number, question)
                for number, owner, question in entries
                if owner is task and number not in file.results
            ]

            def write(rows: list[tuple[int, dict[str, Any]]], name: str = task.name) -> None:
                own = {"task": name} if name else {}
                file.append([{"index": number, "key": keys[number], **own, **row} for number, row in rows])
                on_progress(len(file.results))

            score_rows(subject, task, waiting, seed, write)
        file.sort()
    finally:
        file.close()
    return [file.results[number] for number, _, _ in entries]


def _entries(tasks: Sequence[Task]) -> Iterator[tuple[int, Task, Question]]:
    number = 0
    for task in tasks:
        for question in task.questions.good:
            yield number, task, question
            number += 1


def _key(subject: Subject, task: Task, question: Question, seed: int | None) -> str:
    fixed = task.options.model_dump(exclude={"result_path", "metric", "metric_args", "stream"})
    measured = sorted([entry.name, dict(entry.options)] for entry in task.evaluators)
    parts = [question.messages, question.tools, question.reference, question.choices, fixed, measured]
    return row_key(*parts, list(subject.identity), seed)


def score_rows(
    subject: Subject,
    task: Task,
    questions: Sequence[tuple[int, Question]],
    seed: int | None,
    on_rows: Callable[[list[tuple[int, dict[str, Any]]]], None],
) -> None:
    """Answer and score (number, question) pairs; ``on_rows`` gets (number, result) pairs as they are ready, a few at a
    time, in the order in which their answers came.

    A number decides, with the seed, what is sampled for its question.
    """
    if not (task.answers or task.needs("answer")):
        for start in range(0, len(questions), _TOGETHER):
            part = questions[start : start + _TOGETHER]
            on_rows(_scored(subject, task, part, [[] for _ in part]))
        return
    samples = task.options.num_samples
    replies: list[dict[int, Reply]] = [{} for _ in questions]
    ready: list[int] = []

    def write() -> None:
        found = [[replies[place][sample] for sample in range(samples)] for place in ready]
        on_rows(_scored(subject, task, [questions[place] for place in ready], found))
        ready.clear()

    def keep(index: int, reply: Reply) -> None:
        place, sample = divmod(index, samples)
        replies[place][sample] = reply
        if len(replies[place]) == samples:
            ready.append(place)
        if len(ready) >= _TOGETHER:
            write()

    asked = [question for _, question in questions for _ in range(samples)]
    numbers = [number * samples + sample for number, _ in questions for sample in range(samples)]
    if asked:
        subject.answers(asked, task.options, seed=seed, numbers=numbers, on_reply=keep)
    if ready:
        write()


def _scored(
    subject: Subject, task: Task, questions: Sequence[tuple[int, Question]], replies: Sequence[list[Reply]]
) -> list[tuple[int, dict[str, Any]]]:
    """(number, what the result file says of it) of answered questions."""
    cases = [
        Case(question, [reply.text for reply in found])
        for (_, question), found in zip(questions, replies, strict=True)
    ]
    _add_losses(subject, task, cases)
    rows = [_row(case, found) for case, found in zip(cases, replies, strict=True)]
    for evaluator in task.evaluators:
        chosen = [number for number, case in enumerate(cases) if _applies(evaluator, case)]
        if not chosen:
            continue
        scores = evaluator.score([cases[number] for number in chosen])
        for number, score in zip(chosen, scores, strict=True):
            rows[number].update(score)
    for row in rows:
        if "response" not in row and "chosen" in row:
            row["response"] = row["chosen"]
    return [(number, row) for (number, _), row in zip(questions, rows, strict=True)]


def _add_losses(subject: Subject, task: Task, cases: Sequence[Case]) -> None:
    if task.needs("loss"):
        chosen = [case for case in cases if case.question.reference is not None]
        losses = subject.losses([(c.question, c.question.reference or "") for c in chosen], end=True)
        for case, loss in zip(chosen, losses, strict=True):
            case.loss = loss
    if task.needs("choice"):
        chosen = [case for case in cases if case.question.correct is not None]
        pairs = [(case.question, choice) for case in chosen for choice in case.question.choices]
        sums = iter(subject.losses(pairs, end=False) if pairs else [])
        for case in chosen:
            case.choices = [-next(sums)[0] for _ in case.question.choices]


def _applies(evaluator: ChosenEvaluator, case: Case) -> bool:
    if evaluator.row.needs == "loss":
        return case.loss is not None
    if evaluator.row.needs == "choice":
        return case.choices is not None
    return not evaluator.row.reference or case.question.reference is not None


def _row(case: Case, replies: Sequence[Reply]) -> dict[str, Any]:
    question = case.question
    row: dict[str, Any] = {"location": question.location, "messages": question.messages}
    if replies:
        row |= {"response": replies[0].text, "finish_reason": replies[0].finish_reason}
        if replies[0].num_tokens is not None:
            row["num_tokens"] = replies[0].num_tokens
    if len(replies) > 1:
        row["responses"] = [reply.text for reply in replies]
    if question.extra:
        row["extra"] = question.extra
    if question.reference is not None:
        row["reference"] = question.reference
    if question.choices:
        row["choices"] = list(question.choices)
    return row


def intervals(results: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """Metric -> mean over the rows that have it (``loss``: over all their tokens), with its interval.

    One row has no interval: its ends are the value itself.
    """
    found: dict[str, Interval] = {}
    measured = [(row_metrics(row), float(row.get("num_loss_tokens") or 0)) for row in results]
    for name in dict.fromkeys(name for metrics, _ in measured for name in metrics):
        rows = [(metrics[name], tokens) for metrics, tokens in measured if name in metrics]
        values, tokens = [value for value, _ in rows], [count for _, count in rows]
        if name == "loss" and not sum(tokens):
            continue
        interval = bootstrap(values, tokens if name == "loss" else None)
        found[name] = interval or Interval(values[0], values[0], values[0], 1)
    return found


def summarize(
    results: Sequence[Mapping[str, Any]], evaluators: Sequence[ChosenEvaluator] = ()
) -> dict[str, float]:
    """Means over the rows that have a metric; ``loss`` is the mean over all their tokens.

    ``num_rows`` and ``num_references`` are always there, and ``cut_off``, the share of answers that ``max_new_tokens``
    ended, where some were generated; rows in
    which something failed are counted under ``judge_failures``.
    """
    generated = [result for result in results if "finish_reason" in result]
    summary: dict[str, float] = {
        "num_rows": len(results),
        "num_references": sum("reference" in result for result in results),
    }
    if generated:
        cut = sum(result["finish_reason"] == "length" for result in generated)
        summary["cut_off"] = cut / len(generated)
    failures = sum(int(result.get("judge_failures") or 0) for result in results)
    if failures:
        summary["judge_failures"] = failures
    for evaluator in evaluators:
        pairs = [(r["response"], r["reference"]) for r in generated if "reference" in r]
        if evaluator.row.corpus is not None and pairs:
            answers, references = zip(*pairs, strict=True)
            summary.update(evaluator.row.corpus(list(answers), list(references), **evaluator.options))
    for name, interval in intervals(results).items():
        summary[name] = interval.mean
    if "loss" in summary:
        summary["perplexity"] = math.exp(min(summary["loss"], 700.0))
    return summary
