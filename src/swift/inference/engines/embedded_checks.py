"""What the embedded engine cannot be asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from swift.config.sections.engine import EngineSection
from swift.core.errors import ConfigError
from swift.inference.engines.base import SamplingOptions
from swift.models.load import ModelBundle

__all__ = ["check_prompt", "check_sampling", "most_tokens"]


def most_tokens(bundle: ModelBundle, options: EngineSection) -> int:
    known = bundle.facts.max_position_embeddings
    asked = options.max_model_len
    if known and asked and asked > known:
        raise ConfigError(
            f"the model handles {known} positions",
            where=f"--max_model_len {asked}",
            fix=f"--max_model_len {known}",
        )
    return asked or known or 4096


def check_prompt(prompt: Sequence[int], most: int, vocab_size: int) -> None:
    if not len(prompt):
        raise ConfigError("the prompt has no tokens")
    if len(prompt) >= most:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens and leaves no room for an answer",
            why=f"prompt and answer have at most {most} tokens together",
            fix="shorten the prompt",
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise ConfigError(f"the prompt holds a token id outside of 0 to {vocab_size - 1}")


def check_sampling(options: SamplingOptions, vocab_size: int) -> None:
    """Raise ConfigError for values without a meaning."""
    wrong = [
        (options.max_tokens < 1, "max_tokens must be at least 1"),
        (options.min_tokens < 0, "min_tokens must not be negative"),
        (not 0 <= options.temperature < math.inf, "temperature must be a number from 0"),
        (not 0 < options.top_p <= 1, "top_p must be above 0 and at most 1"),
        (options.top_k < 0, "top_k must not be negative"),
        (not 0 <= options.min_p <= 1, "min_p must be between 0 and 1"),
        (not 0 < options.repetition_penalty < math.inf, "repetition_penalty must be above 0"),
        (not math.isfinite(options.presence_penalty), "presence_penalty must be a number"),
        (not math.isfinite(options.frequency_penalty), "frequency_penalty must be a number"),
        (
            any(not 0 <= token < vocab_size for token in (*options.logit_bias, *options.stop_token_ids)),
            f"token ids of logit_bias and stop_token_ids must be from 0 to {vocab_size - 1}",
        ),
        (
            any(not math.isfinite(value) for value in options.logit_bias.values()),
            "logit_bias must be numbers",
        ),
        ((options.logprobs or 0) < 0 or (options.prompt_logprobs or 0) < 0, "logprobs must not be negative"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise ConfigError(message)
