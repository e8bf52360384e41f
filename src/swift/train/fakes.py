"""Models without values: fake tensors in the place of parameters, quantised layers of the right sizes, and what a model
does found out from its operations instead of its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from swift.config.schema import Resolved
from swift.core.errors import ConfigError
from swift.models.quantised import loading_config, settle_layers
from swift.train.live_bytes import run_without_values
from swift.tuners.lora import LoraLinear

__all__ = ["backbone_and_head", "fill_with_fakes", "quantise", "splits_by_operations"]


def fill_with_fakes(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors on a CPU in the place of all meta tensors of a model; shared ones stay shared."""
    made: dict[
        int, tuple[torch.Tensor, FakeTensor]
    ] = {}  # with the original, whose id stays its own that way

    def fake(tensor: torch.Tensor) -> FakeTensor:
        if id(tensor) not in made:
            plain = tensor.detach().to("meta")
            made[id(tensor)] = tensor, FakeTensor(mode, plain, torch.device("cpu"))
        return made[id(tensor)][1]

    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in parameters:
                parameters[id(old)] = new = nn.Parameter(fake(old), requires_grad=old.requires_grad)
                for attribute in ("quant_state", "CB", "SCB"):
                    if (value := getattr(old, attribute, None)) is not None:
                        setattr(new, attribute, _fake_state(value, fake))
            module._parameters[name] = parameters[id(old)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake(buffer)
        if isinstance(module, LoraLinear):
            module.starts = {name: (fake(a), fake(b)) for name, (a, b) in module.starts.items()}


def _fake_state(value: Any, fake: Callable[[torch.Tensor], FakeTensor]) -> Any:
    """A tensor, or the tensors of a bitsandbytes state, as fakes."""
    if isinstance(value, torch.Tensor):
        return fake(value)
    for name in ("absmax", "code", "offset"):
        if getattr(value, name, None) is not None:
            setattr(value, name, fake(getattr(value, name)))
    if value.state2 is not None:
        _fake_state(value.state2, fake)
    return value


class _Operations(TorchDispatchMode):
    """Remembers the names of operations, those left out that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func.namespace != "prim":
            self.names.append(str(func))
        return run_without_values(func, args, kwargs or {})


def backbone_and_head(model: Any) -> tuple[nn.Module, nn.Module] | None:
    backbone = getattr(model, getattr(model, "base_model_prefix", ""), None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module) or not isinstance(backbone, nn.Module) or backbone is model:
        return None
    return backbone, head


def splits_by_operations(model: Any) -> bool:
    """What `swift.models.head.split_head` finds out by values: whether the model is its head after its backbone."""
    parts = backbone_and_head(model)
    if parts is None:
        return False
    backbone, head = parts
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad(), _Operations() as apart:
        hidden = getattr(backbone(input_ids=tokens, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            return False
        head(hidden)
    with torch.no_grad(), _Operations() as whole:
        model(input_ids=tokens, use_cache=False)
    return apart.names == whole.names


def quantise(model: Any, resolved: Resolved, dtype: torch.dtype) -> None:
    """Replace linear layers by the quantised ones that loading makes, filled with tensors of the same sizes."""
    section = resolved.config.quantization
    if section.quant_method != "bnb":
        raise ConfigError(
            f"layers of {section.quant_method} cannot be traced",
            where="--exact",
            fix="leave out --exact: the formulas know them",
        )
    from bitsandbytes.functional import QuantState
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    sizes = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with (
        unset_fake_temporarily()
    ):  # bitsandbytes' parameters cannot be made of fake tensors; meta ones go away again
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), loading_config(section, dtype))
    for name, plain in sizes.items():
        layer = model.get_submodule(name)
        if layer is plain:
            continue
        if layer.bias is not None:
            layer.bias = nn.Parameter(plain.bias.detach(), requires_grad=False)
        count = plain.in_features * plain.out_features
        if section.quant_bits == 8:
            packed = torch.empty(plain.weight.shape, dtype=torch.int8)
            scales = torch.empty(plain.out_features)
            layer.weight = nn.Parameter(packed, requires_grad=False)
            layer.weight.CB, layer.weight.SCB = packed, scales
            layer.state.threshold = 0.0  # which columns stand out depends on values; they are few
            continue
        blocks = -(-count // 64)
        state = QuantState(
            torch.empty(blocks),
            shape=plain.weight.shape,
            code=torch.empty(16),
            blocksize=64,
            quant_type=section.bnb_4bit_quant_type,
            dtype=dtype,
        )
        if section.bnb_4bit_use_double_quant:
            inner = QuantState(
                torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=dtype
            )
            state.absmax = torch.empty(blocks, dtype=torch.uint8)
            state.state2, state.offset, state.nested = inner, torch.empty(()), True
        layer.weight = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)
        layer.weight.quant_state = layer.quant_state = state
    settle_layers(model)
