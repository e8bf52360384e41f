"""From samples to tensors: shifted targets, positions that restart with every document, right padding.

There is no attention mask. A causal model never looks to the right, so padding at the end of a row changes
nothing before it; documents in one row are told apart by position ids and ``document_lengths``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from swift.data.batching import MicroBatch, Mode
from swift.data.tokens import IGNORE, TokenDataset

__all__ = ["Batch", "collate"]


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        input_ids: [rows, width] int64.
        position_ids: [rows, width] int64, restarting at 0 with every document.
        targets: [rows, width] int64, the next token of the same document; -100 where nothing is learned.
        weights: [rows, width] float32, the loss weight of each target (0 where nothing is learned); None: all
        1.
        document_lengths: for each row the lengths of its documents, which add up to the width (padding at the
            end of a row is a document of its own); None when every row is one document with padding at its
            right.
        num_tokens: tokens that are not padding.
        num_targets: targets that are learned.
        sample_ids: the samples, in reading order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None
    document_lengths: list[list[int]] | None
    num_tokens: int
    num_targets: int
    sample_ids: list[int]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            weights=None if self.weights is None else self.weights.to(device, non_blocking=True),
        )


def collate(dataset: TokenDataset, rows: MicroBatch, mode: Mode, pad_token_id: int = 0) -> Batch:
    """Tensors for the samples in ``rows``.

    The width is that of the longest row. An empty ``rows`` (a rank without work at the end of an epoch) gives
    one padding token without a target: it can be run like any batch and contributes nothing.
    """
    lengths = [[int(dataset.lengths[sample]) for sample in row] for row in rows] or [[]]
    used = [sum(row) for row in lengths]
    width = max(*used, 1)
    shape = (len(lengths), width)
    ids = np.full(shape, pad_token_id, np.int64)
    targets = np.full(shape, IGNORE, np.int64)
    weights = np.zeros(shape, np.float32) if dataset.has_weights else None
    positions = np.empty(shape, np.int64)
    counting = np.arange(width)
    for number, row in enumerate(rows or [[]]):
        start = 0
        for sample in row:
            tokens, labels, sample_weights = dataset[sample]
            end = start + len(tokens)
            ids[number, start:end] = tokens
            targets[number, start : end - 1] = labels[1:]
            positions[number, start:end] = counting[: len(tokens)]
            if weights is not None:
                target_weights = 1.0 if sample_weights is None else sample_weights[1:]
                weights[number, start : end - 1] = np.where(labels[1:] != IGNORE, target_weights, 0.0)
            start = end
        padding_position = start if mode == "padded" else 0
        positions[number, start:] = counting[padding_position : padding_position + width - start]
    documents = None
    if mode != "padded":
        documents = [
            row + ([width - total] if total < width else []) for row, total in zip(lengths, used, strict=True)
        ]
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        weights=None if weights is None else torch.from_numpy(weights),
        document_lengths=documents,
        num_tokens=sum(used),
        num_targets=int((targets != IGNORE).sum()),
        sample_ids=[sample for row in rows for sample in row],
    )
