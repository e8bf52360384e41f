"""One file over HTTP: goes on from the bytes held, watches for silence, checks the hash."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from swift.core.errors import HubError
from swift.core.format import format_bytes
from swift.hubs.refusals import refused, unreachable
from swift.hubs.types import Hub, HubFile, Patience, Repo

if TYPE_CHECKING:
    import ssl

    import httpx

__all__ = ["Cancelled", "Transfer", "is_intact", "reach", "within"]

T = TypeVar("T")
_BLOCK = 1 << 20
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class Cancelled(Exception):
    """Another file failed, or the user pressed Ctrl-C."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of ``call``, which runs in a thread; TimeoutError when it takes longer.

    Client libraries and the resolver of names have waits that nobody can shorten: such a thread is left behind.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:  # handed on to the caller below
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not result:
        raise TimeoutError
    return result[0]


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes longer than a request."""
    import httpx

    return httpx.create_ssl_context()


def reach(hub: Hub, patience: Patience) -> None:
    """Raise HubError within ``patience.reach`` seconds when the hub cannot be reached. Any answer will do."""
    import httpx

    def ask() -> int:
        return httpx.head(hub.endpoint, timeout=patience.reach, verify=_certificates()).status_code

    try:
        within(patience.reach, ask)
    except (httpx.TransportError, TimeoutError) as error:
        raise unreachable(hub, error, "the first contact", patience.reach) from error
    except httpx.InvalidURL as error:
        raise HubError("not an address", where=hub.endpoint, why=str(error)) from error


class Transfer:
    """Fetches files of one commit of one repository.

    Args:
        on_bytes: called with the number of bytes that came in (negative: thrown away).
        cancelled: set it to stop all files at the next block.
    """

    def __init__(
        self,
        hub: Hub,
        repo: Repo,
        commit: str,
        patience: Patience,
        on_bytes: Callable[[int], None],
        cancelled: threading.Event,
    ) -> None:
        import httpx

        self.hub, self.repo, self.commit, self.patience = hub, repo, commit, patience
        self._on_bytes, self._cancelled = on_bytes, cancelled
        timeout = httpx.Timeout(patience.stall, connect=patience.reach)
        limits = httpx.Limits(max_connections=patience.workers)
        self._client = httpx.Client(
            timeout=timeout, limits=limits, follow_redirects=True, verify=_certificates()
        )

    def close(self) -> None:
        self._client.close()

    def fetch(self, file: HubFile, part: Path) -> None:
        """Fill ``part`` until it is ``file``, from the bytes it holds already; then it is complete and on disk.

        Raises:
            HubError: the hub refuses the file, sends nothing for too long, or sends other content twice.
        """
        for attempt in range(2):
            self._fill(file, part)
            if is_intact(part, file):
                return
            self._on_bytes(-part.stat().st_size)
            part.unlink()
            if attempt == 0:
                continue
        name, expected = ("sha256", file.sha256) if file.sha256 else ("git hash", file.git_sha1)
        raise HubError(
            f"{file.path} came twice with content that is not the hub's",
            where=f"{self.hub.title} ({self.hub.endpoint})",
            why=f"its {name} is not {expected}",
            fix="the damaged file is deleted; try again later, or through another network or mirror",
        )

    def _fill(self, file: HubFile, part: Path) -> None:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        if part.stat().st_size > file.size:
            part.write_bytes(b"")
        failures = 0
        while (held := part.stat().st_size) < file.size:
            cause = self._try_once(file, part, held)
            if part.stat().st_size > held:
                failures = 0
            elif cause is not None:
                failures += 1
                if failures >= self.patience.attempts:
                    stage = f"{file.path}, after {format_bytes(held)} of {format_bytes(file.size)}"
                    raise unreachable(self.hub, cause, stage, self.patience.stall) from cause
                self._wait(self.patience.pause * 2 ** (failures - 1))

    def _wait(self, seconds: float) -> None:
        if self._cancelled.wait(seconds):
            raise Cancelled

    def _try_once(self, file: HubFile, part: Path, held: int) -> Exception | None:
        """One request; what was received is in ``part``. Returns why it ended early, if it did."""
        import httpx

        url, headers = self.hub.request(self.repo, self.commit, file.path)
        # Compression would make lengths and positions those of other bytes.
        headers = {**headers, "Accept-Encoding": "identity"}
        if held:
            headers["Range"] = f"bytes={held}-"
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                return self._receive(response, file, part, held)
        except httpx.TransportError as error:
            return error

    def _receive(self, response: httpx.Response, file: HubFile, part: Path, held: int) -> Exception | None:
        status = response.status_code
        if status in _BUSY:
            return HubError(f"HTTP {status}")
        starts_there = response.headers.get("Content-Range", "").startswith(f"bytes {held}-")
        if status == 416 or (status == 206 and not starts_there) or (status == 200 and held):
            self._on_bytes(-held)  # the server will not go on from here: from the start
            part.write_bytes(b"")
            if status != 200:
                return HubError(f"HTTP {status} for bytes from {held}")
        elif status not in (200, 206):
            raise refused(self.hub, self.repo, status, file.path, response.headers)
        with part.open("ab") as stream, contextlib.ExitStack() as after:
            after.callback(lambda: os.fsync(stream.fileno()))
            after.callback(stream.flush)
            left = file.size - stream.tell()
            # No block size: httpx would hold back a part of a block, and lose it when the connection is cut.
            for block in response.iter_bytes():
                if self._cancelled.is_set():
                    raise Cancelled
                stream.write(block[:left])
                self._on_bytes(min(left, len(block)))
                left -= len(block)
                if left < 0:
                    break
        return None if left <= 0 else ConnectionError("the connection was cut")


def is_intact(path: Path, file: HubFile) -> bool:
    """Whether size and hash are the hub's. A file for which the hub knows no hash is judged by its size."""
    size = path.stat().st_size
    if size != file.size:
        return False
    if file.sha256:
        digest = hashlib.sha256()
    elif file.git_sha1:
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        return True
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest() == (file.sha256 or file.git_sha1)
