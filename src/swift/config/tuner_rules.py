"""Which options belong to which tuner, and what of them does not go together."""

from __future__ import annotations

import re
from typing import Any

from swift.config.schema import Resolved
from swift.config.sections.tuner import TunerSection
from swift.core.registry import closest

__all__ = ["TUNER_OPTIONS", "check_tuner", "derived_dropout"]


_LINEAR_TUNERS = ("lora", "adalora", "vera", "oft", "boft", "ia3", "loha", "lokr", "fourierft", "bone")
_LORA_STARTS = ("default", "gaussian", "pissa", "olora", "eva", "lora-ga", "loftq")
_BONE_STARTS = ("default", "bat")
_OWN_OPTIONS = {
    "adalora": "adalora_",
    "vera": "vera_",
    "oft": "oft_",
    "boft": "boft_",
    "ia3": "ia3_",
    "fourierft": "fourier_",
    "reft": "reft_",
    "adapter": "adapter_",
    "llamapro": "llamapro_",
}
"""Tuner -> start of the names of the options that only it has."""


def _starting(start: str) -> tuple[str, ...]:
    return tuple(name for name in TunerSection.model_fields if name.startswith(start))


TUNER_OPTIONS: tuple[tuple[tuple[str, ...], str, tuple[Any, ...]], ...] = (
    (("target_modules", "target_regex"), "tuner_type", _LINEAR_TUNERS),
    (("lora_rank",), "tuner_type", ("lora", "loha", "lokr", "bone")),
    (("lora_alpha",), "tuner_type", ("lora", "adalora", "loha", "lokr")),
    (("lora_dropout",), "tuner_type", ("lora", "adalora")),
    (("init_weights",), "tuner_type", ("lora", "bone")),
    (
        (
            "modules_to_save",
            "use_rslora",
            "use_dora",
            "lora_dtype",
            "target_parameters",
            "longlora_group_size",
        ),
        "tuner_type",
        ("lora",),
    ),
    (
        (*_starting("freeze_"), *_starting("trainable_"), "lisa_activated_layers", "lisa_step_interval"),
        "tuner_type",
        ("full",),
    ),
    *((_starting(start), "tuner_type", (tuner,)) for tuner, start in _OWN_OPTIONS.items()),
    (("lora_ga_direction", "lora_ga_scale", "lora_ga_stable_gamma"), "init_weights", ("lora-ga",)),
    (("lora_ga_batch_size", "lora_ga_iters", "lora_ga_max_length"), "init_weights", ("lora-ga", "eva")),
)
"""(options, tuner_type or init_weights, the values with which they have an effect)"""


def derived_dropout(resolved: Resolved) -> float | None:
    """None with ``target_parameters`` (a parameter has no input to drop elements of), and where answers are sampled:
    the log-probabilities of trainer and sampler would differ."""
    return 0.0 if resolved.config.tuner.target_parameters or resolved.config.rlhf.is_policy else None


def check_tuner(resolved: Resolved) -> None:
    """Raises ConfigError for values that contradict one another."""
    _check_start(resolved)
    _check_combinations(resolved)
    _check_sizes(resolved)


def _check_start(resolved: Resolved) -> None:
    tuner = resolved.config.tuner
    if tuner.init_weights == "loftq" and resolved.config.quantization.quant_method != "bnb":
        raise resolved.error(
            "init_weights",
            "LoftQ starts from the rounding error of a base that bitsandbytes quantises",
            fix="add --quant_method bnb --quant_bits 4",
        )
    starts = _BONE_STARTS if tuner.tuner_type == "bone" else _LORA_STARTS
    if tuner.init_weights in starts:
        return
    if starts is _LORA_STARTS and re.fullmatch(r"pissa_niter_[1-9]\d*", tuner.init_weights):
        return
    raise resolved.error(
        "init_weights",
        f"{tuner.init_weights!r} is no start of {tuner.tuner_type}",
        why=f"possible: {', '.join(starts)}",
        fix=f"--init_weights {closest(tuner.init_weights, starts) or 'default'}",
    )


def _check_combinations(resolved: Resolved) -> None:
    for name, third in (("use_dora", "target_parameters"), ("target_parameters", "lora_dropout")):
        for other in ("init_weights", "modules_to_save", third) if resolved.value(name) else ():
            value = resolved.value(other)
            if value not in ("default", "gaussian", 0, []):
                raise resolved.error(
                    name, f"does not go together with {other} {value}", fix=f"leave out --{name} or --{other}"
                )
    if resolved.is_explicit("lisa_step_interval") and not resolved.config.tuner.lisa_activated_layers:
        raise resolved.error(
            "lisa_step_interval",
            "has no effect without lisa_activated_layers",
            fix="--lisa_activated_layers 2",
        )


def _check_sizes(resolved: Resolved) -> None:
    tuner = resolved.config.tuner
    first, last = tuner.adalora_init_r, tuner.adalora_target_r
    if tuner.tuner_type == "adalora" and first <= last:
        raise resolved.error(
            "adalora_init_r",
            f"ranks shrink from {first} to {last}: the first must be the larger one",
            fix=f"--adalora_init_r {last * 3 // 2 + 1}",
        )
    if tuner.tuner_type == "boft" and (tuner.boft_block_size == 0) == (tuner.boft_block_num == 0):
        raise resolved.error(
            "boft_block_num",
            "one of boft_block_size and boft_block_num must be 0: it follows from the other",
            fix="--boft_block_size 0",
        )
    groups = tuner.llamapro_num_groups
    if groups is not None and tuner.llamapro_num_new_blocks % groups:
        raise resolved.error(
            "llamapro_num_groups",
            f"{tuner.llamapro_num_new_blocks} new layers cannot be spread over {groups} groups evenly",
            fix="leave it out",
        )
