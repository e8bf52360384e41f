"""How an inference engine answers many requests at once."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class EngineSection(Section):
    """The inference engine: which one, how many requests at once, how much memory."""

    infer_backend: Literal["transformers", "vllm"] = option(
        "transformers",
        "Engine that answers: transformers runs in this process, vllm in its own environment.",
        essential=True,
    )
    max_num_seqs: int = option(64, "Requests answered at once.", ge=1)
    max_model_len: int | None = option(
        None,
        "Most tokens of prompt and answer together; default: what the model handles.",
        unit="tokens",
        ge=1,
    )
    max_cache_tokens: int | None = option(
        None,
        "Tokens of all running requests whose keys and values are kept; default: what memory_utilization leaves.",
        unit="tokens",
        ge=16,
    )
    memory_utilization: float = option(
        0.9, "Share of the device's memory (on CPU: of what is free) for the engine.", gt=0, le=1
    )
    prefill_chunk: int = option(
        512, "Most prompt tokens in one step; smaller: smoother streams, slower prompts.", unit="tokens", ge=1
    )
    max_waiting: int = option(
        1024, "Requests that may wait beside those that run; further ones are refused.", ge=1
    )
