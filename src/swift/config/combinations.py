"""Options that have no effect beside others, exclude one another, or say what happens anyway.

ms-swift takes such options without a word. A plan names them, so that its command lines can be planned as they are;
a run refuses them, except where leaving them out would change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from swift.config.memory_rules import FULL_TRAINING_OPTIMIZERS, LOW_RANK_OPTIONS
from swift.config.rlhf_rules import RLHF_OPTIONS
from swift.config.schema import Resolved
from swift.config.sections.optimizer import OptimizerSection
from swift.config.sections.vllm import VllmSection
from swift.config.task_rules import TASK_OPTIONS
from swift.config.tuner_rules import TUNER_OPTIONS

__all__ = ["EXCLUSIVE", "IMPLIED", "ONLY_WITH", "Implied", "OnlyWith", "check_combinations"]


@dataclass(frozen=True)
class OnlyWith:
    """Options without effect unless ``option`` has one of ``values``: giving them anyway is a mistake."""

    names: tuple[str, ...]
    option: str
    values: tuple[Any, ...]


def _without(*kinds: str) -> tuple[str, ...]:
    """The optimizers of other kinds (``lion`` stands for its 8-bit and paged ones too)."""
    names = get_args(OptimizerSection.model_fields["optim"].annotation)
    return tuple(name for name in names if not any(kind in name for kind in kinds))


ONLY_WITH: tuple[OnlyWith, ...] = (
    *(OnlyWith(*row) for row in (*TUNER_OPTIONS, *TASK_OPTIONS, *RLHF_OPTIONS)),
    OnlyWith(("lorap_lr_ratio",), "tuner_type", ("lora",)),
    OnlyWith(("qat_activation_bits", "qat_group_size"), "qat_bits", (4, 8)),
    OnlyWith(("adam_beta1", "adam_beta2"), "optim", _without("adafactor")),
    OnlyWith(("adam_epsilon",), "optim", _without("adafactor", "lion")),
    OnlyWith(LOW_RANK_OPTIONS, "optim", FULL_TRAINING_OPTIMIZERS),
    OnlyWith(("galore_quantization", "galore_cos_threshold"), "optim", ("galore_adamw",)),
    OnlyWith(("apollo_scale_type",), "optim", ("apollo_adamw",)),
    OnlyWith(
        ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"), "quant_bits", (4,)
    ),
    OnlyWith(("lr_decay_ratio",), "lr_scheduler_type", ("wsd",)),
    OnlyWith(("min_lr_ratio", "min_lr"), "lr_scheduler_type", ("cosine", "linear", "wsd")),
    OnlyWith(("chat_template", "enable_thinking", "agent_template"), "use_chat_template", (True,)),
    OnlyWith(("save_steps",), "save_strategy", ("steps",)),
    OnlyWith(("shuffle_buffer_size", "stopping_strategy"), "streaming", (True,)),
    OnlyWith(("split_dataset_ratio",), "streaming", (False,)),
    OnlyWith(("eval_steps",), "eval_strategy", ("steps", "no")),
    OnlyWith(tuple(VllmSection.model_fields), "infer_backend", ("vllm",)),
    OnlyWith(("max_cache_tokens", "prefill_chunk", "attn_impl"), "infer_backend", ("transformers",)),
)

EXCLUSIVE: tuple[tuple[str, str, str], ...] = (
    ("target_regex", "target_modules", "both choose the modules that get an adapter"),
    ("min_lr", "min_lr_ratio", "both set the learning rate at the end"),
    ("warmup_steps", "warmup_ratio", "both set the length of the warm-up"),
    ("split_dataset_ratio", "val_dataset", "both provide the validation data"),
    ("packing", "group_by_length", "packed rows all have the same length"),
)


@dataclass(frozen=True)
class Implied:
    """Options that change nothing when ``option`` is true, whatever they say; ``why`` explains it."""

    names: tuple[str, ...]
    option: str
    why: str


IMPLIED: tuple[Implied, ...] = (
    Implied(("padding_free",), "packing", "packed rows have no padding anyway"),
    Implied(("dataset_num_proc", "dataloader_num_workers"), "streaming", "one process reads a stream"),
)


def check_combinations(resolved: Resolved) -> None:
    """Refuses options that do not go together."""
    for rule in IMPLIED:
        if resolved.value(rule.option):
            for name in _given(resolved, rule.names):
                resolved.warnings.append(f"{resolved.place(name)}: not needed: {rule.why}")
    _check_effects(resolved)
    for first, second, why in EXCLUSIVE:
        if len(_given(resolved, (first, second))) == 2:
            fix = f"leave out --{first} or --{second}"
            resolved.refuse(first, f"does not go together with {second}: {why}", fix=fix)
    _check_ends_of_epochs(resolved)


def _given(resolved: Resolved, names: tuple[str, ...]) -> list[str]:
    """Those that the user set to something."""
    return [name for name in names if resolved.is_explicit(name) and resolved.value(name)]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_effects(resolved: Resolved) -> None:
    for rule in ONLY_WITH:
        value = resolved.value(rule.option)
        for name in _given(resolved, rule.names) if value not in rule.values else ():
            instead = next((one for one in rule.values if one is not None), None)
            # A value that names another kind of work than the user's is no advice.
            fits = instead is not None and None not in rule.values
            fix = "leave it out" + (f", or set --{rule.option} {_word(instead)}" if fits else "")
            resolved.refuse(name, f"has no effect with {rule.option} {_word(value)}", fix=fix)


def _check_ends_of_epochs(resolved: Resolved) -> None:
    """Where an epoch of a stream ends is known only when the step behind it asks for data."""
    if resolved.command not in ("pt", "sft", "rlhf") or not resolved.config.data.streaming:
        return
    for name in ("save_strategy", "eval_strategy"):
        if resolved.sources[name].kind != "derived" and resolved.value(name) == "epoch":
            problem = "does not go together with streaming: the end of an epoch is not known beforehand"
            resolved.refuse(name, problem, fix=f"--{name} steps")
