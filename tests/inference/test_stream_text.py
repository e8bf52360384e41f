"""Streaming text: characters stay whole, stop words are never shown, the pieces are the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift.inference.text import IncrementalDecoder, StopWords, decode
from swift.models.load import load_tokenizer

TEXTS = ["Grüße an die Welt", "你好,世界", "😀👩‍👩‍👧 done", " leading space", "a\n\nb  c", "ends with 世"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_pieces_are_whole_characters_and_join_to_the_text(tiny_model_dir: Path, text: str, size: int) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > size
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert all("�" not in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == decode(tokenizer, ids) == text
    assert sum(bool(piece) for piece in pieces) > 1


def test_an_incomplete_character_comes_out_at_the_end(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir)
    ids = tokenizer("ab 世", add_special_tokens=False).input_ids[:-1]
    decoder = IncrementalDecoder(tokenizer)
    shown = "".join(decoder.push([token]) for token in ids)
    assert "�" not in shown
    assert shown + decoder.flush() == decode(tokenizer, ids)


def stream(words: list[str], pieces: list[str]) -> tuple[str, bool]:
    stop = StopWords(words)
    return "".join(stop.push(piece) for piece in pieces) + stop.flush(), stop.found


@pytest.mark.parametrize(
    "words,pieces,shown,found",
    [
        (["END"], ["abc E", "N", "D def"], "abc ", True),
        (["END"], ["abc EN", "TER"], "abc ENTER", False),
        (["END"], ["EEND"], "E", True),
        (["END", "B"], ["aB END"], "a", True),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", True),
        (["aab"], ["aa", "aab"], "aa", True),
        (["END"], ["the E"], "the E", False),
        ([], ["x", "y"], "xy", False),
    ],
)
def test_stop_words_across_pieces(words: list[str], pieces: list[str], shown: str, found: bool) -> None:
    assert stream(words, pieces) == (shown, found)


def test_what_may_become_a_stop_word_is_held_back() -> None:
    stop = StopWords(["</s>"])
    assert [stop.push(piece) for piece in ["a<", "/", "b", "<", "/s>", "never"]] == [
        "a",
        "",
        "</b",
        "",
        "",
        "",
    ]
    assert stop.found and stop.flush() == ""
