"""What a layer with low-rank adapters computes, forward and backward: the frozen product once for all tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["AdapterFunction", "LoraFunction", "Part", "mixed_seed"]


@dataclass(frozen=True)
class Part:
    """``size`` consecutive tokens and their adapter: A ``[rank, in]`` and B ``[out, rank]``, or the base alone."""

    size: int
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 0.0
    dropout: float = 0.0
    seed: int | None = None
    padding: tuple[int, int] | None = None


def _add_parts(y: Tensor, x: Tensor, parts: Sequence[Part]) -> list[tuple[Tensor, Tensor | None]]:
    """Add every adapter's update of its tokens to ``y [tokens, out]``, in place; what a backward pass needs.

    For each adapter that is the ``[rank, tokens]`` projection, and with dropout what decided about each element.
    The projections are kept as ``[rank, tokens]`` because CPU matrix products are up to four times faster in that
    layout; they are added into the wide tensor in place, so no second ``[tokens, out]`` exists.
    """
    if _are_even(parts):
        return [_add_even(y, x, parts)]
    saved: list[tuple[Tensor, Tensor | None]] = []
    start = 0
    for part in parts:
        stop = start + part.size
        if part.a is not None and part.b is not None:
            whole = len(parts) == 1
            rows, out = (x, y) if whole else (x[start:stop], y[start:stop])
            noise = _draw_dropout(rows, part) if part.dropout > 0 else None
            kept = rows if noise is None else rows * _keep_mask(noise, part.dropout, x.dtype)
            hidden = torch.mm(part.a.to(x.dtype), kept.t())
            out.addmm_(hidden.t(), part.b.to(x.dtype).t(), alpha=part.scaling * _keep_scale(part.dropout))
            saved.append((hidden, noise))
        start = stop
    return saved


def _are_even(parts: Sequence[Part]) -> bool:
    """Whether several adapters differ in their numbers only, so that one batched product computes all of them."""
    first = parts[0]
    return len(parts) > 1 and all(
        part.a is not None
        and part.b is not None
        and first.a is not None
        and first.b is not None
        and (part.size, part.scaling, part.dropout) == (first.size, first.scaling, first.dropout)
        and (part.a.shape, part.b.shape, part.a.dtype) == (first.a.shape, first.b.shape, first.a.dtype)
        for part in parts
    )


def _stacked(parts: Sequence[Part], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A ``[parts, rank, in]`` and B ``[parts, out, rank]``."""
    both = [torch.stack([getattr(part, name) for part in parts]).to(dtype) for name in ("a", "b")]
    return both[0], both[1]


def _add_even(y: Tensor, x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Tensor | None]:
    """`_add_parts` where `_are_even`: the projections are ``[parts, rank, tokens]``."""
    a, b = _stacked(parts, x.dtype)
    noise, dropout = None, parts[0].dropout
    kept = x
    if dropout > 0:
        size = parts[0].size
        noise = torch.cat([_draw_dropout(x[at * size :][:size], part) for at, part in enumerate(parts)])
        kept = x * _keep_mask(noise, dropout, x.dtype)
    hidden = torch.bmm(a, kept.reshape(len(parts), -1, x.shape[1]).transpose(1, 2))
    out = y.view(len(parts), -1, y.shape[1])
    out.baddbmm_(hidden.transpose(1, 2), b.transpose(1, 2), alpha=parts[0].scaling * _keep_scale(dropout))
    return hidden, noise


def _backward_even(
    parts: Sequence[Part],
    grad_y: Tensor,
    grad_x: Tensor | None,
    x: Tensor,
    hidden: Tensor,
    noise: Tensor | None,
) -> list[Tensor | None]:
    """`_backward` where `_are_even`."""
    a, b = _stacked(parts, x.dtype)
    number, dropout = len(parts), parts[0].dropout
    factor = parts[0].scaling * _keep_scale(dropout)
    mask = None if noise is None else _keep_mask(noise, dropout, x.dtype)
    grad = grad_y.reshape(number, -1, grad_y.shape[1])
    grad_hidden = torch.bmm(b.transpose(1, 2), grad.transpose(1, 2))  # [parts, rank, tokens], not yet scaled
    kept = x if mask is None else x * mask
    grad_a = torch.bmm(grad_hidden, kept.reshape(number, -1, x.shape[1])).mul_(factor)
    grad_b = torch.bmm(hidden, grad).mul_(factor).transpose(1, 2)
    if grad_x is not None and mask is None:
        grad_x.view(number, -1, x.shape[1]).baddbmm_(grad_hidden.transpose(1, 2), a, alpha=factor)
    elif grad_x is not None and mask is not None:
        grad_x.addcmul_(torch.bmm(grad_hidden.transpose(1, 2), a).view(x.shape), mask, value=factor)
    grads: list[Tensor | None] = []
    for part, one_a, one_b in zip(parts, grad_a, grad_b, strict=True):
        assert part.a is not None and part.b is not None
        grads += [one_a.to(part.a.dtype), one_b.to(part.b.dtype).contiguous()]
    return grads


Plan = tuple[tuple[Any, ...], ...]
"""The fields of each `Part` that are no tensors: a backward pass goes through the tensors alone."""


def _save(
    ctx: Any, x: Tensor, weight: Tensor | None, plan: Plan, tensors: Sequence[Tensor | None], saved: Any
) -> None:
    flat = [tensor for pair in saved for tensor in pair]
    ctx.save_for_backward(x, weight, *tensors, *flat)
    ctx.plan = plan


def _parts_of(plan: Plan, tensors: Sequence[Tensor | None]) -> list[Part]:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [Part(size, a, b, *rest) for (size, *rest), (a, b) in zip(plan, pairs, strict=True)]


