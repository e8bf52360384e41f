"""Rewards of the likeliest answers to validation prompts, while the policy is in training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from swift.config.sections.data import DataSection
from swift.data.tokens import TokenDataset
from swift.rl.prompts import Prompts
from swift.rl.rewards import Rewards
from swift.rl.sampler import Sampler, SamplingJob
from swift.rl.source import rewarded

__all__ = ["RewardEvaluator"]


class RewardEvaluator:
    """Answers the validation prompts greedily.

    Args:
        dataset: of prompts.
        section: options of the data.
        stands: optimizer steps done, and all of them; rewards may ask.
        at_once: so many prompts are handed to the sampler together.
    """

    num_batches = 0

    def __init__(
        self,
        dataset: TokenDataset,
        section: DataSection,
        sampler: Sampler,
        rewards: Rewards,
        stands: Callable[[], tuple[int, int]],
        at_once: int = 256,
    ) -> None:
        self.stands, self.at_once = stands, at_once
        self.prompts, self.sampler, self.rewards = Prompts(dataset, section), sampler, rewards

    def run(self, engine: Any, given_up: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Keys: eval_reward, eval_rewards/NAME, eval_mean_length, eval_seconds."""
        started = time.perf_counter()
        step, max_steps = self.stands()
        answers = []
        for start in range(0, len(self.prompts), self.at_once):
            if given_up():
                return None
            numbers = range(start, min(start + self.at_once, len(self.prompts)))
            jobs = [
                SamplingJob(self.prompts.ids(number), self.prompts.place(number), number, 0, 0)
                for number in numbers
            ]
            part = self.sampler.sample(jobs, 0, temperature=0.0)
            rewarded(part, self.rewards, self.prompts, step=step, max_steps=max_steps)
            answers += part
        totals = [one.reward for one in answers if one.is_used]
        metrics = {
            "eval_reward": sum(totals) / len(totals) if totals else math.nan,  # nan: every answer was dropped
            "eval_mean_length": sum(len(one.tokens) for one in answers) / len(answers),
        }
        for name in self.rewards.names:
            values = [one.rewards[name] for one in answers if not math.isnan(one.rewards[name])]
            metrics[f"eval_rewards/{name}"] = sum(values) / len(values) if values else math.nan
        return {**metrics, "eval_seconds": time.perf_counter() - started}
