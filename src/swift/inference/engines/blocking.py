"""Engines for callers without an event loop: chat in a terminal, batch inference, sampling."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from swift.inference.engines.base import Delta, FinishReason, InferenceEngine, Request, TokenInfo

__all__ = ["BlockingEngine", "Completion", "Writer"]


class Completion:
    """A whole answer: all deltas of a request together.

    Attributes: those of `Delta`. finish_reason is ``abort`` until the end has come.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.infos: list[TokenInfo] = []
        self.prompt_infos: tuple[TokenInfo, ...] = ()
        self.finish_reason: FinishReason = "abort"
        self.error: str | None = None

    def add(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self.infos += delta.infos
        self.prompt_infos = self.prompt_infos or delta.prompt_infos
        if delta.finish_reason is not None:
            self.finish_reason, self.error = delta.finish_reason, delta.error


class Writer(Protocol):
    """What callers need of an engine. `EmbeddedCore` is one; `BlockingEngine` makes one of any other."""

    @property
    def max_model_len(self) -> int: ...

    def generate(
        self, requests: Sequence[Request], on_delta: Callable[[int, Delta], None] = ...
    ) -> list[Completion]:
        """Answer requests together; ``on_delta(number, delta)`` may `abort` them."""
        ...

    def stream(self, request: Request) -> Iterator[Delta]:
        """One answer as it comes; closing the iterator early cancels it."""
        ...

    def abort(self, request_id: str) -> None: ...

    def close(self) -> None: ...


class BlockingEngine:
    """An engine of the asynchronous protocol, driven by the calling thread. It is started here.

    Args:
        engine: not started yet.
    """

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine, self._runner = engine, asyncio.Runner()
        self._aborted: set[str] = set()
        self._numbers = itertools.count()
        self._runner.run(engine.start())

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    def _submit(self, request: Request) -> AsyncIterator[Delta]:
        # The engine may still be ending a cancelled request of the same id: callers count from 0 each time.
        return self._engine.submit(dataclasses.replace(request, id=f"{next(self._numbers)}-{request.id}"))

    def generate(
        self, requests: Sequence[Request], on_delta: Callable[[int, Delta], None] = lambda index, delta: None
    ) -> list[Completion]:
        """See `Writer`. At most as many requests are under way as the engine answers at once."""

        async def answer(index: int, request: Request, places: asyncio.Semaphore) -> Completion:
            result = Completion()
            async with places:
                stream = self._submit(request)
                async for delta in stream:
                    result.add(delta)
                    on_delta(index, delta)
                    if request.id in self._aborted and delta.finish_reason is None:
                        await stream.aclose()  # type: ignore[attr-defined]
                        on_delta(index, Delta(finish_reason="abort"))
                        break
            return result

        async def all_of_them() -> list[Completion]:
            places = asyncio.Semaphore(self._engine.stats().max_running or 64)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(i, request, places)) for i, request in enumerate(requests)]
            return [task.result() for task in tasks]

        try:
            return self._runner.run(all_of_them())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self._aborted.clear()

    def stream(self, request: Request) -> Iterator[Delta]:
        """See `Writer`."""
        stream = self._submit(request)

        async def following() -> Delta | None:
            return await anext(stream, None)

        try:
            while (delta := self._runner.run(following())) is not None:
                yield delta
        finally:
            self._runner.run(stream.aclose())  # type: ignore[attr-defined]

    def abort(self, request_id: str) -> None:
        """End a request of `generate` at its next delta."""
        self._aborted.add(request_id)

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()
