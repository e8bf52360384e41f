"""A template that needs no tokenizer, and short ways to write data files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.config.schema import Config, Resolved
from swift.core.errors import DataError

ROLES = {"system": 1, "user": 2, "assistant": 3, "tool": 4}
END = 5


@dataclass
class FakeEncoded:
    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None


@dataclass
class FakeTemplate:
    """Role token, one token per character (100 + code point), end token; assistant text and end are learned."""

    fingerprint: str = "fake"
    encoded: int = 0

    def encode_many(
        self, samples: Sequence[tuple[list[dict[str, Any]], list[Any] | None]], /
    ) -> list[FakeEncoded]:
        self.encoded += len(samples)
        return [self._encode(messages) for messages, _ in samples]

    def _encode(self, messages: list[dict[str, Any]]) -> FakeEncoded:
        ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        for message in messages:
            if message["content"] == "REFUSE":
                raise DataError("the template refuses this")
            text = [100 + ord(letter) for letter in message["content"]] + [END]
            learned = message["role"] == "assistant"
            ids += [ROLES[message["role"]], *text]
            labels += [-100, *(text if learned else [-100] * len(text))]
            weights += [0.0, *([message.get("loss_scale", 1.0) if learned else 0.0] * len(text))]
        scaled = any("loss_scale" in message for message in messages)
        return FakeEncoded(ids, labels, weights if scaled else None)


def chat(question: str, answer: str, **extra: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **extra,
    }


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def options(**data: Any) -> Resolved:
    """A configuration whose data section has these values."""
    config = Config()
    for name, value in {"data_seed": 7, **data}.items():
        setattr(config.data, name, value)
    return Resolved("sft", config, {})
