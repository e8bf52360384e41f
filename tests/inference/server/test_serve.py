"""From the first line to the last: addresses, readiness, draining, certificates. In this process, with real signals."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from scripted import ScriptedEngine
from test_refusals import CHAT, HELLO, until

from swift.core.errors import ConfigError, ModelError
from swift.core.process import ProcessIdentity
from swift.inference.server.app import create_app
from swift.inference.server.serve import Listening, bind, serve
from swift.inference.server.service import Service


def served(service: Service, listening: Listening, visit: Callable[[str], None]) -> list[BaseException]:
    """Serve until somebody sends a signal; ``visit`` runs in a thread once the server answers."""
    failures: list[BaseException] = []
    listener = bind(listening)
    threads = []

    def guarded(url: str) -> None:
        try:
            visit(url)
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    def ready(url: str) -> None:
        threads.append(threading.Thread(target=guarded, args=(url,)))
        threads[0].start()

    async def run() -> None:
        app = create_app(service)
        await asyncio.wait_for(serve(app, service, listening, listener, service.engine.start, ready), 60)

    asyncio.run(run())
    for thread in threads:
        thread.join(30)
    return failures


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_answers_are_completed_and_new_requests_hear_503(
    service: Service, engine: ScriptedEngine, tmp_path: Path, number: int
) -> None:
    file = tmp_path / "sub" / "serving.json"

    def visit(url: str) -> None:
        record = json.loads(file.read_text())
        assert record["url"] == url and record["pid"] == os.getpid()
        assert ProcessIdentity(record["pid"], record["start_time"], record["boot_id"]).is_alive()
        engine.held.set()
        with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}) as answer:
            until(lambda: bool(engine.open))
            os.kill(os.getpid(), number)
            until(lambda: service.state == "draining")
            assert httpx.post(url + CHAT, json={"messages": HELLO}).status_code == 503
            assert httpx.get(url + "/health").json() == {"status": "draining"}
            engine.held.clear()
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"

    listening = Listening(port=0, drain_seconds=30.0, ready_file=file)
    assert served(service, listening, visit) == []
    assert engine.closed and not file.exists() and not engine.open


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("signals", [1, 2])
def test_what_does_not_end_in_time_or_until_a_second_signal_hears_why(
    service: Service, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture, stream: bool, signals: int
) -> None:
    engine.held.set()
    seen: list[httpx.Response] = []

    def ask(url: str) -> None:
        seen.append(httpx.post(url + CHAT, json={"messages": HELLO, "stream": stream}, timeout=60))

    def visit(url: str) -> None:
        asking = threading.Thread(target=ask, args=(url,))
        asking.start()
        until(lambda: bool(engine.open))
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: service.state == "draining")
        if signals == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        asking.join(60)

    with caplog.at_level(logging.WARNING):
        assert served(service, Listening(port=0, drain_seconds=600.0 if signals == 2 else 0.05), visit) == []
    (answer,) = seen
    last = [line for line in answer.text.splitlines() if line][-1].removeprefix("data: ")
    assert answer.status_code == (200 if stream else 503)
    assert "it is going down" in json.loads(last)["error"]["message"]
    assert [record.getMessage()[:26] for record in caplog.records] == ["1 requests are cut off aft"]


def test_a_model_that_cannot_be_loaded_ends_the_server(service: Service, engine: ScriptedEngine) -> None:
    async def fail() -> None:
        raise ModelError("no weights")

    engine.start = fail  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="no weights"):
        served(service, Listening(port=0), lambda url: None)
    assert engine.closed


def test_addresses_that_cannot_be_had() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}") as caught:
            bind(Listening(port=port))
        assert caught.value.where == "--port"
    with pytest.raises(ConfigError) as caught:
        bind(Listening(host="203.0.113.1", port=0))
    assert caught.value.where == "--host"


def test_https(service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
        f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    )
    subprocess.run(command.split(), check=True, capture_output=True, timeout=60)
    import ssl

    def visit(url: str) -> None:
        assert url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(certificate))
        client = httpx.Client(verify=trusted)  # stays connected, and does not listen to TLS's goodbye
        clients.append(client)
        assert client.get(url + "/health").json() == {"status": "ready"}
        os.kill(os.getpid(), signal.SIGTERM)

    clients: list[httpx.Client] = []
    listening = Listening(port=0, ssl_keyfile=str(key), ssl_certfile=str(certificate))
    assert served(service, listening, visit) == []
    clients[0].close()
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    with pytest.raises(ConfigError, match="certificate"):
        served(service, Listening(port=0, ssl_keyfile=str(key), ssl_certfile=str(key)), lambda url: None)
