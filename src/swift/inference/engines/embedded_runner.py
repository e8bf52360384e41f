"""How the embedded engine runs its model on a step's tokens, and the proof that it computes what the model computes.

Three ways, the first that passes the proof on the loaded model is taken: all requests in one forward over slots;
each request on its own with the cache its architecture has (recurrent and hybrid models); each on its own without
any cache.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from swift.core.errors import ModelError
from swift.core.logging import get_logger
from swift.inference.engines.embedded_cache import (
    ATTENTION,
    Chunk,
    SlotCache,
    SlotStep,
    register_slot_attention,
)
from swift.tuners.switch import AdapterSwitch

__all__ = ["Batch", "RowFailed", "RowRunner", "Runner", "SlotRunner", "choose_runner"]

logger = get_logger(__name__)

Group = tuple[str | None, int]
"""Adapter and number of consecutive rows."""


@dataclass(frozen=True)
class Batch:
    """What one step computes: consecutive tokens of some slots, requests of one adapter side by side.

    Attributes:
        ids: ``[T]`` token ids.
        slots, counts, begins: for each piece its slot, its number of tokens and the position of its first.
        keep: tokens whose logits are wanted, in order.
        groups: adapters of the tokens. ``keep_groups``: those of ``keep``.
        num_slots: slots in use.
    """

    ids: np.ndarray
    slots: np.ndarray
    counts: np.ndarray
    begins: np.ndarray
    keep: np.ndarray
    groups: Sequence[Group]
    keep_groups: Sequence[Group]
    num_slots: int

    @property
    def adapters(self) -> list[str | None]:
        """The adapter of each piece."""
        names = [name for name, size in self.groups for _ in range(size)]
        return [names[place] for place in np.cumsum(self.counts) - 1]


class RowFailed(Exception):
    """The forward of one slot failed; what the other slots of the batch hold is lost as well."""

    def __init__(self, slot: int, error: Exception) -> None:
        super().__init__(str(error))
        self.slot, self.error = slot, error


class Runner(Protocol):
    """Runs steps and keeps what they leave behind for the next one.

    Attributes:
        name: in words, for logs and errors.
        whole_prompts: a prompt must come in one piece.
    """

    name: str
    whole_prompts: bool
    switch: AdapterSwitch | None

    def fits(self, slots: int, width: int) -> bool: ...
    def reserve(self, slots: int, width: int) -> bool: ...
    def move(self, source: int, target: int, length: int) -> None: ...
    def clear(self, slot: int) -> None: ...
    def leave(self, slot: int) -> None: ...
    def free(self) -> None: ...

    def run(self, batch: Batch) -> Tensor:
        """Logits ``[len(keep), vocab]``."""
        ...


class SlotRunner:
    """All requests in one forward.

    Args:
        model: the transformers model.
        switch: of its adapters, where it has any.
        cache: where keys and values go.
    """

    name = "all requests in one forward"
    whole_prompts = False

    def __init__(self, model: Any, switch: AdapterSwitch | None, cache: SlotCache) -> None:
        register_slot_attention()
        self.model, self.switch, self.cache = model, switch, cache
        self.fits, self.reserve, self.move = cache.fits, cache.reserve, cache.move
        self.clear, self.free = cache.clear, cache.free
        self._configs = list(
            {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
        )
        self.leave: Callable[[int], None] = lambda slot: None
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Our attention within the block; whoever uses the model afterwards finds it as it was.

        Raises:
            RuntimeError: another thread computes with the model at this moment, and would get our attention.
        """
        before = [config._attn_implementation for config in self._configs]
        if ATTENTION in before:
            raise RuntimeError("another thread is writing text with this model: give each engine its own")
        try:
            for config in self._configs:
                config._attn_implementation = ATTENTION
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name

    def run(self, batch: Batch) -> Tensor:
        step, positions = self._step(batch)
        device = self.model.device
        keep = torch.from_numpy(batch.keep).to(device)
        options = {"logits_to_keep": keep} if self._keeps and len(keep) < len(batch.ids) else {}
        with self._attention(), _acting(self.switch, batch.groups, batch.keep_groups if options else ()):
            logits: Tensor = self.model(
                input_ids=torch.from_numpy(batch.ids)[None].to(device),
                position_ids=torch.from_numpy(positions)[None].to(device),
                use_cache=False,
                slot_step=step,
                **options,
            ).logits[0]
        return logits if len(logits) == len(keep) else logits[keep]

    def _step(self, batch: Batch) -> tuple[SlotStep, np.ndarray]:
        """Attention's view of the batch, and the position of each token."""
        device, slots, counts = self.model.device, batch.slots, batch.counts
        ends = np.cumsum(counts)
        starts = ends - counts
        if len(batch.ids) == len(slots):
            positions, owners = batch.begins, slots
        else:
            positions = np.repeat(batch.begins - starts, counts) + np.arange(len(batch.ids))
            owners = np.repeat(slots, counts)
        lengths = np.ones(batch.num_slots, np.int64)
        lengths[slots] = np.where(counts == 1, batch.begins + counts, 1)
        places = torch.from_numpy(np.stack([owners, positions])).to(device)
        step = SlotStep(self.cache, (places[0], places[1]), lengths)
        single = counts == 1
        plain = (
            len(slots) == batch.num_slots
            and bool(single.all())
            and bool((slots == np.arange(len(slots))).all())
        )
        if not plain and single.any():
            gather = np.zeros(batch.num_slots, np.int64)
            gather[slots[single]] = starts[single]
            step.gather = torch.from_numpy(gather).to(device)
            pair = torch.from_numpy(np.stack([starts[single], slots[single]])).to(device)
            step.scatter = (pair[0], pair[1])
        step.chunks = [
            Chunk(int(starts[i]), int(ends[i]), int(slots[i]), int(batch.begins[i]))
            for i in np.flatnonzero(~single)
        ]
        return step, positions


