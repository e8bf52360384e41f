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
        rows: ``(adapter or None, number of batch rows)`` for consecutive groups of rows; wins over
            ``active``.
    """

    def __init__(self, active: str | None = None) -> None:
        self.active = active
        self.rows: tuple[tuple[str | None, int], ...] | None = None

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
    def mixed(self, rows: Sequence[tuple[str | None, int]]) -> Iterator[None]:
        """Batches of several adapters within the block: consecutive ``(adapter, number of rows)``."""
        before = self.rows
        self.rows = tuple(rows)
        try:
            yield
        finally:
            self.rows = before


class _LoraFunction(torch.autograd.Function):
    """The layer with a frozen weight, for one adapter; every tensor in one dtype but A and B.

    Saves the input (which layers with the same input share), the ``[rank, tokens]`` projection and, with
    dropout, what decided about each element. The low-rank products are added into the wide ones in place, so
    no second ``[tokens, out]`` or ``[tokens, in]`` tensor exists. The projections are kept as ``[rank,
    tokens]`` because CPU matrix products are up to four times faster in that layout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [tokens, in]
        weight: Tensor,  # [in, out], a view
        bias: Tensor | None,
        lora_a: Tensor,  # [rank, in]
        lora_b: Tensor,  # [out, rank]
        scaling: float,
        dropout: float,
    ) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        y = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
        noise = _draw_dropout(x, dropout) if dropout > 0 else None
        kept = x if noise is None else x * _keep_mask(noise, dropout, x.dtype)
        hidden = torch.mm(a, kept.t())  # [rank, tokens]
        factor = scaling * _keep_scale(dropout)
        y.addmm_(hidden.t(), b.t(), alpha=factor)
        ctx.save_for_backward(x, hidden, noise, weight, lora_a, lora_b)
        ctx.factor, ctx.dropout = factor, dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, hidden, noise, weight, lora_a, lora_b = ctx.saved_tensors
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        mask = None if noise is None else _keep_mask(noise, ctx.dropout, x.dtype)
        grad_a = grad_b = grad_x = None
        grad_hidden = torch.mm(b.t(), grad_y.t())  # [rank, tokens], not yet scaled
        if ctx.needs_input_grad[3]:
            kept = x if mask is None else x * mask
            grad_a = torch.mm(grad_hidden, kept).to(lora_a.dtype).mul_(ctx.factor)
        if ctx.needs_input_grad[4]:
            grad_b = torch.mm(hidden, grad_y).t().to(lora_b.dtype).contiguous().mul_(ctx.factor)
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_y, weight.t())
            if mask is None:
                grad_x.addmm_(grad_hidden.t(), a, alpha=ctx.factor)
            else:
                grad_x.addcmul_(torch.mm(grad_hidden.t(), a), mask, value=ctx.factor)
        return grad_x, None, None, grad_a, grad_b, None, None


class _AdapterFunction(torch.autograd.Function):
    """The adapter's part alone, added in place to what any frozen layer (a quantised one) computed.

    Saves what ``_LoraFunction`` saves but the weight: the layer keeps that itself, in its few bits.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        noise = _draw_dropout(x, dropout) if dropout > 0 else None
        kept = x if noise is None else x * _keep_mask(noise, dropout, x.dtype)
        hidden = torch.mm(a, kept.t())  # [rank, tokens]
        factor = scaling * _keep_scale(dropout)
        ctx.save_for_backward(x, hidden, noise, lora_a, lora_b)
        ctx.factor, ctx.dropout = factor, dropout
        ctx.mark_dirty(y)
        return y.addmm_(hidden.t(), b.t(), alpha=factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, hidden, noise, lora_a, lora_b = ctx.saved_tensors
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        mask = None if noise is None else _keep_mask(noise, ctx.dropout, x.dtype)
        grad_a = grad_b = grad_x = None
        grad_hidden = torch.mm(b.t(), grad_y.t())
        if ctx.needs_input_grad[2]:
            kept = x if mask is None else x * mask
            grad_a = torch.mm(grad_hidden, kept).to(lora_a.dtype).mul_(ctx.factor)
        if ctx.needs_input_grad[3]:
            grad_b = torch.mm(hidden, grad_y).t().to(lora_b.dtype).contiguous().mul_(ctx.factor)
        if ctx.needs_input_grad[1]:
            grad_x = torch.mm(grad_hidden.t(), a).mul_(ctx.factor)
            if mask is not None:
                grad_x.mul_(mask)
        return grad_y, grad_x, grad_a, grad_b, None, None


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
        """``[..., in]`` to ``[..., out]``; with ``switch.rows`` the first dimension holds the batch rows."""
        rows = self.switch.rows
        if rows is None:
            return self._forward_one(x, self.switch.active)
        sizes = [size for _, size in rows]
        if sum(sizes) != x.shape[0]:
            raise ValueError(f"adapter rows {rows} do not add up to the {x.shape[0]} rows of the batch")
        parts = zip(rows, x.split(sizes), strict=True)
        return torch.cat([self._forward_one(part, name) for (name, _), part in parts])

    def _forward_one(self, x: Tensor, name: str | None) -> Tensor:
        """All rows with one adapter. Layers that the adapter leaves out act as the base."""
        spec = self.specs.get(name) if name is not None else None
        if spec is None or name is None:
            output = self.base(x)
            assert isinstance(output, Tensor)
            return output
        lora_a, lora_b = self.pair(name)
        dropout = spec.dropout if self.training else 0.0
        if torch.compiler.is_compiling():
            return self._compose(x, lora_a, lora_b, spec.scaling, dropout)
        if self.is_quantised:
            return self._add_to_quantised(x, lora_a, lora_b, spec.scaling, dropout)
        weight, bias = self.weight, self.bias
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        flat = x.reshape(-1, x.shape[-1])
        wide = weight if self.is_transposed else weight.t()
        y: Tensor = _LoraFunction.apply(flat, wide, bias, lora_a, lora_b, spec.scaling, dropout)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _add_to_quantised(
        self, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat = x.reshape(-1, x.shape[-1])
        y = self.base(flat)
        result: Tensor = _AdapterFunction.apply(y, flat.to(y.dtype), lora_a, lora_b, scaling, dropout)
        return result.view(*x.shape[:-1], y.shape[-1])

    def _compose(self, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout: float) -> Tensor:
        """The same from plain operations, which torch.compile fuses itself."""
        y = self.base(x)
        kept = F.dropout(x, dropout) if dropout > 0 else x
        hidden = F.linear(kept, lora_a.to(x.dtype)) * scaling
        return y + F.linear(hidden, lora_b.to(hidden.dtype))

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
