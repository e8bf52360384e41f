"""LongLoRA (arXiv 2309.12307): LoRA on long texts, whose attention is cut into shifted groups in training.

Beside the adapters the paper trains the embedding and the norms: ``modules_to_save`` does that. The attention itself is
in `swift.models.attention`; when the trained model is used, it attends to everything, as ever.
"""

from __future__ import annotations

from typing import Any

from swift.core.errors import ModelError
from swift.models.attention import SHIFTED_GROUPS, VARLEN

__all__ = ["use_shifted_groups"]


def use_shifted_groups(model: Any, size: int) -> None:
    """Let every attention layer of ``model`` work in shifted groups of ``size`` tokens while the model is in training.

    Raises:
        ModelError: the model's attention is not ``swift_varlen``, which knows groups.
    """
    used = model.config._attn_implementation
    if used != VARLEN:
        raise ModelError(
            f"shifted groups are not possible with {used} attention",
            where=str(model.name_or_path) or None,
            why="the groups are cut by swift_varlen, which needs an architecture that it computes exactly",
            fix="--attn_impl auto where another one was chosen; else leave --longlora_group_size out",
        )
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            setattr(module, SHIFTED_GROUPS, size)
