"""From an engine's tokens to the text of one answer: whole characters, cut exactly at stop texts, with
log-probabilities for the tokens that are shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift.inference.engines.base import Delta, TokenInfo
from swift.inference.text import IncrementalDecoder, StopWords

__all__ = ["AnswerText", "Piece", "TokenNames"]


@dataclass(frozen=True)
class Piece:
    """What may be shown since the last piece.

    ``infos``: (log-probability, where in the text of the answer the token begins).
    """

    text: str
    infos: Sequence[tuple[TokenInfo, int]] = ()


class AnswerText:
    """The text of one answer while its tokens arrive.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer.
        keep_stop: whether the stop text stands at its end.
        stop_token_ids: tokens that end it and have no text.
        shown_tokens: control tokens whose text is wanted all the same (tool calls of some models begin with one).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop: Sequence[str] = (),
        keep_stop: bool = False,
        stop_token_ids: Collection[int] = (),
        shown_tokens: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer)
        self._words = StopWords(stop)
        self._keep_stop = keep_stop
        self._stops = frozenset(stop_token_ids)
        self._marks = shown_tokens or {}
        self._infos: deque[tuple[TokenInfo, int]] = deque()
        self._decoded = 0  # characters before any stop text is cut
        self._shown = 0
        self.num_tokens = 0
        self.finish_reason: str | None = None

    @property
    def is_over(self) -> bool:
        """The engine has ended it, or a stop text has."""
        return self.finish_reason is not None

    def push(self, delta: Delta) -> Piece:
        """The text that is certain now and was not before."""
        self.num_tokens += len(delta.tokens)
        if delta.infos:
            text = ""
            for token, info in zip(delta.tokens, delta.infos, strict=True):
                if token not in self._stops:
                    self._infos.append((info, self._decoded))
                text += self._decode((token,))
        else:
            text = self._decode(delta.tokens)
        if delta.finish_reason is not None:
            rest = self._decoder.flush()
            self._decoded += len(rest)
            text += rest
        shown = self._cut(text) if self._words else text
        if delta.finish_reason is not None and not self._words.found:
            shown += self._words.flush()
            self.finish_reason = delta.finish_reason
        self._shown += len(shown)
        return Piece(shown, self._certain())

    def _decode(self, tokens: Sequence[int]) -> str:
        if not self._marks or self._marks.keys().isdisjoint(tokens):
            text = self._decoder.push([token for token in tokens if token not in self._stops])
        else:
            text = ""
            for token in tokens:
                if token in self._marks:
                    text += self._decoder.flush() + self._marks[token]
                    self._decoder = IncrementalDecoder(self._tokenizer)
                elif token not in self._stops:
                    text += self._decoder.push([token])
        self._decoded += len(text)
        return text

    def _cut(self, text: str) -> str:
        shown = self._words.push(text)
        if self._words.found:
            self.finish_reason = "stop"
            if self._keep_stop:
                shown += self._words.word
        return shown

    def _certain(self) -> list[tuple[TokenInfo, int]]:
        """Infos of tokens whose text has begun to be shown; at the end also of those that show none."""
        found = []
        while self._infos and (self._infos[0][1] < self._shown or self.finish_reason == "length"):
            found.append(self._infos.popleft())
        return found


class TokenNames:
    """The texts of single tokens, as log-probabilities show them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}
        decoder = getattr(tokenizer.backend_tokenizer, "decoder", None)
        self._bytes = _byte_of_character() if "ByteLevel" in type(decoder).__name__ else {}
        self._special = set(tokenizer.added_tokens_decoder)

    def __call__(self, token: int) -> tuple[str, list[int]]:
        """(text, UTF-8 bytes) of a token; the bytes of a part of a character are not whole text."""
        if token not in self._known:
            self._known[token] = self._look(token)
        return self._known[token]

    def _look(self, token: int) -> tuple[str, list[int]]:
        raw = self._tokenizer.convert_ids_to_tokens(token)
        if raw is None:  # a row of the embedding that the tokenizer has no token for
            return "", []
        if self._bytes and token not in self._special and all(char in self._bytes for char in raw):
            values = [self._bytes[char] for char in raw]
            return bytes(values).decode(errors="replace"), values
        if len(raw) == 6 and raw.startswith("<0x") and raw.endswith(">"):
            value = int(raw[3:5], 16)
            return bytes([value]).decode(errors="replace"), [value]
        text = raw if token in self._special else raw.replace("▁", " ")
        return text, list(text.encode())


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable characters stand for themselves, the other bytes for those from 256 on
    (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}