def _backward(
    ctx: Any, grad_y: Tensor, first: int, grad_x: Tensor | None, x: Tensor, rest: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of A and B of each part (inputs from number ``first``); adds those of x to ``grad_x``, in place.

    ``rest``: what `_save` stored behind input and weight.
    """
    tensors, saved = rest[: 2 * len(ctx.plan)], iter(rest[2 * len(ctx.plan) :])
    parts = _parts_of(ctx.plan, tensors)
    if _are_even(parts):
        return _backward_even(parts, grad_y, grad_x, x, next(saved), next(saved))
    grads: list[Tensor | None] = []
    start = 0
    for number, part in enumerate(parts):
        stop = start + part.size
        rows = slice(start, stop)
        start = stop
        if part.a is None or part.b is None:
            grads += [None, None]
            continue
        hidden, noise = next(saved), next(saved)
        a, b, grad = part.a.to(x.dtype), part.b.to(x.dtype), grad_y[rows]
        mask = None if noise is None else _keep_mask(noise, part.dropout, x.dtype)
        factor = part.scaling * _keep_scale(part.dropout)
        grad_a = grad_b = None
        grad_hidden = torch.mm(b.t(), grad.t())  # [rank, tokens], not yet scaled
        if ctx.needs_input_grad[first + 2 * number]:
            kept = x[rows] if mask is None else x[rows] * mask
            grad_a = torch.mm(grad_hidden, kept).to(part.a.dtype).mul_(factor)
        if ctx.needs_input_grad[first + 2 * number + 1]:
            grad_b = torch.mm(hidden, grad).t().to(part.b.dtype).contiguous().mul_(factor)
        if grad_x is not None and mask is None:
            grad_x[rows].addmm_(grad_hidden.t(), a, alpha=factor)
        elif grad_x is not None:
            grad_x[rows].addcmul_(torch.mm(grad_hidden.t(), a), mask, value=factor)
        grads += [grad_a, grad_b]
    return grads


class LoraFunction(torch.autograd.Function):
    """The layer with a frozen weight, computed once for all tokens; every tensor in one dtype but A and B.

    Saves the input (which layers with the same input share) and what `_add_parts` gives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [tokens, in]
        weight: Tensor,  # [in, out], a view
        bias: Tensor | None,
        plan: Plan,
        *tensors: Tensor | None,  # A and B of each part
    ) -> Tensor:
        y = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
        _save(ctx, x, weight, plan, tensors, _add_parts(y, x, _parts_of(plan, tensors)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, weight, *rest = (
            ctx.saved_tensors
        )  # once: gradient checkpointing computes them when they are asked for
        grad_x = torch.mm(grad_y, weight.t()) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, *_backward(ctx, grad_y, 4, grad_x, x, rest)


class AdapterFunction(torch.autograd.Function):
    """The adapters' part alone, added in place to what any frozen layer (a quantised one) computed.

    Saves what ``LoraFunction`` saves but the weight: the layer keeps that itself, in its few bits.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, plan: Plan, *tensors: Tensor | None) -> Tensor:
        _save(ctx, x, None, plan, tensors, _add_parts(y, x, _parts_of(plan, tensors)))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, _, *rest = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        return grad_y, grad_x, None, *_backward(ctx, grad_y, 3, grad_x, x, rest)


_DROPOUT_STEPS = 2**16


def _dropped_steps(dropout: float) -> int:
    return min(round(dropout * _DROPOUT_STEPS), _DROPOUT_STEPS - 1)


def _keep_scale(dropout: float) -> float:
    """1 / P(kept), for the probability that is really drawn: ``dropout`` in steps of 2^-16."""
    return _DROPOUT_STEPS / (_DROPOUT_STEPS - _dropped_steps(dropout))


def _draw_dropout(x: Tensor, part: Part) -> Tensor:
    """Random numbers that decide which elements of ``x`` are kept, the same for a seed whatever else is drawn."""
    generator = None if part.seed is None else torch.Generator(x.device).manual_seed(part.seed)
    if part.padding is None:
        return _draw(x.shape, part.dropout, x.device, generator)
    own, width = part.padding
    noise = _draw((x.shape[0] // width, own, x.shape[1]), part.dropout, x.device, generator)
    return F.pad(noise, (0, 0, 0, width - own)).view(x.shape)


def _draw(
    shape: Sequence[int], dropout: float, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """On CPU four 16-bit numbers are cut from each 64-bit draw: drawing one per element, as torch's dropout
    does, costs a tenth of the whole layer. Elsewhere it is the mask itself, 0 or 1.
    """
    if device.type == "cpu":
        numel = math.prod(shape)
        draws = torch.empty((numel + 3) // 4, dtype=torch.int64)
        draws.random_(-(2**63), None, generator=generator)
        return draws.view(torch.int16)[:numel].view(shape)
    probability = 1 - _dropped_steps(dropout) / _DROPOUT_STEPS
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(probability, generator=generator)


def mixed_seed(*values: int) -> int:
    """One 63-bit seed from several whole numbers (a multiplication and a shift for each, as in SplitMix64)."""
    state = 0
    for value in values:
        state = (state ^ value) * 0x9E3779B97F4A7C15 & (2**64 - 1)
        state ^= state >> 29
    return state >> 1


def _keep_mask(noise: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """1 where an element is kept and 0 elsewhere, in ``dtype``."""
    if noise.dtype == torch.bool:
        return noise.to(dtype)
    mask = torch.empty(noise.shape, dtype=dtype)
    return torch.ge(noise, _dropped_steps(dropout) - _DROPOUT_STEPS // 2, out=mask)
