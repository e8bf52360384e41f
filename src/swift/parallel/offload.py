"""Activations that wait for the backward pass in host memory (``--activation_cpu_offload``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OffloadedActivations"]

_LEAST_BYTES = 1 << 16
"""Smaller tensors stay: moving them costs more time than their memory is worth."""


class OffloadedActivations(torch.autograd.graph.saved_tensors_hooks):
    """A context: what autograd saves within it is kept in host memory, pinned for a device, until it is needed.

    Parameters and views of them (a transposed weight) stay where they are; with gradient checkpointing only the input
    of each layer is saved at all, and so only that is moved.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        small = tensor.numel() * tensor.element_size() < _LEAST_BYTES
        if small or tensor.untyped_storage()._cdata in self._parameters:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=tensor.is_cuda)
        return tensor.device, host

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        # Copies of one stream follow one another: the tensor is whole before anything on the device reads it.
        moved: Tensor = host.to(device, non_blocking=device.type == "cuda")
        return moved
