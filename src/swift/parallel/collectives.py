"""Collectives along the tokens (dimension 1 of ``[rows, width, size]``) that autograd can go through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["add_up", "enter", "gather", "keep_own", "leave"]


def _own(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(group.size(), 1)[group.rank()].contiguous()


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, 1)


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens of the sum over the ranks."""
    parts = [part.contiguous() for part in x.chunk(group.size(), 1)]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    return own


_MOVES = {
    "own": _own,
    "gather": _gathered,
    "sum": _summed,
    "scatter": _scattered,
    "none": lambda x, group: x.view_as(x),
}


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, forward: str, backward: str) -> Tensor:
        ctx.group, ctx.back = group, backward
        return _MOVES[forward](x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _MOVES[ctx.back](gradients[0], ctx.group), None, None, None


def _move(x: Tensor, group: dist.ProcessGroup, forward: str, backward: str) -> Tensor:
    result: Tensor = _Move.apply(x, group, forward, backward)
    return result


def enter(x: Tensor, group: dist.ProcessGroup, sequence: bool) -> Tensor:
    """Hidden states for all ranks, whose gradients are shares; ``sequence``: each has its own tokens only."""
    return _move(x, group, "gather", "scatter") if sequence else _move(x, group, "none", "sum")


def leave(x: Tensor, group: dist.ProcessGroup, sequence: bool) -> Tensor:
    """The sum of every rank's term: for all, or its own tokens of it for each."""
    return _move(x, group, "scatter", "gather") if sequence else _move(x, group, "sum", "none")


def keep_own(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens of what all ranks have."""
    return _move(x, group, "own", "gather")


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What all ranks have, from the tokens of each; what is done with it is the same on all of them."""
    return _move(x, group, "gather", "own")


def add_up(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over the ranks, in place, with one call for each dtype."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))
