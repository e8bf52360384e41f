"""Every way of writing a row becomes the same messages; every fault has its precise reason."""

from __future__ import annotations

from typing import Any

import pytest

from swift.data.formats import RowError, Sample, to_sample
from swift.data.rows import Row


def read(values: dict[str, Any]) -> Sample:
    return to_sample(Row(values, "d.jsonl:", 3))


def reason(values: dict[str, Any]) -> str:
    with pytest.raises(RowError) as caught:
        read(values)
    assert caught.value.location == "d.jsonl:3"
    assert str(caught.value) == f"d.jsonl:3: {caught.value.reason}"
    return caught.value.reason


USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
TURNS = [USER, ANSWER]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"messages": TURNS}, TURNS),
        ({"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'}, TURNS),
        ({"messages": TURNS, "system": "S"}, [SYSTEM, *TURNS]),
        ({"messages": [SYSTEM, *TURNS], "system": "other"}, [SYSTEM, *TURNS]),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, TURNS),
        ({"conversation": [{"role": "user", "content": "Q"}, {"role": "bot", "content": "A"}]}, TURNS),
        ({"conversation": [{"human": "Q", "assistant": "A"}], "system_prompt": "S"}, [SYSTEM, *TURNS]),
        ({"query": "Q", "response": "A"}, TURNS),
        ({"question": "Q", "answer": "A"}, TURNS),
        ({"problem": "Q", "solution": "A"}, TURNS),
        ({"input": "Q", "output": "A", "system": "S"}, [SYSTEM, *TURNS]),
        ({"query": "Q", "response": "A", "history": [["Q", "A"]]}, TURNS + TURNS),
        ({"query": "Q", "response": "A", "history": '[["Q", "A"]]'}, TURNS + TURNS),
        ({"query": "Q", "response": "A", "history": TURNS}, TURNS + TURNS),
        ({"query": "Q", "response": "A", "history": []}, TURNS),
        ({"query": "Q", "response": "A", "history": None, "system": None}, TURNS),
        ({"instruction": "Q", "input": "", "output": "A"}, TURNS),
        ({"instruction": "Q", "output": "A", "history": [["Q", "A"]], "system": ""}, TURNS + TURNS),
        ({"instruction": "Q", "input": "I", "output": "A"}, [{"role": "user", "content": "Q\nI"}, ANSWER]),
        ({"prompt": "Q", "completion": "A"}, TURNS),
        ({"prompt": [USER], "completion": [ANSWER]}, TURNS),
        ({"prompt": [USER], "solution": "4"}, [USER]),
        ({"query": "Q"}, [USER]),
        ({"text": "A"}, [ANSWER]),
        ({"content": "A"}, [ANSWER]),
    ],
)
def test_formats(values: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert read(values).messages == messages


def test_every_role_name() -> None:
    names = {"human": "user", "gpt": "assistant", "observation": "tool", "developer": "system"}
    for name, role in names.items():
        assert read({"conversations": [{"from": name, "value": "x"}]}).messages[0]["role"] == role


def test_other_columns_are_kept() -> None:
    sample = read({"messages": TURNS, "solution": "4", "channel": {"a": 1}, "empty": None})
    assert sample.extra == {"solution": "4", "channel": {"a": 1}}
    assert read({"question": "Q", "answer": "A", "solution": "4"}).extra == {"solution": "4"}


def test_loss_and_weights_stay_on_the_message() -> None:
    messages = [USER, {**ANSWER, "loss": False}, USER, {**ANSWER, "loss_scale": 0.5, "name": "x"}]
    assert read({"messages": messages}).messages == messages


def test_content_parts() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]
    assert read({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "abc"
    weighted = [
        {"type": "text", "text": "a", "loss_scale": 2},
        {"type": "text", "text": "b", "loss": False},
        {"type": "text", "text": "c", "loss": True},
    ]
    kept = read({"messages": [USER, {"role": "assistant", "content": weighted}]}).messages[1]["content"]
    assert kept == [
        {"type": "text", "text": "a", "loss_scale": 2},
        {"type": "text", "text": "b", "loss_scale": 0},
        {"type": "text", "text": "c"},
    ]


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_openai_tool_calls(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "content": "2", "tool_call_id": "1"}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result, ANSWER]
    assert read({"messages": messages}).messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]},
        result,
        ANSWER,
    ]


