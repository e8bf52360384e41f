"""Served models and judges: what is asked of a server, what is tried again, and what counts as a failure."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from fake_openai import chat_reply, fake_server

from swift.config.sections.generation import GenerationSection
from swift.core.errors import ConfigError
from swift.evaluate.endpoint import Endpoint, EndpointError
from swift.evaluate.evaluators import Case, find_evaluators
from swift.evaluate.judge import read_score
from swift.evaluate.questions import Question
from swift.evaluate.subjects import Reply, ServedModel


def question(text: str = "q", reference: str | None = "right", **extra: Any) -> Question:
    return Question(0, "f:1", [{"role": "user", "content": text}], reference, None, extra)


def answers_of(
    model: ServedModel, questions: list[Question], options: GenerationSection, seed: int | None
) -> list[Reply]:
    """In the order of the questions, whatever the order in which they came."""
    found: dict[int, Reply] = {}
    numbers = range(len(questions))
    model.answers(questions, options, seed=seed, numbers=numbers, on_reply=found.__setitem__)
    return [found[number] for number in numbers]


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(url, **{"_first_pause_seconds": 0.01, **options})


def test_answers_come_in_order_with_bounded_concurrency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    gate = threading.Barrier(3)

    def answer(path: str, body: dict[str, Any], number: int) -> tuple[int, dict[str, str], Any]:
        gate.wait(30)  # passes only when three are here together
        return 200, {}, chat_reply(f"to {body['messages'][0]['content']}", "length")

    options = GenerationSection(temperature=0.5, max_new_tokens=7, stop_words=["X"], top_p=0.9)
    with fake_server(answer) as server:
        model = ServedModel(endpoint(server.url, concurrency=3))
        replies = answers_of(model, [question(str(n)) for n in range(9)], options, 5)
        assert [(reply.text, reply.finish_reason, reply.num_tokens) for reply in replies] == [
            (f"to {n}", "length", 2) for n in range(9)
        ]
        assert server.most_at_once == 3
        bodies = {body["messages"][0]["content"]: body for _, body, _ in server.requests}
        assert bodies["4"] == {
            "model": "fake-model", "messages": [{"role": "user", "content": "4"}], "max_tokens": 7,
            "temperature": 0.5, "top_p": 0.9, "stop": ["X"], "seed": 9,
        }  # fmt: skip
        assert all(headers["Authorization"] == "Bearer sk-test" for _, _, headers in server.requests)
        assert model.identity == [server.url, "fake-model"]


def test_a_busy_server_is_asked_again_and_a_refusal_is_not() -> None:
    def busy(path: str, body: dict[str, Any], number: int) -> tuple[int, dict[str, str], Any]:
        if number < 3:
            return (429, 503, 500)[number], {"retry-after": "0"}, {"error": "busy"}
        return 200, {}, chat_reply("at last")

    with fake_server(busy) as server:
        (response,) = endpoint(server.url).chat([{"messages": []}])
        assert response["choices"][0]["message"]["content"] == "at last" and len(server.requests) == 4
    with fake_server(lambda path, body, number: (400, {}, {"error": "no such option"})) as server:
        with pytest.raises(EndpointError, match="refuses") as caught:
            endpoint(server.url).chat([{"messages": []}] * 3)
        assert "no such option" in (caught.value.why or "") and len(server.requests) <= 3


def test_deadlines_name_the_last_failure() -> None:
    with fake_server(lambda path, body, number: (503, {}, {"error": "loading"})) as server:
        with pytest.raises(EndpointError, match="no answer after") as caught:
            endpoint(server.url, deadline_seconds=0.3).chat([{"messages": []}])
        assert "HTTP 503" in (caught.value.why or "") and len(server.requests) >= 2
        address = server.url
    with pytest.raises(EndpointError, match="no answer after") as caught:  # nobody listens any more
        endpoint(address, deadline_seconds=0.2).chat([{"messages": []}])
    assert "ConnectError" in (caught.value.why or "")


def test_a_server_that_never_answers_is_given_up() -> None:
    hold = threading.Event()

    def silent(path: str, body: dict[str, Any], number: int) -> tuple[int, dict[str, str], Any]:
        hold.wait(30)
        return 200, {}, chat_reply("late")

    with fake_server(silent) as server:
        try:
            with pytest.raises(EndpointError, match="no answer after") as caught:
                endpoint(server.url, timeout_seconds=0.2, deadline_seconds=0.5).chat([{"messages": []}])
            assert "ReadTimeout" in (caught.value.why or "")
        finally:
            hold.set()


def test_answers_that_are_none() -> None:
    with (
        fake_server(lambda path, body, number: (200, {}, b"<html>")) as server,
        pytest.raises(EndpointError, match="cannot be read"),
    ):
        endpoint(server.url).chat([{"messages": []}])
    with (
        fake_server(lambda path, body, number: (200, {}, {"choices": []})) as server,
        pytest.raises(EndpointError, match="no message"),
    ):
        answers_of(ServedModel(endpoint(server.url)), [question()], GenerationSection(), None)


@pytest.mark.parametrize(
    "written", ["http://h:1", "http://h:1/", "http://h:1/v1/", "http://h:1/v1/chat/completions"]
)
def test_addresses(written: str) -> None:
    assert Endpoint(written).url == "http://h:1/v1"


# -- log-probabilities --------------------------------------------------------------------------------------


def echo(path: str, body: dict[str, Any], number: int) -> tuple[int, dict[str, str], Any]:
    """Every character is a token; its log-probability is minus its place, and one more token is generated."""
    assert path == "/v1/completions" and body["echo"] and body["max_tokens"] == 1
    text = body["prompt"] + "!"
    told = {
        "tokens": list(text), "text_offset": list(range(len(text))),
        "token_logprobs": [None, *(-float(n) for n in range(1, len(text)))],
    }  # fmt: skip
    return 200, {}, {"choices": [{"text": text, "logprobs": told}]}


def test_choices_by_echoed_log_probabilities() -> None:
    with fake_server(echo) as server:
        model = ServedModel(endpoint(server.url))
        # "ab\n" has 3 characters: the answer's stand at 3 and 4, the generated one is not its.
        assert model.losses([(question("ab"), "xy"), (question("ab"), "x")], end=False) == [
            (7.0, 2),
            (3.0, 1),
        ]


@pytest.mark.parametrize(
    "answer",
    [
        lambda path, body, number: (404, {}, {"detail": "not found"}),
        lambda path, body, number: (200, {}, {"choices": [{"text": "x", "logprobs": None}]}),
        lambda path, body, number: (
            200, {}, {"choices": [{"logprobs": {"text_offset": [9], "token_logprobs": [-1.0]}}]}
        ),
    ],
    ids=["no completions", "no logprobs", "no echo"],
)  # fmt: skip
def test_servers_without_log_probabilities_are_refused(answer: Any) -> None:
    with fake_server(answer) as server:
        model = ServedModel(endpoint(server.url))
        with pytest.raises(ConfigError, match="does not tell the log-probabilities") as caught:
            model.losses([(question("ab"), "xy")], end=False)
        assert "--model" in (caught.value.fix or "")


# -- judges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good.\nScore: 7", 7.0), ("Score: 7.5", 7.5), ("**Score: 8**", 8.0), ("x\n\nscore: 9/10\n", 9.0),
        ("Score: 7\nBut then again.", None), ("I give 7", None), ("Score: 11", None), ("Score: 0", None),
        ("Score: 4/5", None), ("Score: seven", None), ("", None), ("Score: 7 or 8", None), ("Score: -3", None),
    ],
)  # fmt: skip
def test_scores_are_read_strictly(text: str, score: float | None) -> None:
    if score is None:
        with pytest.raises(ValueError, match=r"no score|said nothing|scale"):
            read_score(text, 1, 10)
    else:
        assert read_score(text, 1, 10) == score


def test_a_judge_and_its_failures() -> None:
    def judge(path: str, body: dict[str, Any], number: int) -> tuple[int, dict[str, str], Any]:
        prompt = body["messages"][0]["content"]
        if "fails" in prompt:
            return 400, {}, {"error": "too long"}
        return 200, {}, chat_reply("no idea" if "odd" in prompt else "Fine.\nScore: 8")

    with fake_server(judge) as server:
        (evaluator,) = find_evaluators(["judge"], {"judge": {"url": server.url, "deadline_seconds": 5}})
        cases = [Case(question(), [text]) for text in ("good", "odd", "fails")]
        cases.append(Case(question(), ["good", "odd"]))
        rows = evaluator.score(cases)
    assert rows[0] == {"judge": 8.0, "judge_says": "Fine.\nScore: 8"}
    assert (
        "judge" not in rows[1]
        and "no score: 'no idea'" in rows[1]["judge_error"]
        and rows[1]["judge_failures"] == 1
    )
    assert "judge" not in rows[2] and "too long" in rows[2]["judge_error"]
    assert (rows[3]["judge"], rows[3]["judge_failures"]) == (8.0, 1)
    prompts = [body["messages"][0]["content"] for _, body, _ in server.requests]
    assert any(
        "[A good answer]\nright" in text and "[The assistant's answer]\ngood" in text for text in prompts
    )


def test_a_judges_prompt_is_a_file(tmp_path: Path) -> None:
    prompt = tmp_path / "judge.jinja"
    prompt.write_text("{{ answer }} for {{ level }}? {{ low }}-{{ high }}")
    with fake_server(lambda path, body, number: (200, {}, chat_reply("Score: 1"))) as server:
        options = {"url": server.url, "prompt": str(prompt), "low": 0, "high": 1}
        (evaluator,) = find_evaluators(["judge"], {"judge": options})
        assert evaluator.score([Case(question(level=3), ["Yes"])])[0]["judge"] == 1.0
        assert server.requests[0][1]["messages"][0]["content"] == "Yes for 3? 0-1"
        with pytest.raises(ConfigError, match="cannot be filled"):
            evaluator.score([Case(question(), ["Yes"])])
    with pytest.raises(ConfigError, match="cannot be used"):
        find_evaluators(["judge"], {"judge": {**options, "prompt": str(tmp_path / "gone")}})
