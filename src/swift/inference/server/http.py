"""HTTP around the routes, without a framework's cost for each token: who may come in, how large a body may be,
streams of server-sent events, and what happens when a client goes away."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swift.core.logging import get_logger
from swift.inference.server.errors import ApiError
from swift.inference.server.service import Service

__all__ = ["EventStream", "Gate", "fault_of", "log_fault", "refusal", "request_id", "unless_gone"]

logger = get_logger(__name__)
T = TypeVar("T")
OPEN_ROUTES = ("/health",)
"""Routes that need no key, and answer while the server is not ready."""
CLIENT_GONE = 499


def refusal(error: ApiError) -> Response:
    """The answer to a request that is refused."""
    headers = dict(error.headers)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    # Escaped: a text of the request that is quoted may hold what UTF-8 has no place for.
    return Response(json.dumps(error.body()), error.status, headers, "application/json")


def fault_of(identity: str) -> ApiError:
    """A fault of ours, as the client hears of it: an id that leads to the traceback in the log."""
    return ApiError(500, f"internal error; its id in the server's log is {identity}", code=identity)


def log_fault(scope: Scope) -> None:
    """The exception being handled, once for each request."""
    if not scope["state"].get("is_logged"):
        scope["state"]["is_logged"] = True
        logger.exception("request %s failed: %s", scope["state"]["request_id"], scope["path"])


def is_allowed(header: str, keys: Sequence[str]) -> bool:
    """Whether an Authorization header has one of the keys; the time taken tells nothing about them."""
    kind, _, given = header.partition(" ")
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    return kind.lower() == "bearer" and any(matches)


class Gate:
    """In front of all routes: readiness, key, number and size of requests; counts and logs what comes out."""

    def __init__(
        self, app: ASGIApp, service: Service, keys: Sequence[str] = (), verbose: bool = False
    ) -> None:
        self.app, self.service, self.keys, self.verbose = app, service, tuple(keys), verbose

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        started, identity = time.monotonic(), uuid.uuid4().hex[:16]
        scope["state"] = {**scope.get("state", {}), "request_id": identity}
        status = 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
            await send(message)

        self.service.open_requests += 1
        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self.app(scope, _replayed(body, receive), tell)
        except ApiError as error:
            await self._refuse(error, status, scope, receive, tell)
        except Exception:
            log_fault(scope)
            await self._refuse(fault_of(identity), status, scope, receive, tell)
        finally:
            self.service.open_requests -= 1
            self._count(scope, status, time.monotonic() - started, identity)

    def _check(self, scope: Scope) -> None:
        if scope["path"] in OPEN_ROUTES:
            return
        headers = dict(scope["headers"])
        if self.keys and not is_allowed(headers.get(b"authorization", b"").decode("latin-1"), self.keys):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        if self.service.state != "ready":
            said = "is loading its model" if self.service.state == "starting" else "is going down"
            raise ApiError(503, f"the server {said}", retry_after_seconds=5)
        if self.service.open_requests > self.service.limits.open_requests:
            raise ApiError(429, "too many requests at once", retry_after_seconds=1)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self.service.limits.body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.service.limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(CLIENT_GONE, "the client left before its request was complete")
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
                    if size > limit:
                        raise too_large
        except TimeoutError:
            seconds = self.service.limits.body_seconds
            raise ApiError(408, f"the body did not arrive within {seconds:g} s") from None
        return b"".join(parts)

    async def _refuse(self, error: ApiError, status: int, scope: Scope, receive: Receive, send: Send) -> None:
        if not status:  # nothing has been said yet
            await refusal(error)(scope, receive, send)

    def _count(self, scope: Scope, status: int, seconds: float, identity: str) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.service.metrics.requests[route, status or CLIENT_GONE] += 1
        if self.verbose:
            path, method = scope["path"], scope["method"]
            logger.info("%s %s %s %s %.3f s", identity, method, path, status or CLIENT_GONE, seconds)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once, and then what comes (that the client has gone)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, service: Service, work: Awaitable[T]) -> T:
    """``work``, given up when the client goes away. Raises ApiError 499 then, which nobody reads."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        service.metrics.disconnects += 1
        raise ApiError(CLIENT_GONE, "the client has gone")
    finally:
        for entry in (task, watch):
            entry.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. ``events`` gives the data of each, as text; errors become a last event.

    Args:
        service: counts clients that leave, which cancels the request.
        close: called at the end, however it comes.
    """

    def __init__(
        self,
        service: Service,
        events: Callable[[], AsyncIterator[str]],
        identity: str,
        close: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._service, self._events = service, events
        self._identity, self._close = identity, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(scope, receive, send))
        watch = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((writing, watch), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
            else:
                self._service.metrics.disconnects += 1
        finally:
            for entry in (writing, watch):
                entry.cancel()
            await asyncio.gather(writing, watch, return_exceptions=True)
            await self._close()

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. What fails before the first is refused with a status of its own."""
        events, begun = self._events(), False
        try:
            async for data in events:
                if not begun:
                    begun = True
                    head = {"status": self.status_code, "headers": self.raw_headers}
                    await send({"type": "http.response.start", **head})
                await _send_text(send, f"data: {data}\n\n")
            last = "data: [DONE]\n\n"
        except ApiError as error:
            if not begun:
                await refusal(error)(scope, receive, send)
                return
            last = f"data: {json.dumps(error.body())}\n\n"
        except Exception:
            if not begun:
                raise
            log_fault(scope)
            last = f"data: {json.dumps(fault_of(self._identity).body())}\n\n"
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        await _send_text(send, last, more=False)


async def _send_text(send: Send, text: str, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": more})


def request_id(request: Request) -> str:
    """The id that logs and headers have for it."""
    state: dict[str, Any] = request.scope["state"]
    return str(state["request_id"])
