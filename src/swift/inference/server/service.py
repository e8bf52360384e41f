"""What all routes share: the models by name, the engine, limits, and the life of one request in the engine."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from swift.core.errors import SwiftError
from swift.inference.engines.base import (
    Delta,
    Grammar,
    InferenceEngine,
    Request,
    SamplingOptions,
)
from swift.inference.server.answer import TokenNames
from swift.inference.server.errors import ApiError, from_swift_error
from swift.inference.server.limits import Defaults, Limits, sampling_of
from swift.inference.server.metrics import ServerMetrics
from swift.inference.server.reasoning import thinks
from swift.inference.server.schemas import Generation
from swift.inference.server.tool_formats import TOOL_FORMATS, ToolFormat, sniff_tool_format
from swift.models.template import Template

__all__ = ["Exchange", "ServedModel", "Service"]

T = TypeVar("T")
LONG_TEXT = 20_000
"""Characters from which a prompt is tokenised in a thread, so that the other answers go on."""


@dataclass(frozen=True)
class ServedModel:
    """One name of ``/v1/models``.

    Attributes:
        template: messages to tokens; adapters have that of their run.
        adapter: the engine's name of the adapter; None: the base model.
        task: what it is for: causal_lm, embedding, seq_cls, reranker, generative_reranker.
    """

    name: str
    template: Template
    folder: Path
    adapter: str | None = None
    parent: str | None = None
    task: str = "causal_lm"
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass
class Service:
    """The state of a server.

    Attributes:
        models: by name; the first is the default.
        tool_parser: the format of tool calls, instead of what the template says.
        reasoning: whether ``<think>`` is told apart; None: as the template says.
        read_adapter: (name, folder) -> the model of an adapter that is loaded at run time; None: that is refused.
        vocab_size: rows of the embedding.
        state: ``starting`` and ``draining`` answer 503.
    """

    engine: InferenceEngine
    models: dict[str, ServedModel]
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    owned_by: str = "swift"
    tool_parser: str | None = None
    reasoning: bool | None = None
    read_adapter: Callable[[str, Path], ServedModel] | None = None
    vocab_size: int = 2**31
    state: Literal["starting", "ready", "draining"] = "ready"
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    open_requests: int = 0

    @property
    def tokenizer(self) -> Any:
        """That of the base model; adapters share it."""
        return next(iter(self.models.values())).template.tokenizer

    @cached_property
    def token_names(self) -> TokenNames:
        """For log-probabilities."""
        return TokenNames(self.tokenizer)

    def model(self, name: str | None) -> ServedModel:
        """The model of a request. Raises ApiError 404 for one that is not served."""
        if name is None:
            return next(iter(self.models.values()))
        found = self.models.get(name)
        if found is None:
            raise ApiError(
                404,
                f"there is no model {name!r} here; these are served: {', '.join(self.models)}",
                code="model_not_found",
                param="model",
            )
        return found

    def tool_format(self, model: ServedModel) -> ToolFormat | None:
        """How the model writes tool calls; None when nobody knows."""
        chat, style = model.template.chat, model.template.section.agent_template
        name = self.tool_parser or style or sniff_tool_format(chat.source if chat is not None else None)
        return TOOL_FORMATS[name] if name else None

    def thinks(self, model: ServedModel) -> bool:
        """Whether its answers may begin with ``<think>``."""
        if self.reasoning is not None:
            return self.reasoning
        return model.template.chat is not None and thinks(model.template.chat.source)

    async def working(self, size: int, work: Callable[[], T]) -> T:
        """``work()`` on a text of ``size`` characters; what the template refuses becomes an ApiError."""
        try:
            return await asyncio.to_thread(work) if size > LONG_TEXT else work()
        except SwiftError as error:
            raise from_swift_error(error) from error

    def asked(
        self, body: Generation, model: ServedModel, prompt: Sequence[int], grammar: Grammar | None
    ) -> list[tuple[Sequence[int], SamplingOptions]]:
        """The ``n`` answers that a request wants to a prompt, each with a seed of its own. Raises ApiError."""
        sampling = sampling_of(
            body,
            prompt_tokens=len(prompt),
            max_model_len=self.engine.max_model_len,
            vocab_size=self.vocab_size,
            limits=self.limits,
            defaults=self.defaults,
            stop_token_ids=model.template.stop_token_ids,
            grammar=grammar,
        )
        first = sampling.seed
        if first is None:
            return [(prompt, sampling)] * body.n
        return [(prompt, replace(sampling, seed=first + number)) for number in range(body.n)]

    async def open(
        self, requests: Sequence[tuple[Sequence[int], SamplingOptions]], model: ServedModel
    ) -> Exchange:
        """Hand prompts to the engine, all or none. Raises ApiError: 429 busy, 400 what it cannot do."""
        if len(requests) > self.limits.choices:
            raise ApiError(
                400, f"{len(requests)} answers at once; this server gives {self.limits.choices}", param="n"
            )
        exchange = Exchange(self)
        try:
            for prompt, sampling in requests:
                exchange.submit(Request(uuid.uuid4().hex, prompt, sampling, model.adapter))
        except SwiftError as error:
            await exchange.close()
            raise from_swift_error(error) from error
        return exchange


class Exchange:
    """The requests that one HTTP request has in the engine. Use ``async with``: leaving it cancels what still runs."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.started = time.monotonic()
        self._streams: list[AsyncIterator[Delta]] = []
        self._open: set[int] = set()
        self._last: list[float] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._timeout: asyncio.Timeout | None = None
        self.num_tokens = 0

    def submit(self, request: Request) -> None:
        """One more; its deltas carry its number, counted from 0."""
        self._streams.append(self.service.engine.submit(request))
        self._open.add(len(self._streams) - 1)
        self._last.append(0.0)
        self.service.metrics.prompt_tokens += len(request.prompt)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(number, delta) of all requests as they come, until each has ended or is closed.

        Raises ApiError for what the engine refuses only now (a grammar that it has looked at).
        """
        try:
            async for number, delta in self._all():
                yield number, delta
        except SwiftError as error:
            raise from_swift_error(error) from error

    async def _all(self) -> AsyncIterator[tuple[int, Delta]]:
        if len(self._streams) == 1:
            async for delta in self._streams[0]:
                self._observe(0, delta)
                yield 0, delta
                if 0 not in self._open:
                    break
            return
        # One task for each request, not for each token.
        queue: asyncio.Queue[tuple[int, Delta | None, BaseException | None]] = asyncio.Queue()
        numbers = range(len(self._streams))
        self._tasks = [asyncio.create_task(self._pump(number, queue)) for number in numbers]
        left = len(self._tasks)
        while left:
            number, news, error = await queue.get()
            if error is not None:
                raise error
            if news is None:
                left -= 1
            elif number in self._open:
                self._observe(number, news)
                yield number, news

    async def _pump(self, number: int, queue: asyncio.Queue[Any]) -> None:
        try:
            async for delta in self._streams[number]:
                queue.put_nowait((number, delta, None))
                if number not in self._open:
                    break
        except Exception as error:  # raised again where the deltas are read
            queue.put_nowait((number, None, error))
            return
        queue.put_nowait((number, None, None))

    def end(self, number: int) -> None:
        """This one has said enough (a stop text): the engine need not go on."""
        self._open.discard(number)

    def _observe(self, number: int, delta: Delta) -> None:
        count = len(delta.tokens)
        now = time.monotonic()
        metrics, last = self.service.metrics, self._last[number]
        if count:
            if last:
                metrics.next_token.observe((now - last) / count, count)
            else:
                metrics.first_token.observe(now - self.started)
            self._last[number] = now
            self.num_tokens += count
            metrics.generated_tokens += count
        if delta.finish_reason == "error":
            raise RuntimeError(delta.error or "the engine gave up")
        if delta.finish_reason == "abort":
            raise ApiError(503, "the server ended this answer: it is going down", retry_after_seconds=5)
        if delta.finish_reason is not None:
            self._open.discard(number)

    async def close(self) -> None:
        """Cancel what still runs. A second call does nothing."""
        tasks, self._tasks = self._tasks, []
        streams, self._streams = self._streams, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]

    async def __aenter__(self) -> Exchange:
        self._timeout = asyncio.timeout(self.service.limits.request_seconds)
        await self._timeout.__aenter__()
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        await self.close()
        assert self._timeout is not None
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            self.service.metrics.timeouts += 1
            raise ApiError(504, self._late(), code="timeout") from None

    def _late(self) -> str:
        """Which stage took too long."""
        stage = (
            f"writing the answer ({self.num_tokens} tokens so far)"
            if self.num_tokens
            else "waiting for the first token"
        )
        stats = self.service.engine.stats()
        queue = "" if self.num_tokens else f" ({stats.running} running, {stats.waiting} waiting)"
        return f"not done within {self.service.limits.request_seconds:g} s: {stage}{queue}"
