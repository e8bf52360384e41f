"""Tool calls in the text of an answer, found while it arrives: name first, then its arguments as they come."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from swift.inference.server.reasoning import possible_start
from swift.inference.server.tool_formats import ToolFormat

__all__ = ["CallArguments", "CallStart", "ToolCallParser"]

_JSON_MARKS = re.compile(r'["{}\[\]\\]')
_SCALAR_END = re.compile(r"[\s,}\]]")
_LINE_END = re.compile(r"\n")


@dataclass(frozen=True)
class CallStart:
    """A call begins; ``index`` counts from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments, which are JSON text."""

    index: int
    text: str


Event = str | CallStart | CallArguments
"""A text is content."""


class ToolCallParser:
    """Parts an answer into content and calls.

    What looks like a call and turns out to be none is content. White space around calls is not told.
    """

    def __init__(self, form: ToolFormat) -> None:
        self.form = form
        self.num_calls = 0
        self._held = ""
        self._lead = ""  # what stood before a call that may turn out to be none
        self._step = self._content if form.begin else self._start
        self._value = self._scanner()
        self._raw: list[str] = []  # arguments that must be seen whole
        self._events: list[Event] = []

    def push(self, text: str, *, is_last: bool = False) -> list[Event]:
        """What is certain now. With ``is_last`` everything is."""
        self._held += text
        self._events = []
        while self._step(is_last):
            pass
        if is_last and self._held:
            self._say(self._lead + self._held)
            self._held = self._lead = ""
        return self._events

    def _scanner(self) -> JsonScanner:
        return JsonScanner(_SCALAR_END if self.form.is_object else _LINE_END)

    # Each step takes from ``_held`` what it can and returns whether another step may go on.

    def _say(self, text: str) -> None:
        if self.num_calls and not text.strip():
            return
        if text:
            self._events.append(text)

    def _start(self, is_last: bool) -> bool:
        """Formats without a beginning: the first characters decide."""
        text = self._held.lstrip()
        mark = self.form.marks[0]
        if text.startswith(mark):
            self._lead, self._held = mark, text[len(mark) :]
            self._step = self._header
        elif text.startswith("{"):
            self._lead, self._step = "", self._header
        elif text and not mark.startswith(text):
            self._step = self._plain
        else:
            return False
        return True

    def _plain(self, is_last: bool) -> bool:
        self._say(self._held)
        self._held = ""
        return False

    def _content(self, is_last: bool) -> bool:
        before, begin, after = self._held.partition(self.form.begin)
        if begin:
            self._say(before.rstrip() if self.form.is_object else before)
            self._lead, self._held, self._step = begin, after, self._header
            return True
        keep = 0 if is_last else possible_start(before, self.form.begin)
        certain = before[: len(before) - keep]
        shown = certain if is_last else certain.rstrip()  # white space before a call is not told
        self._say(shown)
        self._held = before[len(shown) :]
        return False

    def _header(self, is_last: bool) -> bool:
        found = self.form.header.match(self._held)
        if found and (found.end() < len(self._held) or is_last):
            word = found.groupdict().get("word")
            name = word if word is not None else json.loads(found["name"])
            self._begin_call(name, found.end())
            self._step = self._arguments
            return True
        if not self.form.is_object:
            return False
        return self._whole_object(is_last)

    def _begin_call(self, name: str, end: int) -> None:
        self._held = self._held[end:]
        self._lead = ""
        size = 9 if self.form.short_ids else 24
        prefix = "" if self.form.short_ids else "call_"
        identity = prefix + secrets.token_hex(12)[:size]
        self._events.append(CallStart(self.num_calls, identity, name))
        self.num_calls += 1
        self._value, self._raw = self._scanner(), []

    def _whole_object(self, is_last: bool) -> bool:
        """A call whose keys come in another order is known when it is complete."""
        start = len(self._held) - len(self._held.lstrip(" \t\r\n["))
        scanner = JsonScanner()
        end = start + scanner.feed(self._held[start:])
        is_word = scanner.is_wrong and "word" in self.form.header.groupindex and "{" not in self._held
        if not is_last and (is_word or not (scanner.is_done or scanner.is_wrong)):
            return False
        call = _as_call(self._held[start:end]) if scanner.is_done else None
        if call is None:
            self._say(self._lead + self._held[:end])
            self._held, self._lead = self._held[end:], ""
            self._step = self._content if self.form.begin else self._plain
            return True
        self._begin_call(call[0], end - 1)  # its closing brace is the tail's
        self._events.append(CallArguments(self.num_calls - 1, call[1]))
        self._step = self._tail
        return True

    def _arguments(self, is_last: bool) -> bool:
        size = self._value.feed(self._held)
        text, self._held = self._held[:size], self._held[size:]
        if self._value.is_object:
            if text:
                self._events.append(CallArguments(self.num_calls - 1, text))
        else:
            self._raw.append(text)
        if not self._value.is_done and not is_last:
            return False
        if not self._value.is_object:
            self._events.append(CallArguments(self.num_calls - 1, _plain_arguments("".join(self._raw))))
        self._step = self._tail
        return self._value.is_done

    def _tail(self, is_last: bool) -> bool:
        found = self.form.tail.match(self._held)
        if found is None:
            if is_last:
                self._held = ""  # the answer ended within the call
            elif len(self._held.strip()) > 64:
                self._step = self._between  # nothing that closes it: what follows is content
                return True
            return False
        self._held = self._held[found.end() :]
        self._step = self._between
        return True

    def _between(self, is_last: bool) -> bool:
        """Behind a call: another one, or content."""
        if self.form.again is not None:
            found = self.form.again.match(self._held)
            if found:
                self._lead, self._held = found[0], self._held[found.end() :]
                self._step = self._header
                return True
        self._held = self._held.lstrip()
        if not self._held:
            return False
        self._step = self._content if self.form.begin else self._plain
        return True


class JsonScanner:
    """Finds where a JSON value ends that arrives in pieces; what it says is not checked.

    Args:
        scalar_end: what ends anything that is no object, list or text.
    """

    def __init__(self, scalar_end: re.Pattern[str] = _SCALAR_END) -> None:
        self._scalar_end = scalar_end
        self.is_done = False
        self.is_wrong = False
        self.is_object = False
        self._first = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """Number of characters of ``text`` that belong to the value."""
        if self.is_done or not text:
            return 0
        if not self._first:
            self._first = text[0]
            self.is_object = text[0] == "{"
            self.is_wrong = text[0] not in '{["'
        if self.is_wrong:
            return self._scalar(text)
        at = 0
        if self._escaped:
            self._escaped, at = False, 1
        while found := _JSON_MARKS.search(text, at):
            at = found.end()
            mark = found[0]
            if self._in_string:
                if mark == "\\":
                    self._escaped = at >= len(text)
                    at += 1
                elif mark == '"':
                    self._in_string = False
            elif mark == '"':
                self._in_string = True
            elif mark in "{[":
                self._depth += 1
            elif mark in "}]":
                self._depth -= 1
            if self._depth == 0 and not self._in_string:
                self.is_done = True
                return at
        return len(text)

    def _scalar(self, text: str) -> int:
        found = self._scalar_end.search(text)
        self.is_done = found is not None
        return found.start() if found else len(text)


def _as_call(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON text) of a JSON object that is a call, else None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments: Any = value.get("arguments", value.get("parameters", {}))
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(
        arguments, ensure_ascii=False
    )


def _plain_arguments(text: str) -> str:
    """Arguments that are no object: JSON within a JSON text is taken out; none are an empty object."""
    text = text.strip()
    try:
        value = json.loads(text) if text else None
    except ValueError:
        return text
    if value is None:
        return "{}"
    return value if isinstance(value, str) else text
