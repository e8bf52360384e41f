"""A server on 127.0.0.1 that answers as Hugging Face and ModelScope do, and can misbehave on demand.

What it answers was written after what the installed client libraries read; tests drive it through them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 400


@dataclass
class FakeHub:
    """One repository ``owner/tiny``, and what goes wrong with it.

    Attributes:
        files: path -> content. Those ending in .safetensors or .parquet are LFS files.
        cuts: path -> numbers of bytes after which the connection is closed, one for each request.
        wrong: path -> how many times to send other bytes of the same length.
        busy: path -> how many times to answer 503.
        gated: 403 for files.
        token: asked for when set.
        silent: paths (or "list") whose answer never comes, until `close`.
        no_ranges: answer 200 with the whole file to a request for a part of it.
        log: (method, path with query, Range header) of every request.
    """

    files: dict[str, bytes]
    commit: str = COMMIT
    cuts: dict[str, list[int]] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None
    silent: set[str] = field(default_factory=set)
    no_ranges: bool = False
    log: list[tuple[str, str, str | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._released = threading.Event()
        hub = self

        class Handler(_Handler):
            fake = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def wait_for_ever(self) -> None:
        self._released.wait(120)

    def requests_for(self, path: str) -> list[str | None]:
        """Range headers of the requests for one file."""
        return [asked for method, url, asked in self.log if method == "GET" and path in unquote(url)]


def _key(path: str, content: bytes) -> str:
    """Hugging Face's name of a content: sha256 in LFS, else git's hash."""
    if path.endswith((".safetensors", ".parquet")):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        fake = self.fake
        url = urlsplit(self.path)
        fake.log.append((self.command, self.path, self.headers.get("Range")))
        parts, query = unquote(url.path).strip("/").split("/"), parse_qs(url.query)
        if parts == [""]:
            return self._send(200, b"hub")
        if fake.token and f"Bearer {fake.token}" != self.headers.get("Authorization"):
            return self._refuse(401, {"X-Error-Message": "Invalid credentials"})
        if parts[:2] == ["api", "v1"]:
            return self._modelscope(parts[2:], query)
        return self._hugging_face(parts)

    def _hugging_face(self, parts: list[str]) -> None:
        fake = self.fake
        if parts[0] == "api":
            kind, name, rest = parts[1], "/".join(parts[2:4]), parts[4:]
            if name != "owner/tiny" or kind not in ("models", "datasets"):
                return self._refuse(404, {"X-Error-Code": "RepoNotFound"})
            if "list" in fake.silent:
                return fake.wait_for_ever()
            if rest[:1] == ["revision"] and rest[1] not in ("main", fake.commit):
                return self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
            if rest[:1] == ["tree"]:
                return self._json([self._hf_entry(path) for path in fake.files])
            return self._json({"id": name, "sha": fake.commit, "siblings": []})
        if parts[0] == "datasets":
            parts = parts[1:]
        if parts[2:4] != ["resolve", fake.commit]:
            return self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        if fake.gated:
            return self._refuse(403, {"X-Error-Code": "GatedRepo"})
        return self._file("/".join(parts[4:]))

    def _hf_entry(self, path: str) -> dict[str, Any]:
        content = self.fake.files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
        if path.endswith((".safetensors", ".parquet")):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return entry

    def _modelscope(self, parts: list[str], query: dict[str, list[str]]) -> None:
        fake = self.fake
        if "/".join(parts[1:3]) != "owner/tiny" or query["Revision"][0] not in ("master", fake.commit):
            return self._json({"Code": 10010205001, "Success": False, "Message": "not found"}, 404)
        if parts[3:] == ["repo"]:
            if fake.gated:
                return self._json({"Code": 10010300004, "Success": False, "Message": "no permission"}, 403)
            return self._file(query["FilePath"][0])
        if "list" in fake.silent:
            return fake.wait_for_ever()
        files = [
            {
                "Path": path,
                "Name": path.rpartition("/")[2],
                "Type": "blob",
                "Size": len(content),
                "Sha256": hashlib.sha256(content).hexdigest(),
                "Revision": fake.commit,
                "CommittedDate": 1700000000,
            }
            for path, content in fake.files.items()
        ]
        return self._json({"Code": 200, "Success": True, "Data": {"Files": files}})

    def _file(self, path: str) -> None:
        fake = self.fake
        if path not in fake.files:
            return self._refuse(404, {"X-Error-Code": "EntryNotFound"})
        if path in fake.silent:
            return fake.wait_for_ever()
        if fake.busy.get(path):
            fake.busy[path] -= 1
            return self._refuse(503, {})
        content = fake.files[path]
        start = 0
        if (asked := self.headers.get("Range")) and not fake.no_ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        headers = {"ETag": f'"{_key(path, content)}"', "X-Repo-Commit": fake.commit}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fake.wrong.get(path):
            fake.wrong[path] -= 1
            body = bytes(byte ^ 1 for byte in body)
        cut = fake.cuts[path].pop(0) if fake.cuts.get(path) else None
        self._send(206 if start else 200, body, headers, cut)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self._send(status, b"{}", {"Content-Type": "application/json", **headers})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True
