"""Texts that arrive in pieces: thinking, tool calls, stop texts, names of tokens. No server."""

from __future__ import annotations

import json
from collections.abc import Sequence

import llguidance
import pytest

from swift.inference.engines.base import Delta, TokenInfo
from swift.inference.server.answer import AnswerText, TokenNames
from swift.inference.server.reasoning import ReasoningSplitter
from swift.inference.server.tool_calls import CallArguments, CallStart, ToolCallParser
from swift.inference.server.tool_formats import TOOL_FORMATS, call_rules, sniff_tool_format
from swift.models.template import Template


def pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def parse(name: str, text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    """(content, [(function, arguments)]) of an answer that arrives in pieces."""
    parser = ToolCallParser(TOOL_FORMATS[name])
    content, calls = "", {}
    parts = pieces(text, size)
    for number, part in enumerate(parts):
        for event in parser.push(part, is_last=number == len(parts) - 1):
            if isinstance(event, CallStart):
                calls[event.index] = [event.name, ""]
            elif isinstance(event, CallArguments):
                calls[event.index][1] += event.text
            else:
                content += event
    return content, [(name, arguments) for name, arguments in calls.values()]


ARGUMENTS = '{"city": "K\\u00f6ln }]</tool_call>", "days": [1, 2]}'
CASES = [
    (
        "hermes",
        f'<tool_call>\n{{"name": "w", "arguments": {ARGUMENTS}}}\n</tool_call>',
        "",
        [("w", ARGUMENTS)],
    ),
    (
        "hermes",
        'Let me see.\n\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"x": 1}, "name": "b"}\n</tool_call>',
        "Let me see.",
        [("a", "{}"), ("b", '{"x": 1}')],
    ),
    ("hermes", "2 < 3 and <tool is no call", "2 < 3 and <tool is no call", []),
    ("hermes", '<tool_call>{"x": 1}</tool_call> ?', '<tool_call>{"x": 1}</tool_call> ?', []),
    ("hermes", '<tool_call>\n{"name": "w", "arguments": {"a": 1', "", [("w", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "w", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("w", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "w", "arguments": null}</tool_call>', "", [("w", "{}")]),
    ("llama3", f'{{"name": "w", "parameters": {ARGUMENTS}}}', "", [("w", ARGUMENTS)]),
    (
        "llama3",
        '<|python_tag|>{"name": "a", "parameters": {"x": 1}}; {"name": "b", "parameters": {}}',
        "",
        [("a", '{"x": 1}'), ("b", "{}")],
    ),
    ("llama3", 'It is {"name": 1}.', 'It is {"name": 1}.', []),
    ("llama3", '{"name": 1}', '{"name": 1}', []),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "a", "arguments": {ARGUMENTS}}}, {{"name": "b", "arguments": {{}}}}]',
        "",
        [("a", ARGUMENTS), ("b", "{}")],
    ),
    (
        "mistral",
        'Yes.[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b{"y": {}}',
        "Yes.",
        [("a", '{"x": 1}'), ("b", '{"y": {}}')],
    ),
    (
        "react",
        'Thought: I look.\nAction: w\nAction Input: {"x": "}"}\n',
        "Thought: I look.\n",
        [("w", '{"x": "}"}')],
    ),
    ("react", "Action: w\nAction Input: Rome today", "", [("w", "Rome today")]),
    ("react", "Thought: easy\nFinal Answer: Action: none", "Thought: easy\nFinal Answer: Action: none", []),
    (
        "qwen",
        '✿FUNCTION✿: a\n✿ARGS✿: {"x": 1}\n✿FUNCTION✿: b\n✿ARGS✿: {}',
        "",
        [("a", '{"x": 1}'), ("b", "{}")],
    ),
]


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
@pytest.mark.parametrize("name, text, content, calls", CASES)
def test_calls_are_found_however_the_text_is_cut(
    name: str, text: str, content: str, calls: list[tuple[str, str]], size: int
) -> None:
    assert parse(name, text, size) == (content, calls)


def test_arguments_are_told_while_they_arrive() -> None:
    parser = ToolCallParser(TOOL_FORMATS["hermes"])
    events = parser.push('<tool_call>\n{"name": "w", "arguments": {"city": "Par')
    assert isinstance(events[0], CallStart) and events[0].name == "w" and events[0].id.startswith("call_")
    assert events[1:] == [CallArguments(0, '{"city": "Par')]
    assert parser.push('is"}') == [CallArguments(0, 'is"}')]
    assert parser.push("}\n</tool_call>", is_last=True) == []


def test_calls_of_mistral_have_ids_of_nine_letters() -> None:
    events = ToolCallParser(TOOL_FORMATS["mistral"]).push('[TOOL_CALLS][{"name": "a", "arguments": {}}]')
    assert isinstance(events[0], CallStart)
    assert len(events[0].id) == 9 and events[0].id.isalnum()


@pytest.mark.parametrize(
    "source, name",
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral"),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama3"),
        ("{% if tools %}<tool_call><function=f>{% endif %}", None),
        ("{{ messages }}<tool_call>", None),
        (None, None),
    ],
)
def test_the_format_of_calls_follows_from_the_template(source: str | None, name: str | None) -> None:
    assert sniff_tool_format(source) == name


