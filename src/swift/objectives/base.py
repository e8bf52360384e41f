"""What every objective is: a pure function of log-probabilities, the batch, and the step's denominators.

Denominators are counted once per optimizer step over all its micro-batches (and, later, all ranks), so the gradient
does not depend on how a step is split. Engines never know the objective; objectives never know the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Denominators", "GroupBatch", "Objective", "PooledOutputs", "TargetBatch", "TokenOutputs"]


class TargetBatch(Protocol):
    """The part of a batch that objectives read (``data/collate.py`` has the real one).

    Attributes:
        targets: ``[rows, width]`` next-token ids, -100 where nothing is learned.
        weights: ``[rows, width]`` weight of each target, or None for 1 everywhere.
        num_targets: how many targets are not -100.
    """

    targets: Tensor
    weights: Tensor | None
    num_targets: int


class GroupBatch(Protocol):
    """The part of a batch that objectives of tasks over whole sequences read.

    Attributes:
        groups: how many sequences each sample has.
        labels: ``[num_samples, K]`` float32.
    """

    groups: list[int] | None
    labels: Tensor | None


@dataclass(frozen=True)
class Denominators:
    """Counts over one whole optimizer step.

    Attributes:
        target_weight: sum of the weights of all targets (their number when nothing is weighted).
        num_answers: how many answers can be right or wrong; None: as many as there are targets.
        num_sequences: sampled sequences (policy optimisation).
        num_groups: groups of sequences of one prompt (policy optimisation).
        num_micro_batches: into how many the step is split; only losses that depend on the split ask.
    """

    target_weight: float
    num_answers: int | None = None
    num_sequences: int | None = None
    num_groups: int | None = None
    num_micro_batches: int = 1


@dataclass(frozen=True)
class TokenOutputs:
    """What the model says about the targets of one micro-batch, in row-major order of the batch.

    Attributes:
        logprobs: ``[num_targets]``, differentiable.
        is_argmax: ``[num_targets]`` bool, whether the target is the likeliest token.
    """

    logprobs: Tensor
    is_argmax: Tensor


@dataclass(frozen=True)
class PooledOutputs:
    """What the model says about the sequences of one micro-batch, in order.

    Attributes:
        values: ``[num_sequences, size]``, differentiable: scores, or vectors.
    """

    values: Tensor


class Objective(Protocol):
    """A loss. Implementations keep no state that changes.

    Attributes:
        accuracy: under which name the share of right answers is logged; None: there are no right and wrong ones.
    """

    accuracy: str | None

    def denominators(self, batches: Sequence[Any]) -> Denominators:
        """Counts over all micro-batches of one optimizer step."""

    def __call__(
        self, outputs: Any, batch: Any, denominators: Denominators
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the step's loss, and sums (not means) to be added up as metrics.

        ``outputs`` are `TokenOutputs` or `PooledOutputs`.
        """
