"""Which models can be divided how: what parity tests cover. Everything else is refused before anything is loaded.

Imports no torch: plans ask as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swift.config.sections.parallel import ParallelSection
from swift.core.errors import ConfigError

__all__ = ["STAGES_OF_A_RANK", "Decoder", "check_dimensions", "split_degree"]

_DENSE = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi", "glm", "glm4", "granite"),
    *("olmo2", "olmo3", "starcoder2", "smollm3", "ernie4_5"),
)
TENSOR_FAMILIES = (*_DENSE, "cohere", "qwen3_moe")
PIPELINE_FAMILIES = (*_DENSE, "phi3", "qwen3_moe")
EXPERT_FAMILIES = ("qwen3_moe",)

STAGES_OF_A_RANK = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "interleaved_zb": 2, "zbv": 2}
"""Pipeline schedule -> how many stages each rank has."""

_SHARD = "--data_parallel_shard_size N, which shards the weights of every model"


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder that a division depends on.

    Attributes:
        model_type: of the decoder (of a multimodal model, its text part).
        window: of sliding attention, where some layers have it.
    """

    model_type: str
    num_layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    num_experts: int = 0
    window: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Decoder:
        """From the contents of a config.json, or transformers' configuration as a dict."""
        text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
        heads = text.get("num_attention_heads") or 0
        window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
        layers = text.get("layer_types")
        return cls(
            text.get("model_type") or "",
            text.get("num_hidden_layers") or 0,
            heads,
            text.get("num_key_value_heads") or heads,
            text.get("intermediate_size") or 0,
            text.get("num_experts") or 0,
            window if layers is None or "sliding_attention" in layers else None,
        )


def check_dimensions(section: ParallelSection, decoder: Decoder, max_length: int | None = None) -> None:
    """Raises ConfigError when the model cannot be divided as the section says."""
    if section.tensor_parallel_size > 1:
        _check_tensor(decoder, section.tensor_parallel_size)
    if section.pipeline_parallel_size > 1:
        _check_pipeline(decoder, section.pipeline_parallel_size, section.pipeline_schedule)
    if section.context_parallel_size > 1:
        _check_context(decoder, section, max_length)
    if section.expert_parallel_size > 1:
        _check_experts(decoder, section.expert_parallel_size)


def _check_tensor(decoder: Decoder, size: int) -> None:
    where = "--tensor_parallel_size"
    if decoder.model_type not in TENSOR_FAMILIES:
        raise ConfigError(
            f"the layers of {decoder.model_type} models are not split over devices",
            where=where,
            why=f"tested are {', '.join(TENSOR_FAMILIES)}",
            fix=_SHARD,
        )
    for what, count in {
        "attention heads": decoder.heads,
        "channels of the MLP": decoder.intermediate,
    }.items():
        if count % size:
            raise ConfigError(
                f"{count} {what} cannot be shared by {size} devices", where=where, fix="a divisor"
            )
    if decoder.key_value_heads % size and size % decoder.key_value_heads:
        raise ConfigError(
            f"{decoder.key_value_heads} key/value heads and {size} devices: neither divides the other",
            where=where,
        )


def _check_pipeline(decoder: Decoder, size: int, schedule: str) -> None:
    where, each = "--pipeline_parallel_size", STAGES_OF_A_RANK[schedule]
    if decoder.model_type not in PIPELINE_FAMILIES:
        raise ConfigError(
            f"{decoder.model_type} models are not divided into stages",
            where=where,
            why=f"tested are {', '.join(PIPELINE_FAMILIES)}: layers that need hidden states and positions only",
            fix=_SHARD,
        )
    if decoder.num_layers < size * each:
        raise ConfigError(
            f"{decoder.num_layers} layers are too few for {size * each} stages",
            where=where,
            why=f"{schedule} has {each} on each of {size} devices",
            fix="--pipeline_schedule 1f1b" if each > 1 else f"{where} {decoder.num_layers}",
        )


def _check_context(decoder: Decoder, section: ParallelSection, max_length: int | None) -> None:
    # What ranks of tp share are heads as well.
    heads, shared = decoder.heads // section.tensor_parallel_size, decoder.key_value_heads
    shared = max(1, shared // section.tensor_parallel_size)
    ring, _ = split_degree(section.sequence_parallel_method, section.context_parallel_size, heads, shared)
    if ring > 1 and decoder.window is not None and (max_length is None or max_length > decoder.window):
        raise ConfigError(
            f"rings have no sliding window, and this model has one of {decoder.window} tokens",
            where="--context_parallel_size",
            fix=f"--sequence_parallel_method ulysses with a divisor of {heads} heads, "
            f"or --max_length {decoder.window}",
        )


def split_degree(kind: str, size: int, heads: int, key_value_heads: int) -> tuple[int, int]:
    """(ranks in a ring, ranks in a Ulysses group) of ``size`` ranks.

    Ulysses needs its ranks to divide the heads, and the key/value heads or the other way round. ``hybrid`` (and
    ``auto``) takes as many for it as fit and makes rings of the rest.

    Raises:
        ConfigError: Ulysses was asked for and the heads do not divide.
    """
    fits = [
        number
        for number in range(1, size + 1)
        if size % number == 0
        and heads % number == 0
        and (key_value_heads % number == 0 or number % key_value_heads == 0)
    ]
    if kind == "ring":
        return size, 1
    if kind == "ulysses" and size not in fits:
        raise ConfigError(
            f"Ulysses over {size} ranks cannot share {heads} heads ({key_value_heads} of keys and values)",
            where="--sequence_parallel_method",
            why="every rank takes equally many heads",
            fix=f"hybrid, which makes {size // max(fits)} x {max(fits)} of them, or ring",
        )
    return size // max(fits), max(fits)


def _check_experts(decoder: Decoder, size: int) -> None:
    where = "--expert_parallel_size"
    if decoder.model_type not in EXPERT_FAMILIES:
        raise ConfigError(
            f"{decoder.model_type} models have no experts that are shared by devices",
            where=where,
            why=f"tested is {', '.join(EXPERT_FAMILIES)}",
            fix=f"leave it out; {_SHARD}",
        )
    if decoder.num_experts % size:
        raise ConfigError(f"{decoder.num_experts} experts cannot be shared by {size} devices", where=where)
