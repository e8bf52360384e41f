"""Full training with rounded numbers, by torchao: quantisation-aware training, and matrix products in float8.

Both replace the forward pass of linear layers and leave their weights, names and checkpoints as they are.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from swift.config.sections.quantization import QuantizationSection
from swift.core.errors import ConfigError

__all__ = ["train_in_float8", "train_quantisation_aware"]

_FLOAT8_MULTIPLE = 16
"""What the matrix units of float8 want both sizes of a weight to be divisible by."""


def train_quantisation_aware(model: nn.Module, section: QuantizationSection, head: str | None) -> int:
    """Have every linear layer but the output head compute with its weight as it will be quantised later.

    Weights are rounded symmetrically in groups along the input, activations (where asked for) asymmetrically for each
    token; gradients pass the rounding as if it were not there (straight-through estimator, arXiv 1308.3432).

    Returns the number of layers. Raises ConfigError without torchao, or when no layer fits the groups.
    """
    quantization, qat = _import("torchao.quantization"), _import("torchao.quantization.qat")
    dtypes = {4: getattr(torch, "int4"), 8: torch.int8}  # noqa: B009  # absent from the type stubs
    assert section.qat_bits is not None
    weights = qat.IntxFakeQuantizeConfig(
        dtypes[section.qat_bits], group_size=section.qat_group_size, is_symmetric=True
    )
    activations = None
    if section.qat_activation_bits is not None:
        activations = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)

    def fits(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and name != head and module.in_features % section.qat_group_size == 0

    chosen = [name for name, module in model.named_modules() if fits(module, name)]
    if not chosen:
        why = f"no linear layer has a multiple of {section.qat_group_size} inputs"
        raise ConfigError("nothing to quantise", where="--qat_group_size", why=why, fix="a smaller group")
    config = qat.QATConfig(activation_config=activations, weight_config=weights, step="prepare")
    quantization.quantize_(model, config, filter_fn=fits)
    return len(chosen)


def train_in_float8(
    model: nn.Module, device: torch.device, head: str | None, *, emulate: bool = False
) -> int:
    """Multiply in float8 (e4m3 forward, e5m2 gradients, one scale a tensor) in all linear layers but the output head.

    Returns the number of layers. Raises ConfigError without torchao, without matrix units for float8 (unless
    ``emulate``: the same numbers, slowly, on any device), or when no layer fits.
    """
    if not emulate and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise ConfigError(
            "this device does not multiply in float8",
            where="--fp8",
            why="NVIDIA devices do from compute capability 8.9 on (Ada, Hopper, Blackwell)",
            fix="leave it out; --torch_dtype bfloat16",
        )
    float8 = _import("torchao.float8")

    def fits(module: nn.Module, name: str) -> bool:
        if type(module) is not nn.Linear or name == head:
            return False
        return not (module.in_features % _FLOAT8_MULTIPLE or module.out_features % _FLOAT8_MULTIPLE)

    chosen = [name for name, module in model.named_modules() if fits(module, name)]
    if not chosen:
        why = f"no linear layer has sizes that are multiples of {_FLOAT8_MULTIPLE}"
        raise ConfigError("no layer can multiply in float8", where="--fp8", why=why)
    config = float8.Float8LinearConfig(emulate=emulate)
    float8.convert_to_float8_training(model, config=config, module_filter_fn=fits)
    return len(chosen)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            "torchao is not installed", why=str(error), fix="pip install 'swift-forge[torchao]'"
        ) from error
