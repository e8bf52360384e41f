"""Context parallelism: the tokens of every row are spread over ranks, and only attention knows of it.

A batch that all ranks of the group hold whole is cut (`ContextParallel.shard`), the model runs on the rank's own
tokens, and what it says of the targets is put together again (`ContextParallel.gather`): every rank gets all
log-probabilities in the batch's own order. So objectives, denominators and metrics see whole batches, whatever they
compute; gradients of parameters are this rank's share and have to be summed over the group.

The group is a grid of rings times Ulysses groups: rank ``ring * U + place``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from swift.data.collate import Batch
from swift.models.attention import SHIFTED_GROUPS, varlen_attention
from swift.objectives.base import TokenOutputs
from swift.parallel.sequence.ring import RingPlan, held_chunks, ring_attention
from swift.parallel.sequence.ulysses import heads_to_tokens, share_heads, tokens_to_heads

__all__ = ["ContextParallel", "Shard", "pad_batch"]


@dataclass(frozen=True)
class Shard:
    """A rank's part of a batch.

    Attributes:
        batch: as the model runs it; its ``document_lengths`` are those of whole rows.
        order: ``[local targets]`` the places of its targets among all targets of the batch; None: it is all of it.
        num_targets: of the whole batch.
        attention: goes to the attention function as ``context``.
    """

    batch: Batch
    order: Tensor | None = None
    num_targets: int = 0
    attention: ContextAttention | None = None


class ContextAttention:
    """Attention over tokens that are spread over ranks; one for all layers of a pass."""

    def __init__(
        self, lengths: Sequence[Sequence[int]], rings: dist.ProcessGroup, heads: dist.ProcessGroup
    ) -> None:
        self.lengths, self.rings, self.heads = lengths, rings, heads
        self.plan = RingPlan(lengths, rings.rank(), rings.size()) if rings.size() > 1 else None

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        **options: Any,
    ) -> Tensor:
        """``[rows, heads, own width, channels]`` -> ``[rows, own width, heads, channels]``."""
        size = self.heads.size()
        if size > 1:
            query, key, value = (
                tokens_to_heads(part, self.heads)
                for part in (query, share_heads(key, size), share_heads(value, size))
            )
        if self.plan is None:
            output, _ = varlen_attention(
                module, query, key, value, None, scaling=scaling, document_lengths=self.lengths, **options
            )
        else:
            self._check(module, options)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            output = ring_attention(query, key, value, self.plan, self.rings, scale).transpose(1, 2)
        return heads_to_tokens(output, self.heads) if size > 1 else output

    def _check(self, module: nn.Module, options: dict[str, Any]) -> None:
        window = options.get("sliding_window")
        if window is not None and max(max(row) for row in self.lengths) > window:
            raise ValueError(f"ring attention has no sliding window ({window} tokens); use ulysses")
        if options.get("dropout") or (module.training and getattr(module, SHIFTED_GROUPS, 0)):
            raise ValueError("ring attention has neither dropout nor shifted groups")


class ContextParallel:
    """Cuts batches for the ranks of one group and puts results together.

    Args:
        group: the ranks that share each row.
        ring: how many of them form a ring; the others divide the heads (`accepted.split_degree`).
    """

    def __init__(self, group: dist.ProcessGroup, ring: int = 1) -> None:
        self.group, self.ring = group, ring
        self.ulysses = group.size() // ring
        self.rings, self.heads = _grid(group, ring)

    def multiple(self) -> int:
        """What the width of a batch is padded to a multiple of."""
        return self.ulysses * (2 * self.ring if self.ring > 1 else 1)

    def places(self, width: int) -> Tensor:
        """``[width / ranks]``: which tokens of a row this rank holds, in its order."""
        tokens = torch.arange(width)
        if self.ring > 1:
            chunks = tokens.chunk(2 * self.ring)
            tokens = torch.cat([chunks[at] for at in held_chunks(self.rings.rank(), self.ring)])
        return tokens.chunk(self.ulysses)[self.heads.rank()]

    def shard(self, batch: Batch, multiple: int = 1) -> Shard:
        """This rank's tokens of a batch; rows are filled up first, with a document of padding each.

        ``multiple``: divides the number of tokens that a rank gets of each row.
        """
        if batch.document_continues is not None:
            raise ValueError("documents that continue one another cannot be divided")
        batch = pad_batch(batch, self.multiple() * multiple)
        rows, width = batch.input_ids.shape
        lengths = batch.document_lengths or [[width]] * rows
        places = self.places(width).to(batch.input_ids.device)
        is_target = batch.targets != -100
        order = (is_target.flatten().cumsum(0) - 1).view(rows, width)[:, places]
        own = replace(
            batch,
            input_ids=batch.input_ids[:, places],
            position_ids=batch.position_ids[:, places],
            targets=batch.targets[:, places],
            weights=None if batch.weights is None else batch.weights[:, places],
            document_lengths=lengths,
        )
        attention = ContextAttention(lengths, self.rings, self.heads)
        return Shard(own, order[is_target[:, places]], int(is_target.sum()), attention)

    def gather(self, values: Tensor, shard: Shard) -> Tensor:
        """``[local targets, ...]`` -> ``[targets, ...]`` of the whole batch, the same on all ranks.

        Every rank then computes the same loss, so the gradient that comes back is already whole.
        """
        assert shard.order is not None
        result: Tensor = _Gather.apply(values, shard.order, shard.num_targets, self.group)
        return result

    def gather_outputs(self, outputs: TokenOutputs, shard: Shard) -> TokenOutputs:
        hits = self.gather(outputs.is_argmax.to(outputs.logprobs.dtype), shard) > 0
        return TokenOutputs(self.gather(outputs.logprobs, shard), hits)


def pad_batch(batch: Batch, multiple: int = 1, *, rows: int = 0, width: int = 0) -> Batch:
    """The same batch with at least so many rows, of at least ``width``, which ``multiple`` divides."""
    more = max(0, rows - batch.input_ids.shape[0])
    width = max(width, batch.input_ids.shape[1])
    width += -width % multiple
    extra = width - batch.input_ids.shape[1]
    if not extra and not more:
        return batch
    if batch.document_continues is not None:
        raise ValueError("rows whose documents continue one another cannot be filled up")
    added = (0, extra, 0, more)
    lengths, positions = batch.document_lengths, F.pad(batch.position_ids, added)
    positions[:, width - extra :] = torch.arange(extra, device=positions.device)
    positions[len(positions) - more :] = torch.arange(width, device=positions.device)
    # Rows of one document have padding at their right already; it sees what is before it, and nobody sees it.
    if lengths is not None:
        lengths = [*([*row, extra] if extra else row for row in lengths), *[[width]] * more]
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, added),
        position_ids=positions,
        targets=F.pad(batch.targets, added, value=-100),
        weights=None if batch.weights is None else F.pad(batch.weights, added),
        document_lengths=lengths,
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(order)
        whole = values.new_zeros(total, *values.shape[1:]).index_copy_(0, order, values)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0][ctx.saved_tensors[0]], None, None, None


@lru_cache(maxsize=8)
def _grid(group: dist.ProcessGroup, ring: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's ring and this rank's Ulysses group."""
    ranks, ulysses = dist.get_process_group_ranks(group), group.size() // ring
    at, place = divmod(group.rank(), ulysses)
    if ring in (1, group.size()):
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return (group, alone) if ring > 1 else (alone, group)
    mine = [ranks[place::ulysses], ranks[at * ulysses : (at + 1) * ulysses]]
    # Rings first on every rank; each group is made by its own members alone.
    rings, heads = (dist.new_group(members, use_local_synchronization=True) for members in mine)
    return rings, heads
