"""The embedded engine without asyncio: requests in, one step after another, deltas out.

A step admits what fits, takes the next token of every decoding request and pieces of prompts into one forward, and
samples. Requests join and leave between steps. Where memory for keys and values runs out, the youngest request goes
back to the queue and is computed again later; its answer stays the same.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from swift.config.sections.engine import EngineSection
from swift.core.errors import ConfigError, ModelError
from swift.core.logging import get_logger
from swift.inference.engines.base import (
    Delta,
    EngineBusy,
    EngineStats,
    FinishReason,
    Request,
    SamplingOptions,
    TokenInfo,
)
from swift.inference.engines.embedded_cache import SlotCache
from swift.inference.engines.embedded_grammar import GrammarCompiler, GrammarState
from swift.inference.engines.embedded_memory import cache_tokens
from swift.inference.engines.embedded_pool import make_pooler
from swift.inference.engines.embedded_runner import Batch, Group, RowFailed, choose_runner
from swift.inference.engines.embedded_sampler import Sampler, random_seed, token_infos
from swift.models.classifier import is_classifier
from swift.models.load import ModelBundle
from swift.tuners.apply import remove_adapter, tuned_model
from swift.tuners.peft_format import load_adapter, read_adapter_config

__all__ = ["Completion", "EmbeddedCore"]

logger = get_logger(__name__)

_PROMPT_LOGITS = 2**24
"""Most logits of prompt tokens in one step (64 MiB in float32)."""


class Event(NamedTuple):
    """A delta and whose it is."""

    id: str
    delta: Delta


@dataclass
class Completion:
    """A whole answer: all deltas of a request together."""

    tokens: list[int] = field(default_factory=list)
    infos: list[TokenInfo] = field(default_factory=list)
    prompt_infos: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason = "abort"
    error: str | None = None

    def add(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self.infos += delta.infos
        self.prompt_infos = self.prompt_infos or delta.prompt_infos
        if delta.finish_reason is not None:
            self.finish_reason, self.error = delta.finish_reason, delta.error


class _Row:
    """One request on its way. ``slot`` is -1 while it waits."""

    __slots__ = (
        "end",
        "grammar",
        "num_prompt",
        "prompt_infos",
        "request",
        "seed",
        "slot",
        "stops",
        "tells_prompt",
        "tokens",
    )

    def __init__(self, request: Request, end: int, grammar: GrammarState | None) -> None:
        sampling = request.sampling
        self.request, self.end, self.grammar = request, end, grammar
        self.tokens = list(request.prompt)
        self.num_prompt = len(self.tokens)
        self.stops = frozenset(sampling.stop_token_ids)
        self.seed = random_seed() if sampling.seed is None else sampling.seed % 2**64
        self.tells_prompt = sampling.prompt_logprobs is not None
        self.prompt_infos: list[TokenInfo] = []
        self.slot = -1


@dataclass
class _Adapter:
    """A loaded adapter: its name in the model, and how many requests use it."""

    folder: Path
    inner: str
    number: int
    num_requests: int = 0
    is_leaving: bool = False


class EmbeddedCore:
    """Continuous batching over one loaded model. Not for several threads at once.

    Args:
        bundle: model, tokenizer and template; an adapter on it acts where a request names none.
        options: limits.
        task: what the model was trained for (``task_type``).
        answers: the two words of a ``generative_reranker``.

    Raises:
        ModelError: the model cannot write text step by step.
        ConfigError: a limit is beyond what the model or memory allows.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        options: EngineSection | None = None,
        *,
        task: str = "causal_lm",
        answers: tuple[str, str] = ("yes", "no"),
    ) -> None:
        self.bundle, self.options = bundle, options or EngineSection()
        self.model = bundle.model.eval()
        tuned = tuned_model(self.model)
        self._has_other_adapter = tuned.other is not None
        self._switch = tuned.switch
        self._own_adapter = tuned.switch.active if tuned.switch is not None else None
        self._adapters: dict[str, _Adapter] = {}
        self._next_adapter = 1
        self._pooler = make_pooler(bundle, task, answers)
        self.max_model_len = _most_tokens(bundle, self.options)
        self.vocab_size = int(self.model.get_input_embeddings().weight.shape[0])
        self.writes_text = not is_classifier(self.model)
        self.cache = SlotCache(2**62, 3, self.max_model_len)
        size = self.options.max_num_seqs
        if self.writes_text:
            self._prepare_writing()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # by slot
        self._by_id: dict[str, _Row] = {}
        # By slot: tokens in all, of them with keys and values, the last one, tokens of the prompt, adapter.
        self._length, self._computed, self._last, self._prompt, self._adapter = np.zeros((5, size), np.int64)
        self._most_rows = size
        self._totals = {"requests": 0, "aborted": 0, "prompt": 0, "generated": 0}
        self._events: list[Event] = []

    def _prepare_writing(self) -> None:
        limits, device = self.cache, self.model.device
        self._runner, bytes_per_token = choose_runner(self.model, self._switch, limits)
        limits.max_slots = self.options.max_num_seqs
        limits.limit = cache_tokens(self.options, bytes_per_token, self.max_model_len, device)
        self.max_model_len = min(self.max_model_len, limits.limit)
        self.vocab_size = int(self.model.get_output_embeddings().weight.shape[0])
        ends = list(self.bundle.template.stop_token_ids)
        self.compiler = GrammarCompiler(self.bundle.tokenizer, self.vocab_size, ends)
        self._sampler = Sampler(self.options.max_num_seqs, self.vocab_size, device)

    # -- requests ---------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise ConfigError for a request that cannot be answered, EngineBusy when the queue is full."""
        if not self.writes_text:
            raise ConfigError("this model scores texts; it writes none", fix="ask for scores")
        if request.id in self._by_id:
            raise ConfigError(f"there is a request {request.id!r} already")
        _check_prompt(request.prompt, self.max_model_len, self.vocab_size)
        _check_sampling(request.sampling, self.vocab_size)
        adapter = self._adapters.get(request.adapter) if request.adapter is not None else None
        if request.adapter is not None and (adapter is None or adapter.is_leaving):
            raise ConfigError(
                f"there is no adapter {request.adapter!r}", fix=f"one of {sorted(self._adapters)}"
            )
        if len(self._waiting) >= self.options.max_waiting:
            raise EngineBusy(f"{len(self._waiting)} requests are waiting")

    def add(self, request: Request, grammar: GrammarState | None = None) -> None:
        """Queue a request; ``grammar`` is its compiled grammar where the caller has compiled it already.

        Raises as `check`, and ConfigError for a bad grammar.
        """
        self.check(request)
        if grammar is None and request.sampling.grammar is not None:
            grammar = self.compiler.compile(request.sampling.grammar)
        end = min(len(request.prompt) + request.sampling.max_tokens, self.max_model_len)
        row = _Row(request, end, grammar)
        self._waiting.append(row)
        self._by_id[request.id] = row
        self._totals["requests"] += 1
        self._totals["prompt"] += row.num_prompt
        if request.adapter is not None:
            self._adapters[request.adapter].num_requests += 1

    @torch.inference_mode()
    def abort(self, request_id: str) -> None:
        """Forget a request; nothing happens where it has ended already."""
        row = self._by_id.get(request_id)
        if row is not None:
            self._totals["aborted"] += 1
            self._finish(row, "abort")

    def fail_all(self, error: Exception) -> list[Event]:
        """End every request with an error (after a failure that none of them can be blamed for)."""
        for row in list(self._by_id.values()):
            self._finish(row, "error", f"{type(error).__name__}: {error}")
        events, self._events = self._events, []
        return events

    @property
    def way(self) -> str:
        """How the model is run, in words."""
        return self._runner.name if self.writes_text else "texts are read, none is written"

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._by_id or self._events)

    def generate(
        self, requests: Sequence[Request], on_delta: Callable[[int, Delta], None] = lambda index, delta: None
    ) -> list[Completion]:
        """Answer requests together; results in their order. For callers that have the engine to themselves.

        Args:
            on_delta: called with the number of the request and what is new, while it goes on.

        Raises as `add`; a request that fails on the way says so in its completion.
        """
        places = {request.id: index for index, request in enumerate(requests)}
        results = [Completion() for _ in requests]
        coming = deque(requests)
        was_training = self.model.training
        self.model.eval()
        try:
            while coming or self.has_work:
                while coming and len(self._waiting) < min(self.options.max_waiting, 2 * len(self._length)):
                    self.add(coming.popleft())
                for request_id, delta in self.step():
                    index = places[request_id]
                    results[index].add(delta)
                    on_delta(index, delta)
        finally:
            for request in requests:
                self.abort(request.id)
            self._events.clear()
            self.model.train(was_training)
        return results

    # -- adapters ---------------------------------------------------------------------------------------------

    def _find(self, name: str | None) -> _Adapter | None:
        """A loaded adapter that is to stay; None for None. Raises ConfigError when it is not there."""
        if name is None:
            return None
        adapter = self._adapters.get(name)
        if adapter is None or adapter.is_leaving:
            raise ConfigError(f"there is no adapter {name!r}", fix=f"one of {sorted(self._adapters)}")
        return adapter

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make a LoRA adapter available. Raises SwiftError when the name is taken or the folder does not fit."""
        if name in self._adapters:
            raise ConfigError(
                f"there is an adapter {name!r} already", fix="unload it first, or take another name"
            )
        if self._has_other_adapter:
            raise ConfigError(
                "this model carries an adapter of another kind than LoRA, beside which there can be no other",
                fix="serve the base model",
            )
        number, self._next_adapter = self._next_adapter, self._next_adapter + 1
        inner = f"served{number}"
        if read_adapter_config(folder)["peft_type"] != "LORA":
            raise ModelError("only LoRA adapters can be mixed in one engine", where=str(folder))
        load_adapter(self.model, folder, inner)
        self.model.eval()
        self._take_switch()
        self._adapters[name] = _Adapter(folder, inner, number)

    def unload_adapter(self, name: str) -> None:
        """Take an adapter away once its requests have ended (look at `adapters`); new ones are refused from now on.

        Raises ConfigError when it is not there.
        """
        adapter = self._find(name)
        assert adapter is not None
        adapter.is_leaving = True
        self._remove_leaving()

    def _take_switch(self) -> None:
        """Of the adapters now on the model; the one it came with acts where none is named."""
        self._switch = tuned_model(self.model).switch
        if self._switch is not None:
            self._switch.active = self._own_adapter
        if self.writes_text:
            self._runner.switch = self._switch

    def _remove_leaving(self) -> None:
        for name, adapter in list(self._adapters.items()):
            if adapter.is_leaving and adapter.num_requests == 0:
                remove_adapter(self.model, adapter.inner)
                self._take_switch()
                del self._adapters[name]

    def adapters(self) -> dict[str, Path]:
        """The loaded adapters, those that are leaving included."""
        return {name: adapter.folder for name, adapter in self._adapters.items()}

    def pool(self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None) -> list[list[float]]:
        """See `InferenceEngine.pool`."""
        if self._pooler is None:
            raise ConfigError("this model writes text; it gives no vectors or scores")
        for prompt in prompts:
            _check_prompt(prompt, self.max_model_len + 1, self.vocab_size)
        found = self._find(adapter)
        with (
            contextlib.nullcontext()
            if self._switch is None
            else self._switch.use(found.inner if found is not None else self._own_adapter)
        ):
            return self._pooler(prompts)

    # -- a step -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute once; what is new since the last step."""
        self._admit()
        if self._rows:
            self._attempt(self._plan())
        if not self._rows and self.writes_text:
            self._runner.free()
            self._most_rows = len(self._length)
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        """Take waiting requests in, in their order, while slots and memory are there."""
        while self._waiting and len(self._rows) < self._most_rows:
            row = self._waiting[0]
            slot = len(self._rows)
            width = max(int(self._length[:slot].max(initial=0)), len(row.tokens)) + 1
            if slot and not self._runner.fits(slot + 1, width):
                break
            self._waiting.popleft()
            self._rows.append(row)
            row.slot = slot
            name = row.request.adapter
            self._length[slot], self._computed[slot], self._last[slot] = len(row.tokens), 0, row.tokens[-1]
            self._prompt[slot] = row.num_prompt
            self._adapter[slot] = 0 if name is None else self._adapters[name].number
            answer = row.tokens[row.num_prompt :]
            self._sampler.place(slot, row.request.sampling, row.seed, row.request.prompt, answer, row.grammar)

    def _plan(self) -> np.ndarray:
        """How many tokens of each slot this step computes ``[slots]``; there is memory for them."""
        while True:
            slots = len(self._rows)
            left = self._length[:slots] - self._computed[:slots]
            counts = np.minimum(left, 1)
            long = np.flatnonzero(left > 1)
            if len(long):
                counts[long] = left[long] if self._runner.whole_prompts else self._pieces(long, left[long])
            if self._runner.reserve(slots, int((self._computed[:slots] + counts).max())):
                return counts
            self._put_back(self._youngest())

    def _pieces(self, slots: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Share ``prefill_chunk`` tokens among prompts: half for the oldest request, the rest to the shortest first,
        so that a long prompt delays short ones no more than they delay it."""
        budget = self.options.prefill_chunk
        if any(self._rows[slot].tells_prompt for slot in slots.tolist()):
            budget = min(budget, max(1, _PROMPT_LOGITS // self.vocab_size))
        pieces = np.zeros(len(slots), np.int64)
        order = {id(row): place for place, row in enumerate(self._by_id.values())}
        oldest = min(range(len(slots)), key=lambda i: order[id(self._rows[slots[i]])])
        pieces[oldest] = min(left[oldest], budget - budget // 2 if len(slots) > 1 else budget)
        budget -= int(pieces[oldest])
        for place in [*np.argsort(left, kind="stable").tolist(), oldest]:
            more = min(int(left[place] - pieces[place]), budget)
            pieces[place] += more
            budget -= more
        return pieces

    def _youngest(self) -> _Row:
        order = {id(row): place for place, row in enumerate(self._by_id.values())}
        return max(self._rows, key=lambda row: order[id(row)])

    def _attempt(self, counts: np.ndarray) -> None:
        """Compute so many tokens of each slot; on failure with fewer slots at once, down to the one that fails."""
        try:
            batch, told = self._batch(counts)
            logits = self._runner.run(batch)
            if logits.device.type != "cpu":
                logits = logits.float()
        except RowFailed as failure:
            others = [self._rows[slot] for slot in batch.slots.tolist() if slot != failure.slot]
            self._fail(self._rows[failure.slot], failure.error)
            for row in others:
                self._put_back(row)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, MemoryError) as error:
            rows = [self._rows[slot] for slot in np.flatnonzero(counts).tolist()]
            if len(rows) == 1:
                self._fail(rows[0], error)
                return
            logger.warning("a step of %d requests failed and is tried in halves: %s", len(rows), error)
            if _is_out_of_memory(error):
                self._make_smaller()
            for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                chosen = np.zeros(len(self._rows), np.int64)
                for row in half:
                    if row.slot >= 0:  # not put back meanwhile
                        chosen[row.slot] = self._again(row)
                if chosen.any():
                    self._attempt(chosen)
        else:
            self._computed[batch.slots] += batch.counts
            self._take(batch, told, logits)

    def _again(self, row: _Row) -> int:
        left = len(row.tokens) - int(self._computed[row.slot])
        return left if self._runner.whole_prompts else min(left, self.options.prefill_chunk)

    def _make_smaller(self) -> None:
        """After a step that did not fit into memory: half the requests at once, until nothing runs any more."""
        self._most_rows = max(1, len(self._rows) // 2)
        while len(self._rows) > self._most_rows:
            self._put_back(self._youngest())
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _batch(self, counts: np.ndarray) -> tuple[Batch, dict[int, slice]]:
        """The step's tokens, and where among the kept logits those of a prompt are that wants to be told about."""
        slots = np.flatnonzero(counts)
        adapters = self._adapter[slots]
        mixed = len(slots) > 1 and bool((adapters != adapters[0]).any())
        if mixed:
            order = np.argsort(adapters, kind="stable")
            slots, adapters = slots[order], adapters[order]
        sizes, begins = counts[slots], self._computed[slots]
        ends = np.cumsum(sizes)
        left = self._length[slots] - begins
        if len(slots) == ends[-1] and bool((left == 1).all()):
            ids, keep, kept, told = self._last[slots], np.arange(len(slots)), slots, {}
        else:
            parts = [
                self._rows[slot].tokens[begin : begin + size]
                for slot, begin, size in zip(slots.tolist(), begins.tolist(), sizes.tolist(), strict=True)
            ]
            ids = np.fromiter(itertools.chain.from_iterable(parts), np.int64, int(ends[-1]))
            keep, kept, told = self._kept(slots, sizes, ends, left)
        if not mixed:
            name = self._inner(int(adapters[0]))
            groups, keep_groups = [(name, len(ids))], [(name, len(keep))]
        else:
            groups = self._groups(adapters, sizes)
            keep_groups = self._groups(self._adapter[kept], np.ones(len(kept), np.int64))
        return Batch(ids, slots, sizes, begins, keep, groups, keep_groups, len(self._rows)), told

    def _kept(
        self, slots: np.ndarray, sizes: np.ndarray, ends: np.ndarray, left: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, dict[int, slice]]:
        """Tokens whose logits are wanted, the slot of each, and the places of those of prompts."""
        keep: list[int] = []
        kept: list[int] = []
        told: dict[int, slice] = {}
        for slot, size, end, is_last in zip(
            slots.tolist(), sizes.tolist(), ends.tolist(), (sizes == left).tolist(), strict=True
        ):
            first = end - size if self._rows[slot].tells_prompt else end - 1 if is_last else end
            if self._rows[slot].tells_prompt:
                told[slot] = slice(len(keep), len(keep) + size)
            keep += range(first, end)
            kept += [slot] * (end - first)
        return np.array(keep, np.int64), np.array(kept, np.int64), told

    def _groups(self, adapters: np.ndarray, sizes: np.ndarray) -> list[Group]:
        starts = np.flatnonzero(np.diff(adapters, prepend=-1))
        sums = np.add.reduceat(sizes, starts) if len(starts) else []
        return [
            (self._inner(int(adapters[start])), int(size)) for start, size in zip(starts, sums, strict=True)
        ]

    def _inner(self, number: int) -> str | None:
        """The name in the model; number 0 is the model as it was loaded."""
        return next((one.inner for one in self._adapters.values() if one.number == number), self._own_adapter)

    def _take(self, batch: Batch, told: Mapping[int, slice], logits: Tensor) -> None:
        """Tell about prompts, choose the next tokens, end what has ended."""
        for slot, where in told.items():
            self._tell_prompt(self._rows[slot], logits[where])
        ready = self._computed[batch.slots] == self._length[batch.slots]
        slots = batch.slots[ready]
        if not len(slots):
            return
        if len(slots) != len(logits):
            ends = np.cumsum(batch.counts)[ready] - 1
            logits = logits[torch.from_numpy(np.searchsorted(batch.keep, ends)).to(logits.device)]
        sampled = self._sampler.sample(logits, slots, self._length[slots] - self._prompt[slots])
        self._last[slots] = sampled.tokens
        self._length[slots] += 1
        rows, infos = self._rows, sampled.infos
        ended: list[tuple[_Row, FinishReason, str | None]] = []
        for place, (slot, token) in enumerate(zip(slots.tolist(), sampled.tokens.tolist(), strict=True)):
            row = rows[slot]
            if token < 0:
                self._runner.clear(slot)
                ended.append((row, "error", "the model gave no finite scores"))
                continue
            row.tokens.append(token)
            told_of_prompt = ()
            if row.prompt_infos or row.tells_prompt:
                told_of_prompt, row.prompt_infos, row.tells_prompt = tuple(row.prompt_infos), [], False
            problem = (
                row.grammar.accept(token) if row.grammar is not None and token not in row.stops else None
            )
            reason: FinishReason | None = None
            if token in row.stops:
                reason = "stop"
            elif problem is not None:
                reason = "error"
            elif len(row.tokens) >= row.end:
                reason = "length"
            elif row.grammar is not None and row.grammar.is_complete:
                reason = "stop"
            delta = Delta(
                (token,), (infos[place],) if place in infos else (), told_of_prompt, reason, problem
            )
            self._events.append(Event(row.request.id, delta))
            if reason is not None:
                ended.append((row, reason, None))
        self._totals["generated"] += len(slots)
        for row, reason, problem in ended:
            if problem is not None:
                self._finish(row, reason, problem)
            else:
                self._forget(row)

    def _tell_prompt(self, row: _Row, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that come after those just computed."""
        begin = int(self._computed[row.slot]) - len(logits)
        number = row.request.sampling.prompt_logprobs
        assert number is not None
        targets = np.array(row.tokens[begin + 1 : min(begin + 1 + len(logits), row.num_prompt)], np.int64)
        if len(targets):
            row.prompt_infos += token_infos(logits[: len(targets)], targets, np.full(len(targets), number))

    # -- ends -------------------------------------------------------------------------------------------------

    def _finish(self, row: _Row, reason: FinishReason, error: str | None = None) -> None:
        self._events.append(Event(row.request.id, Delta(finish_reason=reason, error=error)))
        self._forget(row)

    def _fail(self, row: _Row, error: Exception) -> None:
        what = (
            "there is not enough memory for it"
            if _is_out_of_memory(error)
            else f"{type(error).__name__}: {error}"
        )
        logger.error("request %s failed: %s", row.request.id, what)
        self._finish(row, "error", what)

    def _forget(self, row: _Row) -> None:
        if row.slot >= 0:
            self._leave(row)
        else:
            self._waiting.remove(row)
        del self._by_id[row.request.id]
        if row.request.adapter is not None:
            self._adapters[row.request.adapter].num_requests -= 1
            self._remove_leaving()

    def _put_back(self, row: _Row) -> None:
        """Free the slot of a request that goes on later, from its first token."""
        self._leave(row)
        if row.tells_prompt:
            row.prompt_infos = []
        self._waiting.appendleft(row)

    def _leave(self, row: _Row) -> None:
        """Free a slot; the last row moves into it."""
        slot, last = row.slot, len(self._rows) - 1
        self._runner.leave(slot)
        if slot != last:
            self._runner.move(last, slot, int(self._computed[last]))
            self._sampler.move(last, slot)
            for values in (self._length, self._computed, self._last, self._prompt, self._adapter):
                values[slot] = values[last]
            self._rows[slot] = self._rows[last]
            self._rows[slot].slot = slot
        else:
            self._sampler.rows[last] = None
        self._rows.pop()
        row.slot = -1

    def stats(self) -> EngineStats:
        """How it stands now."""
        return EngineStats(
            running=len(self._rows),
            waiting=len(self._waiting),
            max_running=len(self._length),
            cache_tokens_used=int(self._computed[: len(self._rows)].sum()),
            cache_tokens=self.cache.limit,
            requests_total=self._totals["requests"],
            aborted_total=self._totals["aborted"],
            prompt_tokens_total=self._totals["prompt"],
            generated_tokens_total=self._totals["generated"],
        )


def _most_tokens(bundle: ModelBundle, options: EngineSection) -> int:
    known = bundle.facts.max_position_embeddings
    asked = options.max_model_len
    if known and asked and asked > known:
        raise ConfigError(
            f"the model handles {known} positions",
            where=f"--max_model_len {asked}",
            fix=f"--max_model_len {known}",
        )
    return asked or known or 4096


def _check_prompt(prompt: Sequence[int], most: int, vocab_size: int) -> None:
    if not len(prompt):
        raise ConfigError("the prompt has no tokens")
    if len(prompt) >= most:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens and leaves no room for an answer",
            why=f"prompt and answer have at most {most} tokens together",
            fix="shorten the prompt",
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise ConfigError(f"the prompt holds a token id outside of 0 to {vocab_size - 1}")


def _check_sampling(options: SamplingOptions, vocab_size: int) -> None:
    """Raise ConfigError for values without a meaning."""
    wrong = [
        (options.max_tokens < 1, "max_tokens must be at least 1"),
        (options.min_tokens < 0, "min_tokens must not be negative"),
        (not 0 <= options.temperature < math.inf, "temperature must be a number from 0"),
        (not 0 < options.top_p <= 1, "top_p must be above 0 and at most 1"),
        (options.top_k < 0, "top_k must not be negative"),
        (not 0 <= options.min_p <= 1, "min_p must be between 0 and 1"),
        (not 0 < options.repetition_penalty < math.inf, "repetition_penalty must be above 0"),
        (not math.isfinite(options.presence_penalty), "presence_penalty must be a number"),
        (not math.isfinite(options.frequency_penalty), "frequency_penalty must be a number"),
        (
            any(not 0 <= token < vocab_size for token in (*options.logit_bias, *options.stop_token_ids)),
            f"token ids of logit_bias and stop_token_ids must be from 0 to {vocab_size - 1}",
        ),
        (
            any(not math.isfinite(value) for value in options.logit_bias.values()),
            "logit_bias must be numbers",
        ),
        ((options.logprobs or 0) < 0 or (options.prompt_logprobs or 0) < 0, "logprobs must not be negative"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise ConfigError(message)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text
