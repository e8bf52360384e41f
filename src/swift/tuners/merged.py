"""LoRA put into the frozen weights for a while: what only reads the model then pays nothing for the adapter.

The sums go into buffers of their own, and the layers look at these within the block: the base stays what it is to the
last bit. Only in float32, where the rounding of a sum is as small as that of the products it replaces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from swift.tuners.apply import TunedModel
from swift.tuners.lora import LoraLinear, lora_layers
from swift.tuners.lora_parameters import lora_parameters
from swift.tuners.registry import MOST_MERGED_BYTES
from swift.tuners.saved_module import saved_modules

__all__ = ["MergedWeights"]


class MergedWeights:
    """The buffers of one adapter.

    Args:
        tuned: a model with our LoRA.
        name: the adapter.
    """

    def __init__(self, tuned: TunedModel, name: str) -> None:
        assert tuned.switch is not None
        self.switch, self.name = tuned.switch, name
        self._layers = [layer for layer in lora_layers(tuned.model).values() if name in layer.specs]
        self._buffers: list[Tensor] = []

    @classmethod
    def of(cls, tuned: TunedModel) -> MergedWeights | None:
        """None where it cannot be done (no LoRA of ours, quantised or half precision, adapters of other weights),
        or would take too much memory."""
        if tuned.switch is None or tuned.switch.active is None or saved_modules(tuned.model):
            return None
        if lora_parameters(tuned.model):
            return None
        made = cls(tuned, tuned.switch.active)
        weights = [None if layer.is_quantised else layer.weight for layer in made._layers]
        kept = [weight for weight in weights if weight is not None and weight.dtype == torch.float32]
        small = sum(weight.numel() * weight.element_size() for weight in kept) <= MOST_MERGED_BYTES
        return made if kept and len(kept) == len(weights) and small else None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The adapter as it is now acts through the weights; the adapter itself is switched off."""
        if not self._buffers:
            self._buffers = [torch.empty_like(layer.weight) for layer in self._layers]
        originals = [layer.weight.data for layer in self._layers]
        try:
            with torch.no_grad():
                for layer, original, buffer in zip(self._layers, originals, self._buffers, strict=True):
                    _add(layer, self.name, original, buffer)
                    layer.weight.data = buffer
            with self.switch.use(None):
                yield
        finally:
            for layer, original in zip(self._layers, originals, strict=True):
                layer.weight.data = original


def _add(layer: LoraLinear, name: str, weight: Tensor, out: Tensor) -> None:
    a, b = (one.to(weight.dtype) for one in layer.pair(name))
    first, second = (a.t(), b.t()) if layer.is_transposed else (b, a)
    torch.addmm(weight, first, second, alpha=layer.specs[name].scaling, out=out)
