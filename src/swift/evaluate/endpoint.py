"""A model behind any server that speaks OpenAI's HTTP: chat answers, and log-probabilities of given texts.

Requests run side by side, at most so many at once; what fails for the moment is tried again until a deadline.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift.core.errors import TransientError
from swift.core.logging import get_logger

__all__ = ["Endpoint", "EndpointError"]

logger = get_logger(__name__)

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_PAUSE_SECONDS = 30.0
_HELLO_SECONDS = 30.0
"""For the list of models: a server that is not there is told soon."""


class EndpointError(TransientError):
    """The server said no, or nothing in time."""


@dataclass
class Endpoint:
    """One model of one server.

    Attributes:
        url: up to and with ``/v1``; a longer one of a client's documentation (``.../chat/completions``) is cut.
        model: its name there; "": the first that the server lists.
        concurrency: requests at once.
        timeout_seconds: of one attempt.
        deadline_seconds: of one request with all its attempts.
        key_variable: environment variable with the API key.
    """

    url: str
    model: str = ""
    concurrency: int = 16
    timeout_seconds: float = 120.0
    deadline_seconds: float = 600.0
    key_variable: str = "OPENAI_API_KEY"
    retries: int = 0
    _first_pause_seconds: float = field(default=0.5, repr=False)

    def __post_init__(self) -> None:
        url = self.url.rstrip("/")
        for ending in ("/chat/completions", "/completions"):
            url = url.removesuffix(ending)
        self.url = url if url.endswith("/v1") or "/v1/" in url else f"{url}/v1"

    def find_model(self) -> str:
        """The model's name; asks the server when none was given. Raises EndpointError."""
        if not self.model:
            self.model = str(self._listed()[0].get("id"))
        return self.model

    def find_adapter(self) -> str:
        """The name of the adapter that a server of ours has beside its base, else that of its first model."""
        adapters = [entry for entry in self._listed() if entry.get("parent")]
        if adapters:
            self.model = str(adapters[0].get("id"))
        return self.find_model()

    def _listed(self) -> list[dict[str, Any]]:
        (listed,) = self._all([("GET", "/models", None)])
        entries = [entry for entry in listed.get("data") or () if isinstance(entry, dict)]
        if not entries:
            raise EndpointError("the server lists no models", where=self.url, fix="--eval_model NAME")
        return entries

    def chat(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The response to each ``/chat/completions`` body. Raises EndpointError with the first failure."""
        return self._all([("POST", "/chat/completions", {"model": self.find_model(), **b}) for b in bodies])

    def try_chat(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any] | EndpointError]:
        """As `chat`, but a failure stands in its place instead of ending all."""
        model = self.find_model()
        calls = [("POST", "/chat/completions", {"model": model, **body}) for body in bodies]
        return asyncio.run(self._gather(calls, keep_errors=True))

    def completions(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The response to each ``/completions`` body. Raises EndpointError with the first failure."""
        return self._all([("POST", "/completions", {"model": self.find_model(), **b}) for b in bodies])

    def _all(self, calls: Sequence[tuple[str, str, Any]]) -> list[dict[str, Any]]:
        return asyncio.run(self._gather(calls))

    async def _gather(self, calls: Sequence[tuple[str, str, Any]], keep_errors: bool = False) -> list[Any]:
        import httpx

        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        slots = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(headers=headers, timeout=self.timeout_seconds) as client:

            async def one(call: tuple[str, str, Any]) -> Any:
                async with slots:
                    return await self._request(client, *call)

            if keep_errors:
                return [
                    entry if not isinstance(entry, BaseException) else _endpoint_error(entry)
                    for entry in await asyncio.gather(*map(one, calls), return_exceptions=True)
                ]
            return await _first_failure_ends_all([one(call) for call in calls])

    async def _request(self, client: Any, method: str, path: str, body: Any) -> Any:
        """One request, tried again while the server is busy or away; at most until the deadline."""
        import httpx

        clock = asyncio.get_running_loop().time
        longest = self.deadline_seconds if body is not None else min(_HELLO_SECONDS, self.deadline_seconds)
        end, pause, attempt = clock() + longest, self._first_pause_seconds, 0
        while True:
            attempt += 1
            wait: float | None = None
            try:
                response = await client.request(
                    method,
                    self.url + path,
                    json=body,
                    timeout=min(self.timeout_seconds, max(0.1, end - clock())),
                )
                if response.is_success:
                    return _json(response, path)
                why = f"HTTP {response.status_code}: {response.text[:300].strip()}"
                if response.status_code not in _AGAIN:
                    raise EndpointError("the server refuses", where=self.url + path, why=why)
                wait = _retry_after(response)
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}".rstrip(": ")
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            wait = pause * random.Random().uniform(0.5, 1.0) if wait is None else wait
            if clock() + wait > end or (self.retries and attempt > self.retries):
                raise EndpointError(
                    f"no answer after {attempt} attempts", where=self.url + path, why=why,
                    fix="is the server up, and the address right?",
                )  # fmt: skip
            logger.warning("%s: %s; asked again in %.1f s", self.url + path, why, wait)
            await asyncio.sleep(wait)


async def _first_failure_ends_all(tasks: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    running = [asyncio.ensure_future(task) for task in tasks]
    try:
        return list(await asyncio.gather(*running))
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _endpoint_error(error: BaseException) -> EndpointError:
    """Failures of a request; anything else is a mistake of ours or a Ctrl-C and goes up."""
    if isinstance(error, EndpointError):
        return error
    raise error


def _json(response: Any, path: str) -> Any:
    try:
        return response.json()
    except ValueError:
        why = f"no JSON: {response.text[:100]!r}"
        raise EndpointError("the server's answer cannot be read", where=path, why=why) from None


def _retry_after(response: Any) -> float | None:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
