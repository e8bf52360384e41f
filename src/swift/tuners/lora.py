"""LoRA (arXiv 2106.09685): K >= 1 low-rank adapters on one frozen linear layer.

``y = x W^T + b + scaling * (dropout(x) A^T) B^T`` with ``A [rank, in]`` and ``B [out, rank]`` (PEFT's
shapes).

One ``AdapterSwitch`` is shared by all layers of a model and says which adapter acts: one for all rows
(``active``), none at all (``active = None``: the base model, exactly), or one for each group of batch rows
(``rows``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from swift.models.quantised import is_quantised_linear, linear_sizes

__all__ = ["AdapterSpec", "AdapterSwitch", "LoraLinear", "is_linear", "lora_layers"]


@dataclass(frozen=True)
class AdapterSpec:
    """How one adapter is built on one layer.

    Attributes:
        rank: width of the bottleneck.
        alpha: scale numerator; the update is scaled by ``alpha / rank``, or ``alpha / sqrt(rank)`` with
            rsLoRA (arXiv 2312.03732).
        dropout: probability with which an input element of the adapter is dropped in training.
        use_rslora: rank-stabilised scaling.
        init: start of A, ``default`` (Kaiming-uniform with a = sqrt(5), as PEFT), ``gaussian`` (std 1 / rank),
            or a start that `swift.tuners.starts` computes later.
        keeps_start: A and B do not start at a zero update (PiSSA, OLoRA, LoRA-GA). What they start from is kept
            and subtracted, where the papers subtract it from the weight: the model starts unchanged all the same,
            and the weight stays what it is, for other adapters, for a quantised base, and for merging.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    init: str = "default"
    keeps_start: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class AdapterSwitch:
    """Which adapter acts, shared by all layers of one model.

    Attributes:
        active: the adapter of every row, or None for the base model.
        rows: ``(adapter or None, number of rows)`` for consecutive groups of rows; wins over ``active``. Rows are
            those of a batch, or the tokens of a single row.
    """

    def __init__(self, active: str | None = None) -> None:
        self.active = active
        self.rows: tuple[tuple[str | None, int], ...] | None = None
        self._groups: dict[int, tuple[tuple[str | None, int], ...]] = {}

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


@dataclass(frozen=True)
class _Part:
    """``size`` consecutive tokens and their adapter: A ``[rank, in]`` and B ``[out, rank]``, or the base alone."""

    size: int
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 0.0
    dropout: float = 0.0


def _add_parts(y: Tensor, x: Tensor, parts: Sequence[_Part]) -> list[tuple[Tensor, Tensor | None]]:
    """Add every adapter's update of its tokens to ``y [tokens, out]``, in place; what a backward pass needs.

    For each adapter that is the ``[rank, tokens]`` projection, and with dropout what decided about each element.
    The projections are kept as ``[rank, tokens]`` because CPU matrix products are up to four times faster in that
    layout; they are added into the wide tensor in place, so no second ``[tokens, out]`` exists.
    """
    saved: list[tuple[Tensor, Tensor | None]] = []
    start = 0
    for part in parts:
        stop = start + part.size
        if part.a is not None and part.b is not None:
            whole = len(parts) == 1
            rows, out = (x, y) if whole else (x[start:stop], y[start:stop])
            noise = _draw_dropout(rows, part.dropout) if part.dropout > 0 else None
            kept = rows if noise is None else rows * _keep_mask(noise, part.dropout, x.dtype)
            hidden = torch.mm(part.a.to(x.dtype), kept.t())
            out.addmm_(hidden.t(), part.b.to(x.dtype).t(), alpha=part.scaling * _keep_scale(part.dropout))
            saved.append((hidden, noise))
        start = stop
    return saved


Plan = tuple[tuple[int, float, float], ...]
"""Size, scaling and dropout of consecutive groups of tokens."""


def _save(
    ctx: Any, x: Tensor, weight: Tensor | None, plan: Plan, tensors: Sequence[Tensor | None], saved: Any
) -> None:
    flat = [tensor for pair in saved for tensor in pair]
    ctx.save_for_backward(x, weight, *tensors, *flat)
    ctx.plan = plan


def _parts_of(plan: Plan, tensors: Sequence[Tensor | None]) -> list[_Part]:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [_Part(size, a, b, *rest) for (size, *rest), (a, b) in zip(plan, pairs, strict=True)]


