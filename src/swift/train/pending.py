"""Results of steps that nobody has looked at yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swift.parallel.world import World

__all__ = ["PendingStep", "over_all"]


@dataclass
class PendingStep:
    """Results of a step that still lie on the device, so that the loop need not wait for it."""

    step: int
    loss_sum: Tensor
    num_correct: Tensor
    grad_norm: Tensor
    target_weight: float
    num_targets: int
    groups: Tensor | None = None


def over_all(world: World, pending: Sequence[PendingStep], values: list[list[float]]) -> list[list[float]]:
    """(loss sum, right answers, norm) of each pending step, and its groups, summed over all processes.

    Norms are the same on all.
    """
    if world.size == 1:
        return values
    flat = [value for loss_sum, num_correct, _ in values for value in (loss_sum, num_correct)]
    groups = [step.groups.double().cpu() for step in pending if step.groups is not None]
    sums = world.sums([*flat, *(value for group in groups for value in group.flatten().tolist())])
    place = len(flat)
    for step in pending:
        if step.groups is not None:
            size = step.groups.numel()
            found = torch.tensor(sums[place : place + size], dtype=torch.float64)
            step.groups, place = found.view(step.groups.shape), place + size
    return [[sums[2 * at], sums[2 * at + 1], row[2]] for at, row in enumerate(values)]
