"""The engine protocol: whoever owns devices, weights and optimizers.

Optimizer, schedule and clipping belong to a *named parameter set*: one for a solo run, K for a fused group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from swift.objectives.base import Denominators, Objective

__all__ = ["RANKS_FOLDER", "Engine", "ParameterSet", "StepCounts", "StepOutput", "add_sums", "count_step"]

RANKS_FOLDER = "ranks"
"""In a checkpoint, what several ranks have saved together."""


@dataclass
class ParameterSet:
    """Parameters that are optimized together.

    Attributes:
        name: "default" for a solo run, else the name of the experiment.
        parameters: full parameter name -> parameter.
        optimizer: over these parameters.
        learning_rate: learning rate of the update that follows ``step`` completed updates.
        max_grad_norm: clip to this norm; 0 never clips.
    """

    name: str
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    max_grad_norm: float


@dataclass(frozen=True)
class StepCounts:
    """What one optimizer step holds, over all ranks.

    Attributes:
        denominators: by which the objective divides.
        num_tokens: tokens that are not padding.
        num_targets: targets that are learned.
    """

    denominators: Denominators
    num_tokens: int
    num_targets: int


def count_step(objective: Objective, batches: Sequence[Any]) -> StepCounts:
    """The counts of these micro-batches."""
    return StepCounts(
        objective.denominators(batches),
        sum(batch.num_tokens for batch in batches),
        sum(batch.num_targets for batch in batches),
    )


@dataclass
class StepOutput:
    """Sums over the micro-batches of one optimizer step, still on the device.

    Attributes:
        loss: the step's loss (already divided by its denominators); with several ranks, this rank's share of it.
        metrics: name -> sum, as the objective returned them, over this rank's micro-batches.
        counts: over all ranks; None for an evaluation.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    counts: StepCounts | None = None


def add_sums(total: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add sums to those of other micro-batches."""
    for name, value in sums.items():
        total[name] = total[name] + value if name in total else value


class Engine(Protocol):
    """One optimizer step is ``forward_backward``, ``clip``, ``step``."""

    parameter_sets: dict[str, ParameterSet]

    def forward_backward(
        self, batches: Sequence[Any], objective: Objective, seed: int | None = None
    ) -> StepOutput:
        """Gradients of the whole step: a list, because pipeline schedules consume lists.

        ``seed``: of the adapters' dropout in this step; None: torch's own generator decides.
        """

    def evaluate(self, batch: Any, objective: Objective) -> StepOutput:
        """Loss and metrics of one batch without gradients, in evaluation mode."""

    def evaluating(self) -> AbstractContextManager[torch.nn.Module]:
        """The model itself, for others to use meanwhile: as it would be saved, in evaluation mode and precision."""

    def clip(self) -> dict[str, Tensor]:
        """Clip every parameter set to its norm; returns the norms before clipping."""

    def step(self, step: int) -> dict[str, float]:
        """Update with the learning rates of ``step`` (0 for the first update) and clear the gradients.

        Returns the learning rate of each parameter set.
        """

    def settle(self) -> None:
        """Put the weights in place that are to be kept; before they are read from outside."""

    def save(self, folder: Path) -> None:
        """Optimizer state (and what else only the engine knows) into a checkpoint folder."""

    def begin_saving(self, folder: Path) -> Any:
        """`save` of several ranks together: starts it, and returns a future."""

    def load(self, folder: Path) -> None:
        """The reverse of `save`; raises SwiftError when the folder does not fit."""

    def collect(self, tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        """Names and tensors with the parts of all ranks, which all must call this; rank 0 gets every stage's."""

    def gather(self) -> dict[str, Tensor]:
        """All trainable parameters, whole, by full name (sharded engines collect them)."""
