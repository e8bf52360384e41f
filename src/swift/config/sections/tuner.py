"""Which weights are trained."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class TunerSection(Section):
    """LoRA or full training, and what stays frozen."""

    tuner_type: Literal["lora", "full"] = option("lora", "Training method.", essential=True)
    lora_rank: int = option(8, "LoRA rank.", essential=True, ge=1)
    lora_alpha: float = option(
        32, "LoRA scale numerator: updates are scaled by alpha / rank.", essential=True, gt=0
    )
    lora_dropout: float = option(0.05, "Dropout on the adapter's input.", ge=0, lt=1)
    target_modules: list[str] = option(
        ["all-linear"], "Modules that get an adapter: all-linear, or ends of module names.", essential=True
    )
    target_regex: str | None = option(
        None, "Regular expression over full module names; replaces target_modules."
    )
    modules_to_save: list[str] = option([], "Modules trained in full and stored with the adapter.")
    use_rslora: bool = option(False, "Scale by alpha / sqrt(rank) (rank-stabilised LoRA, arXiv 2312.03732).")
    lora_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Storage precision of LoRA weights."
    )
    init_weights: Literal["default", "gaussian"] = option(
        "default", "Start of matrix A: Kaiming-uniform (default) or gaussian; B starts at zero."
    )
    freeze_parameters: list[str] = option(
        [], "Full training: freeze parameters whose name starts with one of these."
    )
    freeze_parameters_regex: str | None = option(None, "Full training: freeze parameters whose name matches.")
    freeze_parameters_ratio: float = option(
        0.0, "Full training: freeze this share of the parameters, from the input side.", ge=0, le=1
    )
    trainable_parameters: list[str] = option(
        [], "Full training: keep trainable in spite of the freeze options (starts of names)."
    )
    trainable_parameters_regex: str | None = option(None, "Full training: the same by regular expression.")
