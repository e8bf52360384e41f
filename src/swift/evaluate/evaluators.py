"""The table of evaluators: what turns answers, losses and log-probabilities into numbers.

To add one: a function here, or ``make`` in a file of its own, that takes its options as keywords and returns a scorer,
a row in `EVALUATORS`, and its metrics in ``METRICS`` of ``config/sections/generation.py``. A user's own is
``FILE.py:function``: called with the answer and the question, it returns a number or a dict of numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swift.core.errors import ConfigError
from swift.core.registry import suggest
from swift.core.user_code import load_file
from swift.evaluate import metrics
from swift.evaluate.questions import Question

__all__ = ["EVALUATORS", "Case", "ChosenEvaluator", "Evaluator", "Scorer", "find_evaluators"]


@dataclass
class Case:
    """What an evaluator sees of one row.

    Attributes:
        question: the row; evaluators of answers get those with a reference only, unless they need none.
        answers: one text for each sample.
        loss: summed loss (nats) and number of tokens of the reference.
        choices: log-probability (nats) of each of the question's choices.
    """

    question: Question
    answers: list[str]
    loss: tuple[float, int] | None = None
    choices: list[float] | None = None


Scorer = Callable[[Sequence[Case]], list[dict[str, Any]]]
"""Rows -> for each its metrics; keys that end in ``_error`` or hold no number are only shown beside the answer."""


@dataclass(frozen=True)
class Evaluator:
    """One row of the table.

    Attributes:
        make: options as keywords -> scorer; or the module whose ``make`` that is.
        needs: an ``answer``, the ``loss`` of the reference, or the log-probabilities of each ``choice``.
        reference: it compares with the row's own answer; rows without one have no such metric.
        package: module of the extra ``eval`` that it imports.
        corpus: (responses, references, options) -> metrics of all rows together, where that is no mean of rows.
    """

    make: Callable[..., Scorer] | str
    needs: Literal["answer", "loss", "choice"] = "answer"
    reference: bool = True
    package: str | None = None
    corpus: Callable[..., dict[str, float]] | None = None


@dataclass(frozen=True)
class ChosenEvaluator:
    """An evaluator with its options, ready to score."""

    name: str
    row: Evaluator
    options: Mapping[str, Any]
    score: Scorer


def each(score: Callable[[str, Question], dict[str, Any]]) -> Scorer:
    """A scorer of single answers; with several samples of a question, the mean over them."""

    def scorer(cases: Sequence[Case]) -> list[dict[str, Any]]:
        return [_mean([score(answer, case.question) for answer in case.answers]) for case in cases]

    return scorer


def _mean(scores: list[dict[str, Any]]) -> dict[str, Any]:
    if len(scores) == 1:
        return scores[0]
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def _exact_match(
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_articles: bool = False,
    extract: str = "",
) -> Scorer:
    """``extract``: a regular expression; what its last match (its group, where it has one) says is the answer."""
    pattern = _pattern(extract) if extract else None
    kept = {"case": not ignore_case, "punctuation": not ignore_punctuation, "articles": not ignore_articles}

    def score(answer: str, question: Question) -> dict[str, Any]:
        found = [match[match.re.groups and 1] for match in pattern.finditer(answer)] if pattern else [answer]
        wanted = metrics.normalised(question.reference or "", **kept)
        return {"exact_match": float(bool(found) and metrics.normalised(found[-1] or "", **kept) == wanted)}

    return each(score)


def _rouge() -> Scorer:
    return each(lambda answer, question: metrics.rouge(answer, question.reference or ""))


def _loss() -> Scorer:
    def scorer(cases: Sequence[Case]) -> list[dict[str, Any]]:
        losses = [case.loss or (0.0, 0) for case in cases]
        return [{"loss": total / max(count, 1), "num_loss_tokens": count} for total, count in losses]

    return scorer


def _choice() -> Scorer:
    """The likeliest choice is right: by its log-probability, and by that for each character (``choice_norm``)."""

    def scorer(cases: Sequence[Case]) -> list[dict[str, Any]]:
        found = []
        for case in cases:
            question, values = case.question, case.choices or []
            by_length = [v / max(len(text), 1) for v, text in zip(values, question.choices, strict=True)]
            picks = [max(range(len(row)), key=row.__getitem__) for row in (values, by_length)]
            found.append(
                {
                    "choice": float(picks[0] == question.correct),
                    "choice_norm": float(picks[1] == question.correct),
                    "choice_logprobs": values,
                    "chosen": question.choices[picks[0]],
                }
            )
        return found

    return scorer


def _numeric(tolerance: float = 1e-6) -> Scorer:
    """The last number of the answer is the last of the reference, to a relative and absolute ``tolerance``."""

    def score(answer: str, question: Question) -> dict[str, Any]:
        found, wanted = metrics.last_number(answer), metrics.last_number(question.reference or "")
        if found is None or wanted is None:
            return {"numeric": 0.0}
        return {"numeric": float(abs(found - wanted) <= tolerance * max(1.0, abs(wanted)))}

    return each(score)


def _math() -> Scorer:
    """Answer and reference are the same mathematical object (LaTeX or plain), by math-verify."""
    from math_verify import parse, verify

    def read(text: str) -> Any:
        """A reference of bare LaTeX is found only within dollars."""
        return parse(text) or parse(f"${text}$")

    def score(answer: str, question: Question) -> dict[str, Any]:
        return {"math": float(verify(read(question.reference or ""), read(answer)))}

    return each(score)


def _json(keys: Sequence[str] = ()) -> Scorer:
    """The answer is JSON (an object with ``keys``), and the same as the reference where that is JSON, too."""

    def score(answer: str, question: Question) -> dict[str, Any]:
        try:
            value = metrics.read_json(answer)
        except ValueError:
            value, valid = None, False
        else:
            valid = not keys or (isinstance(value, dict) and set(keys) <= set(value))
        found: dict[str, Any] = {"json_valid": float(valid)}
        try:
            wanted = metrics.read_json(question.reference or "")
        except ValueError:
            return found
        return found | {"json_match": float(valid and value == wanted)}

    return each(score)


def _regex(pattern: str, full: bool = True) -> Scorer:
    """The whole answer (with ``full: false``, a part) matches ``pattern``."""
    compiled = _pattern(pattern)
    match = compiled.fullmatch if full else compiled.search
    return each(lambda answer, question: {"regex": float(match(answer.strip()) is not None)})


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise ConfigError("not a regular expression", where=repr(text), why=str(error)) from None


def _bleu(tokenize: str = "auto") -> Scorer:
    """BLEU of single sentences, 0 to 100; ``tokenize``: sacrebleu's, auto: zh for Chinese, else 13a."""
    from sacrebleu import sentence_bleu

    def score(answer: str, question: Question) -> dict[str, Any]:
        reference = question.reference or ""
        return {
            "bleu": sentence_bleu(answer, [reference], tokenize=_bleu_tokens(tokenize, [reference])).score
        }

    return each(score)


