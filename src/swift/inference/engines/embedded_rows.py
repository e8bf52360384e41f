"""Running requests by slot, and the batch that a step makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from swift.inference.engines.base import Request, TokenInfo
from swift.inference.engines.embedded_grammar import GrammarState
from swift.inference.engines.embedded_runner import Batch, Group
from swift.inference.engines.embedded_sampler import random_seed

__all__ = ["Row", "Rows"]


class Row:
    """One request on its way.

    Attributes:
        number: its place in the order of arrival.
        tokens: prompt and answer so far.
        end: how many tokens there may be.
        prompt_infos: what is known about the prompt's tokens and not yet told.
        tells_prompt: it still wants to know about its prompt.
        slot: -1 while it waits.
    """

    def __init__(self, number: int, request: Request, end: int, grammar: GrammarState | None) -> None:
        sampling = request.sampling
        self.number, self.request, self.end, self.grammar = number, request, end, grammar
        self.tokens = list(request.prompt)
        self.num_prompt = len(self.tokens)
        self.stops = frozenset(sampling.stop_token_ids)
        self.seed = random_seed() if sampling.seed is None else sampling.seed % 2**64
        self.tells_prompt = sampling.prompt_logprobs is not None
        self.prompt_infos: list[TokenInfo] = []
        self.slot = -1


class Rows:
    """The requests in the slots, which are the first ones without a gap. Arrays are indexed by slot.

    Attributes:
        length: tokens in all. computed: those of them with keys and values. last: the last one.
        prompt: tokens of the prompt. adapter: its number.

    Args:
        size: slots.
    """

    def __init__(self, size: int) -> None:
        self.rows: list[Row] = []
        self._arrays = np.zeros((5, size), np.int64)
        self.length, self.computed, self.last, self.prompt, self.adapter = self._arrays

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, slot: int) -> Row:
        return self.rows[slot]

    def enter(self, row: Row, adapter: int) -> int:
        """Put a request into the next slot, which is returned."""
        slot = row.slot = len(self.rows)
        self.rows.append(row)
        self._arrays[:, slot] = len(row.tokens), 0, row.tokens[-1], row.num_prompt, adapter
        return slot

    def leave(self, row: Row) -> tuple[int, int]:
        """Free a slot; the last request moves into it: (freed, last) slot."""
        slot, last = row.slot, len(self.rows) - 1
        self._arrays[:, slot] = self._arrays[:, last]
        self.rows[slot] = self.rows[last]
        self.rows[slot].slot = slot
        self.rows.pop()
        row.slot = -1
        return slot, last

    @property
    def youngest(self) -> Row:
        return max(self.rows, key=lambda row: row.number)

    def counts(self, budget: int | None) -> np.ndarray:
        """How many tokens of each slot to compute: one where it is decoding, prompts share ``budget`` (None: whole).

        Half of it is for the oldest request, the rest goes to the shortest first: so a long prompt delays short ones
        no more than they delay it.
        """
        left = self.length[: len(self)] - self.computed[: len(self)]
        long = np.flatnonzero(left > 1)
        if budget is None or not len(long):
            return left
        counts = np.minimum(left, 1)
        order = long[np.argsort(left[long], kind="stable")].tolist()
        oldest = min(order, key=lambda slot: self.rows[slot].number)
        counts[order] = 0
        for slot, most in [(oldest, budget - budget // 2), *((slot, budget) for slot in [*order, oldest])]:
            more = min(int(left[slot] - counts[slot]), most, budget)
            counts[slot] += more
            budget -= more
        return counts

    def batch(self, counts: np.ndarray, name: Callable[[int], str | None]) -> tuple[Batch, dict[int, slice]]:
        """The tokens of a step, and where among the logits those of a prompt are that wants to be told about.

        Args:
            counts: how many tokens of each slot.
            name: of an adapter's number.
        """
        slots = np.flatnonzero(counts)
        adapters = self.adapter[slots]
        mixed = bool((adapters != adapters[0]).any())
        if mixed:
            order = np.argsort(adapters, kind="stable")
            slots, adapters = slots[order], adapters[order]
        sizes, begins = counts[slots], self.computed[slots]
        told: dict[int, slice] = {}
        if bool((self.length[slots] - begins == 1).all()):
            ids, keep, kept = self.last[slots], np.arange(len(slots)), slots
        else:
            pieces = zip(slots.tolist(), begins.tolist(), sizes.tolist(), strict=True)
            parts = [self.rows[slot].tokens[begin : begin + size] for slot, begin, size in pieces]
            ids = np.fromiter(itertools.chain.from_iterable(parts), np.int64)
            keep, kept = self._kept(slots, sizes, told)
        if mixed:
            groups, kept_adapters = _groups(adapters, sizes, name), self.adapter[kept]
            keep_groups = _groups(kept_adapters, np.ones_like(kept_adapters), name)
        else:
            only = name(int(adapters[0]))
            groups, keep_groups = [(only, len(ids))], [(only, len(keep))]
        return Batch(ids, slots, sizes, begins, keep, groups, keep_groups, len(self)), told

    def _kept(
        self, slots: np.ndarray, sizes: np.ndarray, told: dict[int, slice]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens whose logits are wanted and the slot of each; fills ``told``."""
        ends = np.cumsum(sizes)
        is_last = self.computed[slots] + sizes == self.length[slots]
        if not any(row.tells_prompt for row in self.rows):
            return ends[is_last] - 1, slots[is_last]
        wanted = is_last.astype(np.int64)
        for place, slot in enumerate(slots.tolist()):
            if self.rows[slot].tells_prompt:
                told[slot] = slice(int(wanted[:place].sum()), int(wanted[:place].sum() + sizes[place]))
                wanted[place] = sizes[place]
        keep = np.concatenate([np.arange(end - size, end) for end, size in zip(ends, wanted, strict=True)])
        return keep, np.repeat(slots, wanted)


def _groups(adapters: np.ndarray, sizes: np.ndarray, name: Callable[[int], str | None]) -> list[Group]:
    """Runs of the same adapter, and their sizes together."""
    if not len(adapters):
        return []
    starts = np.flatnonzero(np.diff(adapters, prepend=-1))
    sums = np.add.reduceat(sizes, starts).tolist()
    return [(name(number), size) for number, size in zip(adapters[starts].tolist(), sums, strict=True)]
