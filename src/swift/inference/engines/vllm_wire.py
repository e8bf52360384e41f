"""Requests in the words of vLLM's server, and its answers as deltas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from swift.core.errors import ConfigError
from swift.inference.engines.base import Delta, Request, SamplingOptions, TokenInfo

__all__ = ["error_text", "parse_metrics", "read_choice", "read_line", "request_body"]


def request_body(request: Request, model: str, max_model_len: int) -> dict[str, Any]:
    """A request in the words of vLLM's ``/v1/completions``."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": min(sampling.max_tokens, max_model_len - len(request.prompt)),
        "min_tokens": sampling.min_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # what ends an answer stands in stop_token_ids, and nowhere else
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
        # vLLM does not stream a prompt's log-probabilities.
        "stream": sampling.prompt_logprobs is None,
    }
    optional = {
        "seed": sampling.seed,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        "structured_outputs": _structure(sampling),
    }
    return body | {key: value for key, value in optional.items() if value is not None}


def _structure(sampling: SamplingOptions) -> dict[str, str] | None:
    if sampling.grammar is None:
        return None
    words = {"json_schema": "json", "regex": "regex", "lark": "grammar"}
    return {words[sampling.grammar.kind]: sampling.grammar.text}


def read_line(line: str, request: Request) -> Delta | None:
    """One line of a streamed answer; None for those that say nothing.

    Raises ConfigError when the server finds only now that it cannot do what is asked (a bad grammar).
    """
    if not line.startswith("data:") or line.endswith("[DONE]"):
        return None
    event = json.loads(line[5:])
    if "error" in event:
        if isinstance(event["error"], dict) and event["error"].get("code") in range(400, 500):
            raise ConfigError(f"vLLM refuses the request: {error_text(line[5:])}")
        return Delta(finish_reason="error", error=f"vLLM: {error_text(line[5:])}")
    return read_choice(event["choices"][0], request) if event.get("choices") else None


def read_choice(choice: dict[str, Any], request: Request) -> Delta:
    """A choice of a completion, whole or in part."""
    reason = choice.get("finish_reason")
    return Delta(
        tokens=tuple(choice.get("token_ids") or ()),
        infos=_infos(choice.get("logprobs"), request.sampling.logprobs),
        prompt_infos=_prompt_infos(choice.get("prompt_logprobs"), request),
        finish_reason=reason if reason in (None, "stop", "length", "abort") else "error",
        error=None if reason in (None, "stop", "length", "abort") else f"vLLM ended the answer: {reason}",
    )


def _infos(told: dict[str, Any] | None, alternatives: int | None) -> tuple[TokenInfo, ...]:
    if told is None or alternatives is None:
        return ()
    tops = told.get("top_logprobs") or [None] * len(told["tokens"])
    return tuple(
        TokenInfo(_token(name), logprob, _best({_token(k): v for k, v in (top or {}).items()}, alternatives))
        for name, logprob, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
    )


def _prompt_infos(told: list[dict[str, Any] | None] | None, request: Request) -> tuple[TokenInfo, ...]:
    if told is None or request.sampling.prompt_logprobs is None:
        return ()
    infos = []
    for token, place in zip(request.prompt, told, strict=True):
        if place is not None:  # the first token follows nothing
            known = {int(key): float(entry["logprob"]) for key, entry in place.items()}
            infos.append(TokenInfo(token, known[token], _best(known, request.sampling.prompt_logprobs)))
    return tuple(infos)


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _best(known: Mapping[int, float], count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest ``count``, best first: vLLM adds the chosen token when it is not among them."""
    return tuple(sorted(known.items(), key=lambda item: -item[1])[:count])


def error_text(body: str) -> str:
    """What an error's JSON says."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body.strip()[:500]


def parse_metrics(text: str) -> dict[str, float]:
    """``cache_usage`` (0 to 1) and ``cache_tokens``, of all copies of the model together, from vLLM's metrics."""
    usage = [
        float(value) for value in re.findall(r"^vllm:kv_cache_usage_perc\{[^}]*\} (\S+)", text, re.MULTILINE)
    ]
    tokens = 0
    for labels in re.findall(r"^vllm:cache_config_info\{(.*)\} ", text, re.MULTILINE):
        blocks, size = (re.search(rf'{key}="(\d+)"', labels) for key in ("num_gpu_blocks", "block_size"))
        tokens += int(blocks[1]) * int(size[1]) if blocks and size else 0
    return {"cache_usage": sum(usage) / len(usage) if usage else 0.0, "cache_tokens": float(tokens)}