def _backward(
    ctx: Any, grad_y: Tensor, first: int, grad_x: Tensor | None, x: Tensor, rest: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of A and B of each part (inputs from number ``first``); adds those of x to ``grad_x``, in place.

    ``rest``: what `_save` stored behind input and weight.
    """
    tensors, saved = rest[: 2 * len(ctx.plan)], iter(rest[2 * len(ctx.plan) :])
    grads: list[Tensor | None] = []
    start = 0
    for number, part in enumerate(_parts_of(ctx.plan, tensors)):
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


class _LoraFunction(torch.autograd.Function):
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


class _AdapterFunction(torch.autograd.Function):
    """The adapters' part alone, added in place to what any frozen layer (a quantised one) computed.

    Saves what ``_LoraFunction`` saves but the weight: the layer keeps that itself, in its few bits.
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


def _draw_dropout(x: Tensor, dropout: float) -> Tensor:
    """Random numbers that decide which elements of ``x`` are kept.

    On CPU four 16-bit numbers are cut from each 64-bit draw: drawing one per element, as torch's dropout
    does, costs a tenth of the whole layer. Elsewhere it is the mask itself, 0 or 1.
    """
    if x.device.type == "cpu":
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        return draws.view(torch.int16)[: x.numel()].view(x.shape)
    probability = 1 - _dropped_steps(dropout) / _DROPOUT_STEPS
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(probability)


def _keep_mask(noise: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """1 where an element is kept and 0 elsewhere, in ``dtype``."""
    if noise.dtype == torch.bool:
        return noise.to(dtype)
    mask = torch.empty(noise.shape, dtype=dtype)
    return torch.ge(noise, _dropped_steps(dropout) - _DROPOUT_STEPS // 2, out=mask)


def is_linear(module: nn.Module) -> bool:
    """True where an adapter fits: linear layers, quantised ones too, and GPT-2's ``Conv1D`` (``[in, out]``)."""
    if isinstance(module, nn.Linear):
        # Some inherit from it and compute something else: routers that give scores and indices (Phi-MoE, Llama 4),
        # products group by group (DeepSeek-V4).
        return not any(word in type(module).__name__ for word in ("Router", "Grouped"))
    return _is_conv1d(module) or is_quantised_linear(module)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


class LoraLinear(nn.Module):
    """A frozen linear layer with named adapters.

    Args:
        base: ``nn.Linear`` or transformers' ``Conv1D``; its parameters are frozen here.
        switch: the model's shared switch.
    """

    def __init__(self, base: nn.Module, switch: AdapterSwitch) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.is_quantised = is_quantised_linear(base)
        self.is_transposed = not isinstance(base, nn.Linear) and not self.is_quantised
        self.switch = switch
        self.specs: dict[str, AdapterSpec] = {}
        self.starts: dict[str, tuple[Tensor, Tensor]] = {}
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.training = base.training

    @property
    def weight(self) -> Tensor:
        """The frozen weight, as the base layer stores it."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def in_features(self) -> int:
        if self.is_quantised:
            return linear_sizes(self.base)[1]
        return self.weight.shape[0 if self.is_transposed else 1]

    @property
    def out_features(self) -> int:
        if self.is_quantised:
            return linear_sizes(self.base)[0]
        return self.weight.shape[1 if self.is_transposed else 0]

    def add_adapter(
        self, name: str, spec: AdapterSpec, *, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        """Add an adapter whose update is zero (B = 0). A is a function of ``seed`` and the shape alone.

        Raises:
            ValueError: the name is taken, or holds a dot.
        """
        if name in self.specs or "." in name:
            raise ValueError(f"adapter name {name!r} is taken or holds a dot")
        generator = torch.Generator().manual_seed(seed)
        a = torch.empty(spec.rank, self.in_features)
        if spec.init == "gaussian":
            a.normal_(0, 1 / spec.rank, generator=generator)
        else:  # kaiming_uniform_(a=sqrt(5)) is uniform within 1 / sqrt(in)
            bound = 1 / math.sqrt(self.in_features)
            a.uniform_(-bound, bound, generator=generator)
        device = next(tensor.device for tensor in (*self.base.parameters(), *self.base.buffers()))
        self.lora_A[name] = nn.Parameter(a.to(device=device, dtype=dtype))
        self.lora_B[name] = nn.Parameter(
            torch.zeros(self.out_features, spec.rank, device=device, dtype=dtype)
        )
        self.specs[name] = spec
        if spec.keeps_start:
            self.set_start(name, torch.zeros_like(self.lora_A[name]), torch.zeros_like(self.lora_B[name]))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; nothing happens where the layer does not have it."""
        if self.specs.pop(name, None) is not None:
            del self.lora_A[name], self.lora_B[name]
            self.starts.pop(name, None)

    @torch.no_grad()
    def set_start(self, name: str, a: Tensor, b: Tensor) -> None:
        """Let A and B start at ``a [rank, in]`` and ``b [out, rank]``, which are kept and subtracted."""
        self.lora_A[name].copy_(a)
        self.lora_B[name].copy_(b)
        self.starts[name] = (self.lora_A[name].detach().clone(), self.lora_B[name].detach().clone())

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of the whole update; where a start is kept, it is in the second half, of opposite sign."""
        a, b = self.lora_A[name], self.lora_B[name]
        if name not in self.starts:
            return a, b
        start_a, start_b = self.starts[name]
        return torch.cat([a, start_a]), torch.cat([b, -start_b], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``; with ``switch.rows`` the tokens of consecutive groups of rows."""
        switch = self.switch
        if switch.rows is None:
            name = switch.active
            if name is None or name not in self.specs:  # layers that the adapter leaves out act as the base
                output = self.base(x)
                assert isinstance(output, Tensor)
                return output
            groups: tuple[tuple[str | None, int], ...] = ((name, x.numel() // x.shape[-1]),)
        else:
            groups = switch.groups(x.numel() // x.shape[-1])
        if torch.compiler.is_compiling():
            return self._compose(x, groups)
        device_type = x.device.type
        autocast = torch.is_autocast_enabled(device_type)
        if autocast:
            x = x.to(torch.get_autocast_dtype(device_type))
        flat = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():
            y = self._trained(flat, groups)
        else:
            y = self.base(flat)
            _add_parts(y, flat.to(y.dtype), self._parts(groups))
        return y.view(*x.shape[:-1], y.shape[-1])

    def _parts(self, groups: Sequence[tuple[str | None, int]]) -> list[_Part]:
        return [self._part(name, size) for name, size in groups]

    def _part(self, name: str | None, size: int) -> _Part:
        spec = self.specs.get(name) if name is not None else None
        if spec is None or name is None:
            return _Part(size)
        return _Part(size, *self.pair(name), spec.scaling, spec.dropout if self.training else 0.0)

    def _trained(self, x: Tensor, groups: Sequence[tuple[str | None, int]]) -> Tensor:
        """``[tokens, in]`` to ``[tokens, out]``, for autograd."""
        parts = self._parts(groups)
        plan = tuple((part.size, part.scaling, part.dropout) for part in parts)
        tensors = [tensor for part in parts for tensor in (part.a, part.b)]
        y: Tensor
        if self.is_quantised:
            y = self.base(x)
            y = _AdapterFunction.apply(y, x.to(y.dtype), plan, *tensors)
            return y
        weight, bias = self.weight, self.bias
        if weight.dtype != x.dtype and torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
        y = _LoraFunction.apply(x, weight if self.is_transposed else weight.t(), bias, plan, *tensors)
        return y

    def _compose(self, x: Tensor, groups: Sequence[tuple[str | None, int]]) -> Tensor:
        """The same from plain operations, which torch.compile fuses itself."""
        y = self.base(x)
        updates, flat = [], x.reshape(-1, x.shape[-1])
        for (_, size), part, rows in zip(
            groups, self._parts(groups), flat.split([size for _, size in groups]), strict=True
        ):
            if part.a is None or part.b is None:
                updates.append(rows.new_zeros(size, y.shape[-1]))
                continue
            kept = F.dropout(rows, part.dropout) if part.dropout > 0 else rows
            hidden = F.linear(kept, part.a.to(x.dtype)) * part.scaling
            updates.append(F.linear(hidden, part.b.to(hidden.dtype)))
        update = updates[0] if len(updates) == 1 else torch.cat(updates)
        return y + update.view(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def delta(self, name: str) -> Tensor:
        """The update of the weight in fp32 (fp64 when the weight is), in the base layer's own layout."""
        dtype = torch.float32 if self.is_quantised else torch.promote_types(self.weight.dtype, torch.float32)
        lora_a, lora_b = self.pair(name)
        update = lora_b.to(dtype) @ lora_a.to(dtype) * self.specs[name].scaling
        return update.t() if self.is_transposed else update

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank={spec.rank}" for name, spec in self.specs.items())


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Module name -> LoRA layer, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
