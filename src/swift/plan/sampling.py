"""Memory of policy optimisation while it samples, by formula: what the embedded engine needs beside the model.

Answers are sampled between steps, when there are neither gradients nor activations. Then there are keys and values of
all answers at once, logits of their newest tokens, and of a model in shards the whole (`swift.parallel.gathered`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swift.config.schema import Resolved
from swift.data.mode import batch_mode
from swift.models.facts import ModelFacts
from swift.rl.sizes import answers_of_a_rank, engine_limits
from swift.tuners.registry import MOST_MERGED_BYTES

__all__ = [
    "Sampling",
    "answers_to_prompts",
    "cache_bytes_per_token",
    "make_sampling",
    "merged_numbers",
    "sampling_moments",
]


@dataclass(frozen=True)
class Sampling:
    """What is asked of the embedded engine.

    Attributes:
        slots: answers written at a time.
        cache_tokens: of prompts and answers whose keys and values are kept at most.
        width: tokens of the longest prompt and answer.
        piece: prompt tokens in one forward pass.
        prompts: different ones among those answered at a time.
        goes_on: more answers are wanted than are written at a time, so that prompts come while all slots are in use.
        is_tempered: logits are divided.
        gathered: bytes of the whole model, where each rank has a shard.
        casts: bytes of master weights that are cast once for all of it.
    """

    slots: int
    cache_tokens: int
    width: int
    piece: int
    prompts: int
    goes_on: bool
    is_tempered: bool
    gathered: float = 0.0
    casts: float = 0.0


def cache_bytes_per_token(facts: ModelFacts, dtype_bytes: int) -> int:
    """Keys and values of one token: 2 x layers x key/value heads x head size numbers."""
    return 2 * facts.num_layers * facts.num_key_value_heads * facts.head_dim * dtype_bytes


def make_sampling(resolved: Resolved, longest: int, *, gathered: float, casts: float) -> Sampling | None:
    """None where nothing is sampled.

    Args:
        longest: tokens of the longest prompt, and of the longest answer.
    """
    config = resolved.config
    policy, ranks = config.policy, config.parallel.data_parallel_size
    if not config.rlhf.is_policy or policy.replay is not None or policy.generation_batch_size is None:
        return None
    prompts = -(-policy.generation_batch_size // policy.num_generations)
    wanted = answers_of_a_rank(prompts, policy.num_generations, ranks)
    prompt = max(1, longest - config.generation.max_new_tokens)
    limits = engine_limits(resolved, prompt, wanted)
    slots = min(limits.max_num_seqs, wanted)
    assert limits.max_cache_tokens is not None
    asked = -(-slots // policy.num_generations)
    return Sampling(
        slots=slots,
        cache_tokens=min(limits.max_cache_tokens, slots * (longest + 1)),
        width=longest,
        piece=min(limits.prefill_chunk, asked * prompt),
        prompts=asked,
        goes_on=wanted > slots,
        is_tempered=config.generation.temperature not in (None, 0, 1),
        gathered=gathered,
        casts=casts,
    )


def sampling_moments(
    facts: ModelFacts, sampling: Sampling, size: int, device: str, width: int
) -> dict[str, dict[str, float]]:
    """What comes and goes at the moments of sampling that can be its peak, by part.

    The cache grows by one layer's keys or values at a time. A forward pass keeps inside a layer three times the width
    of its feed-forward part, and the residual stream before and behind a norm. Logits exist in float32 (and as the
    model gives them), and once more as probabilities. On the CPU attention's scores exist as a matrix.

    Args:
        size: bytes of a number in the computing precision.
        width: of the feed-forward layer that one token passes.
    """
    rows, h = sampling.slots, facts.hidden_size
    cache = sampling.cache_tokens * cache_bytes_per_token(facts, size)
    in_layer = size * (3 * width + 3 * h)
    wide = 4 if size == 4 else 8 + size  # scores and weights in float32, and as they are multiplied
    scores = rows * facts.num_attention_heads * sampling.width * (wide + 4) if device == "cpu" else 0
    logits = rows * facts.vocab_size * (8 + (size if size != 4 else 0) + (4 if sampling.is_tempered else 0))
    all_the_time = sampling.gathered + sampling.casts
    began = 1.0 if sampling.goes_on else sampling.prompts / rows
    return {
        "prompts": {"cache": cache * began, "temporary": all_the_time + sampling.piece * in_layer},
        "growing cache": {"cache": cache * (1 + 0.5 / facts.num_layers), "temporary": all_the_time},
        "attention to answers": {"cache": cache, "temporary": all_the_time + scores + rows * in_layer / 2},
        "feed-forward of answers": {"cache": cache, "temporary": all_the_time + rows * in_layer},
        "next tokens": {"cache": cache, "logits": float(logits), "temporary": all_the_time},
    }


def merged_numbers(resolved: Resolved, adapted: Sequence[tuple[int, int]], compute: str, saved: int) -> int:
    """Numbers of the weights that sampling keeps a second time, with LoRA added; see `swift.tuners.merged`.

    Args:
        adapted: inputs and outputs of each adapted layer.
        compute: precision.
        saved: numbers of trained copies of modules.
    """
    config = resolved.config
    is_ours = config.tuner.tuner_type == "lora" and not config.tuner.use_dora
    if not (config.rlhf.is_policy and config.policy.replay is None and is_ours) or compute != "float32":
        return 0
    if saved or config.tuner.target_parameters or config.quantization.is_active:
        return 0
    count = sum(inputs * outputs for inputs, outputs in adapted)
    return count if 4 * count <= MOST_MERGED_BYTES else 0


def answers_to_prompts(resolved: Resolved) -> tuple[int, int]:
    """(answers for which a prompt is computed once, tokens of the longest answer); 1 and 0 where nothing is sampled.

    Answers to one prompt share it in joined rows, where our attention computes them; see `swift.rl.parts`.
    """
    config = resolved.config
    if not config.rlhf.is_policy:
        return 1, 0
    joined = batch_mode(config.data) != "padded" and config.model.attn_impl in ("auto", "varlen")
    shared = joined and config.policy.share_prompts and not config.tuner.longlora_group_size
    each = min(config.training.per_device_train_batch_size, config.policy.num_generations) if shared else 1
    return each, config.generation.max_new_tokens
