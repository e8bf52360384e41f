"""Modules trained in full beside the adapters (``modules_to_save``): a copy acts in place of the original."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from swift.tuners.switch import AdapterSwitch

__all__ = ["SavedModule", "saved_modules"]


class SavedModule(nn.Module):
    """A frozen module and one trainable copy of it per adapter; the switch chooses which one acts.

    Copies may be stored in another precision than the original (float32 beside bfloat16): they compute in the
    original's.

    Args:
        base: any module; its parameters are frozen here.
        switch: the model's shared switch.
    """

    def __init__(self, base: nn.Module, switch: AdapterSwitch) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.switch = switch
        self.copies = nn.ModuleDict()
        self.training = base.training

    def add_copy(self, name: str, dtype: torch.dtype | None = None) -> None:
        """Add a trainable copy of the original, stored in ``dtype`` (default: the original's)."""
        clone = copy.deepcopy(self.base)
        self.copies[name] = clone.to(dtype).requires_grad_(True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.switch.rows is None:
            return self._forward_one(self.switch.active, args, kwargs)
        if len(args) != 1 or kwargs:
            raise ValueError("batches of several adapters need modules_to_save that take one tensor")
        x = args[0]
        axis = (
            1 if x.shape[0] == 1 and x.dim() > 1 else 0
        )  # a single row holds its groups one behind the other
        groups = self.switch.groups(x.shape[axis])
        parts = zip(groups, x.split([size for _, size in groups], axis), strict=True)
        return torch.cat([self._forward_one(name, (part,), {}) for (name, _), part in parts], axis)

    def _forward_one(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name is None or name not in self.copies:
            return self.base(*args, **kwargs)
        clone = self.copies[name]
        dtypes = {key: parameter.dtype for key, parameter in self.base.named_parameters()}
        stored = dict(clone.named_parameters())
        if all(parameter.dtype == dtypes[key] for key, parameter in stored.items()):
            return clone(*args, **kwargs)
        cast = {key: parameter.to(dtypes[key]) for key, parameter in stored.items()}
        return torch.func.functional_call(clone, cast, args, kwargs)

    def _acting_tensor(self, name: str) -> Tensor | None:
        active = self.switch.active
        original = getattr(self.base, name, None)
        if active is None or active not in self.copies or original is None:
            return original
        acting = getattr(self.copies[active], name)
        assert isinstance(acting, Tensor) and isinstance(original, Tensor)
        return acting.to(original.dtype)

    @property
    def weight(self) -> Tensor | None:
        """The weight that acts now, in the computing precision (fused losses read the output matrix)."""
        return self._acting_tensor("weight")

    @property
    def bias(self) -> Tensor | None:
        return self._acting_tensor("bias")


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """Module name -> saved module, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SavedModule)}