def test_tool_call_roles_join_the_assistant_turn() -> None:
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}
    messages = [USER, ANSWER, call, call, {"role": "tool_response", "content": "2"}, call]
    assert read({"messages": messages}).messages == [
        USER,
        {**ANSWER, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]


def test_a_tool_call_that_is_learned_otherwise_stays_alone() -> None:
    call = {"from": "function_call", "value": {"name": "f", "arguments": {"x": 1}}, "loss": False}
    messages = read({"conversations": [{"from": "gpt", "value": "A"}, call]}).messages
    assert messages == [ANSWER, {"role": "assistant", "content": "", "tool_calls": [CALL], "loss": False}]


@pytest.mark.parametrize(
    "tools", [[{"name": "f"}], '[{"name": "f"}]', ['{"name": "f"}'], [{"type": "function", "function": {"name": "f"}}]]
)  # fmt: skip
def test_tools(tools: Any) -> None:
    assert read({"messages": TURNS, "tools": tools}).tools == [
        {"type": "function", "function": {"name": "f"}}
    ]
    assert read({"messages": TURNS, "tools": ""}).tools is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"text_only": "x"},
            "no known columns: found [text_only]; expected messages | conversations | query,response | "
            "instruction,output | prompt,completion | text",
        ),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": {"role": "user"}}, '"messages" is an object, not a list'),
        ({"messages": "hello"}, "\"messages\" is not JSON: 'hello'"),
        ({"messages": [USER, "A"]}, "message 2 is a text, not an object"),
        ({"messages": [USER, {"content": "A"}]}, 'message 2 has no "role"'),
        ({"messages": [USER, {"role": "assistant"}]}, 'message 2 has no "content"'),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, 'message 2 has no "content"'),
        ({"conversations": [{"from": "human"}]}, 'message 1 has no "value"'),
        ({"messages": [{"role": "user", "content": 3}]}, 'message 1: "content" is a number, not text'),
        (
            {"messages": [{"role": "user", "content": ["a", {"type": "image", "image": "x.png"}]}]},
            "message 1: content part 2 is image; only text can be read",
        ),
        (
            {"messages": [USER, {**ANSWER, "loss": "yes"}]},
            "message 2: \"loss\" must be true or false, found 'yes'",
        ),
        (
            {"messages": [USER, {**ANSWER, "loss_scale": -1}]},
            'message 2: "loss_scale" must be a number >= 0, found -1',
        ),
        (
            {"messages": [USER, {"role": "tool_call", "content": "f(1)"}]},
            "message 2: the tool call is not JSON: 'f(1)'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}]},
            'message 1: tool call 1 has no "name"',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x="}]}]},
            "message 1: tool call 1: \"arguments\" is not JSON: 'x='",
        ),
        ({"messages": TURNS, "tools": "f"}, "\"tools\" is not JSON: 'f'"),
        ({"messages": TURNS, "tools": [3]}, '"tools" entry 1 is a number, not an object'),
        ({"query": "Q", "response": 42}, '"response" is a number, not text'),
        ({"query": ["Q"], "response": "A"}, '"query" is a list, not text'),
        (
            {"query": "Q", "response": "A", "history": [["Q"]]},
            '"history" turn 1 is not a pair of texts [query, response]',
        ),
    ],
)
def test_reasons(values: dict[str, Any], expected: str) -> None:
    assert reason(values) == expected


def test_an_unknown_role_lists_the_known_ones() -> None:
    text = reason({"messages": [{"role": "usr", "content": "x"}]})
    assert text.startswith("message 1 has an unknown role 'usr'; known: system, developer, user, human, ")


def test_a_row_that_could_not_be_read_keeps_its_reason() -> None:
    with pytest.raises(RowError, match=r"^d\.jsonl:9: broken JSON$"):
        to_sample(Row({}, "d.jsonl:", 9, "broken JSON"))


def test_images_are_refused_and_not_dropped() -> None:
    row = {"query": "What is this?", "response": "a cat", "images": ["cat.png"]}
    assert reason(row) == '"images": images, audio and video cannot be read in this version'
    assert read({**row, "images": []}).messages[1]["content"] == "a cat"
