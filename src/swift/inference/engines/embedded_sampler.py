"""The next token of every row at once, as `SamplingOptions` says.

Randomness is a function of a request's seed and the number of the token: one uniform number each, by a counter-based
generator, turned into a token by the inverse of the distribution. So neither the other rows nor an interruption
changes an answer (but for rounding: another batch may round a probability differently in the last bit).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.inference.engines.base import SamplingOptions, TokenInfo

__all__ = ["Sampled", "Sampler", "token_infos", "uniform"]

_NEAREST = 1024
"""Tokens looked at first for top_p and min_p; the whole vocabulary is sorted only where these do not suffice."""


def uniform(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64, one for each (seed, counter) of unsigned 64-bit integers: SplitMix64
    (Steele, Lea, Flood 2014), once over the seed and once over the seed and the counter."""
    with np.errstate(over="ignore"):
        mixed = _mix(seeds.astype(np.uint64))
        mixed = _mix(mixed + counters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass
class Sampled:
    """Tokens ``[rows]`` (-1 where the model gave no finite scores) and what was asked for about them."""

    tokens: np.ndarray
    infos: dict[int, TokenInfo]


class Sampler:
    """Options and counts of the rows in the slots.

    Args:
        num_slots: most rows.
        vocab_size: logits of a row.
        device: where the logits are.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.rows: list[_RowOptions | None] = [None] * num_slots
        self.table = np.zeros(
            num_slots,
            [
                ("temperature", np.float32),
                ("top_p", np.float32),
                ("top_k", np.int64),
                ("min_p", np.float32),
                ("seed", np.uint64),
                ("logprobs", np.int64),
                ("penalised", np.bool_),
                ("edited", np.bool_),
                ("cut", np.bool_),
                ("presence", np.float32),
                ("frequency", np.float32),
                ("repetition", np.float32),
            ],
        )
        self._counts: Tensor | None = None  # [slots, vocab]: how often the answer has a token
        self._in_prompt: Tensor | None = None  # [slots, vocab]

    def place(
        self,
        slot: int,
        options: SamplingOptions,
        seed: int,
        prompt: Sequence[int],
        answer: Sequence[int],
        grammar: Any,
    ) -> None:
        """Put a request's options into a slot."""
        penalised = bool(
            options.presence_penalty or options.frequency_penalty or options.repetition_penalty != 1
        )
        cut = bool(options.top_p < 1 or 0 < options.top_k < self.vocab_size or options.min_p > 0)
        edits = _RowOptions(options, grammar, self.device)
        self.rows[slot] = edits
        self.table[slot] = (
            options.temperature,
            options.top_p,
            options.top_k,
            options.min_p,
            seed,
            -1 if options.logprobs is None else options.logprobs,
            penalised,
            edits.is_active,
            cut,
            options.presence_penalty,
            options.frequency_penalty,
            options.repetition_penalty,
        )
        if penalised:
            self._count(slot, prompt, answer)

    def _count(self, slot: int, prompt: Sequence[int], answer: Sequence[int]) -> None:
        if self._counts is None or self._in_prompt is None:
            size = (len(self.rows), self.vocab_size)
            self._counts = torch.zeros(size, dtype=torch.float32, device=self.device)
            self._in_prompt = torch.zeros(size, dtype=torch.bool, device=self.device)
        ids = torch.tensor(list(answer), dtype=torch.long, device=self.device)
        self._counts[slot] = torch.bincount(ids, minlength=self.vocab_size)[: self.vocab_size].float()
        self._in_prompt[slot] = False
        self._in_prompt[slot, torch.tensor(list(prompt), dtype=torch.long, device=self.device)] = True

    def move(self, source: int, target: int) -> None:
        """The row of one slot goes to another, and leaves its own empty."""
        if source == target:
            self.rows[source] = None
            return
        self.rows[target], self.rows[source] = self.rows[source], None
        self.table[target] = self.table[source]
        if self.table["penalised"][source] and self._counts is not None and self._in_prompt is not None:
            self._counts[target] = self._counts[source]
            self._in_prompt[target] = self._in_prompt[source]

    def sample(self, logits: Tensor, slots: np.ndarray, numbers: np.ndarray) -> Sampled:
        """The tokens after ``logits [rows, vocab]`` of some slots, whose answers have ``numbers`` tokens so far."""
        table = self.table[slots]
        wanted = np.flatnonzero(table["logprobs"] >= 0)
        chosen, logits = self.choose(self._edited(logits.float(), table, slots, numbers), table, numbers)
        ids = chosen.cpu().numpy()
        if table["penalised"].any() and self._counts is not None:
            rows = np.flatnonzero(table["penalised"] & (ids >= 0))
            pair = (
                torch.from_numpy(slots[rows]).to(self.device),
                torch.from_numpy(ids[rows]).to(self.device),
            )
            self._counts.index_put_(pair, torch.ones((), device=self.device), accumulate=True)
        infos = {}
        if len(wanted):
            places = torch.from_numpy(wanted).to(self.device)
            part = (
                logits if len(wanted) == len(slots) else logits[places]
            )  # all: as large as the logits themselves
            told = token_infos(part, ids[wanted], table["logprobs"][wanted])
            infos = dict(zip(wanted.tolist(), told, strict=True))
        return Sampled(ids, infos)

    def choose(self, logits: Tensor, table: np.ndarray, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """(tokens ``[rows]``, -1 where scores are not finite; the logits divided by temperatures) of ``logits``.

        Args:
            logits: ``[rows, vocab]`` float32.
            table: options of the rows.
            numbers: tokens of the answers so far.
        """
        tempered = table["temperature"] > 0
        best, tokens = logits.max(-1)
        if tempered.any() or (table["logprobs"] >= 0).any():
            scale = np.where(tempered, table["temperature"], 1.0)
            if (scale != 1.0).any():
                logits = logits / torch.from_numpy(scale.astype(np.float32)).to(self.device)[:, None]
            for is_cut in (False, True):
                chosen = np.flatnonzero(tempered & (table["cut"] == is_cut))
                if len(chosen):
                    places = torch.from_numpy(chosen).to(self.device)
                    part = logits if len(chosen) == len(table) else logits[places]
                    drawn = uniform(table["seed"][chosen], numbers[chosen])
                    pick = self._cut if is_cut else self._whole
                    tokens[places] = pick(part, drawn, table[chosen])
        return torch.where(torch.isfinite(best), tokens, -1), logits

    def _edited(self, logits: Tensor, table: np.ndarray, slots: np.ndarray, numbers: np.ndarray) -> Tensor:
        """Penalties for all rows that have any, then bias, end tokens that come too early, and grammar by row."""
        if not table["penalised"].any() and not table["edited"].any():
            return logits
        logits = logits.clone()
        chosen = np.flatnonzero(table["penalised"])
        if len(chosen) and self._counts is not None and self._in_prompt is not None:
            places = torch.from_numpy(chosen).to(self.device)
            where = torch.from_numpy(slots[chosen]).to(self.device)
            part, counts = logits[places], self._counts[where]
            column = {
                name: torch.from_numpy(table[name][chosen].copy()).to(self.device)[:, None]
                for name in ("presence", "frequency", "repetition")
            }
            repeated = torch.where(part > 0, part / column["repetition"], part * column["repetition"])
            part = torch.where((counts > 0) | self._in_prompt[where], repeated, part)
            logits[places] = part - column["frequency"] * counts - column["presence"] * (counts > 0)
        for place in np.flatnonzero(table["edited"]).tolist():
            row = self.rows[slots[place]]
            assert row is not None
            row.edit(logits[place], int(numbers[place]))
        return logits

    def _whole(self, logits: Tensor, drawn: np.ndarray, table: np.ndarray) -> Tensor:
        return _pick(logits.softmax(-1).cumsum_(-1), drawn)

    def _cut(self, logits: Tensor, drawn: np.ndarray, table: np.ndarray) -> Tensor:
        """From the likeliest tokens that top_k, top_p and min_p leave, each row's own."""
        vocab = logits.shape[-1]
        probabilities = logits.softmax(-1)
        limits = np.where((table["top_k"] > 0) & (table["top_k"] < vocab), table["top_k"], vocab)
        only_k = (table["top_p"] >= 1) & (table["min_p"] <= 0)
        few = min(vocab, int(max(min(_NEAREST, vocab), limits[limits < vocab].max(initial=0))))
        if (only_k & (limits < vocab)).all():
            few = int(limits.max())
        column = {
            name: torch.from_numpy(value).to(self.device)[:, None]
            for name, value in (
                ("k", limits),
                ("top_p", table["top_p"].copy()),
                ("min_p", table["min_p"].copy()),
            )
        }
        while True:
            best, ids = (
                probabilities.topk(few, -1)
                if few < vocab
                else probabilities.sort(stable=True, dim=-1, descending=True)
            )
            before = best.cumsum(-1) - best
            rank = torch.arange(best.shape[-1], device=self.device)
            left = (rank < column["k"]) & (before < column["top_p"]) & (best >= column["min_p"] * best[:, :1])
            # The last one looked at is left and there are more: the border lies farther down.
            if few == vocab or not bool((left[:, -1] & (column["k"][:, 0] > few)).any()):
                break
            few = vocab
        left[:, 0] = True
        place = _pick((best * left).cumsum_(-1), drawn)
        return ids.gather(-1, place[:, None])[:, 0]


def _pick(summed: Tensor, drawn: np.ndarray) -> Tensor:
    """The first place ``[rows]`` whose cumulated weight exceeds the drawn share of all."""
    share = torch.from_numpy(drawn.astype(np.float32)).to(summed.device)
    share = share.clamp_(max=1 - 2.0**-24)[:, None] * summed[:, -1:]
    return torch.searchsorted(summed, share, right=True)[:, 0].clamp_(max=summed.shape[-1] - 1)


class _RowOptions:
    """What only some requests have and is done row by row: bias, a shortest answer, a grammar."""

    def __init__(self, options: SamplingOptions, grammar: Any, device: torch.device) -> None:
        self.grammar = grammar
        self.min_tokens = options.min_tokens if options.stop_token_ids else 0
        self.is_active = bool(options.logit_bias or self.min_tokens or grammar is not None)
        if self.is_active:
            bias = options.logit_bias
            self._biased = torch.tensor(list(bias), dtype=torch.long, device=device)
            self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
            self._ends = torch.tensor(options.stop_token_ids, dtype=torch.long, device=device)

    def edit(self, logits: Tensor, number: int) -> None:
        """Change the logits ``[vocab]`` of the token that comes after ``number`` others, in place."""
        if len(self._biased):
            logits[self._biased] += self._bias
        if number < self.min_tokens:
            logits[self._ends] = -torch.inf
        if self.grammar is not None:
            self.grammar.forbid(logits)


def token_infos(logits: Tensor, tokens: np.ndarray, numbers: np.ndarray) -> list[TokenInfo]:
    """Log-probabilities of ``tokens [rows]`` and of as many of the likeliest as ``numbers [rows]`` says."""
    logits = logits.float()
    total = logits.logsumexp(-1)
    ids = torch.from_numpy(np.maximum(tokens, 0)).to(logits.device)
    chosen = (logits.gather(-1, ids[:, None])[:, 0] - total).tolist()
    most = min(int(numbers.max()), logits.shape[-1])
    if most == 0:
        return [TokenInfo(token, value) for token, value in zip(tokens.tolist(), chosen, strict=True)]
    best, places = logits.topk(most, -1)
    tops = zip((best - total[:, None]).tolist(), places.tolist(), numbers.tolist(), strict=True)
    tops_of = [tuple(zip(names[:n], values[:n], strict=True)) for values, names, n in tops]
    return [
        TokenInfo(token, value, top)
        for token, value, top in zip(tokens.tolist(), chosen, tops_of, strict=True)
    ]


def random_seed() -> int:
    """For a request without one."""
    return secrets.randbits(64)