def _corpus_bleu(
    answers: Sequence[str], references: Sequence[str], tokenize: str = "auto"
) -> dict[str, float]:
    from sacrebleu import corpus_bleu

    tokens = _bleu_tokens(tokenize, references)
    return {"corpus_bleu": corpus_bleu(answers, [references], tokenize=tokens).score}


def _bleu_tokens(tokenize: str, references: Sequence[str]) -> str:
    if tokenize != "auto":
        return tokenize
    return "zh" if any(map(metrics.is_cjk, references)) else "13a"


def _chrf(word_order: int = 0) -> Scorer:
    """chrF of single sentences, 0 to 100; ``word_order`` 2 is chrF++."""
    from sacrebleu import sentence_chrf

    def score(answer: str, question: Question) -> dict[str, Any]:
        return {"chrf": sentence_chrf(answer, [question.reference or ""], word_order=word_order).score}

    return each(score)


def _corpus_chrf(answers: Sequence[str], references: Sequence[str], word_order: int = 0) -> dict[str, float]:
    from sacrebleu import corpus_chrf

    return {"corpus_chrf": corpus_chrf(answers, [references], word_order=word_order).score}


EVALUATORS: dict[str, Evaluator] = {
    "exact_match": Evaluator(_exact_match),
    "rouge": Evaluator(_rouge),
    "loss": Evaluator(_loss, needs="loss"),
    "choice": Evaluator(_choice, needs="choice"),
    "numeric": Evaluator(_numeric),
    "math": Evaluator(_math, package="math_verify"),
    "bleu": Evaluator(_bleu, package="sacrebleu", corpus=_corpus_bleu),
    "chrf": Evaluator(_chrf, package="sacrebleu", corpus=_corpus_chrf),
    "json": Evaluator(_json, reference=False),
    "regex": Evaluator(_regex, reference=False),
    "pass_at_k": Evaluator("swift.evaluate.programs", reference=False),
    "judge": Evaluator("swift.evaluate.judge", reference=False),
}


