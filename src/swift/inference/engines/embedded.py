"""The embedded engine behind the protocol: `EmbeddedCore` in a thread of its own.

The event loop puts commands into an inbox; the thread carries them out between steps and hands all news of a step to
the loop in one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from pathlib import Path
from typing import Any

from swift.config.schema import Resolved
from swift.config.sections.engine import EngineSection
from swift.config.sections.task import TaskSection
from swift.core.errors import ConfigError, SwiftError, TransientError
from swift.core.logging import get_logger
from swift.inference.context import InferenceContext, load_context
from swift.inference.engines.base import Delta, EngineBusy, EngineClosing, EngineStats, Request
from swift.inference.engines.embedded_core import EmbeddedCore, Event
from swift.inference.engines.embedded_grammar import GrammarState
from swift.models.load import ModelBundle

__all__ = ["EmbeddedEngine", "make"]

logger = get_logger(__name__)

_START_SECONDS = 600.0
_COMMAND_SECONDS = 300.0


class EmbeddedEngine:
    """Answers requests with a model in this process.

    Args:
        load: makes the model; called in the engine's thread by `start`.
        options: limits.
        task: what the model was trained for; default: to write text.
    """

    def __init__(
        self,
        load: Callable[[], ModelBundle],
        options: EngineSection | None = None,
        *,
        task: TaskSection | None = None,
    ) -> None:
        self._load, self._options, self._task = load, options or EngineSection(), task
        self._core: EmbeddedCore | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._num_queued = 0  # added by the loop, not yet seen by the thread
        self._is_closing = self._stops = False
        self._pools: list[tuple[list[Sequence[int]], str | None, Future[list[list[float]]]]] = []
        self._leaving: dict[str, Future[None]] = {}
        self._waits: set[Future[Any]] = set()
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

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

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
            raise EngineClosing("the engine is shutting down")
        if request.id in self._streams:
            raise ConfigError(f"there is a request {request.id!r} already")
        if self.core.is_full(self._num_queued):
            raise EngineBusy(f"{self.core.num_open + self._num_queued} requests are running and waiting")
        self.core.check(request)
        stream = self._streams[request.id] = _Stream(self, request)
        if request.sampling.grammar is None:
            self._enqueue(stream, None)
        return stream

    def _enqueue(self, stream: _Stream, grammar: GrammarState | None) -> None:
        self._num_queued += 1

        def add() -> None:
            self._num_queued -= 1
            try:
                self.core.add(stream.request, grammar)
            except SwiftError as error:
                self._later(stream.fail, error)

        self._inbox.put(add)

    def _drop(self, stream: _Stream) -> None:
        """The reader is gone before the answer has ended."""
        self._streams.pop(stream.request.id, None)
        self._inbox.put(lambda: self.core.abort(stream.request.id))

    async def pool(
        self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None
    ) -> list[list[float]]:
        """See `InferenceEngine.pool`. Calls that come while the engine is busy are computed together."""
        result: Future[list[list[float]]] = Future()
        self._inbox.put(lambda: self._pools.append((list(prompts), adapter, result)))
        return await self._wait(result, "pooling")

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
        await self._wait(gone, f"unloading adapter {name}: its requests")

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
        for result in list(self._waits):  # commands that the thread has not come to
            with contextlib.suppress(InvalidStateError):
                result.set_exception(EngineClosing("the engine is shutting down"))
        for stream in list(self._streams.values()):
            stream.put(Delta(finish_reason="abort"))
        self._streams.clear()

    async def _call(self, command: Callable[[], Any], stage: str) -> Any:
        """Have the thread carry out a command between two steps."""
        result: Future[Any] = Future()
        self._inbox.put(lambda: _settle(result, command))
        return await self._wait(result, stage)

    async def _wait(self, result: Future[Any], stage: str) -> Any:
        if self._is_closing:
            raise EngineClosing("the engine is shutting down")
        self._waits.add(result)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(result), _COMMAND_SECONDS)
        except TimeoutError:
            why = f"{_COMMAND_SECONDS:.0f} s have passed"
            raise TransientError("the engine does not answer", where=stage, why=why) from None
        finally:
            self._waits.discard(result)

    # -- the thread's side ------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._core = EmbeddedCore(self._load(), self._options, task=self._task)
        except BaseException as error:  # handed over to `start`, which raises it
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        core = self._core
        while not self._stops:
            try:
                while not self._inbox.empty() or not (core.has_work or self._pools):
                    self._inbox.get()()
                    if self._stops:
                        return
                    self._let_go(core)
                self._pool_all(core)
                self._tell(core.step())
            except Exception as error:  # a mistake of ours must not silence everybody for ever
                logger.exception("the engine failed in a step")
                self._tell(core.fail_all(error))
            self._let_go(core)

    def _let_go(self, core: EmbeddedCore) -> None:
        """Tell those who wait for adapters to be gone."""
        for name in [name for name in self._leaving if name not in core.adapters()]:
            _settle(self._leaving.pop(name), lambda: None)

    def _pool_all(self, core: EmbeddedCore) -> None:
        """Answer the calls of `pool`, those for one adapter together; where that fails, one by one."""
        calls, self._pools = self._pools, []
        for adapter in dict.fromkeys(name for _, name, _ in calls):
            mine = [(prompts, result) for prompts, name, result in calls if name == adapter]
            try:
                values = core.pool([one for prompts, _ in mine for one in prompts], adapter=adapter)
            except (SwiftError, RuntimeError, MemoryError):
                for prompts, result in mine:
                    _settle(result, partial(core.pool, prompts, adapter=adapter))
                continue
            start = 0
            for prompts, result in mine:
                _settle(result, partial(values.__getitem__, slice(start, start + len(prompts))))
                start += len(prompts)

    def _tell(self, events: list[Event]) -> None:
        if events:
            self._later(self._deliver, events)

    def _later(self, call: Callable[[Any], None], value: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is there to be told
            self._loop.call_soon_threadsafe(call, value)

    def _deliver(self, events: list[Event]) -> None:
        for request_id, delta in events:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put(delta)
                if delta.finish_reason is not None:
                    del self._streams[request_id]


class _Stream:
    """The deltas of one request as they come; those that wait for a slow reader are joined.

    Args:
        engine: whose request it is.
        request: the request.
    """

    def __init__(self, engine: EmbeddedEngine, request: Request) -> None:
        self.request, self._engine = request, engine
        self._deltas: list[Delta] = []
        self._news = asyncio.Event()
        self._failure: Exception | None = None
        self._needs_grammar = request.sampling.grammar is not None
        self._is_over = False

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Delta:
        if self._is_over:
            raise StopAsyncIteration
        try:
            if self._needs_grammar:
                assert self.request.sampling.grammar is not None
                compiler, self._needs_grammar = self._engine.core.compiler, False
                grammar = await asyncio.to_thread(compiler.compile, self.request.sampling.grammar)
                self._engine._enqueue(self, grammar)
            await self._news.wait()
            if self._failure is not None:
                raise self._failure
        except BaseException:  # the reader was cancelled, or there will be no answer
            await self.aclose()
            raise
        self._news.clear()
        deltas, self._deltas = self._deltas, []
        self._is_over = deltas[-1].finish_reason is not None
        return deltas[0] if len(deltas) == 1 else _joined(deltas)

    async def aclose(self) -> None:
        """Cancel the request where it has not ended. (Not a generator: it works before the first delta, too.)"""
        if not self._is_over:
            self._is_over = True
            self._engine._drop(self)

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._news.set()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._news.set()


def _settle(result: Future[Any], command: Callable[[], Any]) -> None:
    """What a command gives, or raises, for the one who waits (if he still does)."""
    if not result.set_running_or_notify_cancel():
        return
    try:
        result.set_result(command())
    except Exception as error:  # whoever asked gets it
        result.set_exception(error)


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
    return EmbeddedEngine(load, resolved.config.engine, task=context.task_options)
