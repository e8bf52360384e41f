"""Messages as a chat template wants them, and what they say about their own weight in the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift.core.errors import DataError
from swift.models.jinja import Message

__all__ = ["Conversation", "read_conversation"]

_OURS = ("loss", "loss_scale")
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass
class Conversation:
    """A conversation ready for rendering.

    Attributes:
        messages: role, content (text) and what else the template may read.
        weights: for each message the loss weight it asks for itself, or None.
        part_weights: message index -> (text, weight) of its parts, which together are its content.
    """

    messages: list[Message]
    weights: list[float | None]
    part_weights: dict[int, list[tuple[str, float]]] = field(default_factory=dict)

    @property
    def last_question(self) -> int:
        """Index of the last user message, -1 without one."""
        users = [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "user" and not message.get("from_tool")
        ]
        return users[-1] if users else -1


def read_conversation(
    messages: Sequence[Mapping[str, Any]], *, system: str | None = None, use_part_weights: bool = False
) -> Conversation:
    """Bring messages into one form.

    Parts of text are joined, JSON-encoded tool arguments decoded, reasoning is found under its several names,
    keys whose value is None are dropped (templates test for presence).

    Args:
        system: put in front when the conversation has no system message.
        use_part_weights: read ``loss_scale`` of content parts.

    Raises:
        DataError: a message without role, content of a kind that is not text, a wrong loss or loss_scale.
    """
    if not messages:
        raise DataError("a conversation without messages")
    conversation = Conversation([], [])
    if system is not None and messages[0].get("role") not in ("system", "developer"):
        conversation.messages.append({"role": "system", "content": system})
        conversation.weights.append(None)
    for message in messages:
        number = len(conversation.messages)
        weight = _weight(message, number)
        conversation.weights.append(weight)
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts = _parts(content, number, 1.0 if weight is None else weight)
            if use_part_weights and any("loss_scale" in part for part in content):
                conversation.part_weights[number] = parts
            content = "".join(text for text, _ in parts)
        conversation.messages.append(_clean(message, content, number))
    return conversation


def _clean(message: Mapping[str, Any], content: Any, number: int) -> Message:
    if not isinstance(message.get("role"), str):
        raise DataError(f"message {number + 1} has no role")
    if content is not None and not isinstance(content, str):
        raise DataError(f"the content of message {number + 1} is {type(content).__name__}, not text")
    clean = {key: value for key, value in message.items() if value is not None and key not in _OURS}
    clean["content"] = content or ""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is not None:
        clean = {"thinking": reasoning, **clean, "reasoning_content": reasoning}
    if "tool_calls" in clean:
        clean["tool_calls"] = [_decode_arguments(call) for call in clean["tool_calls"]]
    return clean


def _decode_arguments(call: Any) -> Any:
    """OpenAI sends a call's arguments as JSON text; templates write them as JSON themselves."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        decoded = json.loads(arguments)
    except json.JSONDecodeError:
        return call
    function = {**function, "arguments": decoded}
    return {**call, "function": function} if "function" in call else function


def _weight(message: Mapping[str, Any], number: int) -> float | None:
    loss, scale = message.get("loss"), message.get("loss_scale")
    if loss is None and scale is None:
        return None
    if loss is not None and not isinstance(loss, (bool, int, float)):
        raise DataError(f"loss of message {number + 1} is {loss!r}, not true or false")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale < 0):
        raise DataError(f"loss_scale of message {number + 1} is {scale!r}, not a number from 0 on")
    weight = float(scale) if scale is not None else 1.0
    if loss is not None and not loss:
        weight = 0.0
    if weight > 0 and message.get("role") != "assistant":
        raise DataError(
            f"message {number + 1} asks to be learned, but its role is {message.get('role')!r}",
            why="only assistant messages are learned",
            fix="--loss_scale all learns every message",
        )
    return weight


def _parts(content: Sequence[Any], number: int, default: float) -> list[tuple[str, float]]:
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append((part, default))
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            weight = part.get("loss_scale", default)
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
                raise DataError(
                    f"loss_scale of a part of message {number + 1} is {weight!r}, not a number from 0 on"
                )
            parts.append((part["text"], float(weight)))
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"a part of message {number + 1} is {kind!r}; only text parts are supported")
    return parts
