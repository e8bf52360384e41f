"""A server from its first log line to its last: sockets, readiness, throughput lines, graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from swift.core.errors import ConfigError
from swift.core.files import atomic_write_json
from swift.core.logging import get_logger
from swift.core.process import ProcessIdentity
from swift.inference.server.service import Service

__all__ = ["Listening", "bind", "serve"]

logger = get_logger(__name__)
DRAIN_POLL_SECONDS = 0.05
CUT_SECONDS, GOODBYE_SECONDS = 1, 0.5
"""At the end: for connections with an answer that is cut off, and for those without one that stay open."""


@dataclass(frozen=True)
class Listening:
    """Where and how a server listens.

    Attributes:
        port: 0 takes a free one.
        drain_seconds: for running requests, once the end is asked for.
        log_interval_seconds: between lines of throughput while it is busy.
        ready_file: written when the server answers, removed at its end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    drain_seconds: float = 20.0
    log_interval_seconds: float = 20.0
    ready_file: Path | None = None

    @property
    def scheme(self) -> str:
        """``http``, or ``https`` with a certificate."""
        return "https" if self.ssl_certfile else "http"


def bind(listening: Listening) -> socket.socket:
    """The socket; bound before anything slow happens. Raises ConfigError when the address is taken or is none."""
    family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((listening.host, listening.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {listening.host} port {listening.port}",
            where="--port" if error.errno in (98, 13) else "--host",
            why=error.strerror,
            fix="--port 0 takes a free one",
        ) from error
    return listener


async def serve(
    app: ASGIApp,
    service: Service,
    listening: Listening,
    listener: socket.socket,
    start: Callable[[], Awaitable[None]],
    on_ready: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends it at once.

    Requests are answered with 503 until ``start`` has returned, and again once the end is asked for.

    Args:
        start: gets engine and models ready.
        on_ready: told the URL.

    Raises what ``start`` raises, with the server closed again.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ssl_keyfile=listening.ssl_keyfile,
        ssl_certfile=listening.ssl_certfile,
        timeout_graceful_shutdown=CUT_SECONDS,
        server_header=False,
    )
    server = _Server(config, service, listening.drain_seconds)
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("the certificate cannot be used", where="--ssl_certfile", why=str(error)) from error
    host, port = listener.getsockname()[:2]
    url = f"{listening.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    service.state = "starting"
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.ensure_future(start())
    try:
        await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            if service.state == "starting":
                service.state = "ready"
                _write_ready_file(listening, url)
                on_ready(url)
            reporting = asyncio.create_task(_report(service, listening.log_interval_seconds))
            await serving
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
    finally:
        if not starting.done():
            starting.cancel()
        server.should_exit = True
        await asyncio.gather(serving, starting, return_exceptions=True)
        await service.engine.close()
        if listening.ready_file is not None:
            listening.ready_file.unlink(missing_ok=True)


class _Server(uvicorn.Server):
    """uvicorn's, with an end that lets running answers be completed while new requests hear 503."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of SIGTERM and SIGINT: the first lets answers be completed, the second ends them, the third everything."""
        if self._service.state == "ready":
            self._service.state = "draining"
            self._loop.call_soon_threadsafe(self._begin)
        elif self._service.state == "draining" and not (self._hurry.is_set() or self.should_exit):
            self._loop.call_soon_threadsafe(self._hurry.set)
        elif self._service.state == "starting" and not self.should_exit:
            self.should_exit = True
        else:  # a model that takes its time to load cannot be asked to stop
            os._exit(128 + sig)

    def _begin(self) -> None:
        open_requests = self._service.open_requests
        logger.info("going down%s", f": {open_requests} running requests first" if open_requests else "")
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        started = time.monotonic()
        if not await self._all_answered(self._drain_seconds, self._hurry):
            seconds = time.monotonic() - started
            logger.warning("%d requests are cut off after %.1f s", self._service.open_requests, seconds)
            # They hear 503, or an error as the last event of a stream: uvicorn would only close their connections.
            await self._service.engine.close()
            await self._all_answered(CUT_SECONDS)
        self.should_exit = True

    async def _all_answered(self, seconds: float, hurry: asyncio.Event | None = None) -> bool:
        """Wait until no request is open. False when that takes too long, or somebody is in a hurry."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._service.open_requests and not (hurry and hurry.is_set()):
                    await asyncio.sleep(DRAIN_POLL_SECONDS)
        return not self._service.open_requests

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close everything. Clients that are owed no answer are not waited for: TLS asks them to say goodbye, which
        an idle one does not hear, and uvicorn would report an error."""
        goodbye = self._loop.call_later(GOODBYE_SECONDS, self._drop_idle)
        try:
            await super().shutdown(sockets)
        finally:
            goodbye.cancel()

    def _drop_idle(self) -> None:
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", self)  # HTTP/1's; what has none is left alone
            if connection.transport and (cycle is None or getattr(cycle, "response_complete", False)):
                connection.transport.abort()


def _write_ready_file(listening: Listening, url: str) -> None:
    if listening.ready_file is None:
        return
    listening.ready_file.parent.mkdir(parents=True, exist_ok=True)
    record = {**ProcessIdentity.of(os.getpid()).to_dict(), "url": url, "ready": time.time()}
    atomic_write_json(listening.ready_file, record)


async def _report(service: Service, seconds: float) -> None:
    """A line of throughput every so often, while there is any."""
    if seconds <= 0:
        return
    metrics = service.metrics
    before = (metrics.prompt_tokens, metrics.generated_tokens)
    while True:
        await asyncio.sleep(seconds)
        now = (metrics.prompt_tokens, metrics.generated_tokens)
        if now != before:
            stats = service.engine.stats()
            logger.info(
                "%.1f tokens/s written, %.1f read; %d running, %d waiting, cache %d of %d tokens",
                (now[1] - before[1]) / seconds,
                (now[0] - before[0]) / seconds,
                stats.running,
                stats.waiting,
                stats.cache_tokens_used,
                stats.cache_tokens,
            )
        before = now
