"""What a server is willing to do for one request, and how requests become sampling options within that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift.inference.engines.base import Grammar, SamplingOptions
from swift.inference.server.errors import ApiError, check_unicode
from swift.inference.server.schemas import ChatRequest, CompletionRequest, Generation

__all__ = ["Defaults", "Limits", "grammar_of", "sampling_of"]

OPENAI_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class Limits:
    """Bounds for each request; None: what the model allows.

    Attributes:
        body_bytes: of a request's body.
        body_seconds: to receive it.
        prompt_tokens, answer_tokens: of each prompt and answer.
        choices: answers that one request may ask for: prompts times ``n``.
        texts: to embed or score in one request.
        logprobs: alternatives told beside each token.
        request_seconds: until the answer is complete.
        open_requests: HTTP requests in progress together.
    """

    body_bytes: int = 16 * 2**20
    body_seconds: float = 60.0
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    choices: int = 128
    texts: int = 256
    logprobs: int = 20
    request_seconds: float = 600.0
    open_requests: int = 1024


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say: the options of the command line, else generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = field(default=())


def sampling_of(
    body: Generation,
    *,
    prompt_tokens: int,
    max_model_len: int,
    vocab_size: int,
    limits: Limits,
    defaults: Defaults,
    stop_token_ids: Sequence[int],
    grammar: Grammar | None,
) -> SamplingOptions:
    """How the answer to a prompt of ``prompt_tokens`` is chosen. Raises ApiError beyond a limit."""
    ends = () if body.ignore_eos else (*stop_token_ids, *defaults.stop_token_ids)
    logprobs, prompt_logprobs = _logprobs(body, limits)
    top_k = defaults.top_k if body.top_k is None else body.top_k
    max_tokens = _max_tokens(body, prompt_tokens, max_model_len, limits, defaults)
    if body.min_tokens > max_tokens:
        raise ApiError(400, f"min_tokens {body.min_tokens} is more than max_tokens", param="min_tokens")
    return SamplingOptions(
        max_tokens=max(1, max_tokens),
        min_tokens=body.min_tokens,
        temperature=_or(body.temperature, defaults.temperature),
        top_p=_or(body.top_p, defaults.top_p),
        top_k=max(0, top_k),
        min_p=_or(body.min_p, defaults.min_p),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        seed=body.seed,
        stop_token_ids=tuple(dict.fromkeys((*ends, *body.stop_token_ids))),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_logit_bias(body.logit_bias, vocab_size),
        grammar=grammar,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _max_tokens(
    body: Generation, prompt_tokens: int, max_model_len: int, limits: Limits, defaults: Defaults
) -> int:
    if limits.prompt_tokens is not None and prompt_tokens > limits.prompt_tokens:
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens; this server takes {limits.prompt_tokens}",
            code="context_length_exceeded",
        )
    given = [body.max_tokens, body.max_completion_tokens, body.max_completion_length]
    asked = next((value for value in given if value is not None), None)
    if asked == 0 and not isinstance(
        body, CompletionRequest
    ):  # there: nothing but the prompt's log-probabilities
        raise ApiError(400, "max_tokens 0: an answer has one token at least", param="max_tokens")
    if asked is not None and limits.answer_tokens is not None and asked > limits.answer_tokens:
        raise ApiError(
            400,
            f"max_tokens {asked}: this server writes {limits.answer_tokens} at most",
            param="max_tokens",
        )
    room = max_model_len - prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        wish = "" if asked is None else f" and asks for {asked} more"
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens{wish}; this model takes {max_model_len} together",
            code="context_length_exceeded",
            param="max_tokens" if asked else None,
        )
    if asked is not None:
        return asked
    usual = defaults.max_tokens
    if usual is None and isinstance(body, CompletionRequest):
        usual = OPENAI_COMPLETION_TOKENS
    return min(bound for bound in (room, usual, limits.answer_tokens) if bound is not None)


def _logprobs(body: Generation, limits: Limits) -> tuple[int | None, int | None]:
    """Alternatives told for the answer's and for the prompt's tokens."""
    if isinstance(body, ChatRequest):
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        asked, for_prompt = (body.top_logprobs or 0) if body.logprobs else None, None
    else:
        assert isinstance(body, CompletionRequest)
        asked = body.logprobs
        for_prompt = asked if body.echo else None
    if asked is not None and asked > limits.logprobs:
        raise ApiError(
            400, f"{asked} log-probabilities: this server tells {limits.logprobs}", param="logprobs"
        )
    return asked, for_prompt


def _logit_bias(bias: Mapping[str, float] | None, vocab_size: int) -> dict[int, float]:
    found = {}
    for key, value in (bias or {}).items():
        if not key.isascii() or not key.isdigit() or int(key) >= vocab_size:
            raise ApiError(400, f"logit_bias: {key!r} is no token of this model", param="logit_bias")
        found[int(key)] = value
    return found


def grammar_of(body: ChatRequest | CompletionRequest) -> Grammar | None:
    """What the answer must look like, however it was asked for. Raises ApiError for more than one wish."""
    wishes: list[tuple[str, Any]] = [
        ("json", body.guided_json),
        ("regex", body.guided_regex),
        ("choice", body.guided_choice),
        ("lark", body.guided_grammar),
    ]
    outputs = body.structured_outputs
    if outputs is not None:
        wishes += [
            ("json", outputs.json_), ("regex", outputs.regex), ("choice", outputs.choice),
            ("lark", outputs.grammar),
        ]  # fmt: skip
    wanted = body.response_format
    if wanted is not None and wanted.type != "text":
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise ApiError(400, "response_format json_schema has no schema", param="response_format")
        schema = wanted.json_schema.schema_ if wanted.json_schema is not None else {"type": "object"}
        wishes.append(("json", schema))
    given = [(kind, value) for kind, value in wishes if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ApiError(
            400, "an answer can be bound to one form only: " + ", ".join(kind for kind, _ in given)
        )
    kind, value = given[0]
    check_unicode(*([value] if isinstance(value, str) else value if kind == "choice" else []))
    if kind == "json":
        return Grammar("json_schema", value if isinstance(value, str) else json.dumps(value))
    if kind == "choice":
        rules = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        return Grammar("lark", f"start: {rules}\n")
    return Grammar("regex" if kind == "regex" else "lark", value)
