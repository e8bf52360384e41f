"""What goes together among quantised bases and optimizers."""

from __future__ import annotations

from swift.config.export_rules import METHODS
from swift.config.schema import Resolved

__all__ = ["FULL_TRAINING_OPTIMIZERS", "LOW_RANK_OPTIONS", "check_memory", "quant_bits", "quant_method"]

LOW_RANK_OPTIONS = ("galore_rank", "galore_target_modules", "galore_update_proj_gap", "galore_scale")
FULL_TRAINING_OPTIMIZERS = ("galore_adamw", "apollo_adamw")
_OFF = (0, 16)


def quant_method(resolved: Resolved) -> str | None:
    """``--quant_bits 4`` alone means bitsandbytes."""
    bits = resolved.config.quantization.quant_bits
    return None if bits is None or bits in _OFF else "bnb"


def quant_bits(resolved: Resolved) -> int | None:
    """What a method means without a number of bits."""
    method = resolved.config.quantization.quant_method or ""
    return {"torchao": 8, **{name: entry.bits[0] for name, entry in METHODS.items()}}.get(method)


def check_memory(resolved: Resolved) -> None:
    """Raise ConfigError for what cannot be done together."""
    _check_quantization(resolved)
    _check_rounded(resolved)
    if "optim" in resolved.sources:
        _check_optimizer(resolved)


def _check_quantization(resolved: Resolved) -> None:
    section = resolved.config.quantization
    if resolved.command == "export":  # it has rules of its own
        return
    if not section.is_active:
        if section.quant_bits is not None and section.quant_bits not in _OFF:
            raise resolved.error("quant_bits", "needs a method", fix="--quant_method bnb")
        return
    allowed = {"bnb": (4, 8), "torchao": (8,)}[section.quant_method or ""]
    if section.quant_bits not in allowed:
        raise resolved.error(
            "quant_bits",
            f"{section.quant_method} stores {' or '.join(map(str, allowed))} bits, not {section.quant_bits}",
            fix="--quant_method bnb --quant_bits 4",
        )
    if resolved.command in ("pt", "sft", "rlhf") and resolved.config.tuner.tuner_type == "full":
        raise resolved.error(
            "quant_method",
            "a quantised base cannot be trained in full",
            why="its weights are stored in steps too coarse for an update; adapters on top of it are trained",
            fix="--tuner_type lora, or leave the quantisation out",
        )


def _check_rounded(resolved: Resolved) -> None:
    """Quantisation-aware and float8 training change layers whose weights are trained, one way at a time."""
    section = resolved.config.quantization
    if not section.needs_torchao:
        return
    for option, value, allowed in (
        ("qat_bits", section.qat_bits, (4, 8)),
        ("qat_activation_bits", section.qat_activation_bits, (8,)),
    ):
        if value is not None and value not in allowed:
            fix = " or ".join(f"--{option} {bits}" for bits in allowed)
            raise resolved.error(option, f"no rounding to {value} bits", fix=fix)
    name = "fp8" if section.fp8 else "qat_bits"
    if section.fp8 and section.qat_bits is not None:
        raise resolved.error(name, "does not go together with qat_bits", fix="choose one")
    if resolved.config.tuner.tuner_type != "full":
        raise resolved.error(
            name,
            "is for full training: the weights under an adapter are not trained",
            fix="--tuner_type full, or --quant_method bnb --quant_bits 4 with adapters",
        )


def _check_optimizer(resolved: Resolved) -> None:
    optim = resolved.config.optimizer.optim
    if optim in FULL_TRAINING_OPTIMIZERS and resolved.config.tuner.tuner_type != "full":
        raise resolved.error(
            "optim",
            f"{optim} projects the gradients of whole weight matrices; adapters are of low rank already",
            fix="--tuner_type full, or --optim adamw_8bit to save memory with adapters",
        )
    if optim == "schedule_free_adamw" and resolved.config.training.lr_scheduler_type != "constant":
        resolved.warnings.append(
            f"{resolved.place('lr_scheduler_type')}: schedule_free_adamw replaces a schedule; constant is usual"
        )
