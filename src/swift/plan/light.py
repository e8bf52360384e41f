"""A tokenizer without transformers: what `swift.models.template.Template` needs of one, over the tokenizers library.

Importing transformers and loading its tokenizer costs more than a whole plan may. And a guess, for models whose
tokenizer is not on this disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.core.errors import ModelError

__all__ = ["BYTES_PER_TOKEN", "GuessedTemplate", "LightTokenizer"]

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class LightTokenizer:
    """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja of a model folder.

    Raises ModelError when there is no tokenizer.json or it is damaged.
    """

    is_fast = True

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.name_or_path = str(folder)
        try:
            self.backend_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception for missing and damaged files
            raise ModelError("tokenizer.json cannot be read", where=str(folder), why=str(error)) from error
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        config = _read_json(folder / "tokenizer_config.json")
        named = {**_read_json(folder / "special_tokens_map.json"), **config}
        self.special_tokens_map = {name: _text(named[name]) for name in _SPECIAL if named.get(name)}
        template = folder / "chat_template.jinja"
        self.chat_template = (
            template.read_text("utf-8") if template.is_file() else config.get("chat_template")
        )
        if isinstance(self.chat_template, list):
            self.chat_template = {entry["name"]: entry["template"] for entry in self.chat_template}

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self.convert_tokens_to_ids(self.eos_token)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return self.backend_tokenizer.get_added_tokens_decoder()

    def convert_tokens_to_ids(self, token: str | None) -> int | None:
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        return self.backend_tokenizer.id_to_token(token_id)

    def __call__(
        self, texts: Sequence[str], add_special_tokens: bool = True, **_: Any
    ) -> dict[str, list[list[Any]]]:
        encodings = self.backend_tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [e.ids for e in encodings], "offset_mapping": [e.offsets for e in encodings]}


BYTES_PER_TOKEN = 4
"""Of UTF-8, as large vocabularies have it for English; also for Chinese, where a token is a character or two."""
_TURN_TOKENS = 5
"""What chat templates write around a message."""


@dataclass(frozen=True)
class _Guessed:
    input_ids: list[int]
    labels: list[int]
    weights: None = None


class GuessedTemplate:
    """As many tokens as texts of this length have in general: enough for steps and time, not for a limit of memory."""

    fingerprint = "guessed"

    def encode_many(
        self, samples: Sequence[tuple[list[dict[str, Any]], list[Any] | None]], /
    ) -> list[_Guessed]:
        found = [self.encode_sequence(messages, tools) for messages, tools in samples]
        return [_Guessed(ids, ids) for ids in found]

    def encode_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> list[int]:
        return self.encode_sequence(messages, tools)

    def encode_sequence(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        end_token: bool = False,
    ) -> list[int]:
        said = [message.get("content") or "" for message in messages]
        texts = [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in said]
        size = sum(len(text.encode(errors="replace")) for text in texts) + (
            len(json.dumps(tools)) if tools else 0
        )
        return [0] * (-(-size // BYTES_PER_TOKEN) + _TURN_TOKENS * len(texts))


def _text(token: Any) -> str:
    """A token of tokenizer_config.json: a text, or an object with its text under ``content``."""
    return token["content"] if isinstance(token, dict) else str(token)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError("not valid JSON", where=str(path), why=str(error)) from error
    return content if isinstance(content, dict) else {}
