"""Rewards that need no code of the user. Each entry makes a function from its options (``reward_args``).

The evaluators of `swift.evaluate.evaluators` are rewards, too, against the row's ``solution`` (or ``answer``).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from swift.core.errors import ConfigError

__all__ = ["BUILT_IN"]

Reward = Callable[..., list[float]]
MayFail = Callable[..., list[float | Exception]]
"""An exception instead of a number: the reward of this answer failed."""

_REFERENCES = ("solution", "answer", "ground_truth", "target")


def _task() -> Reward:
    """How right the answer to a row of ``task:...`` is."""
    from swift.data.tasks import score

    def reward(completions: Sequence[str], **columns: Any) -> list[float]:
        if "task" not in columns:
            raise KeyError("the rows have no column 'task'; this reward is for data sets task:...")
        rows = [dict(zip(columns, values, strict=True)) for values in _rows(columns, len(completions))]
        return [score(text, row) for text, row in zip(completions, rows, strict=True)]

    return reward


def _rows(columns: dict[str, Any], count: int) -> list[tuple[Any, ...]]:
    values = [value if isinstance(value, list | tuple) else [value] * count for value in columns.values()]
    return list(zip(*values, strict=True))


def _format(pattern: str = r"<think>.*?</think>\s*<answer>.*?</answer>(?![\s\S])") -> Reward:
    """1 where the whole answer has the form ``<think>...</think> <answer>...</answer>`` (or matches ``pattern``)."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda completions: [float(compiled.fullmatch(text.strip()) is not None) for text in completions]


def _regex(pattern: str, full: bool = True) -> Reward:
    """1 where the answer (``full: false``: a part of it) matches."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(
            f"{pattern!r} is no regular expression", where="--reward_args", why=str(error)
        ) from None
    match = compiled.fullmatch if full else compiled.search
    return lambda completions: [float(match(text.strip()) is not None) for text in completions]


def _json_schema(schema: dict[str, Any] | str | None = None) -> Reward:
    """1 where the answer is JSON of the schema: that of the options, or the row's column ``schema``."""
    try:
        import jsonschema_rs
    except ImportError:
        raise ConfigError(
            "json_schema needs the package jsonschema-rs",
            where="--reward_funcs",
            fix="pip install 'swift-forge[eval]'",
        ) from None

    def check(text: str, wanted: dict[str, Any] | str | None) -> float:
        if wanted is None:
            return math.nan
        rules = json.loads(wanted) if isinstance(wanted, str) else wanted
        try:
            value = json.loads(text)
        except ValueError:
            return 0.0
        return float(jsonschema_rs.is_valid(rules, value))

    if schema is not None:
        return lambda completions: [check(text, schema) for text in completions]

    def reward(completions: Sequence[str], schema: Sequence[Any]) -> list[float]:
        return [check(text, one) for text, one in zip(completions, schema, strict=True)]

    return reward


