"""Keys and values of running requests, and the attention over them.

A forward of the embedded engine is one row of tokens, ``[1, T]``: the next token of every decoding request and pieces
of prompts, one behind the other. Linear layers see them all at once; only attention knows which token belongs to
which request. It is registered with transformers (`ATTENTION`), stores the new keys and values in the request's slot
and computes decoding requests as one batch over all slots, and pieces of prompts one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ATTENTION", "Chunk", "SlotCache", "SlotStep", "register_slot_attention"]

ATTENTION = "swift_slots"
_WIDTH_STEP = 64


def register_slot_attention() -> None:
    """Make ``swift_slots`` known to transformers. It has no mask function on purpose: none is made for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, slot_attention)


class SlotCache:
    """Keys and values of each layer, ``[slots, heads, width, channels]``; slots in use are the first ones.

    In this order products over the first slots and places need no copy.

    It grows by doubling while ``slots * width`` stays within ``limit`` tokens, and shrinks to what is needed where it
    would not fit otherwise. Unused places hold finite numbers: they are masked, but 0 times NaN is NaN.

    Args:
        limit: most tokens for which there is ever memory.
        max_slots: most slots.
        max_width: most tokens of one slot.
    """

    def __init__(self, limit: int, max_slots: int, max_width: int) -> None:
        self.limit, self.max_slots, self.max_width = limit, max_slots, max_width
        self.slots = self.width = 0
        self._layers: dict[int, list[Tensor]] = {}

    def tensors(self) -> Iterator[Tensor]:
        """The keys and values of all layers."""
        return (part for pair in self._layers.values() for part in pair)

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.tensors())

    def fits(self, slots: int, width: int) -> bool:
        """Whether so many slots of such a width can be had."""
        return slots <= self.max_slots and slots * width <= self.limit

    def reserve(self, slots: int, width: int) -> bool:
        """Have at least so much; False when the limit forbids it. What the slots hold stays."""
        if slots <= self.slots and width <= self.width:
            return True
        if not self.fits(slots, width):
            return False
        many = min(self.max_slots, max(self.slots, 1 << (slots - 1).bit_length()))
        wide = width + width // 2 if self.width else width + _WIDTH_STEP
        wide = max(self.width, min(self.max_width, -(-wide // _WIDTH_STEP) * _WIDTH_STEP))
        for size in ((many, wide), (slots, wide), (slots, max(width, min(wide, self.limit // slots)))):
            if size[0] * size[1] <= self.limit:
                break
        self._resize(*size)
        return True

    def _resize(self, slots: int, width: int) -> None:
        """One after another, so that the keys, or the values, of only one layer are ever there twice."""
        for pair in self._layers.values():
            for place in range(2):
                pair[place] = _resized(pair[place], slots, width)
        self.slots, self.width = slots, width

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a slot to another one."""
        for part in self.tensors():
            part[target, :, :length] = part[source, :, :length]

    def clear(self, slot: int) -> None:
        """Forget a slot whose numbers may not be finite."""
        for part in self.tensors():
            part[slot].zero_()

    def free(self) -> None:
        """Give the memory back."""
        self._layers.clear()
        self.slots = self.width = 0

    def store(
        self, layer: int, places: tuple[Tensor, Tensor], key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[T, heads, channels]`` of new tokens to ``places`` (slots and positions)."""
        pair = self._layers.get(layer)
        if pair is None:
            sizes = ((self.slots, new.shape[1], self.width, new.shape[2]) for new in (key, value))
            pair = [key.new_zeros(next(sizes)), value.new_zeros(next(sizes))]
            self._layers[layer] = pair
        for part, new in zip(pair, (key, value), strict=True):
            part.transpose(1, 2).index_put_(places, new)
        return pair[0], pair[1]


def _resized(part: Tensor, slots: int, width: int) -> Tensor:
    """A copy with so many slots of such a width; what is new is zero."""
    new = part.new_zeros(slots, part.shape[1], width, part.shape[3])
    kept = slice(0, min(slots, part.shape[0])), slice(None), slice(0, min(width, part.shape[2]))
    new[kept] = part[kept]
    return new


@dataclass(frozen=True)
class Chunk:
    """A piece of a prompt: tokens ``start`` to ``stop`` of the forward, at positions from ``begin`` of a slot."""

    start: int
    stop: int
    slot: int
    begin: int


@dataclass
class SlotStep:
    """What attention needs to know of one forward.

    Attributes:
        cache: where keys and values are.
        places: slots and positions, ``[T]`` each, where those of each token go.
        lengths: ``[B]`` tokens that each of the first B slots has after this forward.
        gather: ``[B]`` the token of each slot's decoding request (any where a slot is not decoding); None when token
            b is that of slot b throughout.
        scatter: with ``gather``: tokens and slots of decoding requests.
        chunks: the pieces of prompts.
    """

    cache: SlotCache
    places: tuple[Tensor, Tensor]
    lengths: np.ndarray
    gather: Tensor | None = None
    scatter: tuple[Tensor, Tensor] | None = None
    chunks: Sequence[Chunk] = ()
    _shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_slots(self) -> int:
        return len(self.lengths)

    def shares(self) -> tuple[int, list[int]]:
        """(width, outliers): slots computed together up to ``width``, and longer ones computed on their own.

        Together costs ``slots * width``; a slot on its own its length and, in tokens, what a call costs.
        """
        if "shares" not in self._shared:
            call = 150 if self.places[0].device.type == "cpu" else 4000
            order = np.argsort(-self.lengths, kind="stable")
            longest = np.append(self.lengths[order], 0)
            own = np.concatenate([[0], np.cumsum(longest[:-1] + call)])
            best = int(np.argmin(own + self.num_slots * longest))
            self._shared["shares"] = (int(longest[best]), order[:best].tolist())
        found: tuple[int, list[int]] = self._shared["shares"]
        return found

    def decode_mask(self, width: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """``[B, 1, 1, width]``: 0 where a slot's newest token may look, minus infinity elsewhere."""
        key = ("decode", window)
        if key not in self._shared:
            device = self.places[0].device
            ends = torch.from_numpy(np.minimum(self.lengths, width)).to(device)[:, None]
            there = torch.arange(width, device=device)
            hidden = there >= ends
            if window is not None and width > window:
                hidden |= there < ends - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            self._shared[key] = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        found: Tensor = self._shared[key]
        return found

    def chunk_mask(self, chunk: Chunk, first: int, window: int | None) -> Tensor | None:
        """``[c, k]``: which of the keys from ``first`` each token of a piece may see; None: plainly causal."""
        size, end = chunk.stop - chunk.start, chunk.begin + chunk.stop - chunk.start
        windowed = window is not None and end > window
        if chunk.begin == 0 and not windowed:
            return None
        key = (chunk, window)
        if key not in self._shared:
            device = self.places[0].device
            here = torch.arange(chunk.begin, chunk.begin + size, device=device)[:, None]
            there = torch.arange(first, end, device=device)[None]
            seen = there <= here
            self._shared[key] = seen & (there > here - window) if window is not None and windowed else seen
        found: Tensor = self._shared[key]
        return found


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    slot_step: SlotStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of new tokens over their slots, in the form transformers calls attention functions.

    Args:
        query: ``[1, heads, T, channels]``; key and value alike, with key/value heads.
        sliding_window: a token sees itself and at most ``sliding_window - 1`` tokens before it.
        softcap, s_aux: Gemma 2's bound of the scores; the sinks of gpt-oss, one score for each head.

    Returns:
        ``[1, T, heads, channels]`` and None (no attention weights).
    """
    if slot_step is None or position_bias is not None or not getattr(module, "is_causal", True):
        raise ValueError("attention over slots is causal, without a bias, and needs its step")
    step, layer = slot_step, int(module.layer_idx)  # type: ignore[arg-type]
    if torch.is_autocast_enabled(query.device.type):  # else products cast all keys again for every token
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    keys, values = step.cache.store(layer, step.places, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _Attend(scale, softcap, s_aux, query.device.type == "cpu")
    if not step.chunks and step.gather is None:
        return _decode(attend, step, query[0].transpose(0, 1), keys, values, sliding_window)[None], None
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    if step.gather is not None and step.scatter is not None:
        newest = query[0].transpose(0, 1).index_select(0, step.gather)
        decoded = _decode(attend, step, newest, keys, values, sliding_window)
        output.index_copy_(0, step.scatter[0], decoded.index_select(0, step.scatter[1]))
    for chunk in step.chunks:
        end = chunk.begin + chunk.stop - chunk.start
        first = max(0, chunk.begin - sliding_window + 1) if sliding_window else 0
        part = slice(chunk.slot, chunk.slot + 1), slice(None), slice(first, end)
        output[chunk.start : chunk.stop] = attend.chunk(
            query[:, :, chunk.start : chunk.stop],
            keys[part],
            values[part],
            step.chunk_mask(chunk, first, sliding_window),
        )[0].transpose(0, 1)
    return output[None], None


def _decode(
    attend: _Attend, step: SlotStep, query: Tensor, keys: Tensor, values: Tensor, window: int | None
) -> Tensor:
    """One token ``[B, heads, channels]`` for each of the first B slots over what the slot holds; same shape."""
    width, outliers = step.shares()
    output = query.new_empty(*query.shape[:2], values.shape[-1])
    if width:
        mask = step.decode_mask(width, window, query.dtype)
        part = slice(0, step.num_slots), slice(None), slice(0, width)
        output = attend.newest(query, keys[part], values[part], mask)
    for slot in outliers:
        end = int(step.lengths[slot])
        part = slice(slot, slot + 1), slice(None), slice(max(0, end - window) if window else 0, end)
        output[slot : slot + 1] = attend.newest(query[slot : slot + 1], keys[part], values[part], None)
    return output


@dataclass(frozen=True)
class _Attend:
    """The scores' scale and what else changes them."""

    scale: float
    softcap: float | None
    sinks: Tensor | None
    on_cpu: bool

    def newest(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens ``[B, heads, channels]`` over ``[B, kv heads, width, channels]``: ``[B, heads, channels]``.

        The heads that share keys become rows of one product. On CPU plain products take 0.6 of the time of torch's
        fused kernel, which is made for long queries.
        """
        rows, heads, channels = query.shape
        grouped = query.reshape(rows, keys.shape[1], -1, channels)
        if not self.on_cpu and self.softcap is None and self.sinks is None:
            output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=self.scale)
            return output.reshape(rows, heads, -1)
        sinks = None if self.sinks is None else self.sinks.view(keys.shape[1], -1, 1)
        return self._products(grouped, keys, values, mask, sinks).reshape(rows, heads, -1)

    def chunk(self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
        """``[1, heads, c, channels]`` over ``[1, kv heads, k, channels]``; ``seen`` None: causal."""
        times = query.shape[1] // keys.shape[1]
        plain = self.softcap is None and self.sinks is None
        if times > 1 and not (plain and self.on_cpu):
            keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
        if plain:
            return F.scaled_dot_product_attention(
                query,
                keys,
                values,
                attn_mask=seen,
                is_causal=seen is None,
                scale=self.scale,
                enable_gqa=times > 1 and self.on_cpu,
            )
        size = query.shape[2]
        if seen is None:
            seen = torch.ones(size, size, dtype=torch.bool, device=query.device).tril_()
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
        sinks = None if self.sinks is None else self.sinks.view(-1, 1, 1)
        return self._products(query, keys, values, mask, sinks)

    def _products(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        scores = torch.matmul(query * self.scale, keys.transpose(2, 3))
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap).mul_(self.softcap)
        if mask is not None:
            scores += mask
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
        weights = scores.float().softmax(-1).to(values.dtype)
        return torch.matmul(weights if sinks is None else weights[..., :-1], values)
