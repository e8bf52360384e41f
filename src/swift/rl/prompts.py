"""The prompts of a training in the order in which they are asked, without end."""

from __future__ import annotations

from typing import Any

import numpy as np

from swift.config.sections.data import DataSection
from swift.core.errors import DataError
from swift.data.batching import random_generator
from swift.data.formats import to_sample
from swift.data.groups import question_of
from swift.data.load import rows_of
from swift.data.tokens import TokenDataset

__all__ = ["Prompts", "columns_of", "longest"]


class Prompts:
    """Draws prompts: every pass over the data in a new order, one pass after another.

    Args:
        dataset: of prompts.
        section: options of the data.

    Attributes:
        cursor: draws so far. It is the whole state: the same cursor gives the same prompts.
    """

    def __init__(self, dataset: TokenDataset, section: DataSection, *, cursor: int = 0) -> None:
        self.dataset, self.cursor = dataset, cursor
        self._shuffle, self._seed = section.dataset_shuffle, section.data_seed or 0
        self._rows = rows_of(dataset, section)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.dataset)

    def draw(self, count: int) -> list[tuple[int, int]]:
        """(number of the draw, number of the sample) of the next ``count`` prompts."""
        found = [(self.cursor + at, self._sample(self.cursor + at)) for at in range(count)]
        self.cursor += count
        return found

    def _sample(self, draw: int) -> int:
        epoch, place = divmod(draw, len(self))
        if self._order[0] != epoch:
            order = np.arange(len(self))
            if self._shuffle:
                order = random_generator("prompts", self._seed, epoch).permutation(len(self))
            self._order = (epoch, order)
        return int(self._order[1][place])

    def ids(self, sample: int) -> np.ndarray:
        """Tokens of a prompt, int32."""
        return np.asarray(self.dataset[sample][0], np.int32)

    def place(self, sample: int) -> tuple[str, int]:
        """(``Row.source``, ``Row.number``) of its row."""
        return self.dataset.row(sample)

    def question(self, place: tuple[str, int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The messages that are asked, and the row's columns for rewards; ``solution`` is the row's own answer,
        where no column has this name."""
        row = self._rows[place]
        sample = to_sample(row)
        columns = {name: value for name, value in row.values.items() if name not in ("messages", "tools")}
        last = sample.messages[-1]
        if last["role"] == "assistant" and "solution" not in columns:
            columns["solution"] = last["content"]
        return question_of(sample.messages), columns


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Column -> values of all rows, None where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def longest(dataset: TokenDataset) -> int:
    """Tokens of the longest prompt. Raises DataError for no prompts at all."""
    if not len(dataset):
        raise DataError("there are no prompts", where="--dataset")
    return int(dataset.lengths.max())
