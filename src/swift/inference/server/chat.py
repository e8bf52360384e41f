"""``/v1/chat/completions``: one conversation, one or several answers, whole or streamed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from swift.inference.engines.base import Delta, TokenInfo
from swift.inference.server.answer import AnswerText, TokenNames
from swift.inference.server.http import EventStream, request_id, unless_gone
from swift.inference.server.prompts import ChatPlan, plan_chat
from swift.inference.server.schemas import ChatRequest
from swift.inference.server.service import Exchange, Service
from swift.inference.server.tool_calls import CallArguments, CallStart

__all__ = ["chat_routes", "stop_texts", "usage_of"]


def chat_routes(service: Service) -> APIRouter:
    """The route, for one server."""
    routes = APIRouter(tags=["answers"])

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation; with ``stream`` as server-sent events."""
        model = service.model(body.model)
        plan = await plan_chat(service, model, body)
        exchange = await service.open(service.asked(body, model, plan.prompt, plan.grammar), model)
        writer = _Writer(service, body, plan, model.name, exchange)
        if body.stream:
            return EventStream(service, writer.events, request_id(request), exchange.close)
        return JSONResponse(await unless_gone(request, service, writer.whole()))

    return routes


def stop_texts(service: Service, body: Any, more: Sequence[str] = ()) -> list[str]:
    """The texts that end an answer."""
    asked = [body.stop] if isinstance(body.stop, str) else list(body.stop or service.defaults.stop)
    return [*asked, *more]


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass
class _Said:
    """What is new in an answer: by kind, ready to be told."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def delta(self) -> dict[str, Any]:
        """As a stream tells it."""
        found: dict[str, Any] = {}
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.content:
            found["content"] = self.content
        if self.calls:
            found["tool_calls"] = self.calls
        return found


class _Choice:
    """One answer."""

    def __init__(self, service: Service, body: ChatRequest, plan: ChatPlan, stops: Sequence[int]) -> None:
        more = plan.tool_format.stop if plan.tool_format else ()
        self.text = AnswerText(
            service.tokenizer,
            stop=stop_texts(service, body, more),
            keep_stop=body.include_stop_str_in_output,
            stop_token_ids=stops,
            shown_tokens=plan.shown_tokens,
        )
        self.splitter, self.parser = plan.splitter(), plan.parser()
        self.infos: list[TokenInfo] = []

    def push(self, delta: Delta) -> _Said:
        """What is new; log-probabilities gather in ``infos``."""
        piece = self.text.push(delta)
        self.infos += [info for info, _ in piece.infos]
        said, content, over = _Said(), piece.text, self.text.is_over
        if self.splitter is not None:
            said.reasoning, content = self.splitter.push(content, is_last=over)
        if self.parser is None:
            said.content = content
            return said
        for event in self.parser.push(content, is_last=over):
            if isinstance(event, CallStart):
                function = {"name": event.name, "arguments": ""}
                said.calls.append(
                    {"index": event.index, "id": event.id, "type": "function", "function": function}
                )
            elif isinstance(event, CallArguments):
                said.calls.append({"index": event.index, "function": {"arguments": event.text}})
            else:
                said.content += event
        return said

    @property
    def finish_reason(self) -> str | None:
        """``tool_calls`` when the answer ended by itself and called something."""
        called = self.parser is not None and self.parser.num_calls > 0
        return "tool_calls" if called and self.text.finish_reason == "stop" else self.text.finish_reason


class _Writer:
    """The answer to one request, whole or as events."""

    def __init__(
        self, service: Service, body: ChatRequest, plan: ChatPlan, model: str, exchange: Exchange
    ) -> None:
        self.service, self.body, self.plan, self.exchange = service, body, plan, exchange
        self.prompt_tokens = len(plan.prompt)
        stops = service.model(body.model).template.stop_token_ids
        self.choices = [_Choice(service, body, plan, stops) for _ in range(body.n)]
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(self.prompt_tokens, sum(choice.text.num_tokens for choice in self.choices))

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        said = [_Said() for _ in self.choices]
        async with self.exchange:
            async for number, delta in self.exchange.deltas():
                choice = self.choices[number]
                new = choice.push(delta)
                said[number].content += new.content
                said[number].reasoning += new.reasoning
                said[number].calls += new.calls
                if choice.text.is_over:
                    self.exchange.end(number)
        choices = [
            {
                "index": number,
                "message": _message(said[number]),
                "logprobs": self._logprobs(choice.infos),
                "finish_reason": choice.finish_reason,
            }
            for number, choice in enumerate(self.choices)
        ]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage}

    async def events(self) -> AsyncIterator[str]:
        """The answer as data of server-sent events, written by hand: this runs for every token."""
        wants_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = json.dumps({**self.head, "object": "chat.completion.chunk"})[:-1] + ', "choices": ['
        tail = '], "usage": null}' if wants_usage else "]}"

        def chunk(number: int, delta: str, logprobs: str = "null", reason: str = "null") -> str:
            return (
                f'{head}{{"index": {number}, "delta": {delta}, "logprobs": {logprobs}, '
                f'"finish_reason": {reason}}}{tail}'
            )

        begun: set[int] = set()
        async with self.exchange:
            async for number, delta in self.exchange.deltas():
                choice = self.choices[number]
                if number not in begun:
                    begun.add(number)
                    yield chunk(number, '{"role": "assistant", "content": ""}')
                new = choice.push(delta).delta()
                if new or (choice.infos and choice.text.is_over):
                    logprobs = json.dumps(self._logprobs(choice.infos))
                    choice.infos.clear()
                    yield chunk(number, json.dumps(new, ensure_ascii=False), logprobs)
                if choice.text.is_over:
                    self.exchange.end(number)
                    yield chunk(number, "{}", reason=json.dumps(choice.finish_reason))
        if wants_usage:
            yield f'{head}], "usage": {json.dumps(self.usage)}}}'

    def _logprobs(self, infos: Sequence[TokenInfo]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": [_told(self.service.token_names, info) for info in infos], "refusal": None}


def _message(said: _Said) -> dict[str, Any]:
    calls: list[dict[str, Any]] = []
    for piece in said.calls:
        if "id" in piece:
            calls.append(
                {"id": piece["id"], "type": "function", "function": {"name": piece["function"]["name"]}}
            )
            calls[-1]["function"]["arguments"] = ""
        calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": said.content or (None if calls else "")}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _told(names: TokenNames, info: TokenInfo) -> dict[str, Any]:
    """A token's log-probability in the form of chats."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, values = names(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": values}

    return {**entry(info.token, info.logprob), "top_logprobs": [entry(*other) for other in _pairs(info.top)]}


def _pairs(top: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    return list(top)
