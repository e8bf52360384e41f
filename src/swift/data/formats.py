"""From the many ways people write training rows to one: a list of messages.

Recognised, in this order (the columns that are not used are kept in ``Sample.extra``):

- ``chosen`` and ``rejected``: texts or lists of messages, behind ``prompt`` or ``messages`` or whole conversations
  that begin alike: the messages are those of the chosen one, the other stands in ``extra["rejected_messages"]``;
- ``messages``: role and content, optional ``loss`` (true/false) and ``loss_scale`` (a weight) per message,
  OpenAI ``tool_calls``, ms-swift roles ``tool_call`` / ``tool_response``;
- ``conversations`` or ``conversation``: sharegpt (from/value), role/content, or human/assistant pairs;
- ``prompt`` with ``completion``: texts or lists of messages;
- ``instruction`` (``input``) with ``output``: alpaca, with ``history`` and ``system``;
- a query and a response under any of the names in ``QUERY_COLUMNS`` and ``RESPONSE_COLUMNS``, ``history``,
  ``system``;
- a response alone, e.g. ``text``: one assistant message, as pre-training wants it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swift.core.errors import DataError
from swift.data.rows import Row

__all__ = [
    "QUERY_COLUMNS",
    "RESPONSE_COLUMNS",
    "SYSTEM_COLUMNS",
    "FaultError",
    "RowError",
    "Sample",
    "to_messages",
    "to_sample",
]

QUERY_COLUMNS = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE_COLUMNS = (
    "response", "answer", "output", "targets", "target", "answer_key", "answers", "solution", "text",
    "completion", "content",
)  # fmt: skip
SYSTEM_COLUMNS = ("system", "system_prompt")
_EXPECTED = "messages | conversations | query,response | instruction,output | prompt,completion | text"

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_call": "tool_call",
    "function_call": "tool_call",
}
_MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")


class RowError(DataError):
    """A row that is no sample; ``where`` is its location and ``message`` the reason."""

    def __init__(self, location: str, reason: str) -> None:
        super().__init__(reason, where=location)
        self.location = location
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return RowError, (self.location, self.reason)


@dataclass
class Sample:
    """One conversation.

    Attributes:
        messages: ``{"role": system | user | assistant | tool, "content": str | list of text parts, ...}``;
            assistant messages may have ``tool_calls`` (arguments are objects), any may have ``loss`` and
            ``loss_scale``.
            Content stays a list of parts only when a part has a ``loss_scale`` of its own (``"loss": false``
            of a part is read as ``loss_scale`` 0).
        tools: OpenAI function descriptions.
        extra: the other columns.
        location: ``file:line``.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    location: str = ""


class FaultError(ValueError):
    """What is wrong with a row; ``to_sample`` and ``swift.data.groups`` add where."""


def to_sample(row: Row) -> Sample:
    """The conversation in ``row``. Raises RowError with the location and the precise reason."""
    if row.error is not None:
        raise RowError(row.location, row.error)
    columns = {name: value for name, value in row.values.items() if value is not None}
    try:
        for name in _MEDIA_COLUMNS:
            if columns.get(name):
                raise FaultError(f'"{name}": images, audio and video cannot be read in this version')
        messages = _read_messages(columns)
        system = _take_text(columns, SYSTEM_COLUMNS)
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        tools = _read_tools(columns.pop("tools", None))
    except FaultError as fault:
        raise RowError(row.location, str(fault)) from None
    return Sample(messages, tools, columns, row.location)


