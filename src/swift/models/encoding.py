"""Token ids of many texts, and where in its text each token begins and ends.

The tokenizers library can say where tokens stand, but computing that for every token costs a fifth of its time. For
byte-level BPE it follows from the ids: every token stands for a fixed number of bytes, and those of a text's tokens add
up to the text. Where this cannot be told from the tokenizer, or does not add up, the library is asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["TextEncoder", "Tokens"]


@dataclass(frozen=True)
class Tokens:
    """One encoded text.

    Attributes:
        ids: [t] token ids.
        starts, stops: [t] int64, where each token begins and ends: bytes when ``in_bytes``, else characters. A token
            that is not of the text (one that the tokenizer puts at its end) has 0 for both.
    """

    ids: list[int]
    starts: np.ndarray
    stops: np.ndarray
    in_bytes: bool
    text: str

    def place(self, character: int) -> int:
        """A place in the text in the units of ``starts``; places behind the end are the end."""
        if not self.in_bytes or self.text.isascii():
            return min(character, len(self.text))
        return len(self.text[:character].encode())


class TextEncoder:
    """A fast tokenizer's backend, used without truncation and padding."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._sizes: np.ndarray | None = None
        self._looked = False

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[Tokens]:
        """The tokens of each text."""
        self._backend.no_truncation()
        self._backend.no_padding()
        sizes = None if add_special_tokens else self._token_sizes()
        if sizes is None:
            return self._asked(texts, add_special_tokens)
        found: list[Tokens | None] = []
        for text, encoding in zip(
            texts, self._backend.encode_batch_fast(texts, add_special_tokens=False), strict=True
        ):
            ids = encoding.ids
            stops = np.cumsum(sizes[ids], dtype=np.int64)
            num_bytes = len(text) if text.isascii() else len(text.encode())
            fits = (int(stops[-1]) if ids else 0) == num_bytes
            starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]]) if ids else stops
            found.append(Tokens(ids, starts, stops, True, text) if fits else None)
        missing = [number for number, tokens in enumerate(found) if tokens is None]
        again = (
            dict(zip(missing, self._asked([texts[n] for n in missing], False), strict=True))
            if missing
            else {}
        )
        return [again[number] if tokens is None else tokens for number, tokens in enumerate(found)]

    def _asked(self, texts: Sequence[str], add_special_tokens: bool) -> list[Tokens]:
        made = []
        for text, encoding in zip(
            texts, self._backend.encode_batch(texts, add_special_tokens=add_special_tokens), strict=True
        ):
            offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
            made.append(Tokens(encoding.ids, offsets[:, 0], offsets[:, 1], False, text))
        return made

    def _token_sizes(self) -> np.ndarray | None:
        """[vocabulary] int64, bytes of each token; None when they do not follow from the vocabulary."""
        if not self._looked:
            self._looked = True
            self._sizes = _byte_level_sizes(self._backend)
        return self._sizes


def _byte_level_sizes(backend: Any) -> np.ndarray | None:
    settings = json.loads(backend.to_str())
    before = settings.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    plain = settings["model"].get("type") == "BPE" and not settings.get("normalizer")
    # What is put before a text, or taken away around a special token, is no part of any token's bytes.
    if not plain or len(byte_level) != 1 or byte_level[0].get("add_prefix_space"):
        return None
    after = settings.get("post_processor") or {}
    if any(step.get("trim_offsets") for step in after.get("processors", [after])):
        return None  # the library then counts a token from behind its spaces, and so do assistant masks elsewhere
    added = settings.get("added_tokens") or []
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return None
    vocabulary: dict[str, int] = settings["model"]["vocab"]
    ids = [*vocabulary.values(), *(token["id"] for token in added)]
    sizes = np.zeros(max(ids) + 1, np.int64)
    for token, number in vocabulary.items():
        sizes[number] = len(token)  # the byte-level alphabet has one character for each byte
    for token in added:
        sizes[token["id"]] = len(token["content"].encode())
    return sizes
