"""The demo's task, one that a tiny model visibly masters: spell a word of five capital letters backwards."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["TOKENIZER_TEXTS", "WORD_LENGTH", "write_task"]

WORD_LENGTH = 5
# Merges are learned from these words only, so the capital letters of a question stay one token each.
TOKENIZER_TEXTS = ("user", "assistant", "Reverse")


def write_task(folder: Path, *, num_train: int, num_heldout: int, seed: int) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``heldout.jsonl`` (rows of ``messages``); no word stands in both, or twice.

    Returns the two paths.
    """
    words = _distinct_words(random.Random(seed))
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, count in zip(paths, (num_train, num_heldout), strict=True):
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(_row(next(words))) + "\n" for _ in range(count))
    return paths


def _distinct_words(rng: random.Random) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        word = "".join(rng.choices(string.ascii_uppercase, k=WORD_LENGTH))
        if word not in seen:
            seen.add(word)
            yield word


def _row(word: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Reverse {word}"},
            {"role": "assistant", "content": word[::-1]},
        ]
    }
