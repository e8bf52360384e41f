"""Several optimizers, each over its own parameters, that act as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["CombinedOptimizer"]


class CombinedOptimizer(torch.optim.Optimizer):
    """Steps, saves and loads its parts together; ``param_groups`` are those of all parts."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        # The parts hold groups and state; torch's own bookkeeping of a single optimizer is left out.
        self.parts = list(parts)
        self._after_step: OrderedDict[int, Callable[..., None]] = OrderedDict()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
        for hook in list(self._after_step.values()):
            hook(self, (), {})

    def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Called as ``hook(optimizer, (), {})`` once all parts have stepped."""
        handle = RemovableHandle(self._after_step)
        self._after_step[handle.id] = hook
        return handle

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
