"""What the algorithm's row says about options that nobody set. Imports no torch: plans ask as well as runs."""

from __future__ import annotations

from swift.config.schema import Resolved
from swift.config.sections.engine import EngineSection
from swift.objectives.policy.algorithms import Algorithm, find_algorithm

__all__ = ["answers_in_step", "answers_of_a_rank", "derive_sizes", "engine_limits"]

_AT_ONCE = 256


def answers_in_step(resolved: Resolved) -> int:
    """Answers of an optimizer step of a run that begins, over all ranks."""
    training = resolved.config.training
    if training.global_batch_size is not None:
        return training.global_batch_size
    ranks = resolved.config.parallel.data_parallel_size
    return training.per_device_train_batch_size * (training.gradient_accumulation_steps or 1) * ranks


def derive_sizes(resolved: Resolved, in_step: int) -> Algorithm:
    """Fill in algorithm, answers sampled at a time, and weight of the KL.

    Args:
        in_step: answers of an optimizer step, over all ranks.

    Raises ConfigError for an unknown algorithm.
    """
    config = resolved.config
    policy, training = config.policy, config.training
    resolved.derive("algo", config.rlhf.rlhf_type, "rlhf_type")
    row = find_algorithm(policy.algo or "grpo")
    sampled = None
    if policy.steps_per_generation:  # micro-batches of one rank
        sampled = policy.steps_per_generation * in_step // (training.gradient_accumulation_steps or 1)
    resolved.derive(
        "generation_batch_size", sampled or in_step * row.sampling.get("steps_per_generation", 1), "algo"
    )
    resolved.derive("beta", row.beta, "algo")
    return row


def answers_of_a_rank(num_prompts: int, num_generations: int, ranks: int) -> int:
    """Answers that one of ``ranks`` samples at a time: all of those to its prompts."""
    return -(-num_prompts // ranks) * num_generations


def engine_limits(resolved: Resolved, longest_prompt: int, num_samples: int) -> EngineSection:
    """How much the embedded engine does at once, unless options say so: all answers, with room for the longest.

    Args:
        longest_prompt: tokens.
        num_samples: answers that are wanted at a time.
    """
    section = resolved.config.engine.model_copy()
    if not resolved.is_explicit("max_num_seqs"):
        section.max_num_seqs = min(num_samples, _AT_ONCE)
    if section.max_cache_tokens is None:
        longest = longest_prompt + resolved.config.generation.max_new_tokens + 1
        section.max_cache_tokens = max(16, section.max_num_seqs * longest)
    return section
