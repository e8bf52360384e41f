"""What every inference engine is: token ids in, tokens with log-probabilities out, many requests at once.

An engine knows no text, no chat and no HTTP: templates, stop strings, tools and JSON live in front of it, once for
all engines. Its methods are called from one event loop; where it computes (a thread, another process, another
environment) is its own affair.

To add an engine: one file here with a class of this protocol.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from swift.core.errors import TransientError

__all__ = [
    "Delta",
    "EngineBusy",
    "EngineClosing",
    "EngineStats",
    "FinishReason",
    "Grammar",
    "InferenceEngine",
    "Request",
    "SamplingOptions",
    "TokenInfo",
]

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like.

    Attributes:
        kind: how ``text`` is written; ``lark`` is llguidance's dialect.
        text: a JSON Schema as JSON, a regular expression, or a grammar.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str


JSON_SPACE = r"[\x20\x0A\x0D\x09]{0,40}"
"""White space between the parts of JSON: enough to indent it, not enough for a model to lose itself in."""


@dataclass(frozen=True)
class SamplingOptions:
    """How the tokens of one answer are chosen. Names and meanings are OpenAI's and vLLM's.

    Attributes:
        max_tokens: longest answer, in tokens.
        min_tokens: end tokens are not chosen before.
        temperature: 0 takes the likeliest token.
        top_p, top_k, min_p: what is sampled from; 1, 0 and 0 are off.
        presence_penalty, frequency_penalty: subtracted from logits of tokens the answer has, once and per occurrence.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt and answer; 1 is off.
        seed: an answer with a seed depends on it, the prompt and the weights alone, never on other requests.
        stop_token_ids: tokens that end the answer.
        logprobs: number of alternatives told beside each chosen token (0: the chosen one alone); None: nothing is.
            They are of the distribution sampled from before top_p, top_k and min_p cut it: after temperature,
            penalties and bias (at temperature 0: as at 1).
        prompt_logprobs: the same for the prompt's tokens, of the model's own distribution; None: nothing.
        logit_bias: token id -> what is added to its logit.
        grammar: what the answer must look like.
    """

    max_tokens: int = 512
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Request:
    """One prompt to go on with.

    Attributes:
        id: unique among the engine's requests; appears in logs.
        prompt: token ids, at least one.
        sampling: how to choose tokens.
        adapter: name of a loaded adapter; None: the model as the engine was started with it.
    """

    id: str
    prompt: Sequence[int]
    sampling: SamplingOptions = SamplingOptions()
    adapter: str | None = None


@dataclass(frozen=True)
class TokenInfo:
    """Log-probability (natural logarithm) of a token, and of the likeliest ones at its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What became of a request since the last delta.

    Attributes:
        tokens: new token ids, an end token included.
        infos: one for each new token when log-probabilities were asked for, else empty.
        prompt_infos: with the first delta, when asked for: one for each prompt token but the first.
        finish_reason: set in the last delta only.
        error: with finish_reason ``error``: what went wrong, in words for a user.
    """

    tokens: tuple[int, ...] = ()
    infos: tuple[TokenInfo, ...] = ()
    prompt_infos: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


class EngineBusy(TransientError):
    """The engine takes no further request now: its queue is full."""


class EngineClosing(TransientError):
    """The engine takes no further request: it is going down."""


@dataclass(frozen=True)
class EngineStats:
    """How an engine stands now. Counts of requests and tokens since the start end in ``_total``."""

    running: int = 0
    waiting: int = 0
    max_running: int = 0
    cache_tokens_used: int = 0
    cache_tokens: int = 0
    requests_total: int = 0
    aborted_total: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0


class InferenceEngine(Protocol):
    """Answers many requests at once with one model and any number of adapters on it."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def is_alive(self) -> bool:
        """False when what computes has ended: no request will be answered any more."""
        ...

    async def start(self) -> None:
        """Get ready to answer. Raises SwiftError with the stage when that takes too long or fails."""
        ...

    def submit(self, request: Request) -> AsyncIterator[Delta]:
        """Queue a request; its deltas come from the iterator. Closing the iterator early cancels the request.

        Raises:
            EngineBusy: the waiting queue is full.
            ConfigError: the request cannot be answered by this engine (too long, unknown adapter). A bad grammar may
                show later: then the iterator raises it instead of giving the first delta.
        """
        ...

    async def pool(
        self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None
    ) -> list[list[float]]:
        """What a model of another task than writing makes of texts: an embedding, or scores, for each prompt.

        Raises ConfigError for a model that only writes text.
        """
        ...

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Make a LoRA adapter available. Raises SwiftError when the name is taken or the folder does not fit."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away once its running requests have ended. Raises SwiftError when it is not there."""
        ...

    def adapters(self) -> dict[str, Path]:
        """The loaded adapters."""
        ...

    def stats(self) -> EngineStats:
        """How it stands now."""
        ...

    async def close(self, *, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let running ones end for at most so long, cancel the others, free everything."""
        ...
