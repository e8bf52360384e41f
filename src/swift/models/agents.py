"""Tools written as plain text, for models whose own chat template knows none.

The tools go into the system message, calls into the text of the assistant's message (so they are learned as it is), and
results into a message of the user (so they are not). Each format is a line of its table of texts.

- ``hermes``: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``, as Hermes and Qwen models write it;
- ``react``: Thought, Action, Action Input, Observation (ReAct, arXiv 2210.03629);
- ``qwen``: the words between ``✿`` that Qwen-Agent uses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["AGENT_FORMATS", "write_tools"]


@dataclass(frozen=True)
class AgentFormat:
    """The texts of one format. ``{name}``, ``{description}``, ``{arguments}``, ``{tool}``... stand in them.

    Attributes:
        tool: one tool in the list; separated by ``between``.
        system: what the system message says, with ``{tools}`` and ``{names}``.
        call: one call, and what stands before the first.
        result: one result.
    """

    tool: str
    between: str
    system: str
    call: str
    result: str


AGENT_FORMATS: Mapping[str, AgentFormat] = {
    "hermes": AgentFormat(
        tool="{tool}",
        between="\n",
        system="# Tools\n\nThese functions can be called, one JSON description a line:\n<tools>\n{tools}\n</tools>\n\n"
        "To call one, write its name and arguments as JSON:\n"
        '<tool_call>\n{{"name": ..., "arguments": {{...}}}}\n</tool_call>',
        call='<tool_call>\n{{"name": {json_name}, "arguments": {arguments}}}\n</tool_call>',
        result="<tool_response>\n{result}\n</tool_response>",
    ),
    "react": AgentFormat(
        tool="{name}: {description} Parameters (JSON Schema): {parameters}",
        between="\n",
        system="Answer as well as you can. These tools may be used:\n{tools}\n\nWrite in this form:\n\n"
        "Thought: what to do next\nAction: one of [{names}]\nAction Input: its arguments as JSON\n"
        "Observation: what the tool returned (given to you)\n"
        "... (as often as needed)\nThought: the answer is known\nFinal Answer: the answer",
        call="Action: {name}\nAction Input: {arguments}",
        result="Observation: {result}",
    ),
    "qwen": AgentFormat(
        tool="### {name}\n\n{name}: {description} Parameters (JSON Schema): {parameters}",
        between="\n\n",
        system="# Tools\n\n{tools}\n\nA tool is called by these words:\n\n✿FUNCTION✿: one of [{names}]\n✿ARGS✿: its"
        " arguments as JSON\n✿RESULT✿: what it returned\n✿RETURN✿: the reply",
        call="✿FUNCTION✿: {name}\n✿ARGS✿: {arguments}",
        result="✿RESULT✿: {result}",
    ),
}


def write_tools(
    style: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, system: str | None
) -> list[dict[str, Any]]:
    """The conversation with its tools, calls and results as text.

    Args:
        style: a name of ``AGENT_FORMATS``.
        system: the system message of conversations that have none.

    Results in a row become one message of the user, marked ``from_tool``: some templates want users and assistants to
    take turns, and a result does not begin a new round.
    """
    form = AGENT_FORMATS[style]
    written: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = form.result.format(result=message.get("content") or "")
            if written and written[-1].get("from_tool"):
                written[-1]["content"] += "\n" + text
            else:
                written.append({"role": "user", "content": text, "from_tool": True})
        elif message.get("tool_calls"):
            calls = "\n".join(_call(form, call) for call in message["tool_calls"])
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            written.append({**kept, "content": _append(message.get("content") or "", calls)})
        else:
            written.append(dict(message))
    if tools:
        if not written or written[0]["role"] not in ("system", "developer"):
            written.insert(0, {"role": "system", "content": system or ""})
        written[0] = {**written[0], "content": _append(written[0]["content"], _describe(form, tools), "\n\n")}
    return written


def _append(content: Any, text: str, between: str = "\n") -> Any:
    if not isinstance(content, str):  # parts, which may have weights of their own
        return [*content, {"type": "text", "text": between + text}]
    return f"{content}{between}{text}" if content else text


def _describe(form: AgentFormat, tools: Sequence[Any]) -> str:
    functions = [tool.get("function", tool) for tool in tools]
    lines = [
        form.tool.format(
            name=function["name"],
            description=function.get("description", ""),
            parameters=json.dumps(function.get("parameters", {}), ensure_ascii=False),
            tool=json.dumps(tool, ensure_ascii=False),
        )
        for tool, function in zip(tools, functions, strict=True)
    ]
    names = ", ".join(function["name"] for function in functions)
    return form.system.format(tools=form.between.join(lines), names=names)


def _call(form: AgentFormat, call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = function["name"]
    return form.call.format(name=name, json_name=json.dumps(name, ensure_ascii=False), arguments=text)