def find_evaluators(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> list[ChosenEvaluator]:
    """The evaluators of these names with their options (name -> keywords), each once, in order.

    Raises ConfigError for unknown names and options, and for packages that are not installed.
    """
    unused = set(options) - set(names)
    if unused:
        name = min(unused)
        fix = suggest(name, names, f"--metric {name}")
        raise ConfigError(
            f"options for {name}, which is not among the metrics", where="--metric_args", fix=fix
        )
    return [_choose(name, dict(options.get(name) or {})) for name in dict.fromkeys(names)]


def _choose(name: str, options: dict[str, Any]) -> ChosenEvaluator:
    row = _users_own(name) if ".py" in name else EVALUATORS.get(name)
    if row is None:
        raise ConfigError(
            f"unknown metric {name!r}",
            where="--metric",
            why=f"known: {', '.join(EVALUATORS)}; your own: FILE.py:function",
            fix=suggest(name, EVALUATORS),
        )
    if row.package is not None and importlib.util.find_spec(row.package) is None:
        raise ConfigError(
            f"the metric {name} needs the package {row.package}",
            where="--metric",
            fix="pip install 'swift-forge[eval]'",
        )
    make = importlib.import_module(row.make).make if isinstance(row.make, str) else row.make
    _check_options(name, make, options)
    return ChosenEvaluator(name, row, options, make(**options))


def _check_options(name: str, make: Callable[..., Scorer], options: Mapping[str, Any]) -> None:
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{name} has no option {option!r}",
                where="--metric_args",
                why=f"known: {', '.join(known) or 'none'}",
                fix=suggest(option, known),
            )
    missing = [key for key, entry in known.items() if entry.default is entry.empty and key not in options]
    if missing:
        fix = f'--metric_args \'{{"{name}": {{"{missing[0]}": ...}}}}\''
        raise ConfigError(f"{name} needs {', '.join(missing)}", where="--metric_args", fix=fix)


def _users_own(name: str) -> Evaluator:
    """``FILE.py:function``; its metrics bear the function's name unless it gives them names."""
    file, _, wanted = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).expanduser().is_file():
        raise ConfigError("no such file", where=f"--metric {name}", fix="--metric FILE.py:function")
    function = getattr(load_file(file, "metric", where="--metric"), wanted, None)
    if not callable(function):
        raise ConfigError(f"there is no function {wanted!r}", where=file)

    def score(answer: str, question: Question) -> dict[str, Any]:
        value = function(answer, question)
        values = value if isinstance(value, Mapping) else {wanted: value}
        return {key: float(entry) for key, entry in values.items()}

    return Evaluator(lambda: each(score), reference=False)
