"""AdamW whose moments live in a low-rank image of the gradient: GaLore, Q-GaLore and APOLLO.

With ``G [m, n]`` the gradient of a matrix, transposed first where ``m > n``, and ``P [r, m]``:

- GaLore (arXiv 2403.03507): ``P`` is made of the ``r`` first left singular vectors of ``G``, anew every ``gap`` steps;
  ``R = P G``; the update is ``scale * P^T Adam(R)``.
- Q-GaLore (arXiv 2407.08296): ``P`` is stored in 4 bits, and while the last five projections of a matrix resemble
  their predecessors, its gap doubles. (The paper also stores the weights in 8 bits; that is not done here.)
- APOLLO (arXiv 2412.05270): ``P`` is random, drawn anew from a seed, so it is not stored; ``Adam(R)`` only says by how
  much each channel (or the whole matrix) of ``G`` is scaled: ``scale * G * |Adam(R)| / |R|``. The update may grow by
  1 % a step at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LowRankAdamW", "pack_4bit", "unpack_4bit"]

_QUEUE = 5
_GROWTH = 1.01
_GROUP = 256


class LowRankAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; groups with ``rank > 0`` are projected.

    Args:
        params: groups of parameters; ``rank`` of a group is that of its projections, 0 for plain AdamW.
        method: ``galore`` or ``apollo``.
        gap: steps between projections.
        scale: factor on the projected update.
        quantized: Q-GaLore.
        cos_threshold: mean similarity of projections from which the gap doubles.
        per_channel: APOLLO scales each channel, else the whole matrix.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        method: str,
        gap: int,
        scale: float,
        quantized: bool = False,
        cos_threshold: float = 0.4,
        per_channel: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "rank": 0})
        self.method, self.gap, self.scale = method, gap, scale
        self.quantized, self.cos_threshold, self.per_channel = quantized, cos_threshold, per_channel

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved: torch's own loading would turn every state into the precision of its parameter."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, values in state_dict["state"].items():
            parameter = parameters[index]
            for key, value in values.items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                gradient = parameter.grad.float()
                if 0 < group["rank"] < min(gradient.shape):
                    update = self._projected(gradient, state, group, index)
                else:
                    update = _adam(gradient, state, group)
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])

    def _projected(
        self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], index: int
    ) -> Tensor:
        is_tall = gradient.shape[0] > gradient.shape[1]
        wide = gradient.t() if is_tall else gradient  # [m, n] with m <= n
        if self.method == "galore":
            matrix = self._galore_projection(wide, state, group["rank"])
            update = matrix.t() @ _adam(matrix @ wide, state, group) * self.scale
        else:
            update = self._apollo(wide, state, group, index)
        return update.t() if is_tall else update

    def _galore_projection(self, wide: Tensor, state: dict[str, Any], rank: int) -> Tensor:
        """``[rank, m]``, renewed when due."""
        if state["step"] < state.get("due", 1):
            return self._load(state, wide)
        before = self._load(state, wide) if "projection" in state else None
        # A copy: the transpose of LAPACK's columns is contiguous already, and as a view keeps all of them.
        vectors = torch.linalg.svd(wide, full_matrices=False)[0]
        matrix = vectors[:, :rank].t().clone(memory_format=torch.contiguous_format)
        gap = state.get("gap", self.gap)
        if self.quantized and before is not None:
            similarity = torch.nn.functional.cosine_similarity(before, matrix, dim=1).abs().mean().item()
            queue = [*state.get("similarities", []), similarity][-_QUEUE:]
            if len(queue) == _QUEUE and sum(queue) / _QUEUE >= self.cos_threshold:
                gap, queue = 2 * gap, []
            state["similarities"] = queue
        state["gap"], state["due"] = gap, state["step"] + gap
        if self.quantized:
            state["projection"], state["projection_scale"] = pack_4bit(matrix)
        else:
            state["projection"] = matrix
        state["rank"] = rank
        return self._load(state, wide)

    def _load(self, state: dict[str, Any], wide: Tensor) -> Tensor:
        stored: Tensor = state["projection"]
        if not self.quantized:
            return stored
        return unpack_4bit(stored, state["projection_scale"], (state["rank"], wide.shape[0]))

    def _apollo(self, wide: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> Tensor:
        rank, epoch = group["rank"], (state["step"] - 1) // self.gap
        generator = torch.Generator().manual_seed((index << 32) + epoch)
        matrix = torch.randn(rank, wide.shape[0], generator=generator).to(wide.device) / math.sqrt(rank)
        low = matrix @ wide
        adapted = _adam(low, state, group)
        if self.per_channel:
            factor = adapted.norm(dim=0) / low.norm(dim=0).clamp_min(1e-8)
        else:
            factor = adapted.norm() / low.norm().clamp_min(1e-8)
        update = wide * factor * self.scale
        norm = update.norm()
        if "norm" in state:
            limit = _GROWTH * state["norm"]
            update = update * (limit / norm.clamp_min(1e-12)).clamp(max=1.0)
            norm = torch.minimum(norm, limit)
        state["norm"] = norm
        return update


def _adam(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Adam's step direction (arXiv 1412.6980), bias-corrected."""
    if "first" not in state:
        state["first"], state["second"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    (beta1, beta2), step = group["betas"], state["step"]
    first, second = state["first"], state["second"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
    return first / (1 - beta1**step) / root


def pack_4bit(values: Tensor) -> tuple[Tensor, Tensor]:
    """(two numbers a byte, largest magnitude of each group of 256)."""
    flat = values.flatten()
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % _GROUP)).view(-1, _GROUP)
    scale = flat.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    codes = (flat / scale * 7).round_().add_(8).to(torch.uint8).flatten()
    return codes[::2] * 16 + codes[1::2], scale


def unpack_4bit(packed: Tensor, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """The reverse of `pack_4bit`, in float32."""
    codes = torch.stack([packed // 16, packed % 16], dim=1).flatten()
    values = (codes.float() - 8) / 7
    return (values.view(-1, _GROUP) * scale).flatten()[: shape[0] * shape[1]].view(shape)
