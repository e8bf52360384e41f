"""The policy loss as an objective of the training loop, beside the expert's loss of CHORD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from swift.objectives.base import Denominators, TokenOutputs
from swift.objectives.policy.algorithms import Algorithm
from swift.objectives.policy.chord import chord_sft_loss
from swift.objectives.policy.loss import policy_denominators, policy_loss

__all__ = ["METRICS", "ExpertShare", "PolicyObjective", "PolicyTensors"]

METRICS = (
    "ratio",
    "approx_kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "mismatch_kl",
    "mismatch_kept",
    "kl",
    "entropy",
    "chord/mu",
    "chord/sft_loss",
)
"""What is measured beside the loss. ``entropy`` is estimated by the mean of ``-log p`` of the sampled tokens."""

_NAMES = {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean"}


@dataclass(frozen=True)
class PolicyTensors:
    """What the loss knows of the sequences of one micro-batch; tokens are those that are learned, without gaps.

    Attributes:
        mask: ``[sequences, tokens]`` bool, False for padding.
        advantages: ``[sequences]`` or ``[sequences, tokens]``.
        groups: ``[sequences]`` int64.
        old_logprobs: ``[sequences, tokens]``; None: those of this very update.
        sampler_logprobs: as the sampler gave them.
        ref_logprobs: of the reference, or None.
        entropies: of the old policy, or None.
        entropy_threshold: of the whole step, where entropies count.
        weight: of the policy loss (CHORD: 1 - mu).
    """

    mask: Tensor
    advantages: Tensor
    groups: Tensor
    sampler_logprobs: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropies: Tensor | None = None
    entropy_threshold: float | None = None
    weight: float = 1.0

    def to(self, device: torch.device | str) -> PolicyTensors:
        """The same with its tensors on ``device``."""
        moved: dict[str, Any] = {
            one.name: value.to(device, non_blocking=True)
            for one in fields(self)
            if isinstance(value := getattr(self, one.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class ExpertShare:
    """A micro-batch of the expert (CHORD): weight of its loss, and its tokens in the whole step."""

    mu: float
    phi: bool
    num_tokens: int


class PolicyObjective:
    """``policy_loss`` over the micro-batches of a step, ``(1 - mu)`` of it where an expert has the rest.

    Batches hold ``policy`` (`PolicyTensors`) or ``expert`` (`ExpertShare`).

    Args:
        algorithm: the row, with all knobs in place.
        max_completion_length: what dr_grpo divides by.
    """

    accuracy: str | None = None
    metric_names = METRICS

    def __init__(self, algorithm: Algorithm, max_completion_length: int) -> None:
        self.algorithm, self.max_completion_length = algorithm, max_completion_length

    def denominators(self, batches: Sequence[Any]) -> Denominators:
        """Counts over the answers of the step; an expert's micro-batches count for themselves."""
        parts = [batch.policy for batch in batches if batch.policy is not None]
        return policy_denominators([part.mask for part in parts], [part.groups for part in parts])

    def __call__(
        self, outputs: TokenOutputs, batch: Any, denominators: Denominators
    ) -> tuple[Tensor, dict[str, Tensor]]:
        measured: dict[str, tuple[Any, float]]
        if not batch.num_tokens:  # of a rank that has none left: it computes along with the others
            loss, measured = outputs.logprobs.sum(), {}
        elif batch.policy is None:
            loss, measured = self._expert(outputs.logprobs, batch.expert)
        else:
            loss, measured = self._policy(outputs.logprobs, batch, denominators)
        scaled = loss.detach() * denominators.target_weight  # the loop divides by it
        return loss, {
            "loss_sum": scaled,
            "num_correct": torch.zeros((), device=loss.device),
            "groups": _table(measured, loss.device),
        }

    def _policy(
        self, logprobs: Tensor, batch: Any, denominators: Denominators
    ) -> tuple[Tensor, dict[str, tuple[Any, float]]]:
        part: PolicyTensors = batch.policy
        table = pad_sequence(list(logprobs.split(batch.target_counts)), batch_first=True)
        knobs: dict[str, Any] = {}
        if part.entropy_threshold is not None:
            knobs = {"entropy_threshold": part.entropy_threshold, "top_entropy_quantile": 1.0}
        loss, shares = policy_loss(
            self.algorithm,
            table,
            table.detach() if part.old_logprobs is None else part.old_logprobs,
            part.advantages,
            part.mask,
            groups=part.groups,
            ref_logprobs=part.ref_logprobs,
            sampler_logprobs=part.sampler_logprobs,
            denominators=denominators,
            max_completion_length=self.max_completion_length,
            entropies=part.entropies,
            **knobs,
        )
        shares["entropy"] = -(table.detach() * part.mask).sum() / denominators.target_weight
        # Where all tokens of the step are left out (overlong_filter), there is nothing to take means of.
        share = 1.0 / denominators.num_micro_batches if denominators.target_weight >= 1 else 0.0
        measured = {_NAMES.get(name, name): (value, share) for name, value in shares.items()}
        return loss * part.weight, measured

    @staticmethod
    def _expert(logprobs: Tensor, expert: ExpertShare) -> tuple[Tensor, dict[str, tuple[Any, float]]]:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
        loss = chord_sft_loss(logprobs, mask, phi=expert.phi, num_tokens=expert.num_tokens)
        share = len(logprobs) / expert.num_tokens
        return expert.mu * loss, {
            "chord/mu": (expert.mu * share, share),
            "chord/sft_loss": (loss.detach(), share),
        }


def _table(measured: dict[str, tuple[Any, float]], device: torch.device) -> Tensor:
    """``[2, names]`` float64: sums, and weights of what they are means of."""
    rows = torch.zeros(2, len(METRICS), dtype=torch.float64, device=device)
    for name, (value, weight) in measured.items():
        rows[0, METRICS.index(name)] = value
        rows[1, METRICS.index(name)] = weight
    return rows
