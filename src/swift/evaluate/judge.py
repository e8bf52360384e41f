"""Answers judged by another model behind an OpenAI server ("LLM as a judge", Zheng et al. 2023, arXiv 2306.05685).

The prompt is a Jinja file with ``question``, ``answer``, ``reference``, ``low``, ``high`` and the row's other columns.
The judge must end with a line ``Score: N``; whatever else it says is a failure: counted and shown, no score.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift.core.errors import ConfigError
from swift.core.logging import get_logger
from swift.evaluate.endpoint import Endpoint, EndpointError
from swift.evaluate.evaluators import Case, Scorer

__all__ = ["make", "read_score"]

logger = get_logger(__name__)

_PROMPT = Path(__file__).parent / "prompts" / "judge.jinja"
_SCORE = re.compile(
    r"[*_]*Score:?[*_]*:?\s*[*_]*([-+]?\d+(?:\.\d+)?)[*_]*(?:\s*/\s*(\d+))?\s*\.?[*_]*", re.IGNORECASE
)


def make(
    url: str,
    model: str = "",
    prompt: str = "",
    low: float = 1.0,
    high: float = 10.0,
    temperature: float = 0.0,
    max_tokens: int = 1024,
    concurrency: int = 8,
    timeout_seconds: float = 120.0,
    deadline_seconds: float = 600.0,
    key_variable: str = "OPENAI_API_KEY",
) -> Scorer:
    """``judge``: the score (``low`` to ``high``), with several samples their mean; ``judge_says`` the judge's words.

    A sample without a valid score has none; a row without any has a ``judge_error`` and no metric.

    Args:
        url: of the judge's server, up to ``/v1``.
        model: "": the first that the server lists.
        prompt: Jinja file; default: this package's.
        deadline_seconds: for one judgement, retries included.
        key_variable: environment variable with the API key.
    """
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path = Path(prompt).expanduser() if prompt else _PROMPT
    try:
        template = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True).from_string(
            path.read_text(encoding="utf-8")
        )
    except (OSError, TemplateSyntaxError) as error:
        raise ConfigError("the judge's prompt cannot be used", where=str(path), why=str(error)) from None
    endpoint = Endpoint(url, model, concurrency, timeout_seconds, deadline_seconds, key_variable)

    def ask(case: Case, answer: str) -> dict[str, Any]:
        from jinja2 import TemplateError

        question = case.question
        names = question.extra | {
            "question": _conversation(question.messages), "answer": answer, "reference": question.reference or "",
            "low": _plain(low), "high": _plain(high),
        }  # fmt: skip
        try:
            text = template.render(**names)
        except TemplateError as error:
            raise ConfigError(
                "the judge's prompt cannot be filled", where=str(path), why=str(error)
            ) from None
        return {
            "messages": [{"role": "user", "content": text}],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }

    def scorer(cases: Sequence[Case]) -> list[dict[str, Any]]:
        asked = [ask(case, answer) for case in cases for answer in case.answers]
        said = iter(endpoint.try_chat(asked))
        return [_scores([next(said) for _ in case.answers], low, high) for case in cases]

    return scorer


def _scores(responses: Sequence[dict[str, Any] | EndpointError], low: float, high: float) -> dict[str, Any]:
    scores, words, errors = [], [], []
    for response in responses:
        text = _words(response)
        try:
            scores.append(read_score(text, low, high))
        except ValueError as error:
            errors.append(response.render() if isinstance(response, EndpointError) else str(error))
        words.append(text)
    found: dict[str, Any] = {"judge_says": words[0] if len(words) == 1 else words}
    if scores:
        found["judge"] = sum(scores) / len(scores)
    if errors:
        found |= {"judge_error": errors[0], "judge_failures": len(errors)}
    return found


def _words(response: dict[str, Any] | EndpointError) -> str:
    if isinstance(response, EndpointError):
        return ""
    choices = response.get("choices") or [{}]
    return str((choices[0].get("message") or {}).get("content") or "")


def read_score(text: str, low: float, high: float) -> float:
    """The score on the last line. ValueError when that is no ``Score: N``, or N is out of range or of another scale."""
    lines = text.strip().splitlines()
    match = _SCORE.fullmatch(lines[-1].strip()) if lines else None
    if match is None:
        raise ValueError(
            f"the last line is no score: {lines[-1][:80]!r}" if lines else "the judge said nothing"
        )
    score = float(match[1])
    if not low <= score <= high or (match[2] is not None and float(match[2]) != high):
        raise ValueError(f"{match[0].strip()!r} is not on the scale from {_plain(low)} to {_plain(high)}")
    return score


def _conversation(messages: Sequence[dict[str, Any]]) -> str:
    """One question as it is; a longer conversation with its roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _plain(number: float) -> str:
    return f"{number:g}"
