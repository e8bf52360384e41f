"""What follows from the options of policy optimisation, and what does not go together."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swift.config.schema import SECTIONS, Resolved
from swift.config.sections.policy import PolicySection
from swift.config.sections.rlhf import LATER_TYPES, POLICY_LOSSES, POLICY_TYPES, PREFERENCE_TYPES
from swift.core.errors import ConfigError

__all__ = [
    "POLICY_DERIVATIONS",
    "POLICY_OPTIONS",
    "TASK_PREFIX",
    "best_metric",
    "check_policy",
    "policy_metrics",
    "reward_name",
    "steps_of_prompts",
    "whole_groups",
]


TASK_PREFIX = "task:"
"""Data sets that are made here, with a reward of their own."""

_NOT_SAMPLED = (
    "stream",
    "result_path",
    "metric",
    "metric_args",
    "num_samples",
    "stop_words",
    "repetition_penalty",
)
_ENGINE = ("max_num_seqs", "max_cache_tokens", "memory_utilization")
_LEARNED = ("packing", "streaming", "debug_mode", "loss_scale", "use_loss_scale")
"""What is about texts that are learned as they stand in the data."""
_UNGROUPED = ("reinforce_pp", "reinforce_mean")

POLICY_OPTIONS: tuple[tuple[tuple[str, ...], str, tuple[Any, ...]], ...] = (
    (tuple(SECTIONS["policy"].model_fields), "rlhf_type", POLICY_TYPES),
    (_NOT_SAMPLED, "rlhf_type", (None, *LATER_TYPES)),
    (_ENGINE, "rlhf_type", (None, *POLICY_TYPES, *LATER_TYPES)),
    (_LEARNED, "rlhf_type", (None, *PREFERENCE_TYPES, *LATER_TYPES)),
    (("ref_model_sync_steps", "ref_model_mixup_alpha"), "sync_ref_model", (True,)),
    (("vllm_config",), "use_vllm_sampler", (True,)),
)


def _temperature(resolved: Resolved) -> float | None:
    return 1.0 if resolved.config.rlhf.is_policy else None


def _reward_funcs(resolved: Resolved) -> list[str] | None:
    """Rows made here bring a reward along."""
    config = resolved.config
    made_here = config.data.dataset and all(name.startswith(TASK_PREFIX) for name in config.data.dataset)
    return ["task"] if config.rlhf.is_policy and made_here and not config.policy.reward_model else None


def best_metric(resolved: Resolved) -> str | None:
    return "eval_reward" if resolved.config.rlhf.is_policy else None


POLICY_DERIVATIONS: tuple[tuple[str, tuple[str, ...], Callable[[Resolved], Any]], ...] = (
    ("temperature", ("rlhf_type",), _temperature),
    ("reward_funcs", ("dataset",), _reward_funcs),
)


def whole_groups(resolved: Resolved, wanted: int, at_once: int) -> int:
    """The smallest number of answers from ``wanted`` on that whole groups and whole micro-batches make up."""
    unit = math.lcm(resolved.config.policy.num_generations, at_once)
    return -(-wanted // unit) * unit


def steps_of_prompts(policy: PolicySection, num_prompts: int, in_step: int) -> int:
    """Optimizer steps of a pass over the prompts, of ``in_step`` answers; passes join without a gap.

    Each batch of answers gives a few steps, ``num_iterations`` times. ``generation_batch_size`` has to be derived.
    """
    sampled = policy.generation_batch_size
    assert sampled is not None, "derived by swift.rl.sizes"
    per_batch = sampled // in_step * policy.num_iterations
    return max(1, num_prompts * per_batch // max(1, sampled // policy.num_generations))


def reward_name(text: str) -> str:
    """The name of a reward in metrics: ``FILE.py:function`` is ``function``, a folder its last part."""
    return text.rpartition(":")[2] if ":" in text else Path(text).name


def policy_metrics(resolved: Resolved) -> tuple[str, ...]:
    """Names of the metrics of an evaluation."""
    policy = resolved.config.policy
    names = [reward_name(one) for one in (*policy.reward_funcs, *policy.reward_model)]
    if policy.soft_overlong or resolved.config.rlhf.rlhf_type in ("dapo", "fipo"):
        names.append("soft_overlong")
    return ("eval_reward", "eval_mean_length", *(f"eval_rewards/{name}" for name in names))


def check_policy(resolved: Resolved) -> None:
    """Raises ConfigError for what does not go together."""
    config = resolved.config
    policy = config.policy
    _check_sampler(resolved)
    if not (policy.reward_funcs or policy.reward_model or policy.replay or resolved.planning):
        raise ConfigError(
            "which reward?",
            where="--reward_funcs",
            fix="--reward_funcs FILE.py:function, a built-in one, or --reward_model FOLDER",
        )
    num_rewards = len(policy.reward_funcs) + len(policy.reward_model)
    if policy.reward_weights and len(policy.reward_weights) != num_rewards:
        raise resolved.error(
            "reward_weights",
            f"{len(policy.reward_weights)} weights for {num_rewards} rewards",
            fix="give one weight for each of --reward_funcs, then of --reward_model",
        )
    losses = config.rlhf.rlhf_loss_type
    if len(losses) > 1 or not set(losses) <= set(POLICY_LOSSES):
        raise resolved.error(
            "rlhf_loss_type",
            f"{' '.join(losses)} is no loss of policy optimisation",
            fix=f"one of {', '.join(POLICY_LOSSES)}",
        )
    if config.tuner.lora_dropout:
        raise resolved.error(
            "lora_dropout",
            "dropout makes the log-probabilities of trainer and sampler differ",
            fix="leave it out: 0",
        )
    if config.rlhf.rlhf_type == "chord" and not policy.chord_sft_dataset and not resolved.planning:
        raise ConfigError(
            "chord learns from an expert's answers as well",
            where="--chord_sft_dataset",
            fix="--chord_sft_dataset FILE",
        )
    kind = config.rlhf.rlhf_type
    if policy.algo not in (None, kind) and kind != "grpo":
        raise resolved.error(
            "algo",
            f"is another algorithm than rlhf_type {kind}",
            fix=f"--rlhf_type grpo --algo {policy.algo}",
        )
    if config.data.truncation_strategy == "right":
        resolved.refuse(
            "truncation_strategy",
            "would cut a prompt off where the answer begins",
            fix="--truncation_strategy left (or delete), or a larger --max_length",
        )
    _check_sizes(resolved)


def _check_sampler(resolved: Resolved) -> None:
    policy, generation = resolved.config.policy, resolved.config.generation
    if policy.use_vllm_sampler:
        problem = "the asynchronous pool of vLLM samplers comes with a later version"
        fix = "leave it out: the embedded engine samples in this process, with the weights in training"
        resolved.refuse("use_vllm_sampler", problem, fix=fix)
    if generation.temperature == 0:
        raise resolved.error(
            "temperature", "at temperature 0 all answers to a prompt are the same", fix="leave it out: 1"
        )
    if generation.top_p < 1 or generation.top_k:
        name = "top_p" if generation.top_p < 1 else "top_k"
        resolved.warnings.append(
            f"{resolved.place(name)}: answers come from a part of the distribution, log-probabilities and ratios are "
            "those of the whole"
        )


def _check_sizes(resolved: Resolved) -> None:
    policy, training = resolved.config.policy, resolved.config.training
    group, ranks = policy.num_generations, resolved.config.parallel.data_parallel_size
    at_once = training.per_device_train_batch_size * ranks
    in_step = at_once * (training.gradient_accumulation_steps or 1)
    if training.global_batch_size is not None:
        in_step = training.global_batch_size
    if policy.steps_per_generation is not None and policy.generation_batch_size is not None:
        raise resolved.error(
            "steps_per_generation",
            "does not go together with generation_batch_size: each follows from the other",
            fix="leave one of them out",
        )
    sampled = policy.generation_batch_size or (policy.steps_per_generation or 0) * at_once or in_step
    # A step of a resumed run has as many answers as before, whatever the number of processes: `swift.rl.settings`.
    begins = resolved.config.checkpoint.resume_from_checkpoint is None
    if begins and sampled % in_step:
        raise resolved.error(
            "generation_batch_size" if policy.generation_batch_size else "steps_per_generation",
            f"{sampled} answers sampled at a time cannot be dealt out in steps of {in_step}",
            fix=f"--generation_batch_size {-(-sampled // in_step) * in_step}",
        )
    if begins and sampled % group:
        name = "num_generations" if resolved.is_explicit("num_generations") else "per_device_train_batch_size"
        whole = whole_groups(resolved, sampled, at_once)
        raise resolved.error(
            name,
            f"{sampled} answers at a time are no whole groups of {group}",
            fix=f"--gradient_accumulation_steps {whole // at_once}, or --num_generations {math.gcd(sampled, group)}",
        )
    kind = policy.advantage_estimator or resolved.config.rlhf.rlhf_type
    if group == 1 and kind not in _UNGROUPED and policy.algo is None:
        raise resolved.error(
            "num_generations",
            f"{kind} compares the answers to a prompt with one another",
            fix="--num_generations 8",
        )
