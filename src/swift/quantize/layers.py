"""Which linear layers of a model are quantised, by their full names. Reads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift.quantize.methods import check_awq_shapes, check_excluded, is_kept

__all__ = ["kept_layers"]


def kept_layers(
    folder: Path,
    exclude: Sequence[str],
    lm_head: bool,
    trust_remote_code: bool,
    awq_group_size: int | None = None,
) -> list[str]:
    """Full names of the linear layers that stay in full precision.

    Args:
        awq_group_size: of AWQ, which cannot quantise every shape; None: another method.

    Raises:
        ConfigError: one of ``exclude`` names no linear layer; AWQ cannot quantise one of the others.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from swift.models.load import find_class

    model_class, config = find_class(folder, trust_remote_code)
    with torch.device("meta"):
        model: Any = (
            model_class(config) if hasattr(model_class, "config_class") else model_class.from_config(config)
        )
    head = model.get_output_embeddings()
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    check_excluded(exclude, list(layers))
    kept = [name for name, module in layers.items() if is_kept(name, module is head, exclude, lm_head)]
    if awq_group_size is not None:
        shapes = {name: _shape(module) for name, module in layers.items() if name not in kept}
        check_awq_shapes(shapes, awq_group_size)
    return kept


def _shape(layer: Any) -> tuple[int, int]:
    """(inputs, outputs); Conv1D keeps its weight as ``[in, out]``, Linear as ``[out, in]``."""
    first, second = layer.weight.shape
    return (second, first) if hasattr(layer, "out_features") else (first, second)
