"""Tokens to text while they arrive: whole characters only, and stop words never shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["IncrementalDecoder", "StopWords", "decode"]

_BROKEN = "�"


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated tokens, control tokens left out, nothing tidied up."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class IncrementalDecoder:
    """Text of a growing token sequence; the pieces joined are ``decode`` of all tokens.

    A character whose bytes are spread over several tokens is given out when it is complete. A short window of
    earlier tokens is decoded along with new ones, because the text of a token can depend on its neighbours
    (leading spaces).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._window = 0  # first token that is decoded again
        self._shown = 0  # tokens whose text has been given out

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; returns the text that is certain now and was not before."""
        self._ids.extend(ids)
        old = decode(self.tokenizer, self._ids[self._window : self._shown])
        new = decode(self.tokenizer, self._ids[self._window :])
        if new.endswith(_BROKEN) or not new.startswith(old):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return new[len(old) :]

    def flush(self) -> str:
        """What is left at the end, an incomplete character included."""
        old = decode(self.tokenizer, self._ids[self._window : self._shown])
        new = decode(self.tokenizer, self._ids[self._window :])
        self._window = self._shown = len(self._ids)
        return new[len(old) :]


class StopWords:
    """Finds texts that end an answer, and holds back what may become one.

    Args:
        words: the texts; empty ones are ignored.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [word for word in words if word]
        self._held = ""
        self.found = False
        self.word = ""
        """The one that was found."""

    def __bool__(self) -> bool:
        return bool(self.words)

    @property
    def num_tokens(self) -> int:
        """So many tokens at the end of an answer hold any of the words, one byte each at worst."""
        return max((len(word.encode()) for word in self.words), default=0) + 4

    def ends(self, text: str) -> bool:
        """True when one of the words stands in ``text``."""
        return any(word in text for word in self.words)

    def cut(self, text: str) -> str:
        """``text`` up to the first stop word."""
        places = [place for word in self.words if (place := text.find(word)) >= 0]
        return text[: min(places)] if places else text

    def push(self, piece: str) -> str:
        """The part of the text so far that may be shown: before a stop word, and not the start of one."""
        if self.found:
            return ""
        text = self._held + piece
        cut = self.cut(text)
        if len(cut) < len(text):
            self.found, self._held = True, ""
            self.word = next(word for word in self.words if text.startswith(word, len(cut)))
            return cut
        longest = max((len(word) for word in self.words), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(word.startswith(text[-size:]) for word in self.words):
                self._held = text[-size:]
                return text[:-size]
        self._held = ""
        return text

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held
