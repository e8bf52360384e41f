"""Thinking apart from the answer: ``<think>...</think>`` at its beginning."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ReasoningSplitter", "Split", "possible_start", "thinks"]

OPEN, CLOSE = "<think>", "</think>"


class Split(NamedTuple):
    """The two parts of a piece of text."""

    reasoning: str
    content: str


def thinks(template_source: str | None) -> bool:
    """Whether a chat template knows of thinking."""
    return template_source is not None and CLOSE in template_source


class ReasoningSplitter:
    """Divides the text of an answer while it arrives.

    White space around the thinking, and between it and the answer, belongs to neither.

    Args:
        is_open: the prompt ends within the thinking (the template has written ``<think>``).
    """

    def __init__(self, is_open: bool) -> None:
        self._state = "thinking" if is_open else "start"
        self._held = ""

    def push(self, text: str, *, is_last: bool = False) -> Split:
        """What is certain now. With ``is_last`` everything is."""
        if self._state == "answer":
            return Split("", text)
        self._held += text
        if self._state == "start" and not self._begins(is_last):
            held = self._held if self._state == "answer" else ""
            self._held = self._held[len(held) :]
            return Split("", held)
        reasoning = content = ""
        if self._state == "thinking":
            reasoning = self._thinking(is_last)
        if self._state == "between":
            content = self._held.lstrip()
            self._held = ""
            if content:
                self._state = "answer"
        return Split(reasoning, content)

    def _begins(self, is_last: bool) -> bool:
        """Whether the text begins with thinking; sets the state once that is certain."""
        stripped = self._held.lstrip()
        if stripped.startswith(OPEN):
            self._state, self._held = "thinking", stripped[len(OPEN) :]
            return True
        if is_last or not OPEN.startswith(stripped):
            self._state = "answer"
        return False

    def _thinking(self, is_last: bool) -> str:
        before, mark, after = self._held.partition(CLOSE)
        if mark:
            self._state, self._held = "between", after
            return self._trim(before.rstrip())
        keep = 0 if is_last else possible_start(self._held, CLOSE)
        certain = self._held[: len(self._held) - keep]
        shown = certain.rstrip()  # white space before </think> is not told
        self._held = "" if is_last else self._held[len(shown) :]
        return self._trim(shown)

    _told = False

    def _trim(self, text: str) -> str:
        """Without the white space that follows ``<think>``."""
        if not self._told:
            text = text.lstrip()
            self._told = bool(text)
        return text


def possible_start(text: str, word: str) -> int:
    """Length of the longest end of ``text`` that ``word`` may go on from."""
    return next(
        (size for size in range(min(len(word) - 1, len(text)), 0, -1) if word.startswith(text[-size:])), 0
    )
