"""Ulysses (arXiv 2309.14509): before attention every rank swaps its share of the tokens for a share of the heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["heads_to_tokens", "share_heads", "tokens_to_heads"]


class _AllToAll(torch.autograd.Function):
    """Cut dimension ``cut`` into a piece for each rank, and join what comes back along ``join``."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.cut, ctx.join, ctx.group = cut, join, group
        sent = torch.stack(tensor.chunk(group.size(), cut))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return torch.cat(list(received), join)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _AllToAll.apply(gradients[0], ctx.join, ctx.cut, ctx.group), None, None, None


def tokens_to_heads(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[rows, heads, width, channels]`` of this rank's tokens -> ``[rows, heads / n, n * width, channels]``."""
    result: Tensor = _AllToAll.apply(tensor, 1, 2, group)
    return result


def heads_to_tokens(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[rows, n * width, heads / n, channels]`` -> ``[rows, width, heads, channels]`` of this rank's tokens."""
    result: Tensor = _AllToAll.apply(tensor, 1, 2, group)
    return result


def share_heads(key_value: Tensor, size: int) -> Tensor:
    """Repeat key/value heads, where there are fewer than ranks, so that each rank gets the one its queries need."""
    heads = key_value.shape[1]
    return key_value if heads >= size else key_value.repeat_interleave(size // heads, 1)
