"""The embedded engine without asyncio: requests in, one step after another, deltas out.

A step admits what fits, takes the next token of every decoding request and pieces of prompts into one forward, and
samples. Requests join and leave between steps. Where memory for keys and values runs out, the youngest request goes
back to the queue and is computed again later; its answer stays the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from swift.config.sections.engine import EngineSection
from swift.config.sections.task import TaskSection
from swift.core.errors import ConfigError
from swift.core.logging import get_logger
from swift.inference.engines.base import Delta, EngineBusy, EngineStats, FinishReason, Request, TokenInfo
from swift.inference.engines.blocking import Completion
from swift.inference.engines.embedded_adapters import Adapters
from swift.inference.engines.embedded_cache import SlotCache
from swift.inference.engines.embedded_checks import check_prompt, check_sampling, most_tokens
from swift.inference.engines.embedded_grammar import GrammarCompiler, GrammarState
from swift.inference.engines.embedded_memory import cache_tokens, is_out_of_memory
from swift.inference.engines.embedded_pool import make_pooler
from swift.inference.engines.embedded_rows import Row, Rows
from swift.inference.engines.embedded_runner import Batch, RowFailed, choose_runner
from swift.inference.engines.embedded_sampler import Sampler, token_infos
from swift.models.classifier import is_classifier
from swift.models.load import ModelBundle

__all__ = ["EmbeddedCore", "Event"]

logger = get_logger(__name__)

_PROMPT_LOGITS = 2**24
"""Most logits of prompt tokens in one step (64 MiB in float32)."""


class Event(NamedTuple):
    """A delta and whose it is."""

    id: str
    delta: Delta


class EmbeddedCore:
    """Continuous batching over one loaded model. Not for several threads at once.

    Args:
        bundle: model, tokenizer and template; an adapter on it acts where a request names none.
        options: limits.
        task: what the model was trained for; default: to write text.

    Attributes:
        shares_prompts: a request waits while another one with the same prompt computes it, and copies what comes of
            it. For many answers to each prompt; the first request of every prompt should come before the others.

    Raises:
        ModelError: the model cannot write text step by step.
        ConfigError: a limit is beyond what the model or memory allows.
    """

    def __init__(
        self, bundle: ModelBundle, options: EngineSection | None = None, *, task: TaskSection | None = None
    ) -> None:
        self.bundle, self.options = bundle, options or EngineSection()
        self.model = bundle.model.eval()
        self.max_model_len = most_tokens(bundle, self.options)
        self.vocab_size = int(self.model.get_input_embeddings().weight.shape[0])
        self.writes_text = not is_classifier(self.model)
        self.cache = SlotCache(2**62, 3, self.max_model_len)
        self._adapters = Adapters(self.model)
        self._pooler = make_pooler(bundle, task or TaskSection())
        if self.writes_text:
            self._prepare_writing()
        self._waiting: deque[Row] = deque()
        self._rows = Rows(self.options.max_num_seqs)
        self._by_id: dict[str, Row] = {}
        self._most_rows = self.options.max_num_seqs
        self._totals = {"requests": 0, "aborted": 0, "prompt": 0, "generated": 0}
        self._events: list[Event] = []
        self.shares_prompts = False

    def _prepare_writing(self) -> None:
        cache, device = self.cache, self.model.device
        self._runner, bytes_per_token = choose_runner(self.model, self._adapters.switch, cache)
        cache.max_slots = self.options.max_num_seqs
        cache.limit = cache_tokens(self.options, bytes_per_token, self.max_model_len, device)
        self.max_model_len = min(self.max_model_len, cache.limit)
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
        check_prompt(request.prompt, self.max_model_len, self.vocab_size)
        check_sampling(request.sampling, self.vocab_size)
        self._adapters.find(request.adapter)
        if self.is_full():
            raise EngineBusy(f"{self.num_open} requests are running and waiting")

    def add(self, request: Request, grammar: GrammarState | None = None) -> None:
        """Queue a request; ``grammar`` is its compiled grammar where the caller has compiled it already.

        Raises as `check`, and ConfigError for a bad grammar.
        """
        self.check(request)
        if grammar is None and request.sampling.grammar is not None:
            grammar = self.compiler.compile(request.sampling.grammar)
        end = min(len(request.prompt) + request.sampling.max_tokens, self.max_model_len)
        row = Row(self._totals["requests"], request, end, grammar)
        self._waiting.append(row)
        self._by_id[request.id] = row
        self._adapters.use(request.adapter)
        self._totals["requests"] += 1
        self._totals["prompt"] += row.num_prompt

    @torch.inference_mode()
    def abort(self, request_id: str) -> None:
        """Forget a request; nothing happens where it has ended already."""
        row = self._by_id.get(request_id)
        if row is not None:
            self._totals["aborted"] += 1
            self._finish(row, "abort")

    @torch.inference_mode()
    def fail_all(self, error: Exception) -> list[Event]:
        """End every request with an error (after a failure that none of them can be blamed for)."""
        for row in list(self._by_id.values()):
            self._fail(row, error)
        events, self._events = self._events, []
        return events

    @property
    def has_work(self) -> bool:
        return bool(self._by_id or self._events)

    def generate(
        self, requests: Sequence[Request], on_delta: Callable[[int, Delta], None] = lambda index, delta: None
    ) -> list[Completion]:
        """Answer requests together; results in their order. For callers that have the engine to themselves.

        Args:
            on_delta: called with the number of the request and what is new; may `abort` requests.

        Raises as `add`; a request that fails on the way says so in its completion.
        """
        places = {request.id: index for index, request in enumerate(requests)}
        results = [Completion() for _ in requests]
        coming = deque(requests)
        was_training = self.model.training
        self.model.eval()
        try:
            while coming or self.has_work:
                while coming and not self.is_full():
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

    def stream(self, request: Request) -> Iterator[Delta]:
        """One answer as it comes; closing the iterator early cancels it.

        For callers that have the engine to themselves. Raises as `add`.
        """
        self.add(request)
        try:
            while request.id in self._by_id:
                for request_id, delta in self.step():
                    if request_id == request.id:
                        yield delta
        finally:
            self.abort(request.id)
            self._events.clear()
            if not self._by_id:
                self._runner.free()

    def close(self) -> None:
        """End everything that goes on and free the cache."""
        for request_id in list(self._by_id):
            self.abort(request_id)
        self._events.clear()
        if self.writes_text:
            self._runner.free()

    # -- adapters, other tasks, figures ------------------------------------------------------------------------

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make a LoRA adapter available. Raises SwiftError when the name is taken or the folder does not fit."""
        self._adapters.load(name, folder)
        self._take_switch()

    def unload_adapter(self, name: str) -> None:
        """Take an adapter away once its requests have ended (look at `adapters`); new ones are refused from now on.

        Raises ConfigError when it is not there.
        """
        self._adapters.find(name)
        if self._adapters.leave(name):
            self._take_switch()

    def _take_switch(self) -> None:
        if self.writes_text:
            self._runner.switch = self._adapters.switch

    def adapters(self) -> dict[str, Path]:
        """The loaded adapters, those that are leaving included."""
        return self._adapters.folders()

    def pool(self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None) -> list[list[float]]:
        """See `InferenceEngine.pool`."""
        if self._pooler is None:
            raise ConfigError("this model writes text; it gives no vectors or scores")
        for prompt in prompts:
            check_prompt(prompt, self.max_model_len + 1, self.vocab_size)
        with self._adapters.acting(adapter):
            return self._pooler(prompts)

    @property
    def way(self) -> str:
        """How the model is run, in words."""
        return self._runner.name if self.writes_text else "texts are read, none is written"

    @property
    def num_open(self) -> int:
        """Requests that run or wait."""
        return len(self._by_id)

    def is_full(self, more: int = 0) -> bool:
        """Whether no request may come any more, with ``more`` on their way."""
        return self.num_open + more >= self.options.max_num_seqs + self.options.max_waiting

    def stats(self) -> EngineStats:
        """How it stands now."""
        return EngineStats(
            running=len(self._rows),
            waiting=len(self._waiting),
            max_running=self.options.max_num_seqs,
            cache_tokens_used=int(self._rows.computed[: len(self._rows)].sum()),
            cache_tokens=self.cache.limit,
            requests_total=self._totals["requests"],
            aborted_total=self._totals["aborted"],
            prompt_tokens_total=self._totals["prompt"],
            generated_tokens_total=self._totals["generated"],
        )

    # -- a step -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute once; what is new since the last step."""
        self._admit()
        if self._rows:
            self._attempt(self._plan())
        if not self._rows and self.writes_text:
            self._runner.free()
            self._most_rows = self.options.max_num_seqs
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        """Take waiting requests in, in their order, while slots and memory are there."""
        rows = self._rows
        while self._waiting and len(rows) < self._most_rows:
            row = self._waiting[0]
            width = max(int(rows.length[: len(rows)].max(initial=0)), len(row.tokens)) + 1
            if len(rows) and not self._runner.fits(len(rows) + 1, width):
                break
            twin = self._twin(row) if self.shares_prompts else None
            if twin is not None and rows.computed[twin.slot] < row.num_prompt - 1:
                break  # its prompt is being computed: the next step may copy it
            self._waiting.popleft()
            slot = rows.enter(row, self._adapters.number(row.request.adapter))
            answer = row.tokens[row.num_prompt :]
            self._sampler.place(slot, row.request.sampling, row.seed, row.request.prompt, answer, row.grammar)
            if twin is not None and self._runner.reserve(len(rows), width):
                # All but the last token, whose forward chooses the first one of the answer.
                self._runner.move(twin.slot, slot, row.num_prompt - 1)
                rows.computed[slot] = row.num_prompt - 1

    def _twin(self, row: Row) -> Row | None:
        """A running request whose prompt is the same, for one that has not begun; None where nothing can be copied."""
        if row.tells_prompt or len(row.tokens) > row.num_prompt or self._runner.whole_prompts:
            return None
        prompt, adapter = row.request.prompt, row.request.adapter
        same = (
            one for one in self._rows.rows if one.request.prompt == prompt and one.request.adapter == adapter
        )
        return next(same, None)

    def _plan(self) -> np.ndarray:
        """How many tokens of each slot this step computes; there is memory for them."""
        while True:
            counts = self._rows.counts(self._budget())
            width = int((self._rows.computed[: len(counts)] + counts).max())
            if self._runner.reserve(len(counts), width):
                return counts
            self._put_back(self._rows.youngest)

    def _budget(self) -> int | None:
        """Prompt tokens of a step."""
        if self._runner.whole_prompts:
            return None
        budget = self.options.prefill_chunk
        if any(row.tells_prompt for row in self._rows.rows):
            budget = min(budget, max(1, _PROMPT_LOGITS // self.vocab_size))
        return budget

    def _attempt(self, counts: np.ndarray) -> None:
        """Compute so many tokens of each slot; when that fails in two halves, down to the one request it is."""
        batch, told = self._rows.batch(counts, self._adapters.inner)
        rows = [self._rows[slot] for slot in batch.slots.tolist()]
        try:
            logits = self._runner.run(batch)
        except RowFailed as failure:
            for row in rows:
                if row.slot == failure.slot:
                    self._fail(row, failure.error)
                else:
                    self._put_back(row)
        except (RuntimeError, ValueError, LookupError, TypeError, MemoryError) as error:
            if len(rows) == 1:
                self._fail(rows[0], error)
                return
            logger.warning("a step of %d requests failed and is tried in halves: %s", len(rows), error)
            wanted = dict(zip((row.number for row in rows), batch.counts.tolist(), strict=True))
            if is_out_of_memory(error):
                self._make_smaller()
            for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                part = np.zeros(len(self._rows), np.int64)
                for row in half:
                    if row.slot >= 0:  # some may have been put back
                        part[row.slot] = wanted[row.number]
                if part.any():
                    self._attempt(part)
        else:
            self._rows.computed[batch.slots] += batch.counts
            self._take(batch, told, logits)

    def _make_smaller(self) -> None:
        """After a step that did not fit into memory: half the requests at once, until nothing runs any more."""
        self._most_rows = max(1, len(self._rows) // 2)
        while len(self._rows) > self._most_rows:
            self._put_back(self._rows.youngest)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _take(self, batch: Batch, told: Mapping[int, slice], logits: Tensor) -> None:
        """Tell about prompts, choose the next tokens, end what has ended."""
        rows = self._rows
        for slot, where in told.items():
            self._tell_prompt(rows[slot], logits[where])
        ready = rows.computed[batch.slots] == rows.length[batch.slots]
        slots = batch.slots[ready]
        if not len(slots):
            return
        if len(slots) != len(logits):
            places = np.searchsorted(batch.keep, np.cumsum(batch.counts)[ready] - 1)
            logits = logits[torch.from_numpy(places).to(logits.device)]
        sampled = self._sampler.sample(logits, slots, rows.length[slots] - rows.prompt[slots])
        rows.last[slots] = sampled.tokens
        rows.length[slots] += 1
        self._totals["generated"] += len(slots)
        chosen = [rows[slot] for slot in slots.tolist()]
        for place, (row, token) in enumerate(zip(chosen, sampled.tokens.tolist(), strict=True)):
            if token < 0:
                self._runner.clear(row.slot)
                self._finish(row, "error", "the model gave no finite scores")
            else:
                self._append(row, token, sampled.infos.get(place))

    def _append(self, row: Row, token: int, info: TokenInfo | None) -> None:
        row.tokens.append(token)
        reason: FinishReason | None = None
        problem = None
        if token in row.stops:
            reason = "stop"
        elif row.grammar is not None:
            problem = row.grammar.accept(token)
            reason = "error" if problem else "stop" if row.grammar.is_complete else None
        if reason is None and len(row.tokens) >= row.end:
            reason = "length"
        prompt_infos: tuple[TokenInfo, ...] = ()
        if row.tells_prompt:
            prompt_infos, row.prompt_infos, row.tells_prompt = tuple(row.prompt_infos), [], False
        delta = Delta((token,), () if info is None else (info,), prompt_infos, reason, problem)
        self._events.append(Event(row.request.id, delta))
        if reason is not None:
            self._forget(row)

    def _tell_prompt(self, row: Row, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that come after those just computed."""
        begin = int(self._rows.computed[row.slot]) - len(logits)
        number = row.request.sampling.prompt_logprobs
        assert number is not None
        targets = np.array(row.tokens[begin + 1 : min(begin + 1 + len(logits), row.num_prompt)], np.int64)
        if len(targets):
            row.prompt_infos += token_infos(logits[: len(targets)], targets, np.full(len(targets), number))

    # -- ends -------------------------------------------------------------------------------------------------

    def _finish(self, row: Row, reason: FinishReason, error: str | None = None) -> None:
        self._events.append(Event(row.request.id, Delta(finish_reason=reason, error=error)))
        self._forget(row)

    def _fail(self, row: Row, error: Exception) -> None:
        what = "there is not enough memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        logger.error("request %s failed: %s", row.request.id, what)
        self._finish(row, "error", what)

    def _forget(self, row: Row) -> None:
        if row.slot >= 0:
            self._leave(row)
        else:
            self._waiting.remove(row)
        del self._by_id[row.request.id]
        if self._adapters.release(row.request.adapter):
            self._take_switch()

    def _put_back(self, row: Row) -> None:
        """Free the slot of a request that goes on later, from its first token."""
        self._leave(row)
        row.prompt_infos = []
        self._waiting.appendleft(row)

    def _leave(self, row: Row) -> None:
        length = int(self._rows.computed[len(self._rows) - 1])
        slot, last = self._rows.leave(row)
        self._runner.leave(slot)
        if slot != last:
            self._runner.move(last, slot, length)
        self._sampler.move(last, slot)
