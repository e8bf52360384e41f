"""In which precision weights are stored, computed with and exported."""

from __future__ import annotations

import torch

from swift.config.schema import Resolved
from swift.core.errors import ConfigError
from swift.models.facts import ModelFacts

__all__ = ["check_precision", "export_dtype", "param_dtype"]


def check_precision(resolved: Resolved, dtype: torch.dtype) -> None:
    """Refuse storage precisions that cannot be computed with as asked."""
    config = resolved.config
    name = str(dtype).removeprefix("torch.")
    if config.tuner.trains_whole_model:
        if config.model.param_dtype == "bfloat16" and dtype != torch.bfloat16:
            raise ConfigError(
                f"weights stored in bfloat16 cannot be trained in {name}",
                where="--param_dtype bfloat16",
                fix="--torch_dtype bfloat16, or leave --param_dtype out",
            )
    elif config.tuner.lora_dtype == "float16" and dtype == torch.float16:
        raise ConfigError(
            "float16 computation scales the loss, and that needs gradients of higher precision",
            where="--lora_dtype float16",
            fix="--lora_dtype float32",
        )


def export_dtype(facts: ModelFacts, dtype: torch.dtype) -> torch.dtype:
    """Precision of saved full models: that of the original, or of the computation when config.json has none."""
    return getattr(torch, facts.dtype) if facts.dtype else dtype


def param_dtype(resolved: Resolved) -> torch.dtype:
    """Storage precision of trained weights."""
    return torch.bfloat16 if resolved.config.model.param_dtype == "bfloat16" else torch.float32
