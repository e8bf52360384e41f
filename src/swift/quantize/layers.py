"""Which linear layers of a model are quantised, by their full names. Reads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift.quantize.methods import check_excluded, is_kept

__all__ = ["kept_layers"]


def kept_layers(folder: Path, exclude: Sequence[str], lm_head: bool, trust_remote_code: bool) -> list[str]:
    """Full names of the linear layers that stay in full precision.

    Raises:
        ConfigError: one of ``exclude`` names no linear layer.
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
    return [name for name, module in layers.items() if is_kept(name, module is head, exclude, lm_head)]
