"""``/v1/completions``: texts or token ids to go on with, whole or streamed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from swift.inference.engines.base import Delta, TokenInfo
from swift.inference.server.answer import AnswerText, TokenNames
from swift.inference.server.chat import stop_texts, usage_of
from swift.inference.server.errors import ApiError
from swift.inference.server.http import EventStream, request_id, unless_gone
from swift.inference.server.limits import grammar_of
from swift.inference.server.prompts import encode_text
from swift.inference.server.schemas import CompletionRequest
from swift.inference.server.service import Exchange, ServedModel, Service

__all__ = ["check_tokens", "completion_routes", "encode_inputs"]


def completion_routes(service: Service) -> APIRouter:
    """The route, for one server."""
    routes = APIRouter(tags=["answers"])

    @routes.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Go on with texts; with ``stream`` as server-sent events."""
        model = service.model(body.model)
        if body.best_of is not None and body.best_of != body.n:
            raise ApiError(400, "best_of other than n is not offered", param="best_of")
        prompts = await encode_inputs(service, model, body.prompt)
        grammar = grammar_of(body)
        requests = [one for prompt in prompts for one in service.asked(body, model, prompt, grammar)]
        exchange = await service.open(requests, model)
        writer = _Writer(service, body, model, prompts, exchange)
        if body.stream:
            return EventStream(service, writer.events, request_id(request), exchange.close)
        return JSONResponse(await unless_gone(request, service, writer.whole()))

    return routes


async def encode_inputs(
    service: Service, model: ServedModel, given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
) -> list[list[int]]:
    """Token ids of one or several prompts, each a text or token ids."""
    entries: Sequence[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    found: list[list[int]] = []
    for one in entries:
        if isinstance(one, str):
            found.append(await encode_text(service, model, one))
        else:
            found.append(check_tokens(service, one))
        if not found[-1]:
            raise ApiError(400, "a prompt has no tokens", param="prompt")
    return found


def check_tokens(service: Service, tokens: Sequence[int]) -> list[int]:
    """The tokens, if the model has them all. Raises ApiError."""
    if any(token >= service.vocab_size for token in tokens):
        raise ApiError(400, f"this model has tokens from 0 to {service.vocab_size - 1}", param="prompt")
    return list(tokens)


@dataclass
class _Logprobs:
    """Log-probabilities in the form of completions, while they come."""

    names: TokenNames
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token: int, info: TokenInfo | None, offset: int) -> None:
        """One token; None: the first of a prompt, which nothing predicts."""
        text = self.names(token)[0]
        self.tokens.append(text)
        self.token_logprobs.append(None if info is None else max(info.logprob, -9999.0))
        top = (
            None if info is None else {self.names(other)[0]: max(value, -9999.0) for other, value in info.top}
        )
        if info is not None and top is not None:
            top.setdefault(text, max(info.logprob, -9999.0))
        self.top_logprobs.append(top)
        self.text_offset.append(offset)

    def take(self) -> dict[str, Any]:
        """What has come since the last time."""
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        found = {name: getattr(self, name) for name in names}
        for name in names:
            setattr(self, name, [])
        return found


class _Choice:
    """One answer, with the prompt in front when that is wanted."""

    def __init__(
        self, service: Service, body: CompletionRequest, prompt: Sequence[int], stops: Sequence[int]
    ) -> None:
        self.prompt = prompt
        self.echo = body.echo
        self.empty = next(
            (
                value == 0
                for value in (body.max_tokens, body.max_completion_tokens, body.max_completion_length)
                if value is not None
            ),
            False,
        )
        self.text = AnswerText(
            service.tokenizer,
            stop=stop_texts(service, body),
            keep_stop=body.include_stop_str_in_output,
            stop_token_ids=stops,
        )
        self.prompt_text = (
            service.tokenizer.decode(list(prompt), skip_special_tokens=False) if body.echo else ""
        )
        self.logprobs = _Logprobs(service.token_names) if body.logprobs is not None else None
        self._begun = False

    def push(self, delta: Delta) -> str:
        """The text that is new."""
        text = ""
        if not self._begun:
            self._begun, text = True, self.prompt_text
            if self.echo and self.logprobs is not None:
                self._add_prompt(delta)
        piece = self.text.push(delta)
        if self.empty:  # max_tokens 0: only the prompt is of interest
            return text
        if self.logprobs is not None:
            for info, place in piece.infos:
                self.logprobs.add(info.token, info, len(self.prompt_text) + place)
        return text + piece.text

    def _add_prompt(self, delta: Delta) -> None:
        assert self.logprobs is not None
        offset = 0
        for token, info in zip(self.prompt, (None, *delta.prompt_infos), strict=True):
            self.logprobs.add(token, info, offset)
            offset += len(self.logprobs.tokens[-1])

    @property
    def num_tokens(self) -> int:
        """Of the answer."""
        return 0 if self.empty else self.text.num_tokens


class _Writer:
    """The answer to one request, whole or as events. Choice ``n * i + j`` is the j-th answer to prompt i."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        exchange: Exchange,
    ) -> None:
        self.body, self.exchange = body, exchange
        stops = model.template.stop_token_ids
        self.choices = [_Choice(service, body, prompt, stops) for prompt in prompts for _ in range(body.n)]
        self.prompt_tokens = sum(map(len, prompts))
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(self.prompt_tokens, sum(choice.num_tokens for choice in self.choices))

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        texts = [""] * len(self.choices)
        async with self.exchange:
            async for number, delta in self.exchange.deltas():
                texts[number] += self.choices[number].push(delta)
                if self.choices[number].text.is_over:
                    self.exchange.end(number)
        choices = [
            {
                "index": number,
                "text": texts[number],
                "logprobs": None if choice.logprobs is None else choice.logprobs.take(),
                "finish_reason": choice.text.finish_reason,
            }
            for number, choice in enumerate(self.choices)
        ]
        return {**self.head, "choices": choices, "usage": self.usage}

    async def events(self) -> AsyncIterator[str]:
        """The answer as data of server-sent events."""
        wants_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = json.dumps(self.head)[:-1] + ', "choices": ['
        tail = '], "usage": null}' if wants_usage else "]}"
        async with self.exchange:
            async for number, delta in self.exchange.deltas():
                choice = self.choices[number]
                text = choice.push(delta)
                over = choice.text.is_over
                if over:
                    self.exchange.end(number)
                elif not text:
                    continue
                logprobs = "null" if choice.logprobs is None else json.dumps(choice.logprobs.take())
                reason = json.dumps(choice.text.finish_reason)
                yield (
                    f'{head}{{"index": {number}, "text": {json.dumps(text, ensure_ascii=False)}, '
                    f'"logprobs": {logprobs}, "finish_reason": {reason}}}{tail}'
                )
        if wants_usage:
            yield f'{head}], "usage": {json.dumps(self.usage)}}}'
