"""The native engine for tasks over whole sequences: one row of values for each, read at its last token or over all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swift.data.collate import Batch
from swift.models.head import split_head
from swift.objectives.base import PooledOutputs
from swift.parallel.native import NativeEngine
from swift.parallel.sequence.context import Shard

__all__ = ["PooledEngine", "last_token", "mean_of_tokens"]


class PooledEngine(NativeEngine):
    """What the head makes of the hidden state of each sequence of a batch, ``[num_sequences, size]`` in order.

    Args:
        split: backbone and head of the model, or None when they cannot be told apart: then its logits are read.
        pool: from hidden states ``[rows, width, size]`` and the batch to one of each sequence.
        readout: from what the head gives ``[num_sequences, ...]`` to the values of the objective.
        options: those of the native engine.
    """

    def __init__(
        self,
        *args: Any,
        split: Callable[[Any], tuple[nn.Module, nn.Module] | None] = split_head,
        pool: Callable[[Tensor, Batch], Tensor] | None = None,
        readout: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, split=split, **options)
        self._pool = pool or last_token
        self._readout = readout

    @torch.no_grad()
    def predict(self, batch: Batch) -> PooledOutputs:
        """The values of a batch, in evaluation mode."""
        self.model.eval()
        self.average(True)
        return self.objective_inputs(batch.to(self.device))

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        return self.objective_inputs(batch).values

    def objective_inputs(self, batch: Batch, tokens: Any = None) -> PooledOutputs:
        if self.ranks is None:
            return PooledOutputs(self._values(batch))
        return PooledOutputs(*self.ranks.compute(lambda: (self._values(batch),)))

    def _values(self, batch: Batch) -> Tensor:
        cut = self.ranks.cut(batch) if self.ranks else Shard(batch)
        with self.precision():
            outputs = self._run(cut.batch, cut.attention)
            states = self._pool(outputs.last_hidden_state if self._split else outputs.logits, cut.batch)
            values = self._split[1](states) if self._split else states
        if self._readout is not None:
            values = self._readout(values)
        return self.of_batch(values.to(torch.promote_types(values.dtype, torch.float32)), cut)


def last_token(states: Tensor, batch: Batch) -> Tensor:
    """``[rows, width, size] -> [num_sequences, size]``: the states at the end of each sequence."""
    return states[batch.targets != -100]


def mean_of_tokens(states: Tensor, batch: Batch) -> Tensor:
    """``[rows, width, size] -> [num_sequences, size]``: the mean over the tokens of each sequence, in float32."""
    ends = (batch.targets != -100).flatten().nonzero()[:, 0]
    lengths = batch.position_ids.flatten()[ends] + 1
    sequence = torch.arange(len(ends), device=ends.device).repeat_interleave(lengths)
    first = ends + 1 - lengths.cumsum(0)  # place in the batch less place among the tokens of all sequences
    tokens = first[sequence] + torch.arange(len(sequence), device=ends.device)
    values = states.flatten(0, 1)[tokens].float()
    sums = values.new_zeros(len(ends), values.shape[1]).index_add(0, sequence, values)
    return sums / lengths[:, None]
