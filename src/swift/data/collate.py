"""Micro-batches as tensors. How samples are laid out is decided in ``layout``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from swift.data.batching import MicroBatch, Mode
from swift.data.layout import Layout, lay_out
from swift.data.tokens import TokenDataset

__all__ = ["Batch", "batch_of", "collate"]


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
        samples_per_row: how many of them each row holds.
        groups: tasks over whole sequences: how many sequences each sample has; a target marks the end of each.
        labels: [samples, K] float32, the labels of each sample of such a task.
        target_counts: of such a task, how many targets each sequence has.
        reference: [sequences] float32, log-probabilities of the answers under a reference, where they are known.
        mismatched: the questions with answers to other ones (KTO).
        mismatched_ratios: [sequences] log-ratios of these, where they are known.
        document_continues: for each document whether its tokens also see all of the last document that does not
            continue another: one prompt for several answers. None: none does.
        temperature: log-probabilities are those of logits divided by it.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None
    document_lengths: list[list[int]] | None
    num_tokens: int
    num_targets: int
    sample_ids: list[int]
    samples_per_row: list[int]
    groups: list[int] | None = None
    labels: torch.Tensor | None = None
    target_counts: list[int] | None = None
    reference: torch.Tensor | None = None
    mismatched: Batch | None = None
    mismatched_ratios: torch.Tensor | None = None
    document_continues: list[list[bool]] | None = None
    temperature: float = 1.0

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        mismatched = None if self.mismatched is None else self.mismatched.to(device)
        return replace(self, **moved, mismatched=mismatched)


def collate(dataset: TokenDataset, rows: MicroBatch, mode: Mode, pad_token_id: int = 0) -> Batch:
    """Tensors for the samples in ``rows``.

    The width is that of the longest row. An empty ``rows`` (a rank without work at the end of an epoch) gives
    one padding token without a target: it can be run like any batch and contributes nothing.
    """
    return batch_of(lay_out(dataset, rows, mode, pad_token_id))


def batch_of(layout: Layout) -> Batch:
    """The arrays as tensors that share their memory."""
    values: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in vars(layout).items()
    }
    return Batch(**values | {"mismatched": layout.mismatched and batch_of(layout.mismatched)})
