"""Preference losses as the trainer uses them: on values read from whole answers, with their metrics.

Values of an answer are columns: the sum of its log-probabilities under the policy (with ``ld_alpha`` weighted), the
same under the reference (0 without one), its number of tokens, the plain sum under the policy; for KTO also the
log-ratio of a mismatched pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swift.objectives.pooled import LossTerms
from swift.objectives.preference.losses import kto_loss, preference_loss, reward_loss

__all__ = ["KtoLoss", "PreferenceLoss", "RewardLoss"]

POLICY, REFERENCE, LENGTH, PLAIN, MISMATCHED = range(5)


def _averages(columns: Mapping[str, Tensor], where: Tensor | None = None) -> Tensor:
    """``[names, 2]`` float64: sum and number of each metric over the samples of ``where`` (None: all)."""
    rows = []
    for values in columns.values():
        chosen = values if where is None else values[where]
        rows.append(torch.stack([chosen.double().sum(), values.new_tensor(len(chosen)).double()]))
    return torch.stack(rows)


@dataclass(frozen=True)
class PreferenceLoss:
    """A weighted sum of losses of pairs (MPO, arXiv 2411.10442), one term a pair.

    Sequences 2i and 2i + 1 are the chosen and the rejected answer. Rewards are ``beta (log p - log p_ref)``.

    Attributes:
        kinds: names of losses -> their weights.
        beta: as in `preference_loss`.
        knobs: kind -> its knobs.
        rpo_alpha: weight of the chosen answers' negative log-likelihood per token (RPO, arXiv 2404.19733).
        divergence: name and coefficient of the f-divergence.
        has_reference: whether the column of the reference means something.
        average: rewards are per token (orpo, simpo).
    """

    kinds: Mapping[str, float]
    beta: float
    knobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rpo_alpha: float = 0.0
    divergence: tuple[str, float] = ("reverse_kl", 0.5)
    has_reference: bool = True
    average: bool = False

    decides = False
    metric_names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        chosen, rejected = values[0::2], values[1::2]
        references: tuple[Tensor, ...] = ()
        if self.has_reference:
            references = chosen[:, REFERENCE], rejected[:, REFERENCE]
        total = torch.zeros_like(chosen[:, POLICY])
        for kind, weight in self.kinds.items():
            total = total + weight * preference_loss(
                kind,
                # A likelihood of its own is that of the answer as it is.
                chosen[:, PLAIN if kind == "sft" else POLICY],
                rejected[:, POLICY],
                *references,
                beta=self.beta,
                chosen_lengths=chosen[:, LENGTH],
                rejected_lengths=rejected[:, LENGTH],
                **self._options(kind),
            )
        if self.rpo_alpha:
            total = total - self.rpo_alpha * chosen[:, PLAIN] / chosen[:, LENGTH].clamp(min=1)
        return LossTerms(total, metrics=_averages(self._measured(values.detach())))

    def _options(self, kind: str) -> dict[str, Any]:
        options = dict(self.knobs.get(kind, {}))
        if self.divergence[0] != "reverse_kl" and kind != "sft":
            name, coefficient = self.divergence
            options |= {"f_divergence_type": name, "f_alpha_divergence_coef": coefficient}
        return options

    def _measured(self, values: Tensor) -> dict[str, Tensor]:
        ratios = values[:, POLICY] - (values[:, REFERENCE] if self.has_reference else 0)
        if self.average:
            ratios = ratios / values[:, LENGTH].clamp(min=1)
        rewards = self.beta * ratios
        chosen, rejected = rewards[0::2], rewards[1::2]
        logps = values[0::2, POLICY], values[1::2, POLICY]
        columns = (chosen, rejected, chosen - rejected, (chosen > rejected).to(values.dtype), *logps)
        return dict(zip(self.metric_names, columns, strict=True))

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        return len(groups)

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        return {name: float(column.double().mean()) for name, column in self._measured(values).items()}


@dataclass(frozen=True)
class KtoLoss:
    """`kto_loss`, one term an answer; z0 is the mean log-ratio of the micro-batch's mismatched pairs."""

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    loss_type: str = "kto"

    decides = False
    metric_names = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        losses = kto_loss(
            values[:, POLICY],
            values[:, REFERENCE],
            labels[:, 0],
            self._kl(values),
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            loss_type=self.loss_type,
        )
        desirable = labels[:, 0] != 0
        parts = [
            _averages(columns, where) for columns, where in self._columns(values.detach(), desirable).values()
        ]
        return LossTerms(losses, metrics=torch.cat(parts)[[0, 2, 1, 3, 4]])

    def _kl(self, values: Tensor) -> Tensor:
        return values[:, MISMATCHED].mean() if len(values) else values.sum()

    def _columns(
        self, values: Tensor, desirable: Tensor
    ) -> dict[str, tuple[dict[str, Tensor], Tensor | None]]:
        own = {"rewards": self.beta * (values[:, POLICY] - values[:, REFERENCE]), "logps": values[:, POLICY]}
        kl = self._kl(values).clamp(min=0).expand(min(len(values), 1))
        return {"chosen": (own, desirable), "rejected": (own, ~desirable), "": ({"kl": kl}, None)}

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        return len(groups)

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        """Means over the desirable (chosen) and the other answers; nan where there are none."""
        measured = {}
        for side, (columns, where) in self._columns(values, labels[:, 0] != 0).items():
            for name, column in columns.items():
                chosen = column if where is None else column[where]
                measured[f"{name}/{side}" if side else name] = float(chosen.double().mean())
        measured["rewards/margins"] = measured["rewards/chosen"] - measured["rewards/rejected"]
        return measured


@dataclass(frozen=True)
class RewardLoss:
    """`reward_loss` of scores ``[2 * num_pairs, 1]``; the label of a pair is its margin."""

    center_rewards_coefficient: float = 0.0

    decides = True
    metric_names = ("margin", "mean_reward")

    def __call__(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> LossTerms:
        chosen, rejected = values[0::2, 0], values[1::2, 0]
        losses = reward_loss(
            chosen,
            rejected,
            labels[:, 0].to(values.dtype),
            center_rewards_coefficient=self.center_rewards_coefficient,
        )
        metrics = {"margin": (chosen - rejected).detach(), "mean_reward": values[:, 0].detach()}
        return LossTerms(losses, chosen > rejected, _averages(metrics))

    def num_terms(self, labels: Tensor, groups: Sequence[int]) -> int:
        return len(groups)

    def measure(self, values: Tensor, labels: Tensor, groups: Sequence[int]) -> dict[str, float]:
        scores = values[:, 0].double()
        chosen, rejected = scores[0::2], scores[1::2]
        return {
            "accuracy": float((chosen > rejected).double().mean()),
            "margin": float((chosen - rejected).mean()),
            "mean_reward": float(scores.mean()),
            "min_reward": float(scores.min()),
            "max_reward": float(scores.max()),
        }
