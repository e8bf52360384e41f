"""A batch of answers, dealt out to optimizer steps and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from swift.data.batching import deal
from swift.objectives.policy.corrections import entropy_threshold
from swift.objectives.policy.objective import PolicyTensors
from swift.rl.settings import PolicySettings
from swift.rl.trajectory import AnswerLayout, RolloutBatch, Trajectory, rollout_batch

__all__ = ["RolloutBuffer", "micro_batches"]


class RolloutBuffer:
    """The answers that training learns from now.

    Args:
        trajectories: with advantages; whole groups, in order.
        layout: of the answers of a micro-batch.
        used: optimizer steps already made of it.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        settings: PolicySettings,
        layout: AnswerLayout,
        *,
        used: int = 0,
    ) -> None:
        self.trajectories, self.settings, self.layout = list(trajectories), settings, layout
        self.used = used

    @property
    def is_used_up(self) -> bool:
        return self.used >= self.settings.steps_per_batch

    def next_step(self, share: tuple[int, int] = (0, 1)) -> list[RolloutBatch]:
        """Our micro-batches of the next optimizer step; ``share``: which rank we are, of how many."""
        size = self.settings.answers_per_step
        start = self.used % self.settings.num_updates * size
        part = self.trajectories[start : start + size]
        self.used += 1
        threshold = self._threshold(part)
        chunks = micro_batches(part, self.settings.micro_batch, self._sorts)
        return [self._batch(chunk, threshold) for chunk in deal(chunks, share, [])]

    @property
    def _sorts(self) -> bool:
        """Answers of like length into one micro-batch, where rows are padded; never where groups must stay whole."""
        return self.layout.mode == "padded" and self.settings.algorithm.aggregation not in (
            "group_mean",
            "micro_batch_mean",
        )

    def _threshold(self, part: Sequence[Trajectory]) -> float | None:
        """The entropy from which on tokens are learned: of the whole step, so that micro-batches add up."""
        if not self.settings.needs_entropies:
            return None
        knobs = self.settings.algorithm.knobs
        if (fixed := knobs.get("entropy_threshold")) is not None:
            return float(fixed)
        quantile = knobs["top_entropy_quantile"]
        values = [one.entropies for one in part if one.is_used and one.entropies is not None]
        kept = torch.from_numpy(np.concatenate(values)) if values else torch.zeros(0)
        return entropy_threshold(kept, torch.ones_like(kept), quantile)

    def _batch(self, part: list[Trajectory], threshold: float | None) -> RolloutBatch:
        batch = rollout_batch(part, self.layout)
        width = max((one.num_learned for one in part), default=0)
        is_wide = any(one.advantage is not None and len(one.advantage) > 1 for one in part)
        used = torch.tensor([one.is_used for one in part], dtype=torch.bool)
        lengths = torch.tensor([one.num_learned for one in part])
        advantages = _table([one.advantage for one in part], width if is_wide else 1)
        batch.policy = PolicyTensors(
            mask=(torch.arange(width)[None] < lengths[:, None]) & used[:, None],
            advantages=advantages if is_wide else advantages[:, 0],
            groups=torch.tensor([one.group for one in part], dtype=torch.int64),
            sampler_logprobs=_table([one.sampler_logprobs for one in part], width),
            old_logprobs=self._optional(part, width, lambda one: one.old_logprobs),
            ref_logprobs=self._optional(part, width, lambda one: one.ref_logprobs),
            entropies=None if threshold is None else self._optional(part, width, lambda one: one.entropies),
            entropy_threshold=threshold,
        )
        return batch

    @staticmethod
    def _optional(
        part: Sequence[Trajectory], width: int, read: Callable[[Trajectory], np.ndarray | None]
    ) -> Tensor | None:
        values = [read(one) for one in part]
        return None if any(value is None for value in values) else _table(values, width)


def micro_batches(part: Sequence[Trajectory], size: int, by_length: bool) -> list[list[Trajectory]]:
    """Chunks of ``size`` answers; with ``by_length`` the longest first."""
    ordered = list(part)
    if by_length:
        ordered.sort(key=lambda one: -(len(one.prompt_ids) + len(one.tokens)))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def _table(values: Sequence[np.ndarray | None], width: int) -> Tensor:
    """``[rows, width]`` float32, padded with 0."""
    table = torch.zeros(len(values), width)
    for row, value in enumerate(values):
        if value is not None and len(value):
            table[row, : len(value)] = torch.from_numpy(value)
    return table