class RowRunner:
    """Each request on its own.

    Args:
        model: the transformers model.
        switch: of its adapters, where it has any.
        limits: of slots and tokens.
        cached: keep the model's own cache between steps; False computes the whole text for every token.
    """

    whole_prompts = True

    def __init__(self, model: Any, switch: AdapterSwitch | None, limits: SlotCache, *, cached: bool) -> None:
        self.model, self.switch, self.cached = model, switch, cached
        self.name = "each request on its own, " + ("with its own cache" if cached else "without a cache")
        self.fits = self.reserve = limits.fits
        self._past: dict[int, Any] = {}

    def move(self, source: int, target: int, length: int) -> None:
        if source in self._past:
            self._past[target] = self._past.pop(source)

    def leave(self, slot: int) -> None:
        self._past.pop(slot, None)

    clear = leave

    def free(self) -> None:
        self._past.clear()

    def run(self, batch: Batch) -> Tensor:
        """Raises RowFailed where the forward of a slot fails."""
        ends = np.cumsum(batch.counts)
        rows = []
        for slot, end, count, begin, adapter in zip(
            batch.slots.tolist(),
            ends.tolist(),
            batch.counts.tolist(),
            batch.begins.tolist(),
            batch.adapters,
            strict=True,
        ):
            ids = torch.from_numpy(batch.ids[end - count : end])[None].to(self.model.device)
            places = batch.keep[(batch.keep >= end - count) & (batch.keep < end)] - (end - count)
            try:
                with _acting(self.switch, [(adapter, 1)]):
                    logits = self._forward(slot, ids, begin)
            except (RuntimeError, ValueError, IndexError, MemoryError) as error:
                for lost in batch.slots.tolist():
                    self.clear(lost)
                raise RowFailed(slot, error) from error
            rows.append(logits[0, torch.from_numpy(places - count)])
        return torch.cat(rows)

    def _forward(self, slot: int, ids: Tensor, begin: int) -> Tensor:
        """Logits ``[1, n, vocab]`` whose last rows are those of ``ids``."""
        past = self._past.get(slot) if begin else None
        if not self.cached:
            text = ids if past is None else torch.cat([past, ids], 1)
            self._past[slot] = text
            return self.model(input_ids=text, use_cache=False).logits
        output = self.model(input_ids=ids, use_cache=True, **(past or {}))
        names = [
            name
            for name in ("past_key_values", "cache_params", "state")
            if getattr(output, name, None) is not None
        ]
        if not names:
            raise ValueError(f"{type(self.model).__name__} returns no cache")
        self._past[slot] = {names[0]: getattr(output, names[0])}
        return output.logits


@contextlib.contextmanager
def _acting(
    switch: AdapterSwitch | None, groups: Sequence[Group], kept: Sequence[Group] = ()
) -> Iterator[None]:
    """The adapters of a batch act within the block."""
    if switch is None:
        yield
    elif len(groups) == 1:
        with switch.use(groups[0][0]):
            yield
    else:
        with switch.mixed(groups, kept):
            yield


