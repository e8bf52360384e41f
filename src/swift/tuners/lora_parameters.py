"""LoRA on weights that are no linear layer of their own: the fused experts of a mixture, ``[experts, out, in]``.

PEFT calls it ``target_parameters``. Every expert has a pair of its own, ``A [experts, rank, in]`` and
``B [experts, out, rank]``, and computes with ``W + scaling * B A``: which tokens it gets is the router's business. The
sums exist while a layer is computed and until its backward pass is done.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift.core.errors import ConfigError, ModelError
from swift.models.sharded import local
from swift.tuners.lora import AdapterSpec, LoraLinear, lora_layers
from swift.tuners.switch import AdapterSwitch

__all__ = [
    "LoraParameters",
    "adapted_modules",
    "find_parameters",
    "from_peft",
    "lora_parameters",
    "peft_key",
    "short_parameters",
    "to_peft",
]


class LoraParameters(nn.Module):
    """A module some of whose own weights have adapters.

    Args:
        base: its parameters are frozen here.
        switch: the model's shared switch.
    """

    def __init__(self, base: nn.Module, switch: AdapterSwitch) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.switch = switch
        self.specs: dict[str, AdapterSpec] = {}
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.training = base.training

    def sizes(self, key: str) -> tuple[int, int, int]:
        """(experts, inputs, outputs) of a weight; one matrix is one expert."""
        shape = getattr(self.base, key).shape
        number, (rows, columns) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
        return (number, rows, columns) if self._is_transposed(key) else (number, columns, rows)

    def _is_transposed(self, key: str) -> bool:
        return getattr(self.base, key).ndim == 3 and bool(getattr(self.base, "is_transposed", False))

    def add_adapter(
        self,
        name: str,
        spec: AdapterSpec,
        keys: Sequence[str],
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """Add an adapter to the weights ``keys`` whose updates are zero (B = 0); A as in `swift.tuners.lora`."""
        if name in self.specs or "." in name:
            raise ValueError(f"adapter name {name!r} is taken or holds a dot")
        generator = torch.Generator().manual_seed(seed)
        first, second = nn.ParameterDict(), nn.ParameterDict()
        for key in keys:
            number, size_in, size_out = self.sizes(key)
            a = torch.empty(number, spec.rank, size_in)
            if spec.init == "gaussian":
                a.normal_(0, 1 / spec.rank, generator=generator)
            else:
                a.uniform_(-1 / math.sqrt(size_in), 1 / math.sqrt(size_in), generator=generator)
            device = getattr(self.base, key).device
            if device.type == "meta":  # the frozen weights come later, or never (traces)
                device = a.device
            first[key] = nn.Parameter(a.to(device=device, dtype=dtype))
            second[key] = nn.Parameter(torch.zeros(number, size_out, spec.rank, device=device, dtype=dtype))
        self.lora_A[name], self.lora_B[name] = first, second
        self.specs[name] = spec

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; nothing happens where the layer does not have it."""
        if self.specs.pop(name, None) is not None:
            del self.lora_A[name], self.lora_B[name]

    def keys(self, name: str) -> list[str]:
        """The adapted weights, in the module's order."""
        adapted = self.lora_A[name]
        assert isinstance(adapted, nn.ParameterDict)
        return [key for key in self.base._parameters if key in adapted]

    def pair(self, name: str, key: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of one weight."""
        return self.lora_A[name][key], self.lora_B[name][key]  # type: ignore[index]

    def summed(self, name: str, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The weight with its update, of what this rank has of both."""
        weight = local(getattr(self.base, key))
        a, b = (local(one).to(dtype or weight.dtype) for one in self.pair(name, key))
        first, second = (a.transpose(1, 2), b.transpose(1, 2)) if self._is_transposed(key) else (b, a)
        stacked = weight.to(first.dtype).reshape(-1, *weight.shape[-2:])
        return torch.baddbmm(stacked, first, second, alpha=self.specs[name].scaling).reshape(weight.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = {self.switch.active} if self.switch.rows is None else {one for one, _ in self.switch.rows}
        if len(names) > 1 and any(one in self.specs for one in names):
            raise ValueError("adapters of parameters cannot act on some rows of a batch only")
        name = next(iter(names), None)
        if name is None or name not in self.specs:
            return self.base(*args, **kwargs)
        summed = {key: self.summed(name, key) for key in self.keys(name)}
        return torch.func.functional_call(self.base, summed, args, kwargs)

    @torch.no_grad()
    def merge(self, name: str) -> None:
        """Add the adapter's updates to the weights; the sum is rounded once."""
        for key in self.keys(name) if name in self.specs else ():
            weight = getattr(self.base, key)
            weight.copy_(self.summed(name, key, torch.promote_types(weight.dtype, torch.float32)))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank={spec.rank}" for name, spec in self.specs.items())


def lora_parameters(model: nn.Module) -> dict[str, LoraParameters]:
    """Module name -> module with adapted weights, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraParameters)}


def adapted_modules(model: nn.Module) -> dict[str, LoraLinear | LoraParameters]:
    """Module name -> linear layer or other module with adapters."""
    return {**lora_layers(model), **lora_parameters(model)}


def _owners(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Module without our wrappers' names -> its own weights that could have adapters."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in module._parameters.items() if value is not None}
        wide = {key: value for key, value in own.items() if value.ndim in (2, 3)}
        if name and wide and "lora_" not in name:
            found[name.removesuffix(".base")] = wide
    return found


def find_parameters(model: nn.Module, targets: Sequence[str]) -> dict[str, list[str]]:
    """Module -> its weights that ``targets`` (full names or their ends, as PEFT takes them) mean.

    Raises:
        ConfigError: a target means nothing, or the weight of a linear layer.
    """
    found: dict[str, list[str]] = {}
    owners = _owners(model)
    for target in targets:
        named = [(name, key) for name, keys in owners.items() for key in keys if _means(target, name, key)]
        plain = (nn.Linear, nn.Embedding, LoraLinear)
        linear = next((name for name, _ in named if isinstance(model.get_submodule(name), plain)), None)
        if not named or linear is not None:
            fused = sorted(
                {key for keys in owners.values() for key, value in keys.items() if value.ndim == 3}
            )
            raise ConfigError(
                f"{target} is the weight of a linear layer or an embedding"
                if named
                else f"no weight is called {target}",
                where="--target_parameters",
                why=f"the fused weights of this model: {', '.join(fused) or 'none'}",
                fix=f"--target_modules {linear.rpartition('.')[2]}" if linear else None,
            )
        for name, key in named:
            found.setdefault(name, []).append(key)
    return {name: [key for key in owners[name] if key in keys] for name, keys in found.items()}


def _means(target: str, name: str, key: str) -> bool:
    return f"{name}.{key}" == target or f"{name}.{key}".endswith(f".{target}")


def short_parameters(model: nn.Module, chosen: Mapping[str, Sequence[str]]) -> list[str]:
    """What PEFT is told: the names behind the number of a layer when they mean exactly ``chosen``."""
    full = [f"{name}.{key}" for name, keys in chosen.items() for key in keys]
    short = sorted({re.split(r"\.\d+\.", name)[-1] for name in full})
    found = find_parameters(model, short) if full else {}
    return short if found == {name: list(keys) for name, keys in chosen.items()} else full


def peft_key(name: str, keys: Sequence[str], key: str) -> str:
    """PEFT wraps a module once for each adapted weight, the last one outermost."""
    return name + ".base_layer" * (len(keys) - 1 - list(keys).index(key))


def to_peft(kind: str, tensor: Tensor) -> Tensor:
    """A as ``[experts * rank, in]``, B as ``[out, rank * experts]`` in which experts vary fastest."""
    return tensor.flatten(0, 1) if kind == "A" else tensor.permute(1, 2, 0).flatten(1)


def from_peft(
    layer: LoraParameters, key: str, pair: Mapping[str, Tensor], folder: Path
) -> tuple[Tensor, Tensor]:
    """The reverse of `to_peft`.

    Raises:
        ModelError: the matrices have other sizes than the weight.
    """
    number, size_in, size_out = layer.sizes(key)
    a, b = pair["A"], pair["B"]
    rank = a.shape[0] // number
    if a.shape != (number * rank, size_in) or b.shape != (size_out, rank * number):
        raise ModelError(
            "the adapter does not fit this base model",
            where=str(folder),
            why=f"{key} is of {number} x [{size_out}, {size_in}], the adapter has A {list(a.shape)}",
        )
    return a.view(number, rank, size_in), b.view(size_out, rank, number).permute(2, 0, 1)
