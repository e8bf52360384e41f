"""Answers of a given form, by llguidance: which tokens may come next."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.core.errors import ConfigError
from swift.inference.engines.base import JSON_SPACE, Grammar

__all__ = ["GrammarCompiler", "GrammarState"]


class GrammarState:
    """How far one answer has come in its grammar.

    Args:
        matcher: llguidance's.
        vocab_size: logits of a row.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((1, (vocab_size + 31) // 32), np.int32)

    def forbid(self, logits: Tensor) -> None:
        """Set ``logits [vocab]`` of tokens that may not come next to minus infinity."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask, 0)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: logits.shape[0]]
        logits.masked_fill_(torch.from_numpy(bits == 0).to(logits.device), -torch.inf)

    def accept(self, token: int) -> str | None:
        """Go on with a token; what is wrong where the grammar cannot."""
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return None  # an end token behind a complete answer
        self._matcher.consume_token(token)
        return str(self._matcher.get_error()) if self._matcher.is_error() else None

    @property
    def is_complete(self) -> bool:
        """Nothing but an end token could follow."""
        return bool(self._matcher.is_stopped())


class GrammarCompiler:
    """Makes grammars for one tokenizer. Compiling takes milliseconds to a second and may run in any thread.

    Args:
        tokenizer: a fast one of transformers.
        vocab_size: logits of a row (the tokenizer may know fewer tokens).
        end_tokens: what may follow a complete answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_tokens: list[int]) -> None:
        self._hf, self._vocab_size, self._ends = tokenizer, vocab_size, end_tokens
        self._tokenizer: Any = None

    def compile(self, grammar: Grammar) -> GrammarState:
        """The start of a grammar.

        Raises:
            ConfigError: it is not one, or is too large, or llguidance is missing.
        """
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise ConfigError(
                "answers of a given form need llguidance",
                where="grammar",
                fix="pip install 'swift-forge[serve]'",
            ) from error
        if self._tokenizer is None:
            try:
                self._tokenizer = llguidance.hf.from_tokenizer(self._hf, self._vocab_size, self._ends or None)
            except ValueError as error:
                raise ConfigError("this tokenizer cannot be used with a grammar", why=str(error)) from error
        try:
            make = {
                "json_schema": partial(
                    llguidance.LLMatcher.grammar_from_json_schema, defaults={"whitespace_pattern": JSON_SPACE}
                ),
                "regex": llguidance.LLMatcher.grammar_from_regex,
                "lark": llguidance.LLMatcher.grammar_from_lark,
            }[grammar.kind]
            matcher = llguidance.LLMatcher(self._tokenizer, make(grammar.text), log_level=0)
        except ValueError as error:
            raise ConfigError(f"not a {grammar.kind}", where="grammar", why=str(error)) from error
        if matcher.is_error():
            raise ConfigError(f"not a usable {grammar.kind}", where="grammar", why=matcher.get_error())
        return GrammarState(matcher, self._vocab_size)
