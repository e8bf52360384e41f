"""The demo's two tasks, which a tiny model visibly masters, on words of five capital letters.

``Reverse`` is what the model learns first; adapters then teach it ``Rotate`` (the first letter goes to the end).
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["TASKS", "TOKENIZER_TEXTS", "WORD_LENGTH", "write_task"]

TASKS: dict[str, Callable[[str], str]] = {
    "Reverse": lambda word: word[::-1],
    "Rotate": lambda word: word[1:] + word[0],
}

WORD_LENGTH = 5
# Merges are learned from these words only, so the capital letters of a question stay one token each.
TOKENIZER_TEXTS = ("user", "assistant", *TASKS)


def write_task(
    folder: Path, *, num_train: int, num_heldout: int, seed: int, verb: str = "Reverse"
) -> tuple[Path, Path]:
    """Write rows of ``messages`` to train and to hold out; no word stands in both, or twice.

    Returns the two paths: ``train.jsonl`` and ``heldout.jsonl``, for other tasks ``VERB-train.jsonl`` and so on.
    """
    words = _distinct_words(random.Random(seed))
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "" if verb == "Reverse" else f"{verb.lower()}-"
    paths = folder / f"{prefix}train.jsonl", folder / f"{prefix}heldout.jsonl"
    for path, count in zip(paths, (num_train, num_heldout), strict=True):
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(_row(verb, next(words))) + "\n" for _ in range(count))
    return paths


def _distinct_words(rng: random.Random) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        word = "".join(rng.choices(string.ascii_uppercase, k=WORD_LENGTH))
        if word not in seen:
            seen.add(word)
            yield word


def _row(verb: str, word: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"{verb} {word}"},
            {"role": "assistant", "content": TASKS[verb](word)},
        ]
    }
