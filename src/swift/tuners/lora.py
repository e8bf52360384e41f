"""LoRA (arXiv 2106.09685): K >= 1 low-rank adapters on one frozen linear layer.

``y = x W^T + b + scaling * (dropout(x) A^T) B^T`` with ``A [rank, in]`` and ``B [out, rank]`` (PEFT's
shapes).

One ``AdapterSwitch`` is shared by all layers of a model and says which adapter acts: one for all rows
(``active``), none at all (``active = None``: the base model, exactly), or one for each group of batch rows
(``rows``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swift.models.quantised import is_quantised_linear, linear_sizes
from swift.models.sharded import ShardedLinear, local
from swift.tuners.lora_function import AdapterFunction, LoraFunction, Part, mixed_seed
from swift.tuners.switch import AdapterSwitch

__all__ = ["AdapterSpec", "LoraLinear", "is_linear", "lora_layers"]


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
        key: tells the noise of this layer from that of others.
    """

    def __init__(self, base: nn.Module, switch: AdapterSwitch, key: int = 0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.key = key
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
        if device.type == "meta":  # the frozen weights come later, or never (traces)
            device = a.device
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

    def local_pair(self, name: str) -> tuple[Tensor, Tensor]:
        """`pair` as this rank computes with it, where the layer is shared by several."""
        if name in self.starts:
            start_a, start_b = self.starts[name]
            a = torch.cat([local(self.lora_A[name]), start_a])
            b = torch.cat([local(self.lora_B[name]), -start_b], dim=1)
        else:  # without ParameterDict's own access, which costs as much as the product
            a, b = (local(pairs._parameters[name]) for pairs in (self.lora_A, self.lora_B))  # type: ignore[arg-type]
        return (a, self.base.share.of_outputs(b)) if isinstance(self.base, ShardedLinear) else (a, b)

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
        if torch.is_grad_enabled() or self.training:
            y = self._trained(flat, groups)
        else:
            y = self.base(flat)
            self._add_updates(y, flat if flat.dtype == y.dtype else flat.to(y.dtype), groups)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _add_updates(self, y: Tensor, x: Tensor, groups: Sequence[tuple[str | None, int]]) -> None:
        """`_add_parts` for evaluation, where with small models every call of Python counts: in place, no dropout."""
        if len(groups) == 1:
            pieces: Any = ((groups[0], x, y),)
        else:
            sizes = [size for _, size in groups]
            pieces = zip(groups, x.split(sizes), y.split(sizes), strict=True)
        for (name, _), rows, out in pieces:
            spec = self.specs.get(name)
            if spec is None:
                continue
            a, b = self.local_pair(name)
            if a.dtype != x.dtype:
                a, b = a.to(x.dtype), b.to(x.dtype)
            out.addmm_(torch.mm(a, rows.t()).t(), b.t(), alpha=spec.scaling)

    def _parts(self, groups: Sequence[tuple[str | None, int]]) -> list[Part]:
        return [self._part(name, size) for name, size in groups]

    def _part(self, name: str | None, size: int) -> Part:
        spec = self.specs.get(name) if name is not None else None
        if spec is None or name is None:
            return Part(size)
        a, b = self.local_pair(name)
        dropout = spec.dropout if self.training else 0.0
        draw = self.switch.draws.get(name) if dropout else None
        if draw is None:
            return Part(size, a, b, spec.scaling, dropout)
        seed = mixed_seed(draw.seed, draw.micro_batch, self.key)
        # A head that computes some tokens only is run for one adapter at a time: there is no padding.
        padding = draw.padding if self.switch.rows is not None else None
        return Part(size, a, b, spec.scaling, dropout, seed, padding)

    def _trained(self, x: Tensor, groups: Sequence[tuple[str | None, int]]) -> Tensor:
        """``[tokens, in]`` to ``[tokens, out]``, for autograd."""
        parts = self._parts(groups)
        plan = tuple((part.size, part.scaling, part.dropout, part.seed, part.padding) for part in parts)
        tensors = [tensor for part in parts for tensor in (part.a, part.b)]
        y: Tensor
        if self.is_quantised:
            y = self.base(x)
            y = AdapterFunction.apply(y, x.to(y.dtype), plan, *tensors)
            return y
        weight, bias = self.base.parts() if isinstance(self.base, ShardedLinear) else (self.weight, self.bias)
        if weight.dtype != x.dtype and torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
        y = LoraFunction.apply(x, weight if self.is_transposed else weight.t(), bias, plan, *tensors)
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
