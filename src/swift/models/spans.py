"""Where in a rendered conversation each assistant turn stands.

A turn begins where the generation prompt ends and runs to the token that ends it (that token included, what
the template puts after it not). Templates with ``{% generation %}`` say so themselves. For the others,
`find_turns` compares renderings:

1. By prefix: the rendering of the messages before the turn, with the generation prompt, is a prefix of the
   whole; so is the rendering up to and with the turn.
2. By difference, when a template rewrites history (Qwen3 removes the thinking of earlier turns): only the
   content of one message is replaced by a character that occurs nowhere else; what differs is that message,
   what surrounds it is the template's.

Nothing is guessed: where both fail, `DataError` is raised.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from swift.core.errors import DataError
from swift.models.jinja import Message

__all__ = ["Turn", "end_of_turn_token", "find_turns", "fit_end"]

Render = Callable[[Sequence[Message], bool], str]

PROBE = "\U000ff002"
"""Stands for a message's content; occurs in no conversation and no template."""


@dataclass(frozen=True)
class Turn:
    """Characters ``start`` to ``end`` of the rendering are what message ``index``, an assistant's, adds."""

    index: int
    start: int
    end: int


def find_turns(
    render: Render, messages: Sequence[Message], text: str, end_tokens: Sequence[str]
) -> list[Turn]:
    """All assistant turns in ``text``, the rendering of ``messages``.

    Args:
        render: (messages, add_generation_prompt) -> text.
        end_tokens: texts of the tokens that end a turn.

    Raises:
        DataError: the template's rendering does not tell the turns apart.
    """
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        found = _by_prefix(render, messages, index, text, end_tokens) or _by_difference(
            render, messages, index, text
        )
        if found is None:
            raise DataError(
                f"cannot tell which part of the rendered text message {index + 1} (assistant) is",
                why="the chat template mixes it with other messages and has no {% generation %} block",
                fix="--chat_template chatml (or a Jinja file of yours with {% generation %})",
            )
        start, end = found
        if start < (turns[-1].end if turns else 0):
            # The end token of the turn before was taken in; what remains is this turn's own.
            start = turns[-1].end
        if start > end:
            continue  # The template leaves this message out.
        turns.append(Turn(index, start, fit_end(text, start, end, end_tokens)))
    return turns


def fit_end(text: str, start: int, end: int, end_tokens: Sequence[str]) -> int:
    """Move ``end`` to just behind the token that ends the turn ``text[start:end]``.

    What follows that token in the range (a newline) is cut off; when the token follows the range directly,
    it is taken in; when there is none, white space at the end is cut off.
    """
    if not end_tokens:
        return max(start, len(text[:end].rstrip()))
    # All of the end tokens and white space at the end of the range; the first of these tokens ends the turn.
    cut = end
    while True:
        cut = start + len(text[start:cut].rstrip())
        last = next((item for item in end_tokens if text.endswith(item, start, cut)), None)
        if last is None:
            break
        cut -= len(last)
    if first := _any_of(tuple(end_tokens)).match(text, cut):
        return first.end()
    return cut


@functools.cache
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """White space and one of the tokens; the longest where one begins like another."""
    words = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return re.compile(rf"\s*({words})")


def end_of_turn_token(render: Render, tokens: Sequence[str]) -> str | None:
    """The one of ``tokens`` that the template writes directly after an assistant's content, if any."""
    try:
        text = render([{"role": "user", "content": "-"}, {"role": "assistant", "content": PROBE}], False)
    except DataError:
        return None
    after = text.partition(PROBE)[2].lstrip()
    return next((token for token in sorted(tokens, key=len, reverse=True) if after.startswith(token)), None)


def _by_prefix(
    render: Render, messages: Sequence[Message], index: int, text: str, end_tokens: Sequence[str]
) -> tuple[int, int] | None:
    if index == 0:
        return None
    try:
        before = render(messages[:index], True)
        if not text.startswith(before):
            return None
        if index + 1 < len(messages):
            # Most turns are just their content: that saves a rendering.
            end = _end_of_content(messages[index], text, len(before), end_tokens)
            if end is not None:
                return len(before), end
        with_turn = text if index + 1 == len(messages) else render(messages[: index + 1], False)
    except DataError:
        return None
    if not text.startswith(with_turn) or len(with_turn) < len(before):
        return None
    return len(before), len(with_turn)


def _end_of_content(message: Message, text: str, start: int, end_tokens: Sequence[str]) -> int | None:
    """Where the turn that begins at ``start`` ends, when it is the message's content and an end token."""
    if message.get("tool_calls"):
        return None
    for content in (message["content"], message["content"].strip()):
        if text.startswith(content, start):
            end = start + len(content)
            token = next((token for token in end_tokens if text.startswith(token, end)), None)
            if token is not None:
                return end + len(token)
    return None


def _by_difference(
    render: Render, messages: Sequence[Message], index: int, text: str
) -> tuple[int, int] | None:
    region = _changed_region(render, messages, index, text)
    if region is None:
        return None
    start, end = region
    if index == 0:
        return region  # No generation prompt leads to it.
    previous = _changed_region(render, messages, index - 1, text)
    header = _header(render, [*messages[: index - 1], _probe(messages[index - 1])])
    if previous is None or header is None or previous[1] > start:
        return None
    # Between the two messages stands the template's text only. As much of it as the generation prompt says comes
    # before the turn; more than that (an empty thinking block, say) the model has to write itself.
    between = text[previous[1] : start]
    if between.startswith(header):
        return previous[1] + len(header), end
    return (start, end) if header.startswith(between) else None


def _probe(message: Message) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in message.items()
        if key not in ("reasoning_content", "thinking", "tool_calls")
    }
    return {**kept, "content": PROBE}


def _header(render: Render, messages: Sequence[Message]) -> str | None:
    """What follows the last of ``messages`` (a probe), up to the end of the generation prompt."""
    try:
        _, probe, header = render(messages, True).rpartition(PROBE)
    except DataError:
        return None
    return header if probe else None


def _changed_region(
    render: Render, messages: Sequence[Message], index: int, text: str
) -> tuple[int, int] | None:
    """The range of ``text`` that depends on the content of one message."""
    message = messages[index]
    # A tool result must follow a tool call in some templates: then only the content is replaced.
    for probe in (_probe(message), {**message, "content": PROBE}):
        try:
            other = render([*messages[:index], probe, *messages[index + 1 :]], False)
        except DataError:
            continue
        before, found, after = other.partition(PROBE)
        if not found or PROBE in after:
            continue
        start = _shared(text, before)
        same = _shared(text[start:][::-1], after[::-1])
        return start, len(text) - same
    return None


def _shared(one: str, other: str) -> int:
    """Length of the common prefix."""
    if one.startswith(other) or other.startswith(one):
        return min(len(one), len(other))
    return next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