TOOLS = [
    {
        "name": "w",
        "parameters": {
            "type": "object",
            "properties": {"c": {"$ref": "#/$defs/city"}},
            "required": ["c"],
            "$defs": {"city": {"enum": ["Rom", "Ulm"]}},
            "additionalProperties": False,
        },
    },
    {"name": "none"},
]


def accepts(grammar: str, text: str) -> bool:
    """Whether a grammar takes a text, and takes it as complete. Bytes are tokens."""
    tokenizer = _byte_tokenizer()
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def _byte_tokenizer() -> llguidance.LLTokenizer:
    class Bytes:
        eos_token_id, bos_token_id = 256, None
        tokens = (*(bytes([byte]) for byte in range(256)), b"</s>")
        special_token_ids = (256,)

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text if isinstance(text, bytes) else text.encode())

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_a_required_call_is_one_that_the_parser_reads(name: str) -> None:
    form = TOOL_FORMATS[name]
    grammar = "start: calls\n" + call_rules(form, TOOLS, parallel=True, token_ids={})
    before, between, behind = form.around
    start, middle, end = form.call

    def call(function: str, arguments: str) -> str:
        return start + (json.dumps(function) if form.quoted else function) + middle + arguments + end

    one = before + call("w", '{"c": "Ulm"}') + behind
    assert accepts(grammar, one)
    assert parse(name, one, 3) == ("", [("w", '{"c": "Ulm"}')])
    assert not accepts(grammar, before + call("w", '{"c": "Bonn"}') + behind)
    assert not accepts(grammar, before + call("other", "{}") + behind)
    assert not accepts(grammar, "Hello")
    if between is not None:
        two = before + call("w", '{"c": "Rom"}') + between + call("none", "{}") + behind
        assert accepts(grammar, two)
        assert [function for function, _ in parse(name, two, 3)[1]] == ["w", "none"]
        alone = "start: calls\n" + call_rules(form, TOOLS, parallel=False, token_ids={})
        assert accepts(alone, one) and not accepts(alone, two)


def test_control_tokens_stand_in_grammars_by_number() -> None:
    rules = call_rules(TOOL_FORMATS["mistral"], TOOLS, parallel=True, token_ids={"[TOOL_CALLS]": 7})
    assert rules.startswith('calls: <[7]> "[" call (", " call)* "]"\n')


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    "text, is_open, parts",
    [
        ("<think>\nWell. </thin\n</think>\n\nYes. ", False, ("Well. </thin", "Yes. ")),
        ("Well.\n</think>\n\nYes.", True, ("Well.", "Yes.")),
        ("\n<think></think>Yes", False, ("", "Yes")),
        ("<thinking> no", False, ("", "<thinking> no")),
        ("Yes <think>not at the start</think>", False, ("", "Yes <think>not at the start</think>")),
        ("never done", True, ("never done", "")),
        ("<th", False, ("", "<th")),
    ],
)
def test_thinking_is_told_apart(text: str, is_open: bool, parts: tuple[str, str], size: int) -> None:
    splitter = ReasoningSplitter(is_open)
    found = ["", ""]
    cut = pieces(text, size)
    for number, piece in enumerate(cut):
        split = splitter.push(piece, is_last=number == len(cut) - 1)
        found[0] += split.reasoning
        found[1] += split.content
    assert tuple(found) == parts


def deltas(ids: Sequence[int], size: int, *, infos: bool = False) -> list[Delta]:
    made = []
    for start in range(0, len(ids), size):
        chunk = tuple(ids[start : start + size])
        told = tuple(TokenInfo(token, -0.5) for token in chunk) if infos else ()
        made.append(Delta(chunk, told, finish_reason="stop" if start + size >= len(ids) else None))
    return made


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("keep", [False, True])
def test_an_answer_ends_exactly_before_a_stop_text(template: Template, size: int, keep: bool) -> None:
    text = "Häuser 🙂 and more. STOP here"
    ids = template.tokenizer.encode(text)
    answer = AnswerText(template.tokenizer, stop=["STOP", "re. S"], keep_stop=keep)
    shown = ""
    for delta in deltas(ids, size):
        shown += answer.push(delta).text
        if answer.is_over:
            break
    assert shown == "Häuser 🙂 and mo" + ("re. S" if keep else "")
    assert answer.finish_reason == "stop"


def test_log_probabilities_belong_to_shown_tokens_only(template: Template) -> None:
    ids = template.tokenizer.encode("one two three four")
    end = template.stop_token_ids[0]
    answer = AnswerText(template.tokenizer, stop=["three"], stop_token_ids=[end])
    infos, text = [], ""
    for delta in deltas([*ids, end], 1, infos=True):
        piece = answer.push(delta)
        text += piece.text
        infos += piece.infos
        if answer.is_over:
            break
    names = TokenNames(template.tokenizer)
    assert text == "one two "
    starts = [place for _, place in infos]
    assert starts == sorted(starts) and starts[-1] < len(text)
    assert "".join(names(info.token)[0] for info, _ in infos).startswith("one two")


def test_names_of_tokens_are_their_bytes(template: Template) -> None:
    names = TokenNames(template.tokenizer)
    ids = template.tokenizer.encode("Grüße 🙂<|im_end|>")
    assert b"".join(bytes(names(token)[1]) for token in ids).decode() == "Grüße 🙂<|im_end|>"
    assert names(template.stop_token_ids[0])[0] == "<|im_end|>"
    assert names(100_000) == ("", [])