def _accuracy() -> Reward:
    """1 where answer and solution are the same mathematical object (math-verify); NaN where the solution is none.

    The answer may stand in ``<answer>...</answer>`` or in a box.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ConfigError(
            "accuracy needs the package math-verify",
            where="--reward_funcs",
            fix="pip install 'swift-forge[eval]'",
        ) from None

    # It warns of every call without a deadline of its own: here a call has one from outside.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def read(text: str) -> Any:
        inner = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        text = inner[-1] if inner else text
        return parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)

    def reward(completions: Sequence[str], **columns: Any) -> list[float]:
        wanted = [read(str(solution)) for solution in references(columns)]
        return [
            math.nan if not gold else float(verify(gold, read(text), timeout_seconds=None))
            for text, gold in zip(completions, wanted, strict=True)
        ]

    return reward


def references(columns: dict[str, Any]) -> Sequence[Any]:
    """The column with the right answers. Raises KeyError when there is none."""
    for name in _REFERENCES:
        if name in columns:
            found: Sequence[Any] = columns[name]
            return found
    raise KeyError(f"the rows have no column {' or '.join(_REFERENCES)}")


def _cosine(
    min_len_value_wrong: float = -0.5,
    max_len_value_wrong: float = 0.0,
    min_len_value_correct: float = 1.0,
    max_len_value_correct: float = 0.5,
    max_len: int = 512,
) -> Reward:
    """Accuracy by length: right answers are better short, wrong ones better long (arXiv 2502.03373).

    ``most - (most - least) (1 - cos(pi L / max_len)) / 2`` with the values at length 0 and ``max_len``.
    """
    accuracy = _accuracy()

    def reward(
        completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        values = []
        for right, ids in zip(accuracy(completions, **columns), completion_ids, strict=True):
            short, long = (
                (min_len_value_correct, max_len_value_correct)
                if right == 1
                else (min_len_value_wrong, max_len_value_wrong)
            )
            share = (1 - math.cos(math.pi * min(len(ids) / max_len, 1.0))) / 2
            values.append(math.nan if math.isnan(right) else short - (short - long) * share)
        return values

    return reward


def _repetition(n_grams: int = 3, max_penalty: float = -1.0) -> Reward:
    """``(1 - different n-grams / n-grams) max_penalty`` over the words of the answer (arXiv 2502.03373)."""

    def reward(completions: Sequence[str]) -> list[float]:
        values = []
        for text in completions:
            words = text.lower().split()
            found = [tuple(words[at : at + n_grams]) for at in range(len(words) - n_grams + 1)]
            values.append((1 - len(set(found)) / len(found)) * max_penalty if found else 0.0)
        return values

    return reward


def _soft_overlong(max_length: int = 512, cache_length: int = 102) -> Reward:
    """0 up to ``max_length - cache_length`` tokens, then falling by a line to -1 (DAPO, arXiv 2503.14476)."""
    if cache_length > max_length:
        raise ConfigError(
            f"the punishment would begin before 0 tokens ({max_length} - {cache_length})",
            where="--soft_cache_length",
            fix=f"--soft_cache_length {max(1, max_length // 5)}",
        )

    def reward(completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> list[float]:
        border = max_length - cache_length
        return [-min(1.0, max(0.0, (len(ids) - border) / cache_length)) for ids in completion_ids]

    return reward


def _evaluator(name: str, metric: str) -> Callable[..., MayFail]:
    """An evaluator as a reward: its metric, against the row's reference; NaN where it gives none.

    A judge that could not be asked, or gave no score, is a failure of that answer.
    """

    def make(**options: Any) -> MayFail:
        from swift.evaluate.evaluators import Case, find_evaluators
        from swift.evaluate.questions import Question

        try:
            evaluator = find_evaluators([name], {name: options})[0]
        except ConfigError as error:  # these options are given in another way here
            if error.where == "--metric_args":
                error.where, error.fix = (
                    "--reward_args",
                    error.fix and error.fix.replace("--metric", "--reward"),
                )
            raise
        scale = options.get("high", 10.0) if name == "judge" else 1.0

        def reward(
            completions: Sequence[str], messages: Sequence[Any], **columns: Any
        ) -> list[float | Exception]:
            try:
                wanted = references(columns)
            except KeyError:
                if evaluator.row.reference:
                    raise
                wanted = [None] * len(completions)
            own = {key: value for key, value in columns.items() if key not in _CALL}
            rows = [dict(zip(own, values, strict=True)) for values in _rows(own, len(completions))] or [
                {}
            ] * len(completions)
            cases = [
                Case(
                    Question(at, "", list(asked), None if right is None else str(right), None, row),
                    [text],
                )
                for at, (asked, text, right, row) in enumerate(
                    zip(messages, completions, wanted, rows, strict=True)
                )
            ]
            return [_score(one, metric, scale) for one in evaluator.score(cases)]

        return reward

    return make


def _score(found: dict[str, Any], metric: str, scale: float) -> float | Exception:
    if metric in found:
        return float(found[metric]) / scale
    return RuntimeError(found[f"{metric}_error"]) if f"{metric}_error" in found else math.nan


_CALL = ("prompts", "completion_ids", "response_token_ids", "trainer_state")

BUILT_IN: dict[str, Callable[..., Reward | MayFail]] = {
    "task": _task,
    "accuracy": _accuracy,
    "format": _format,
    "cosine": _cosine,
    "repetition": _repetition,
    "soft_overlong": _soft_overlong,
    "regex": _regex,
    "json_schema": _json_schema,
    "exact_match": _evaluator("exact_match", "exact_match"),
    "numeric": _evaluator("numeric", "numeric"),
    "rouge": _evaluator("rouge", "rougeL"),
    "code": _evaluator("pass_at_k", "pass_at_1"),
    "judge": _evaluator("judge", "judge"),
}
