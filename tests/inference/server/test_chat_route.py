"""Chat completions through the real OpenAI client, over a socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted import ScriptedEngine, running

from swift.config.sections.template import TemplateSection
from swift.inference.server.limits import Defaults
from swift.inference.server.service import Service
from swift.models.load import load_template

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
TEXT = "The answer is 42, no doubt."
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'


def test_a_whole_answer(client: openai.OpenAI, engine: ScriptedEngine, service: Service) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO)
    choice = answer.choices[0]
    template = service.models["tiny"].template
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert choice.logprobs is None and answer.model == "tiny" and answer.object == "chat.completion"
    request = engine.requests[0]
    assert list(request.prompt) == template.encode_prompt(HELLO)
    assert request.adapter is None
    assert request.sampling.max_tokens == engine.max_model_len - len(request.prompt)
    assert request.sampling.stop_token_ids == tuple(template.stop_token_ids)
    assert answer.usage and answer.usage.prompt_tokens == len(request.prompt)
    assert answer.usage.completion_tokens == len(template.tokenizer.encode(TEXT)) + 1


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_stream_says_the_same(client: openai.OpenAI, engine: ScriptedEngine, chunk: int) -> None:
    engine.chunk = chunk
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in chunks if part.choices) == TEXT
    assert [part.choices[0].finish_reason for part in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(part.usage is None for part in chunks[:-1]) and chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert len({part.id for part in chunks}) == 1


def test_sampling_options_reach_the_engine(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    client.chat.completions.create(
        model="french", messages=HELLO, max_completion_tokens=7, temperature=0.5, top_p=0.9, seed=3,
        presence_penalty=0.1, frequency_penalty=-0.2, logit_bias={"5": -100}, stop=["x"], n=2,
        extra_body={
            "top_k": 4, "min_p": 0.2, "repetition_penalty": 1.1, "min_tokens": 2, "stop_token_ids": [9],
        },
    )  # fmt: skip
    first, second = engine.requests
    assert first.adapter == "french"
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (7, 2, 0.5)
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.9, 4, 0.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.2)
    assert sampling.repetition_penalty == 1.1 and sampling.logit_bias == {5: -100}
    assert sampling.stop_token_ids[-1] == 9
    assert (sampling.seed, second.sampling.seed) == (3, 4)  # answers of their own


def test_what_is_not_asked_for_has_the_servers_defaults(
    client: openai.OpenAI, engine: ScriptedEngine, service: Service
) -> None:
    service.defaults = Defaults(temperature=0.25, top_k=3, max_tokens=4, stop=("no",))
    answer = client.chat.completions.create(model="tiny", messages=HELLO)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.25, 3, 4)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("chunk", [1, 3])
def test_stop_texts_cut_exactly_and_cancel_the_request(
    client: openai.OpenAI, engine: ScriptedEngine, chunk: int
) -> None:
    engine.chunk = chunk
    whole = client.chat.completions.create(model="tiny", messages=HELLO, stop=["2, n", "doubt"])
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("The answer is 4", "stop")
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stop="2, n", stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == "The answer is 4"
    assert len(engine.cancelled) == 2 and not engine.open


def test_several_answers(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = lambda request: f"seed {request.sampling.seed}"
    answer = client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=5)
    assert [choice.message.content for choice in answer.choices] == ["seed 5", "seed 6", "seed 7"]
    texts: dict[int, str] = {}
    for part in client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=5, stream=True):
        for choice in part.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == {0: "seed 5", 1: "seed 6", 2: "seed 7"}


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client: openai.OpenAI, service: Service, stream: bool) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "logprobs": True, "top_logprobs": 2, "stream": stream}
    answer = client.chat.completions.create(**options)
    if stream:
        told = [
            entry
            for part in answer
            if part.choices[0].logprobs
            for entry in part.choices[0].logprobs.content or []
        ]
    else:
        told = answer.choices[0].logprobs.content
    ids = service.tokenizer.encode(TEXT)
    assert [entry.logprob for entry in told] == [-token / 1000 for token in ids]  # not the end token's
    assert "".join(entry.token for entry in told) == TEXT
    assert bytes(value for entry in told for value in entry.bytes).decode() == TEXT
    assert [len(entry.top_logprobs) for entry in told] == [2] * len(ids)
    assert told[0].top_logprobs[0].token == told[0].token


@pytest.mark.parametrize(
    "asked, kind, text",
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": 1}}}},
            "json_schema",
            '{"a": 1}',
        ),
        ({"structured_outputs": {"json": {"a": 1}}}, "json_schema", '{"a": 1}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, "lark", 'start: "yes" | "n\\"o"\n'),
        ({"guided_json": '{"a": 1}'}, "json_schema", '{"a": 1}'),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a"]}, "lark", 'start: "a"\n'),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
    ],
)
def test_forms_of_answers_become_grammars(
    client: openai.OpenAI, engine: ScriptedEngine, asked: dict[str, Any], kind: str, text: str
) -> None:
    client.chat.completions.create(model="tiny", messages=HELLO, extra_body=asked)
    grammar = engine.requests[0].sampling.grammar
    assert grammar is not None and (grammar.kind, grammar.text) == (kind, text)


# Tools


def test_a_call_in_an_answer(client: openai.OpenAI, engine: ScriptedEngine, service: Service) -> None:
    engine.script = lambda request: "I look.\n" + CALL
    answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER])
    message = answer.choices[0].message
    assert message.content == "I look." and answer.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    function: Any = message.tool_calls[0]
    assert (function.function.name, function.function.arguments) == ("weather", '{"city": "Rom"}')
    # The answer can be sent back, with what the tool returned.
    follow: list[Any] = [
        *HELLO, message, {"role": "tool", "tool_call_id": function.id, "content": "sunny"},
    ]  # fmt: skip
    engine.script = lambda request: "Sunny."
    client.chat.completions.create(model="tiny", messages=follow, tools=[WEATHER])
    text = service.tokenizer.decode(list(engine.requests[-1].prompt))
    assert '{"name": "weather", "arguments": {"city": "Rom"}}' in text and "sunny" in text
    assert "The weather of a city." in text


def test_a_call_in_a_stream(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = lambda request: CALL
    name = arguments = ""
    reasons, pieces = [], 0
    stream = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], stream=True)
    for part in stream:
        choice = part.choices[0]
        assert not choice.delta.content
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            assert call.index == 0 and call.function is not None
            name += call.function.name or ""
            arguments += call.function.arguments or ""
            pieces += 1
    assert (name, arguments, reasons[-1]) == ("weather", '{"city": "Rom"}', "tool_calls")
    assert pieces > 3  # as they come, not at the end


def test_no_tools_with_tool_choice_none(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = lambda request: CALL
    answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == CALL and answer.choices[0].finish_reason == "stop"
    assert engine.requests[0].sampling.grammar is None


@pytest.mark.parametrize(
    "choice, several", [("required", True), ({"type": "function", "function": {"name": "weather"}}, False)]
)
def test_a_required_call_is_enforced_by_a_grammar(
    client: openai.OpenAI, engine: ScriptedEngine, choice: Any, several: bool
) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    engine.script = lambda request: CALL
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[WEATHER, other], tool_choice=choice
    )
    assert answer.choices[0].message.tool_calls
    grammar = engine.requests[0].sampling.grammar
    assert grammar is not None and grammar.kind == "lark"
    assert ("call)*" in grammar.text, "other" in grammar.text) == (several, several)


@pytest.fixture
def agent_url(service: Service, tiny_model_dir: Path) -> Iterator[str]:
    section = TemplateSection(agent_template="react", chat_template="plain")
    model = replace(service.models["tiny"], template=load_template(tiny_model_dir, section))
    with running(replace(service, models={"tiny": model})) as url:
        yield url


def test_tools_of_our_own_format(agent_url: str, engine: ScriptedEngine) -> None:
    engine.script = lambda request: (
        'Thought: look\nAction: weather\nAction Input: {"city": "Rom"}\nObservation: rain'
    )
    with openai.OpenAI(base_url=f"{agent_url}/v1", api_key="-") as client:
        answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER])
    call: Any = (answer.choices[0].message.tool_calls or [])[0]
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rom"}')
    assert answer.choices[0].message.content == "Thought: look\n"
    assert len(engine.cancelled) == 1  # at the observation that the model invents


def test_tools_that_the_template_does_not_know_are_refused(service: Service, tiny_model_dir: Path) -> None:
    plain = load_template(tiny_model_dir, TemplateSection(chat_template="plain"))
    model = replace(service.models["tiny"], template=plain)
    with running(replace(service, models={"tiny": model})) as url:
        body = {"messages": HELLO, "tools": [WEATHER]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "--agent_template" in answer.json()["error"]["message"]


# Thinking

THINKING = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""


@pytest.fixture
def thinking_url(service: Service, tiny_model_dir: Path, tmp_path: Path) -> Iterator[str]:
    file = tmp_path / "thinking.jinja"
    file.write_text(THINKING)
    template = load_template(tiny_model_dir, TemplateSection(chat_template=str(file)))
    model = replace(service.models["tiny"], template=template)
    with running(replace(service, models={"tiny": model})) as url:
        yield url


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_told_apart(thinking_url: str, engine: ScriptedEngine, stream: bool) -> None:
    engine.script = lambda request: "<think>\nHm, <b>.\n</think>\n\nYes."
    with openai.OpenAI(base_url=f"{thinking_url}/v1", api_key="-") as client:
        answer: Any = client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
        if stream:
            deltas = [part.choices[0].delta for part in answer]
            reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
            content = "".join(delta.content or "" for delta in deltas)
        else:
            message = answer.choices[0].message
            reasoning, content = message.reasoning_content, message.content
    assert (reasoning, content) == ("Hm, <b>.", "Yes.")


def test_thinking_can_be_switched_off(thinking_url: str, engine: ScriptedEngine, service: Service) -> None:
    engine.script = lambda request: "Yes."
    bodies: list[dict[str, Any]] = [
        {"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}, {},
    ]  # fmt: skip
    for body in bodies:
        answer = httpx.post(f"{thinking_url}/v1/chat/completions", json={"messages": HELLO, **body})
        assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": "Yes."}
    ends = [
        service.tokenizer.decode(list(request.prompt)).endswith("</think>\n\n") for request in engine.requests
    ]
    assert ends == [True, True, False]


def test_a_form_of_the_answer_holds_behind_the_thinking(thinking_url: str, engine: ScriptedEngine) -> None:
    from test_text import accepts

    form = {"type": "json_schema", "json_schema": {"schema": {"const": 7}}}
    for body in ({}, {"enable_thinking": False}):
        url = f"{thinking_url}/v1/chat/completions"
        assert httpx.post(url, json={"messages": HELLO, "response_format": form, **body}).status_code == 200
    thinks, does_not = (request.sampling.grammar for request in engine.requests)
    assert thinks is not None and does_not is not None
    assert thinks.kind == "lark" and does_not.kind == "json_schema"
    for text, fits in (("<think>ab\n</think>\n\n7", True), ("7", True), ("<think>7", False), ("a7", False)):
        assert accepts(thinks.text, text) == fits, text
    httpx.post(url, json={"messages": HELLO, "guided_regex": "a/b+"})
    regex = engine.requests[-1].sampling.grammar
    assert regex is not None
    assert accepts(regex.text, "<think>x</think>a/bb") and not accepts(regex.text, "<think>x</think>ab")


def test_the_tokens_of_a_stream_are_plain_json_lines(url: str) -> None:
    body = {"messages": HELLO, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        assert json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk"
