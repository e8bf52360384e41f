"""Places of tokens from their sizes, against those that the tokenizers library tells."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

from swift.models.encoding import TextEncoder

PIECES = [
    "one two",
    "  three\n\n",
    "né",
    "汉字",
    "🙂👍🏽",
    "\t",
    "<|im_start|>",
    "<|im_end|>\n",
    "123456",
    "e\u0301",
    "\u200b",
    "ß…",
]


@pytest.fixture
def backend(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))


def texts() -> list[str]:
    generator = random.Random(5)
    return ["", *("".join(generator.choices(PIECES, k=generator.randint(1, 12))) for _ in range(300))]


def test_places_are_those_of_the_library(backend: Tokenizer) -> None:
    encoder = TextEncoder(backend)
    ours, asked = encoder.encode(texts(), False), encoder._asked(texts(), False)
    assert sum(tokens.in_bytes for tokens in ours) == len(ours)
    for fast, slow in zip(ours, asked, strict=True):
        assert fast.ids == slow.ids
        for place in range(len(fast.text) + 2):
            expected = np.searchsorted(slow.starts, slow.place(place))
            assert np.searchsorted(fast.starts, fast.place(place)) == expected
            expected = np.searchsorted(slow.stops, slow.place(place), side="right")
            assert np.searchsorted(fast.stops, fast.place(place), side="right") == expected


def changed(backend: Tokenizer, **changes: Any) -> Tokenizer:
    settings = json.loads(backend.to_str())
    settings.update(changes)
    return Tokenizer.from_str(json.dumps(settings))


def test_what_changes_the_text_is_asked(backend: Tokenizer) -> None:
    """A normaliser, a prefix space, and special tokens that swallow white space: sizes would not tell places."""
    spaced = json.loads(backend.to_str())["pre_tokenizer"] | {"add_prefix_space": True}
    greedy = changed(backend)
    greedy.add_special_tokens([AddedToken("<|eat|>", lstrip=True, rstrip=True)])
    composed = changed(backend)
    composed.normalizer = normalizers.NFC()
    trimmed = changed(
        backend,
        post_processor={
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
    )
    for other in (changed(backend, pre_tokenizer=spaced), greedy, composed, trimmed):
        tokens = TextEncoder(other).encode(["one two e\u0301 <|eat|> three"], False)[0]
        assert not tokens.in_bytes
        assert tokens.stops[-1] == len(tokens.text)


def test_a_text_whose_tokens_do_not_add_up_is_asked(backend: Tokenizer) -> None:
    encoder = TextEncoder(backend)
    sizes = encoder._token_sizes()
    assert sizes is not None
    number = backend.token_to_id("1")
    sizes[number] += 1  # as if the tokenizer changed the text in a way that its settings do not show
    ours = encoder.encode(["one two", "1"], False)
    assert [tokens.in_bytes for tokens in ours] == [True, False]
    assert ours[1].stops.tolist() == [1]


def test_special_tokens_are_asked(backend: Tokenizer) -> None:
    assert not TextEncoder(backend).encode(["one"], True)[0].in_bytes