# -- the choice -----------------------------------------------------------------------------------------------


def choose_runner(model: Any, switch: AdapterSwitch | None, cache: SlotCache) -> tuple[Runner, int]:
    """The fastest way that computes what the model's plain forward computes, found by trying.

    Returns it and the bytes that keys and values of a token take (0 where it keeps none in ``cache``).

    Raises:
        ModelError: none does.
    """
    runners: list[Runner] = [
        RowRunner(model, switch, cache, cached=True),
        RowRunner(model, switch, cache, cached=False),
    ]
    if _may_share_forwards(model):
        runners.insert(0, SlotRunner(model, switch, cache))
    reasons = []
    for runner in runners:
        try:
            difference = _difference(model, switch, runner, cache.max_width)
            bytes_per_token = cache.num_bytes // max(1, cache.slots * cache.width)
        except (RowFailed, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            first = str(error).split("\n", 1)[0]
            reasons.append(f"{runner.name}: {type(error).__name__}: {first}")
            continue
        finally:
            runner.free()
        half = _compute_dtype(model) in (torch.bfloat16, torch.float16)
        if difference <= (0.1 if half else 1e-4):
            if reasons:
                logger.warning("slower inference (%s): %s", runner.name, "; ".join(reasons))
            return runner, bytes_per_token
        reasons.append(f"{runner.name}: results differ by {difference:.2g} standard deviations")
    raise ModelError(f"{type(model).__name__} cannot write text step by step here", why="; ".join(reasons))


def _compute_dtype(model: Any) -> torch.dtype:
    """In what precision products are: under autocast (full training: float32 weights) not that of the weights."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def _may_share_forwards(model: Any) -> bool:
    """Whether the architecture takes its attention from transformers' interface, and positions mean the same in
    every batch (dynamic and long RoPE change with the longest text of a batch)."""
    config = model.config.get_text_config()
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [scaling, *(part for part in scaling.values() if isinstance(part, dict))]
    moving = any(kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope") for kind in kinds)
    return bool(getattr(model, "_supports_attention_backend", False)) and not moving


@torch.inference_mode()
def _difference(model: Any, switch: AdapterSwitch | None, runner: Runner, max_width: int) -> float:
    """Mean difference of logits between a run in small steps and plain forwards, in their standard deviations.

    Three texts of different lengths: prompts in pieces (where the runner takes pieces), then three tokens together.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    long = window + 9 if window <= 256 else 30
    lengths = [min(length, max_width) - 3 for length in (12, 21, max(long, 30))]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocabulary, (length + 3,), generator=generator).numpy() for length in lengths]
    plan = [[(slot, 0, length) for slot, length in enumerate(lengths)]]
    if not runner.whole_prompts:
        cut = lengths[2] // 2
        plan = [[(2, 0, cut)], [(0, 0, lengths[0]), (2, cut, lengths[2]), (1, 0, lengths[1])]]
    plan += [[(slot, length + i, length + i + 1) for slot, length in enumerate(lengths)] for i in range(3)]
    total = count = 0.0
    with switch.use(None) if switch is not None else contextlib.nullcontext():
        alone = [
            model(input_ids=torch.from_numpy(text)[None].to(model.device), use_cache=False).logits[0].float()
            for text in texts
        ]
        spread = float(torch.cat(alone).std()) or 1.0
        for pieces in plan:
            if not runner.reserve(3, max(map(len, texts))):
                raise ValueError(f"no room for three texts of {max(map(len, texts))} tokens")
            sizes = np.array([stop - start for _, start, stop in pieces])
            tokens = int(sizes.sum())
            batch = Batch(
                ids=np.concatenate([texts[slot][start:stop] for slot, start, stop in pieces]),
                slots=np.array([slot for slot, _, _ in pieces]),
                counts=sizes,
                begins=np.array([start for _, start, _ in pieces]),
                keep=np.arange(tokens),
                groups=[(None, tokens)],
                keep_groups=[(None, tokens)],
                num_slots=3,
            )
            expected = torch.cat([alone[slot][start:stop] for slot, start, stop in pieces])
            total += float((runner.run(batch).float() - expected).abs().mean())
            count += 1
    difference = total / count / spread
    return difference if difference == difference else float("inf")
