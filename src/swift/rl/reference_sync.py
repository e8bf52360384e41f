"""A reference that follows the policy now and then (TR-DPO, arXiv 2404.09656): ``ref = (1 - a) ref + a policy``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swift.models.sharded import local
from swift.train.weights import Collect

__all__ = ["ReferenceSync"]

FILE = "reference.safetensors"


class ReferenceSync:
    """Moves the copies of the trained weights that the reference consists of.

    Args:
        parameters: those in training, by name.
        weights: the copies, changed in place.
        every: updates between two moves.
        share: of the policy in each move.
        collect: makes shards whole, see `swift.parallel.engine.Engine.collect`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        weights: dict[str, Tensor],
        *,
        every: int,
        share: float,
        collect: Collect,
    ) -> None:
        self.parameters, self.weights, self.every, self.share = parameters, weights, every, share
        self.collect = collect

    @torch.no_grad()
    def before_update(self, updates: int) -> None:
        """To be called before each update, with the number of those that have been made."""
        if updates and updates % self.every == 0:
            for name, weight in self.weights.items():
                policy = local(self.parameters[name].detach())
                local(weight).lerp_(policy.to(weight.dtype), self.share)

    def save(self, folder: Path | None) -> None:
        """All ranks call this; those that do not write, with None."""
        found = {name: weight.contiguous() for name, weight in self.collect(self.weights)}
        if folder is not None:
            save_file(found, folder / FILE)

    def load(self, folder: Path) -> None:
        from swift.parallel.states import shared

        found = load_file(folder / FILE)
        for name, weight in self.weights.items():
            weight.copy_(shared(found[name], weight))
