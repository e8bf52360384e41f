"""Ring attention (arXiv 2310.01889): keys and values travel round the ranks while queries stay.

Every rank holds two of ``2 R`` chunks of a row, the i-th and the i-th from the end (zigzag), so that all have the same
work under a causal mask. Between two different chunks only one document can reach from the one to the other (documents
are consecutive), namely from its first token in the earlier chunk to its last in the later one: what is computed is a
full rectangle, without any mask. Within a chunk the pieces of documents are causal squares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from swift.parallel.sequence.blocks import block_backward, block_forward, merge

__all__ = ["Block", "RingPlan", "held_chunks", "ring_attention"]


@dataclass(frozen=True)
class Block:
    """Queries and keys that see one another, as places in what the two ranks hold."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool


def held_chunks(rank: int, size: int) -> tuple[int, int]:
    """The chunks (of ``2 * size``) that a rank of the ring holds, in this order."""
    return rank, 2 * size - 1 - rank


class RingPlan:
    """Which blocks there are; the same for all layers of a pass.

    Args:
        lengths: for each row the lengths of its documents, which fill the row.
        rank: of the ring's ``size`` ranks.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.chunk = sum(lengths[0]) // (2 * size)
        alike = all(list(row) == list(lengths[0]) for row in lengths)
        rows = (
            [(slice(None), lengths[0])]
            if alike
            else [(slice(at, at + 1), row) for at, row in enumerate(lengths)]
        )
        self.blocks = {
            source: [block for where, row in rows for block in self._blocks(where, row, source)]
            for source in range(size)
        }

    def _blocks(self, rows: slice, lengths: Sequence[int], source: int) -> Iterator[Block]:
        width, starts = self.chunk, _starts(lengths)
        for place, later in enumerate(held_chunks(self.rank, self.size)):
            for other, earlier in enumerate(held_chunks(source, self.size)):
                first, last = later * width, (later + 1) * width
                here, there = place * width - first, other * width - earlier * width
                if earlier == later:
                    for start, stop in starts:
                        start, stop = max(start, first), min(stop, last)
                        if start < stop:
                            piece = slice(start + here, stop + here)
                            yield Block(rows, piece, piece, True)
                elif earlier < later:
                    border = (earlier + 1) * width
                    start, stop = next(span for span in starts if span[0] < border <= span[1])
                    if stop > first:
                        keys = slice(max(start, earlier * width) + there, border + there)
                        yield Block(rows, slice(first + here, min(stop, last) + here), keys, False)


def _starts(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(first, behind the last) place of each document of a row."""
    spans, start = [], 0
    for length in lengths:
        spans.append((start, start + length))
        start += length
    return spans


class _Hop:
    """Tensors on their way to the next rank of the ring, while this one computes."""

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        size, rank = group.size(), group.rank()
        after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        self.sent = [tensor.contiguous() for tensor in tensors]
        self.received = [torch.empty_like(tensor) for tensor in self.sent]
        pairs = zip(self.sent, self.received, strict=True)
        self.works = dist.batch_isend_irecv(
            [
                operation
                for sent, received in pairs
                for operation in (
                    dist.P2POp(dist.isend, sent, after, group),
                    dist.P2POp(dist.irecv, received, before, group),
                )
            ]
        )

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: RingPlan,
        group: dist.ProcessGroup,
        scale: float,
    ) -> Tensor:
        high = torch.promote_types(query.dtype, torch.float32)
        output = torch.zeros_like(query, dtype=high)
        total = torch.full(query.shape[:-1], float("-inf"), dtype=high, device=query.device)
        held = [key, value]
        for hop in range(plan.size):
            travelling = _Hop(held, group) if hop + 1 < plan.size else None
            for block in plan.blocks[(plan.rank - hop) % plan.size]:
                at = block.rows, slice(None), block.queries
                keys, values = (_heads(part[block.rows, :, block.keys], query) for part in held)
                part = block_forward(query[at], keys, values, block.causal, scale)
                merge(output[at], total[at], *part)
            held = travelling.wait() if travelling else held
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, total)
        ctx.plan, ctx.group, ctx.scale = plan, group, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, total = ctx.saved_tensors
        gradient, plan = gradients[0], ctx.plan
        grad_query = torch.zeros_like(query, dtype=total.dtype)
        held = [key, value]
        # The gradients of keys and values travel with them: after as many hops as there are ranks they are home.
        sums = [torch.zeros_like(part, dtype=total.dtype) for part in held]
        for hop in range(plan.size):
            travelling = _Hop(held, ctx.group) if hop + 1 < plan.size else None
            for block in plan.blocks[(plan.rank - hop) % plan.size]:
                at, keys_at = (block.rows, slice(None), block.queries), (block.rows, slice(None), block.keys)
                keys, values = (_heads(part[keys_at], query) for part in held)
                parts = block_backward(
                    gradient[at], query[at], keys, values, output[at], total[at], block.causal, ctx.scale
                )
                grad_query[at] += parts[0]
                for whole, part in zip(sums, parts[1:], strict=True):
                    whole[keys_at] += part.unflatten(1, (key.shape[1], -1)).sum(2)
            held = travelling.wait() if travelling else held
            sums = _Hop(sums, ctx.group).wait()
        grads = (grad_query, *sums)
        return *(grad.to(query.dtype) for grad in grads), None, None, None


def _heads(part: Tensor, query: Tensor) -> Tensor:
    """Key/value heads repeated to as many as the query has."""
    times = query.shape[1] // part.shape[1]
    return part if times == 1 else part.repeat_interleave(times, 1)


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: RingPlan, group: dist.ProcessGroup, scale: float
) -> Tensor:
    """``[rows, heads, width, channels]`` of this rank's two chunks -> output alike.

    Args:
        key: fewer heads than the query when they are shared by groups of query heads.
    """
    output: Tensor = _Ring.apply(query, key, value, plan, group, scale)
    return output
