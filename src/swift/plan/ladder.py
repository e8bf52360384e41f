"""What makes a run need less memory, the cheapest changes first: for a plan that does not fit, and for a failed run.

A rung looks at the options in force (flat, defaults and derived ones included) and says what it would change, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift.config.memory_rules import FULL_TRAINING_OPTIMIZERS
from swift.config.sections.rlhf import POLICY_TYPES, RlhfSection
from swift.config.sections.task import TaskSection

__all__ = ["AFTER_FAILURE", "LADDER", "Change", "changes", "is_in_batch"]

Options = Mapping[str, Any]
SHORTEST, LOWEST_RANK, LEAST_CHUNK = 256, 4, 128


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        overrides: option -> value.
        words: what it is, in a few words.
    """

    overrides: dict[str, Any]
    words: str


def is_in_batch(options: Options) -> bool:
    """The loss compares the rows of a micro-batch: with another one it would be another loss."""
    return any(
        section(**{name: options[name] for name in known if options.get(name) is not None}).is_in_batch
        for section, known in (
            (TaskSection, ("loss_type", "infonce_use_batch")),
            (RlhfSection, ("rlhf_loss_type",)),
        )
    )


def smaller_batch(options: Options) -> Change | None:
    """A smaller micro-batch with as much more accumulation: the same samples in each step."""
    batch = int(options.get("per_device_train_batch_size") or 1) if options else 1
    accumulation = int(options.get("gradient_accumulation_steps") or 1) if options else 1
    if batch == 1 or is_in_batch(options):
        return None
    factor = next(number for number in range(2, batch + 1) if batch % number == 0)
    smaller = batch // factor
    overrides: dict[str, Any] = {"per_device_train_batch_size": smaller}
    if not options.get("global_batch_size"):  # else it follows from it, and naming both is refused
        overrides["gradient_accumulation_steps"] = accumulation * factor
    if int(options.get("per_device_eval_batch_size") or 0) > smaller:
        overrides["per_device_eval_batch_size"] = smaller
    words = f"micro-batch {batch} -> {smaller}, accumulation {accumulation} -> {accumulation * factor}"
    return Change(overrides, words)


def recompute(options: Options) -> Change | None:
    """About a third more computation."""
    if not options or options.get("gradient_checkpointing"):
        return None
    return Change({"gradient_checkpointing": True}, "gradient checkpointing switched on")


def fewer_at_once(options: Options) -> Change | None:
    """Answers of policy optimisation written in two goes: the same ones, later."""
    at_once = int(options.get("max_num_seqs") or 0)
    if options.get("rlhf_type") not in POLICY_TYPES or options.get("replay") or at_once <= 1:
        return None
    return Change({"max_num_seqs": at_once // 2}, f"{at_once // 2} answers written at once")


def smaller_chunks(options: Options) -> Change | None:
    """Logits of fewer positions at once."""
    chunk = int(options.get("logits_chunk_size") or 0)
    if chunk <= LEAST_CHUNK:
        return None
    return Change({"logits_chunk_size": chunk // 2}, f"logits of {chunk // 2} positions at once")


def smaller_optimizer(options: Options) -> Change | None:
    """AdamW's moments in 8 bits, in pageable memory on CUDA."""
    if options.get("optim", "adamw") not in ("adamw", "paged_adamw"):
        return None
    paged = "" if str(options.get("device", "cpu")).startswith("cpu") else "paged_"
    return Change({"optim": f"{paged}adamw_8bit"}, "AdamW in 8 bits")


def narrow_weights(options: Options) -> Change | None:
    """Full training without float32 copies, where it computes in bfloat16 anyway: small updates are rounded away."""
    computes = options.get("torch_dtype", "auto")
    on_cpu = str(options.get("device", "cpu")).startswith("cpu")
    if options.get("tuner_type") not in ("full", "llamapro") or options.get("param_dtype") == "bfloat16":
        return None
    if computes != "bfloat16" and (on_cpu or computes != "auto"):
        return None
    return Change({"param_dtype": "bfloat16"}, "trained weights in bfloat16, without float32 copies")


def adapters_only(options: Options) -> Change | None:
    """LoRA in the place of full training."""
    if options.get("tuner_type") not in ("full", "llamapro"):
        return None
    overrides: dict[str, Any] = {"tuner_type": "lora"}
    if options.get("optim") in FULL_TRAINING_OPTIMIZERS:
        overrides["optim"] = "adamw"
    return Change(overrides, "adapters (LoRA) in the place of full training")


def quantised_base(options: Options) -> Change | None:
    """A frozen base in 4 bits."""
    if options.get("tuner_type") in ("full", "llamapro") or options.get("quant_bits") == 4:
        return None
    if options.get("tuner_type") in ("loha", "lokr"):
        return None
    return Change({"quant_method": "bnb", "quant_bits": 4}, "the frozen base in 4 bits (QLoRA)")


def offload(options: Options) -> Change | None:
    """Activations in host memory: every one of them goes there and back."""
    if options.get("activation_cpu_offload") or str(options.get("device", "cpu")).startswith("cpu"):
        return None
    return Change({"activation_cpu_offload": True}, "activations in host memory")


def shorter(options: Options) -> Change | None:
    """Half as long samples: the model sees less of each."""
    length = int(options.get("max_length") or 0)
    if length // 2 < SHORTEST:
        return None
    return Change({"max_length": length // 2}, f"samples of {length // 2} tokens at most")


def lower_rank(options: Options) -> Change | None:
    """Half the rank."""
    rank = int(options.get("lora_rank") or 0)
    if options.get("tuner_type") != "lora" or rank // 2 < LOWEST_RANK:
        return None
    return Change({"lora_rank": rank // 2}, f"rank {rank // 2}")


LADDER: tuple[Callable[[Options], Change | None], ...] = (
    smaller_batch,
    recompute,
    fewer_at_once,
    smaller_chunks,
    smaller_optimizer,
    narrow_weights,
    adapters_only,
    quantised_base,
    offload,
    shorter,
    lower_rank,
)  # fmt: skip


AFTER_FAILURE = LADDER[:2]
"""What a retry may do by itself: the run computes the same as before, and much less memory is needed."""


def changes(
    options: Options, rungs: Sequence[Callable[[Options], Change | None]] = LADDER
) -> Iterator[Change]:
    """What each rung would change, the cheapest first."""
    return (change for rung in rungs if (change := rung(options)) is not None)
