"""Which adapter acts on which rows, for all layers of a model at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["AdapterSwitch", "Draw"]

T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """What the dropout of one adapter in one micro-batch is a function of.

    Attributes:
        seed: of the optimizer step.
        micro_batch: its number in the step.
        padding: ``(own width, width of the batch)`` where rows of several adapters are padded to the longest: the
            noise is that of the own width, so it does not depend on who else is in the batch.
    """

    seed: int
    micro_batch: int = 0
    padding: tuple[int, int] | None = None


class AdapterSwitch:
    """Which adapter acts, shared by all layers of one model.

    Attributes:
        active: the adapter of every row, or None for the base model.
        rows: ``(adapter or None, number of rows)`` for consecutive groups of rows; wins over ``active``. Rows are
            those of a batch, or the tokens of a single row.
        draws: adapter -> what its dropout is a function of, beside the layer; torch's generator decides for others.
    """

    def __init__(self, active: str | None = None) -> None:
        self.active = active
        self.rows: tuple[tuple[str | None, int], ...] | None = None
        self.draws: dict[str, Draw] = {}
        self._groups: dict[int, tuple[tuple[str | None, int], ...]] = {}

    @contextlib.contextmanager
    def drawing(self, draws: Mapping[str, Draw]) -> Iterator[None]:
        """Draw the adapters' dropout so within the block, which holds the backward pass too."""
        before = self.draws
        self.draws = dict(draws)
        try:
            yield
        finally:
            self.draws = before

    @contextlib.contextmanager
    def use(self, active: str | None) -> Iterator[None]:
        """Let ``active`` act on all rows within the block; ``use(None)`` is the base model."""
        before = (self.active, self.rows)
        self.active, self.rows = active, None
        try:
            yield
        finally:
            self.active, self.rows = before

    @contextlib.contextmanager
    def mixed(
        self, rows: Sequence[tuple[str | None, int]], kept: Sequence[tuple[str | None, int]] = ()
    ) -> Iterator[None]:
        """Batches of several adapters within the block: consecutive ``(adapter, number of rows)``.

        ``kept``: the groups behind a place where the model goes on with fewer tokens (the head, of which only
        some logits are wanted).
        """
        before = (self.rows, self._groups)
        self.rows, self._groups = tuple(rows), {sum(size for _, size in kept): tuple(kept)}
        try:
            yield
        finally:
            self.rows, self._groups = before

    def bound(self, function: Callable[..., T]) -> Callable[..., T]:
        """``function`` with the adapter that acts now, whenever it is called."""
        active = self.active

        def call(*args: Any) -> T:
            with self.use(active):
                return function(*args)

        return call

    def groups(self, total: int) -> tuple[tuple[str | None, int], ...]:
        """``(adapter or None, size)`` of ``total`` consecutive tokens, those of a row side by side.

        Raises:
            ValueError: the rows do not divide them.
        """
        assert self.rows is not None
        found = self._groups.get(total)
        if found is None:
            num_rows = sum(size for _, size in self.rows)
            if not num_rows or total % num_rows:
                raise ValueError(f"adapter rows {self.rows} do not add up to the {total} rows of the batch")
            times = total // num_rows
            found = self._groups[total] = tuple((name, size * times) for name, size in self.rows)
        return found
