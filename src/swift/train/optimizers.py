"""The optimizer of one parameter set."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from swift.config.sections.training import TrainingSection

__all__ = ["build_optimizer"]


def build_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], section: TrainingSection, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW in torch's fused form; weight decay on matrices and embeddings, not on biases and norms."""
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    plain = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate or 0.0,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        fused=device.type in ("cpu", "cuda", "mps", "xpu"),
    )
