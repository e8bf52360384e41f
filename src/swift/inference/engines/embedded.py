"""The embedded engine behind the protocol: `EmbeddedCore` in a thread of its own.

The event loop puts commands into an inbox; the thread carries them out between steps and hands all news of a step to
the loop in one call. Deltas that wait for a slow reader are joined.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from swift.config.schema import Resolved
from swift.config.sections.engine import EngineSection
from swift.core.errors import ConfigError, SwiftError
from swift.core.logging import get_logger
from swift.inference.context import InferenceContext, load_context
from swift.inference.engines.base import Delta, EngineBusy, EngineStats, Request
from swift.inference.engines.embedded_core import EmbeddedCore, Event
from swift.models.load import ModelBundle

__all__ = ["EmbeddedEngine", "make"]

logger = get_logger(__name__)

_START_SECONDS = 600.0
_COMMAND_SECONDS = 300.0


@dataclass
class _Stream:
    """What the reader of one request has not taken yet."""

    request: Request
    deltas: list[Delta] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Exception | None = None


class EmbeddedEngine:
    """Answers requests with a model in this process.

    Args:
        load: makes the model; called in the engine's thread by `start`.
        options: limits.
        task, answers: as for `EmbeddedCore`.
    """

    def __init__(
        self,
        load: Callable[[], ModelBundle],
        options: EngineSection | None = None,
        *,
        task: str = "causal_lm",
    ) -> None:
        self._load, self._options, self._task = load, options or EngineSection(), task
        self._core: EmbeddedCore | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._num_queued = 0  # added by the loop, not yet seen by the thread
        self._is_closing = self._stops = False
        self._leaving: dict[str, Future[None]] = {}
        self._thread = threading.Thread(target=self._work, name="swift-engine", daemon=True)
        self._ready: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- the loop's side --------------------------------------------------------------------------------------

    @property
    def core(self) -> EmbeddedCore:
        """The synchronous engine. Only its immutable facts may be read while the thread runs."""
        if self._core is None:
            raise RuntimeError("the engine has not been started")
        return self._core

    @property
    def max_model_len(self) -> int:
        return self.core.max_model_len

    async def start(self) -> None:
        """Load the model. Raises SwiftError when that fails or takes longer than ten minutes."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._ready), _START_SECONDS)
        except TimeoutError:
            raise SwiftError(
                "the engine is not ready",
                where="loading the model",
                why=f"{_START_SECONDS:.0f} s have passed",
            ) from None

    def submit(self, request: Request) -> AsyncIterator[Delta]:
        """See `InferenceEngine.submit`. A grammar is compiled in another thread: when it is bad, ConfigError comes
        with the first delta asked for."""
        if self._is_closing:
            raise EngineBusy("the engine is shutting down")
        if request.id in self._streams:
            raise ConfigError(f"there is a request {request.id!r} already")
        if self._num_queued + self.core.num_waiting >= self._options.max_waiting:
            raise EngineBusy(f"{self._options.max_waiting} requests are waiting")
        self.core.check(request)
        stream = self._streams[request.id] = _Stream(request)
        if request.sampling.grammar is None:
            self._enqueue(stream, None)
        return self._read(stream)

    def _enqueue(self, stream: _Stream, grammar: Any) -> None:
        self._num_queued += 1

        def add() -> None:
            self._num_queued -= 1
            try:
                self.core.add(stream.request, grammar)
            except (SwiftError, EngineBusy) as error:
                stream.failure = error
                self._tell([])

        self._inbox.put(add)

    async def _read(self, stream: _Stream) -> AsyncIterator[Delta]:
        request, is_over = stream.request, False
        try:
            if request.sampling.grammar is not None:
                grammar = await asyncio.to_thread(self.core.compiler.compile, request.sampling.grammar)
                self._enqueue(stream, grammar)
            while not is_over:
                await stream.news.wait()
                stream.news.clear()
                if stream.failure is not None:
                    is_over = True
                    raise stream.failure
                waiting, stream.deltas = stream.deltas, []
                if waiting:
                    is_over = waiting[-1].finish_reason is not None
                    yield waiting[0] if len(waiting) == 1 else _joined(waiting)
        finally:
            self._streams.pop(request.id, None)
            if not is_over:
                self._inbox.put(lambda: self.core.abort(request.id))

    async def pool(
        self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None
    ) -> list[list[float]]:
        """See `InferenceEngine.pool`."""
        return await self._call(lambda: self.core.pool(prompts, adapter=adapter), "pooling")

    async def load_adapter(self, name: str, folder: Path) -> None:
        """See `InferenceEngine.load_adapter`."""
        await self._call(lambda: self.core.load_adapter(name, folder), f"loading adapter {name}")

    async def unload_adapter(self, name: str) -> None:
        """See `InferenceEngine.unload_adapter`."""
        gone: Future[None] = Future()

        def leave() -> None:
            self.core.unload_adapter(name)
            self._leaving[name] = gone

        await self._call(leave, f"unloading adapter {name}")
        await asyncio.wait_for(asyncio.wrap_future(gone), _COMMAND_SECONDS)

    def adapters(self) -> dict[str, Path]:
        """The loaded adapters."""
        return self.core.adapters()

    def stats(self) -> EngineStats:
        """How it stands now."""
        return self.core.stats()

    async def close(self, *, drain_seconds: float = 0.0) -> None:
        """See `InferenceEngine.close`."""
        self._is_closing = True
        end = time.monotonic() + drain_seconds
        while self._streams and time.monotonic() < end and self._thread.is_alive():
            await asyncio.sleep(0.02)
        self._stops = True
        self._inbox.put(lambda: None)
        await asyncio.to_thread(self._thread.join, _COMMAND_SECONDS)
        for stream in list(self._streams.values()):
            stream.deltas.append(Delta(finish_reason="abort"))
            stream.news.set()

    async def _call(self, command: Callable[[], Any], stage: str) -> Any:
        """Have the thread carry out a command between two steps."""
        if self._stops:
            raise EngineBusy("the engine is shutting down")
        result: Future[Any] = Future()

        def carry_out() -> None:
            try:
                result.set_result(command())
            except Exception as error:  # whoever asked gets it
                result.set_exception(error)

        self._inbox.put(carry_out)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(result), _COMMAND_SECONDS)
        except TimeoutError:
            raise SwiftError(
                "the engine does not answer", where=stage, why=f"{_COMMAND_SECONDS:.0f} s have passed"
            ) from None

    # -- the thread's side ------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._core = EmbeddedCore(self._load(), self._options, task=self._task, answers=self._answers)
        except BaseException as error:  # handed over to `start`, which raises it
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        core = self._core
        while not self._stops:
            try:
                while not self._inbox.empty() or not core.has_work:
                    self._inbox.get()()
                    if self._stops:
                        return
                self._tell(core.step())
            except Exception as error:  # a mistake of ours must not silence everybody for ever
                logger.exception("the engine failed in a step")
                self._tell(core.fail_all(error))
            for name in [name for name in self._leaving if name not in core.adapters()]:
                self._leaving.pop(name).set_result(None)

    def _tell(self, events: list[Event]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        for request_id, delta in events:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.deltas.append(delta)
                stream.news.set()
        if not events:
            for stream in self._streams.values():
                if stream.failure is not None:
                    stream.news.set()


def _joined(deltas: Sequence[Delta]) -> Delta:
    """One delta that says what several say."""
    last = deltas[-1]
    return Delta(
        tuple(token for delta in deltas for token in delta.tokens),
        tuple(info for delta in deltas for info in delta.infos),
        deltas[0].prompt_infos,
        last.finish_reason,
        last.error,
    )


def make(context: InferenceContext, resolved: Resolved) -> EmbeddedEngine:
    """For the table of engines: the model of a context."""
    load = partial(load_context, context, resolved)
    return EmbeddedEngine(load, resolved.config.engine, task=context.task, answers=context.answers)
