"""A model in parts, whole for a while: for those who use it as a model, each rank at its own pace (sampling).

FSDP's own way of keeping weights gathered hangs on the forward of every layer, where ranks have to come together, and
counts the passes for the backward to come. So there is a second model without weights, made before the first was
divided; it gets the gathered weights, and gives them back.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from swift.parallel.data_parallel import ShardedRoot, whole

__all__ = ["GatheredModel"]


class GatheredModel:
    """A copy of a model (adapters included) whose weights are there only within `filled`.

    Args:
        model: before it is divided.
        device: where the weights are gathered.
        dtype: in which precision; None: as they are stored.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype
        # Parameters that copying finds in its memory are not copied; tied ones stay one.
        memory: dict[int, Any] = {
            id(parameter): nn.Parameter(
                torch.empty(0, dtype=dtype or parameter.dtype, device=device), requires_grad=False
            )
            for parameter in model.parameters()
        }
        # Buffers of a model that has no weights yet are filled with its own.
        memory |= {id(one): torch.empty_like(one, device=device) for one in model.buffers() if one.is_meta}
        self.model = copy.deepcopy(model, memory).to(device)

    @contextlib.contextmanager
    def filled(self, model: nn.Module, root: ShardedRoot | None) -> Iterator[nn.Module]:
        """The model with the weights of ``model`` as they are now; all ranks have to begin this together.

        Args:
            root: of a model in shards.
        """
        if root is not None:
            root.free()
        room = dict(self.model.named_parameters())
        try:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    part = parameter.detach()
                    part = part if self.dtype is None else part.to(self.dtype)
                    room[name].data = whole(part).to(self.device)
                for buffer, own in zip(self.model.buffers(), model.buffers(), strict=True):
                    buffer.copy_(own)
            yield self.model.eval()
        finally:
            for parameter in room.values():
                parameter.data = parameter.new_empty(0)
