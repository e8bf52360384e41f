"""A small OpenAI server in a thread, whose answers a test decides."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["FakeServer", "chat_reply", "fake_server"]

Answer = Callable[[str, dict[str, Any], int], tuple[int, dict[str, str], Any]]
"""(path, body, number of the request) -> (status, headers, JSON)"""


def chat_reply(text: str, finish: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {
        "object": "chat.completion",
        "choices": [choice],
        "usage": {"completion_tokens": len(text.split())},
    }


class FakeServer(ThreadingHTTPServer):
    """``requests``: (path, body, headers) as they came; ``most_at_once``: requests in progress together."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.lock = threading.Lock()
        self.now = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._reply(200, {}, {"object": "list", "data": [{"id": "fake-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            number = len(server.requests)
            server.requests.append((self.path, body, dict(self.headers)))
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
        try:
            status, headers, value = server.answer(self.path, body, number)
        finally:
            with server.lock:
                server.now -= 1
        self._reply(status, headers, value)

    def _reply(self, status: int, headers: dict[str, str], value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "content-type": "application/json",
            **headers,
            "content-length": str(len(data)),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(data)


@contextlib.contextmanager
def fake_server(answer: Answer) -> Iterator[FakeServer]:
    server = FakeServer(answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
