"""How models write tool calls: which format a model's template belongs to, and a grammar that enforces a call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TOOL_FORMATS", "ToolFormat", "call_rules", "sniff_tool_format"]

_NAME = r'"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")'
_OBJECT = rf'\{{\s*{_NAME}\s*,\s*"(?:arguments|parameters)"\s*:\s*'


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls.

    Attributes:
        begin: the text that calls begin with; what stands before is content. Empty: the answer is nothing but calls.
        header: from behind ``begin`` up to the arguments; ``name`` (JSON) or ``word`` is the function.
        tail: what closes a call behind its arguments.
        again: what leads to the next call without a ``begin``.
        is_object: a call is a JSON object, whose keys may come in another order.
        call: how a call is written: (before the name, between name and arguments, behind).
        around: what stands before, between and behind all calls of an answer.
        quoted: the name is a JSON text.
        stop: texts that end the answer: the model would go on with a result of its own invention.
        marks: control tokens that belong to the format, where the tokenizer has them.
        short_ids: calls have ids of nine letters and digits, as its templates want.
    """

    begin: str
    header: re.Pattern[str]
    tail: re.Pattern[str]
    call: tuple[str, str, str]
    around: tuple[str, str | None, str] = ("", None, "")
    again: re.Pattern[str] | None = None
    is_object: bool = True
    quoted: bool = True
    stop: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    short_ids: bool = False


TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat(
        begin="<tool_call>",
        header=re.compile(rf"\s*{_OBJECT}"),
        tail=re.compile(r"\s*\}\s*(?:</tool_call>)"),
        call=('<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>"),
        around=("", "\n", ""),
        marks=("<tool_call>", "</tool_call>"),
    ),
    "llama3": ToolFormat(
        begin="",
        header=re.compile(rf"\s*{_OBJECT}"),
        tail=re.compile(r"\s*\}"),
        call=('{"name": ', ', "parameters": ', "}"),
        around=("", "; ", ""),
        again=re.compile(r"\s*;"),
        marks=("<|python_tag|>",),
    ),
    "mistral": ToolFormat(
        begin="[TOOL_CALLS]",
        header=re.compile(
            rf"\s*(?:\[\s*)?{_OBJECT}|\s*(?P<word>[\w.-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{{)"
        ),
        tail=re.compile(r"\s*\}\s*(?:\]|(?=,))|(?=[^\s}])"),
        call=('{"name": ', ', "arguments": ', "}"),
        around=("[TOOL_CALLS][", ", ", "]"),
        again=re.compile(r"\s*,"),
        marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        short_ids=True,
    ),
    "react": ToolFormat(
        begin="Action:",
        header=re.compile(r"\s*(?P<word>[^\n]+?)\s*\n\s*Action Input:\s*"),
        tail=re.compile(r"\s*"),
        call=("Action: ", "\nAction Input: ", ""),
        is_object=False,
        quoted=False,
        stop=("Observation:",),
    ),
    "qwen": ToolFormat(
        begin="✿FUNCTION✿:",
        header=re.compile(r"\s*(?P<word>[^\n]+?)\s*\n\s*✿ARGS✿:\s*"),
        tail=re.compile(r"\s*"),
        call=("✿FUNCTION✿: ", "\n✿ARGS✿: ", ""),
        around=("", "\n", ""),
        is_object=False,
        quoted=False,
        stop=("✿RESULT✿", "✿RETURN✿"),
    ),
}
"""``hermes`` is also Qwen's; ``react`` and ``qwen`` are those of ``--agent_template``."""


def sniff_tool_format(source: str | None) -> str | None:
    """The format that a chat template asks its model for; None when it knows no tools, or a format that is not here."""
    if source is None or "tools" not in source or "<function=" in source:
        return None
    if "[TOOL_CALLS]" in source:
        return "mistral"
    if "<tool_call>" in source:
        return "hermes"
    return "llama3" if "<|python_tag|>" in source or '"parameters"' in source else None


def call_rules(
    form: ToolFormat, tools: Sequence[Mapping[str, Any]], *, parallel: bool, token_ids: Mapping[str, int]
) -> str:
    """Rules of a Lark grammar (llguidance's dialect) for an answer that calls one of ``tools``: its rule is ``calls``.

    Args:
        parallel: several calls may follow each other, where the format has that.
        token_ids: of control tokens, which no text stands for.

    The name is fixed text and the arguments follow the function's own JSON Schema, a grammar of its own: references
    within the schema go on to mean what they say.
    """
    before, between, behind = form.around
    more = f" ({_literal(between, token_ids)} call)*" if parallel and between is not None else ""
    lines = [f"calls: {_literal(before, token_ids)} call{more} {_literal(behind, token_ids)}"]
    lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, function in enumerate(tools):
        name = json.dumps(function["name"]) if form.quoted else function["name"]
        start, middle, end = form.call
        schema = dict(function.get("parameters") or {"type": "object"})
        schema["x-guidance"] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        opening = _literal(start + name + middle, token_ids)
        lines.append(f"call_{number}: {opening} arguments_{number} {_literal(end, token_ids)}")
        lines.append(f"arguments_{number}: %json {json.dumps(schema)}")
    return "\n".join(lines) + "\n"


def _literal(text: str, token_ids: Mapping[str, int]) -> str:
    """Fixed text as a sequence of Lark strings and control tokens."""
    parts = re.split("(" + "|".join(map(re.escape, token_ids)) + ")", text) if token_ids else [text]
    return " ".join(
        f"<[{token_ids[part]}]>" if part in token_ids else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )
