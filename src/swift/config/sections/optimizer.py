"""Which optimizer updates the weights."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class OptimizerSection(Section):
    """The optimizer, and options of the ones that have their own."""

    optim: Literal[
        "adamw",
        "adamw_8bit",
        "paged_adamw",
        "paged_adamw_8bit",
        "lion",
        "lion_8bit",
        "paged_lion",
        "paged_lion_8bit",
        "adafactor",
        "muon",
        "galore_adamw",
        "apollo_adamw",
        "schedule_free_adamw",
    ] = option("adamw", "Optimizer.", essential=True)
    lorap_lr_ratio: float | None = option(
        None, "LoRA+ (arXiv 2402.12354): learning rate of B divided by that of A; 16 is usual.", gt=0
    )
    galore_rank: int = option(
        128, "GaLore and APOLLO: rank of the space in which the optimizer keeps its state.", ge=1
    )
    galore_target_modules: list[str] = option(
        ["all-linear"],
        "GaLore and APOLLO: ends of names of the matrices projected; all-linear: all but head.",
    )
    galore_update_proj_gap: int = option(
        50, "GaLore and APOLLO: steps after which the projection is computed anew.", unit="steps", ge=1
    )
    galore_scale: float = option(1.0, "GaLore and APOLLO: factor on the projected update.", gt=0)
    galore_quantization: bool = option(
        False, "Q-GaLore (arXiv 2407.08296): 4-bit projections, renewed less often where they hardly change."
    )
    galore_cos_threshold: float = option(
        0.4, "Q-GaLore: two projections at least this similar double the gap to the next.", ge=0, le=1
    )
    apollo_scale_type: Literal["channel", "tensor"] = option(
        "channel", "APOLLO: one gradient scale per channel, or per matrix (APOLLO-Mini, with galore_rank 1)."
    )
