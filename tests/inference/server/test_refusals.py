"""Status codes, OpenAI's error body, limits, and what happens when a client or the server goes away."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted import ScriptedEngine, running, with_limits

from swift.inference.engines.base import Delta, EngineClosing
from swift.inference.server.service import Service

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    "body, status, said",
    [
        ({"messages": []}, 422, "messages"),
        ({}, 422, "messages"),
        ({"messages": HELLO, "temperature": "hot"}, 422, "temperature"),
        ({"messages": HELLO, "temperature": -1}, 422, "temperature"),
        ({"messages": HELLO, "n": 0}, 422, "n:"),
        ({"messages": HELLO, "temprature": 1}, 422, "temprature"),
        ({"messages": [{"content": "x"}]}, 422, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 7}]}, 422, "messages.0.content"),
        ({"messages": HELLO, "model": "other"}, 404, "these are served: tiny"),
        ({"messages": HELLO, "max_tokens": 0}, 400, "one token at least"),
        ({"messages": HELLO, "max_tokens": 5000}, 400, "takes 512 together"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "takes 512 together"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "wizard"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "Unicode"),
        ({"messages": HELLO, "model": "\ud800"}, 404, "no model"),
        ({"messages": HELLO, "guided_regex": "("}, 400, "not valid"),
        ({"messages": HELLO, "guided_regex": "a", "guided_choice": ["a"]}, 400, "one form only"),
        ({"messages": HELLO, "top_logprobs": 3}, 400, "logprobs: true"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 30}, 400, "tells 20"),
        ({"messages": HELLO, "logit_bias": {"9999": 1}}, 400, "no token"),
        ({"messages": HELLO, "logit_bias": {"5": 101}}, 422, "logit_bias"),
        ({"messages": HELLO, "n": 200}, 400, "gives 128"),
        ({"messages": HELLO, "tool_choice": "required"}, 400, "needs tools"),
        ({"messages": HELLO, "chat_template_kwargs": {"colour": 1}}, 400, "colour"),
        ({"messages": HELLO, "min_tokens": 5, "max_tokens": 4}, 400, "min_tokens"),
    ],
)
def test_what_cannot_be_answered(
    url: str, engine: ScriptedEngine, body: dict[str, Any], status: int, said: str
) -> None:
    for stream in (False, True):
        raw = json.dumps({**body, "stream": stream})
        answer = httpx.post(url + CHAT, content=raw, headers={"Content-Type": "application/json"})
        assert said in refused(answer, status)["message"]
    assert not engine.open


def test_the_fault_of_the_form_that_was_meant_is_told(url: str) -> None:
    error = refused(httpx.post(url + "/v1/embeddings", json={"model": "tiny", "input": []}), 422)
    assert "at least 1 item" in error["message"]


def test_prompts_that_are_too_long_have_openais_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 600)
    assert caught.value.code == "context_length_exceeded"


def test_not_json_and_no_such_route(url: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert "not JSON" in refused(httpx.post(url + CHAT, content=b"{", headers=headers), 400)["message"]
    refused(httpx.post(url + CHAT, content=b'{"messages": "\xff"}', headers=headers), 400)
    refused(httpx.get(url + "/v1/nothing"), 404)
    answer = httpx.get(url + CHAT)
    refused(answer, 405)
    assert "POST" in answer.headers["allow"]


def test_keys(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with running(service, keys=["first", "second"]) as url:
        for header in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}):
            answer = httpx.post(url + CHAT, json={"messages": HELLO}, headers=header)
            assert refused(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(url + "/health").status_code == 200
        assert httpx.get(url + "/metrics").status_code == 401
        with openai.OpenAI(base_url=f"{url}/v1", api_key="second") as client:
            assert client.models.list().data
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_limits_of_size(service: Service) -> None:
    small = with_limits(service, body_bytes=2000, prompt_tokens=20, answer_tokens=5)
    with running(small) as url:
        long = {"messages": [{"role": "user", "content": "x" * 3000}]}
        assert refused(httpx.post(url + CHAT, json=long), 413)["code"] == "request_too_large"

        def parts() -> Any:  # no content-length
            for _ in range(30):
                yield b"x" * 100

        refused(httpx.post(url + CHAT, content=parts()), 413)
        words = {"messages": [{"role": "user", "content": "a b c d e f g h i j k l m n o p q r"}]}
        assert "this server takes 20" in refused(httpx.post(url + CHAT, json=words), 400)["message"]
        many = {"messages": HELLO, "max_tokens": 6}
        assert "writes 5" in refused(httpx.post(url + CHAT, json=many), 400)["message"]
        answer = httpx.post(url + CHAT, json={"messages": HELLO}).json()
        assert answer["usage"]["completion_tokens"] == 5


def test_a_full_queue(url: str, engine: ScriptedEngine) -> None:
    engine.max_running = 2
    answer = httpx.post(url + CHAT, json={"messages": HELLO, "n": 3})
    assert refused(answer, 429)["type"] == "rate_limit_error" and answer.headers["retry-after"] == "1"
    assert not engine.open and len(engine.cancelled) == 2  # all or none
    assert httpx.post(url + CHAT, json={"messages": HELLO, "n": 2}).status_code == 200


def test_too_many_requests_at_once(service: Service, engine: ScriptedEngine) -> None:
    engine.held.set()
    with running(with_limits(service, open_requests=1)) as url:
        with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}):
            until(lambda: bool(engine.requests))
            refused(httpx.post(url + CHAT, json={"messages": HELLO}), 429)
            assert httpx.get(url + "/health").status_code == 200
        engine.held.clear()


def test_a_deadline_names_its_stage(service: Service, engine: ScriptedEngine) -> None:
    engine.held.set()
    with running(with_limits(service, request_seconds=0.05)) as url:
        error = refused(httpx.post(url + CHAT, json={"messages": HELLO}), 504)
        assert "writing the answer (1 tokens so far)" in error["message"]
        with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert "writing the answer" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client,
            pytest.raises(openai.APIError, match="writing the answer"),
        ):
            list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    assert len(engine.cancelled) == 3 and not engine.open
    assert service.metrics.timeouts == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_has_an_id_that_is_in_the_log(
    url: str, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    engine.fault = ZeroDivisionError("a fault")
    with caplog.at_level(logging.ERROR):
        answer = httpx.post(url + CHAT, json={"messages": HELLO, "stream": stream})
    if stream:
        lines = [line for line in answer.text.splitlines() if line]
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
    else:
        error = refused(answer, 500)
    assert error["type"] == "server_error" and "ZeroDivisionError" not in error["message"]
    assert error["code"] in caplog.text and "ZeroDivisionError: a fault" in caplog.text


def test_an_error_of_the_engine_is_a_fault(url: str, engine: ScriptedEngine, monkeypatch: Any) -> None:
    async def deltas() -> Any:
        yield Delta((5,))
        yield Delta((), finish_reason="error", error="out of memory")

    monkeypatch.setattr(engine, "submit", lambda request: deltas())
    refused(httpx.post(url + CHAT, json={"messages": HELLO}), 500)


@pytest.mark.parametrize("path", [CHAT, "/v1/load_lora_adapter", "/v1/score"])
def test_an_engine_that_closes_or_does_not_answer_is_no_fault_of_the_request(
    service: Service, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    bodies: dict[str, Any] = {
        CHAT: {"messages": HELLO},
        "/v1/load_lora_adapter": {"lora_name": "late", "lora_path": str(tmp_path)},
        "/v1/score": {"text_1": "a", "text_2": "b"},
    }
    first = next(iter(service.models.values()))
    task = "reranker" if path == "/v1/score" else "causal_lm"
    served = replace(
        service,
        models={first.name: replace(first, task=task)},
        read_adapter=lambda name, folder: replace(first, name=name, folder=folder, adapter=name),
    )

    def closes(*_: Any, **__: Any) -> Any:
        raise EngineClosing("the engine is shutting down")

    for name in ("submit", "load_adapter", "pool"):
        monkeypatch.setattr(engine, name, closes)
    with running(served) as url:
        answer = httpx.post(url + path, json=bodies[path])
    assert "shutting down" in refused(answer, 503)["message"] and answer.headers["retry-after"] == "5"
    assert list(served.models) == [first.name]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_leaves_cancels_its_request(
    url: str, engine: ScriptedEngine, service: Service, stream: bool, n: int
) -> None:
    engine.held.set()
    body = json.dumps({"messages": HELLO, "stream": stream, "n": n}).encode()
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: len(engine.open) == n)
    until(lambda: len(engine.cancelled) == n and not service.open_requests)
    engine.held.clear()
    assert not engine.open and service.metrics.disconnects == 1
    until(lambda: service.metrics.requests["/v1/chat/completions", 200 if stream else 499] == 1)


def test_a_server_that_goes_down_or_comes_up_says_so(url: str, service: Service) -> None:
    for state in ("starting", "draining"):
        service.state = state  # type: ignore[assignment]
        answer = httpx.post(url + CHAT, json={"messages": HELLO})
        assert refused(answer, 503)["type"] == "server_error" and answer.headers["retry-after"] == "5"
        health = httpx.get(url + "/health")
        assert (health.status_code, health.json()) == (503, {"status": state})


def test_an_engine_that_has_ended_is_not_healthy(url: str, engine: ScriptedEngine) -> None:
    engine.is_alive = False  # vLLM is a process of its own
    health = httpx.get(url + "/health")
    assert (health.status_code, health.json()) == (503, {"status": "failed"})


def test_metrics(url: str, engine: ScriptedEngine, service: Service) -> None:
    httpx.post(url + CHAT, json={"messages": HELLO, "max_tokens": 4})
    httpx.post(url + CHAT, json={"messages": []})
    lines = httpx.get(url + "/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['swift_http_requests_total{route="/v1/chat/completions",status="200"}'] == "1"
    assert values['swift_http_requests_total{route="/v1/chat/completions",status="422"}'] == "1"
    assert values["swift_generated_tokens_total"] == "4"
    assert values["swift_prompt_tokens_total"] == str(len(engine.requests[0].prompt))
    assert values["swift_time_to_first_token_seconds_count"] == "1"
    assert values["swift_inter_token_seconds_count"] == "3"
    assert values['swift_inter_token_seconds_bucket{le="+Inf"}'] == "3"
    assert values["swift_requests_running"] == "0"
    described = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {name.partition("{")[0].removesuffix("_bucket").removesuffix("_sum") for name in values} <= {
        *described, "swift_time_to_first_token_seconds_count", "swift_inter_token_seconds_count",
    }  # fmt: skip


def test_many_at_once(url: str, engine: ScriptedEngine) -> None:
    """Threads, half of which leave early: nothing stays behind."""
    engine.script = lambda request: "word " * 30

    def ask(number: int) -> None:
        body = {"messages": HELLO, "stream": True, "n": 1 + number % 2, "max_tokens": 30}
        with httpx.stream("POST", url + CHAT, json=body) as answer:
            for count, _ in enumerate(answer.iter_lines()):
                if number % 2 and count > 4:
                    break

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    until(lambda: not engine.open)
    assert len(engine.requests) == 18


def test_two_services_do_not_share_anything(service: Service, engine: ScriptedEngine) -> None:
    other = replace(service, models={"only": service.models["tiny"]})
    with running(other) as url:
        names = [entry["id"] for entry in httpx.get(f"{url}/v1/models").json()["data"]]
    assert names == ["tiny"] and "only" not in service.models
