"""An engine whose answers are written in advance, and a server around it on a real socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from swift.core.errors import ConfigError, SwiftError
from swift.inference.engines.base import Delta, EngineBusy, EngineStats, Request, TokenInfo
from swift.inference.server.app import create_app
from swift.inference.server.service import Service

Script = Callable[[Request], str | Sequence[int]]


class ScriptedEngine:
    """Answers as ``script`` says, token for token, and remembers what it was asked.

    Attributes:
        gate: cleared, no answer goes beyond its first token.
        chunk: tokens in each delta.
        log-probabilities: of a token t: -t / 1000; alternatives are t + 1, t + 2...
    """

    def __init__(self, tokenizer: Any, script: Script, *, max_running: int = 64) -> None:
        self.tokenizer, self.script, self.max_running = tokenizer, script, max_running
        self.requests: list[Request] = []
        self.open: set[str] = set()
        self.cancelled: list[str] = []
        self.folders: dict[str, Path] = {}
        self.chunk = 1
        self.fault: Exception | None = None
        self.held = threading.Event()  # set: answers wait after their first token
        self.max_model_len = 512
        self.closed, self.is_alive = False, True
        self.started = asyncio.Event()

    async def start(self) -> None:
        self.started.set()

    def submit(self, request: Request) -> AsyncIterator[Delta]:
        if len(self.open) >= self.max_running:
            raise EngineBusy(f"{len(self.open)} requests")
        grammar = request.sampling.grammar
        if grammar is not None and grammar.text == "(":
            raise ConfigError("the regular expression is not valid")
        self.requests.append(request)
        self.open.add(request.id)
        return _Answer(self, request)

    async def pool(
        self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None
    ) -> list[list[float]]:
        return [[float(sum(prompt) % 7) - 3] for prompt in prompts]

    async def load_adapter(self, name: str, folder: Path) -> None:
        if not folder.is_dir():
            raise SwiftError("no such folder", where=str(folder))
        self.folders[name] = folder

    async def unload_adapter(self, name: str) -> None:
        del self.folders[name]

    def adapters(self) -> dict[str, Path]:
        return dict(self.folders)

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.open), requests_total=len(self.requests), cache_tokens=1000)

    async def close(self, *, drain_seconds: float = 0.0) -> None:
        self.closed = True


class _Answer:
    """The deltas of one request."""

    def __init__(self, engine: ScriptedEngine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.deltas = self._deltas()

    def __aiter__(self) -> _Answer:
        return self

    async def __anext__(self) -> Delta:
        return await self.deltas.__anext__()

    async def aclose(self) -> None:
        if self.request.id in self.engine.open:
            self.engine.open.discard(self.request.id)
            self.engine.cancelled.append(self.request.id)
        await self.deltas.aclose()

    async def _deltas(self) -> AsyncIterator[Delta]:
        engine, sampling = self.engine, self.request.sampling
        if engine.fault is not None:
            raise engine.fault
        answer = engine.script(self.request)
        ids = list(answer) if not isinstance(answer, str) else engine.tokenizer.encode(answer)
        end = [sampling.stop_token_ids[0]] if sampling.stop_token_ids else []
        ids = [*ids, *end]
        reason = "length" if len(ids) > sampling.max_tokens or not end else "stop"
        ids = ids[: sampling.max_tokens]
        first = True
        for start in range(0, len(ids), engine.chunk):
            tokens = tuple(ids[start : start + engine.chunk])
            last = start + engine.chunk >= len(ids)
            infos = tuple(self._info(token, sampling.logprobs) for token in tokens)
            prompt = self.request.prompt[1:] if first and sampling.prompt_logprobs is not None else ()
            yield Delta(
                tokens,
                infos if sampling.logprobs is not None else (),
                tuple(self._info(token, sampling.prompt_logprobs) for token in prompt),
                reason if last else None,  # type: ignore[arg-type]
            )
            if last:
                engine.open.discard(self.request.id)
            first = False
            await asyncio.sleep(0)
            while engine.held.is_set() and not engine.closed:
                await asyncio.sleep(0.005)
            if engine.closed and not last:
                yield Delta(finish_reason="abort")
                return

    def _info(self, token: int, number: int | None) -> TokenInfo:
        top = tuple((token + step, -(token + step) / 1000) for step in range(number or 0))
        return TokenInfo(token, -token / 1000, top)


@contextmanager
def running(
    service: Service, keys: Sequence[str] = (), *, start: bool = False, **settings: Any
) -> Iterator[str]:
    """The service on a free port of this machine; gives its URL. ``start``: its engine is real and must be."""
    config = uvicorn.Config(
        create_app(service, keys=keys), port=0, log_config=None, lifespan="off", **settings
    )
    server = uvicorn.Server(config)
    started = threading.Event()

    async def run() -> None:
        if start:
            await service.engine.start()
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.002)
        started.set()
        await task
        if start:
            await service.engine.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(120)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def with_limits(service: Service, **limits: Any) -> Service:
    """The same service with other limits."""
    return replace(service, limits=replace(service.limits, **limits))