def _read_messages(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row; removes the columns it uses."""
    if {"chosen", "rejected"} <= columns.keys() and not columns.keys() & {
        "rejected_messages",
        "rejected_response",
    }:
        return _chosen_and_rejected(columns)
    for name in ("messages", "conversations", "conversation"):
        if name in columns:
            return to_messages(_as_list(columns.pop(name), name), name)
    if "completion" in columns and "prompt" in columns:
        return _prompt_completion(columns)
    if isinstance(columns.get("prompt"), list):  # a preference or reward row: the answers are other columns
        return to_messages(columns.pop("prompt"), "prompt")
    if "instruction" in columns:
        parts = [_text(columns.pop(name), name) for name in ("instruction", "input") if name in columns]
        query: str | None = "\n".join(part for part in parts if part)
    else:
        query = _take_text(columns, QUERY_COLUMNS)
    response = _take_text(columns, RESPONSE_COLUMNS)
    if query is None and response is None:
        raise FaultError(f"no known columns: found [{', '.join(columns)}]; expected {_EXPECTED}")
    messages = _history(columns.pop("history", None))
    if query is not None:
        messages.append({"role": "user", "content": query})
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return messages


def _chosen_and_rejected(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The chosen conversation; the rejected one is put into ``columns``."""
    chosen, rejected = columns.pop("chosen"), columns.pop("rejected")
    whole = isinstance(chosen, list) and not ({"prompt", "messages"} | {*QUERY_COLUMNS}) & columns.keys()
    question = [] if whole else _read_messages(columns)
    if question and question[-1]["role"] == "assistant":
        question = question[:-1]
    columns["rejected_messages"] = [*question, *_answer(rejected, "rejected")]
    return [*question, *_answer(chosen, "chosen")]


def _answer(value: Any, column: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return to_messages(value, column)
    return [{"role": "assistant", "content": _text(value, column)}]


def _prompt_completion(columns: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = columns.pop(name)
        if isinstance(value, list):
            messages.extend(to_messages(value, name))
        else:
            messages.append({"role": role, "content": _text(value, name)})
    return messages


def _history(value: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if value is None or value == "":
        return messages
    turns = _as_list(value, "history")
    if turns and isinstance(turns[0], Mapping):
        return to_messages(turns, "history")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(t, str) for t in turn):
            raise FaultError(f'"history" turn {number} is not a pair of texts [query, response]')
        messages.append({"role": "user", "content": turn[0]})
        messages.append({"role": "assistant", "content": turn[1]})
    return messages


def to_messages(raw: list[Any], column: str) -> list[dict[str, Any]]:
    """Messages in our form from any of the known spellings. Raises FaultError."""
    if not raw:
        raise FaultError(f'"{column}" is empty')
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(raw, start=1):
        if not isinstance(item, Mapping):
            raise FaultError(f"message {number} is {_kind(item)}, not an object")
        if "role" not in item and "from" not in item and ("human" in item or "assistant" in item):
            for key, role in (("human", "user"), ("assistant", "assistant")):
                if item.get(key) is not None:
                    messages.append({"role": role, "content": _content(item[key], number)})
            continue
        message = _message(item, number)
        if message["role"] == "tool_call":
            _add_tool_calls(messages, message)
        else:
            messages.append(message)
    return messages


def _message(item: Mapping[str, Any], number: int) -> dict[str, Any]:
    message = {key: value for key, value in item.items() if value is not None}
    role_key = next((key for key in _ROLE_KEYS if key in message), None)
    if role_key is None:
        raise FaultError(f'message {number} has no "role"')
    written = message.pop(role_key)
    role = _ROLES.get(written) if isinstance(written, str) else None
    if role is None:
        raise FaultError(f"message {number} has an unknown role {written!r}; known: {', '.join(_ROLES)}")
    content_key = next((key for key in _CONTENT_KEYS if key in message), None)
    calls = message.pop("tool_calls", None)
    if content_key is None and not calls:
        raise FaultError(f'message {number} has no "{"value" if role_key == "from" else "content"}"')
    content = message.pop(content_key) if content_key else ""
    result: dict[str, Any] = {"role": role}
    if role == "tool_call":
        result["content"] = ""
        result["tool_calls"] = _tool_calls(_from_json(content, f"message {number}: the tool call"), number)
    else:
        result["content"] = _content(content, number)
        if calls:
            result["tool_calls"] = _tool_calls(calls, number)
    _check_loss(message, f"message {number}")
    result.update(message)
    return result


def _content(value: Any, number: int) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and value.get("type") == "text":
        value = [value]
    if not isinstance(value, list):
        raise FaultError(f'message {number}: "content" is {_kind(value)}, not text')
    parts: list[dict[str, Any]] = []
    weighted = False
    for place, part in enumerate(value, start=1):
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise FaultError(f"message {number}: content part {place} is {kind}; only text can be read")
        _check_loss(part, f"message {number}: content part {place}")
        scale = 0 if part.get("loss") is False else part.get("loss_scale")
        kept = {} if scale is None else {"loss_scale": scale}
        weighted = weighted or bool(kept)
        parts.append({"type": "text", "text": part["text"], **kept})
    return parts if weighted else "".join(part["text"] for part in parts)


def _check_loss(values: Mapping[str, Any], where: str) -> None:
    loss, scale = values.get("loss"), values.get("loss_scale")
    if loss is not None and not isinstance(loss, bool):
        raise FaultError(f'{where}: "loss" must be true or false, found {loss!r}')
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale < 0
    ):
        raise FaultError(f'{where}: "loss_scale" must be a number >= 0, found {scale!r}')


def _tool_calls(value: Any, number: int) -> list[dict[str, Any]]:
    calls = []
    for place, call in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"message {number}: tool call {place}"
        call = _from_json(call, where)
        if not isinstance(call, Mapping):
            raise FaultError(f"{where} is {_kind(call)}, not an object")
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise FaultError(f'{where} has no "name"')
        arguments = function.get("arguments", function.get("parameters"))
        arguments = _from_json(arguments or {}, f'{where}: "arguments"')
        if not isinstance(arguments, Mapping):
            raise FaultError(f'{where}: "arguments" is {_kind(arguments)}, not an object')
        kept = {"id": call["id"]} if call.get("id") is not None else {}
        calls.append(
            {**kept, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
        )
    return calls


def _add_tool_calls(messages: list[dict[str, Any]], call: dict[str, Any]) -> None:
    """Append a tool call: to the assistant message right before it when both are learned alike."""
    last: dict[str, Any] = messages[-1] if messages else {"role": ""}
    alike = all(last.get(key) == call.get(key) for key in ("loss", "loss_scale"))
    if last["role"] == "assistant" and alike:
        last["tool_calls"] = [*last.get("tool_calls", []), *call["tool_calls"]]
    else:
        messages.append({**call, "role": "assistant"})


def _read_tools(value: Any) -> list[dict[str, Any]] | None:
    if not value:
        return None
    value = _from_json(value, '"tools"')
    tools: list[dict[str, Any]] = []
    for place, tool in enumerate(value if isinstance(value, list) else [value], start=1):
        tool = _from_json(tool, f'"tools" entry {place}')
        if not isinstance(tool, Mapping):
            raise FaultError(f'"tools" entry {place} is {_kind(tool)}, not an object')
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tools or None


def _take_text(columns: dict[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        if name in columns:
            return _text(columns.pop(name), name)
    return None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise FaultError(f'"{name}" is {_kind(value)}, not text')
    return value


def _as_list(value: Any, name: str) -> list[Any]:
    value = _from_json(value, f'"{name}"')
    if not isinstance(value, list):
        raise FaultError(f'"{name}" is {_kind(value)}, not a list')
    return value


def _from_json(value: Any, what: str) -> Any:
    """CSV and some JSON files carry structures as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise FaultError(f"{what} is not JSON: {value[:40]!r}") from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
