"""Sampling for a trace of memory (`swift.train.memory`): the embedded engine's own passes on fake tensors."""

from __future__ import annotations

import contextlib
from typing import Protocol

import numpy as np
import torch

from swift.config.schema import Resolved
from swift.inference.engines.embedded_cache import SlotCache
from swift.inference.engines.embedded_runner import Batch, SlotRunner
from swift.inference.engines.embedded_sampler import Sampler
from swift.parallel.native import NativeEngine
from swift.train.live_bytes import LiveBytes
from swift.train.memory import Afterwards
from swift.tuners.apply import tuned_model
from swift.tuners.merged import MergedWeights

__all__ = ["sampling"]


class Asked(Protocol):
    """Sizes, as `swift.plan.sampling.Sampling` has them."""

    @property
    def slots(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def piece(self) -> int: ...
    @property
    def prompts(self) -> int: ...
    @property
    def goes_on(self) -> bool: ...


def sampling(asked: Asked, resolved: Resolved) -> Afterwards:
    """A piece of the prompts, the growth of the cache, and the last tokens of all answers."""

    def sample(engine: NativeEngine, live: LiveBytes) -> None:
        live.enter("sampling: adapter", "sampler")
        with engine.evaluating() as model, torch.no_grad():
            tuned = tuned_model(model)
            merged = MergedWeights.of(tuned)
            with merged.applied() if merged is not None else contextlib.nullcontext():
                cache = SlotCache(asked.slots * (asked.width - 1), asked.slots, asked.width)
                runner = SlotRunner(model, tuned.switch, cache)
                name = tuned.switch.active if tuned.switch is not None else None
                first = asked.slots if asked.goes_on else asked.prompts
                _pass(runner, cache, live, name, "sampling: prompts", first, asked.piece)
                live.enter("sampling: growing cache", "cache")
                for width in (
                    asked.width - 1,
                    asked.width,
                ):  # the last time it is hardly smaller than it becomes
                    cache.limit = asked.slots * width
                    cache.reserve(asked.slots, width)
                logits = _pass(runner, cache, live, name, "sampling: answers", asked.slots, asked.slots)
                live.enter("sampling: next tokens", "logits")
                _choose(logits, resolved)
                del logits
                runner.free()

    return sample


def _pass(
    runner: SlotRunner,
    cache: SlotCache,
    live: LiveBytes,
    adapter: str | None,
    phase: str,
    slots: int,
    tokens: int,
) -> torch.Tensor:
    """Logits of a forward pass over so many tokens: of prompts; or, with one for each slot, the last of answers."""
    is_last = tokens == slots
    counts = np.full(slots, 1) if is_last else np.diff(np.linspace(0, tokens, slots + 1).astype(np.int64))
    counts = np.maximum(counts, 1)
    width = cache.max_width if is_last else max(int(counts.max()), cache.max_width // 2)
    cache.reserve(slots, width)
    live.enter(phase, "temporary")
    total = int(counts.sum())
    batch = Batch(
        ids=np.zeros(total, np.int64),
        slots=np.arange(slots),
        counts=counts,
        begins=np.full(slots, cache.max_width - 1) if is_last else np.zeros(slots, np.int64),
        keep=np.cumsum(counts) - 1,
        groups=[(adapter, total)],
        keep_groups=[(adapter, slots)],
        num_slots=slots,
    )
    logits = runner.run(batch)
    live.claim(cache.tensors(), "cache")
    return logits


def _choose(logits: torch.Tensor, resolved: Resolved) -> None:
    options = resolved.config.generation
    rows, vocab = logits.shape
    sampler = Sampler(rows, vocab, logits.device)
    table = sampler.table
    table["temperature"], table["top_p"], table["top_k"] = options.temperature, options.top_p, options.top_k
    table["cut"] = options.top_p < 1 or options.top_k > 0
    sampler.choose(logits.float(), table, np.zeros(rows, np.int64))
