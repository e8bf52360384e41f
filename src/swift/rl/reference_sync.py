"""A reference that follows the policy now and then (TR-DPO, arXiv 2404.09656): ``ref = (1 - a) ref + a policy``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["ReferenceSync"]

FILE = "reference.safetensors"


class ReferenceSync:
    """Moves the copies of the trained weights that the reference consists of.

    Args:
        parameters: those in training, by name.
        weights: the copies, changed in place.
        every: updates between two moves.
        share: of the policy in each move.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], weights: dict[str, Tensor], *, every: int, share: float
    ) -> None:
        self.parameters, self.weights, self.every, self.share = parameters, weights, every, share

    @torch.no_grad()
    def before_update(self, updates: int) -> None:
        """To be called before each update, with the number of those that have been made."""
        if updates and updates % self.every == 0:
            for name, weight in self.weights.items():
                weight.lerp_(self.parameters[name].detach().to(weight.dtype), self.share)

    def save(self, folder: Path) -> None:
        save_file({name: weight.contiguous() for name, weight in self.weights.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        found = load_file(folder / FILE)
        for name, weight in self.weights.items():
            weight.copy_(found[name])
