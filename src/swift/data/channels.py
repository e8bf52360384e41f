"""Groups of samples by their ``channel`` column, for a loss of each group (``--enable_channel_loss``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from swift.data.collate import Batch

__all__ = ["NO_CHANNEL", "Channels", "number_channels"]

NO_CHANNEL = "default"
"""The group of rows that name none."""


@dataclass(frozen=True)
class Channels:
    """Which group each sample of a data set belongs to.

    Attributes:
        names: of the groups.
        numbers: [samples] int64, index into ``names``.
    """

    names: tuple[str, ...]
    numbers: np.ndarray

    def of_targets(self, batch: Batch) -> torch.Tensor:
        """[num_targets] int64: the group of each learned target of the batch, in row-major order."""
        groups = np.zeros(batch.targets.shape, np.int64)
        samples = iter(batch.sample_ids)
        for row, size in enumerate(batch.samples_per_row):
            lengths = [groups.shape[1]] if batch.document_lengths is None else batch.document_lengths[row]
            start = 0
            for length in lengths[:size]:
                groups[row, start : start + length] = self.numbers[next(samples)]
                start += length
        return torch.from_numpy(groups).to(batch.targets.device)[batch.targets != -100]


def number_channels(found: Sequence[Sequence[Any]]) -> list[Channels]:
    """Groups of several data sets under common names; each is the ``channel`` (or None) of every sample."""
    names = sorted({_name(value) for values in found for value in values})
    numbers = {name: number for number, name in enumerate(names)}
    return [
        Channels(tuple(names), np.asarray([numbers[_name(value)] for value in values], np.int64))
        for values in found
    ]


def _name(value: Any) -> str:
    return NO_CHANNEL if value is None else str(value)
