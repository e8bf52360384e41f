"""Bytes of living tensors by part and phase, counted operation by operation (on fake tensors too, which have none)."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "run_without_values"]

aten = torch.ops.aten


def run_without_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation on tensors without values; where there would have to be some, a plausible answer.

    Torch's own description of a product of groups knows bfloat16 only.
    """
    if func is aten._local_scalar_dense.default:
        if (
            args[0].dtype == torch.bool
        ):  # all finite, drawn above a threshold of 0: what training usually finds
            return True
        return 0.0 if args[0].dtype.is_floating_point else 0
    if func is not aten._grouped_mm.default:
        return func(*args, **kwargs)
    a, b, ends = (*args, None)[:3]
    groups = () if ends is None or a.ndim + b.ndim != 4 else (ends.shape[0],)
    batch = a.shape[:1] if a.ndim + b.ndim == 6 else groups
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]))


class LiveBytes(TorchDispatchMode):
    """While this mode is on, every storage that an operation makes is counted until nothing refers to it.

    What is allocated belongs to ``part``, unless its shape says more: a last dimension of ``vocab`` numbers means
    logits, and a cast of a weight is temporary. Peaks are kept apart for each ``phase``, so that the peaks of models of
    different depth can be compared phase by phase.

    A mask of the batch's shape selects ``selected`` elements, and what is repeated for each token becomes ``tokens``
    numbers: fake tensors have no values that would tell.

    Args:
        vocab: size of the vocabulary.
        selected: how many positions of a mask of the batch's shape are set.
        tokens: of the batch.
        on_device: count what is drawn for dropout as devices do, one byte an element (the CPU draws two).
    """

    def __init__(self, *, vocab: int, selected: int, tokens: int, on_device: bool) -> None:
        super().__init__()
        self.vocab, self.selected, self.tokens, self.on_device = vocab, selected, tokens, on_device
        self.part, self.phase = "weights", "build"
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._total = self._inside = 0
        self._tops: dict[str, int] = {}
        self._owners: dict[int, list[Any]] = {}  # storage -> [part, bytes]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.index.Tensor:
            args = (args[0], self._positions(args[1]), *args[2:])
        if func is aten.nonzero.default:
            count = self.selected if args[0].numel() == self.tokens else args[0].numel()
            output = args[0].new_zeros((count, args[0].ndim), dtype=torch.int64)
        elif func is aten.repeat_interleave.Tensor:
            output = args[0].new_zeros(self.tokens)
        else:
            output = run_without_values(func, args, kwargs or {})
        # Layers are recomputed in the backward pass with gradients switched on, or a function of ours runs inside one.
        recomputes = self.part == "temporary" and (self._inside > 0 or torch.is_grad_enabled())
        part = "activations" if recomputes else self.part
        if func is aten.empty_like.default and (kwargs or {}).get("device") is not None:
            part = "host"  # an offloaded activation
        if func is aten._to_copy.default and self._part_of(args[0]) in ("weights", "adapters"):
            part = "temporary"
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(tensor, part)
        if func is getattr(aten.random_, "from") and self.on_device:
            self._resize(args[0], 0.5)
        return output

    def _positions(self, indices: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Boolean indices as positions, as many as are known to be set."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
                continue
            count = self.selected if index.ndim == 2 else index.numel()
            found += [torch.zeros(count, dtype=torch.int64, device=index.device) for _ in range(index.ndim)]
        return found

    def _see(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._owners:
            return
        if tensor.ndim and tensor.shape[-1] == self.vocab and part in ("activations", "temporary"):
            part = "logits"
        self._owners[key] = [part, storage.nbytes()]
        self._add(part, storage.nbytes())
        weakref.finalize(storage, partial(self._free, key))

    def _free(self, key: int) -> None:
        part, size = self._owners.pop(key)
        self._add(part, -size)

    def _add(self, part: str, size: int) -> None:
        if part == "host":
            return
        self.live[part] += size
        self._total += size
        if self._total > self._tops.get(self.phase, -1):
            self._tops[self.phase] = self._total
            self.peaks[self.phase] = self.live.copy()

    def _part_of(self, tensor: Tensor) -> str | None:
        owner = self._owners.get(tensor.untyped_storage()._cdata)
        return owner[0] if owner else None

    def _resize(self, tensor: Tensor, factor: float) -> None:
        owner = self._owners[tensor.untyped_storage()._cdata]
        change = round(owner[1] * factor) - owner[1]
        owner[1] += change
        self._add(owner[0], change)

    def claim(self, tensors: Iterable[Tensor], part: str) -> None:
        """From now on these tensors belong to ``part``."""
        for tensor in tensors:
            self._see(tensor, part)
            owner = self._owners[tensor.untyped_storage()._cdata]
            self.live[owner[0]] -= owner[1]
            self.live[part] += owner[1]
            owner[0] = part

    def enter(self, phase: str, part: str | None = None) -> None:
        """Begin (or go on with) a phase."""
        self.phase, self.part = phase, part or self.part
        self._add(self.part, 0)

    def go_inside(self, levels: int) -> None:
        """A module of a layer begins (1) or ends (-1) to compute."""
        self._inside += levels

    def hook(self, phase: str, part: str | None = None) -> Callable[..., None]:
        """A hook that begins a phase, whatever it is called with."""

        def begin(*_: Any) -> None:
            self.enter(phase, part)

        return begin
