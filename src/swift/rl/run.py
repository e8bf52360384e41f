"""A training, with what stands above the training loop: sampled answers, their rewards, tasks that are evaluated."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import Any

from swift.config.schema import Resolved
from swift.core.errors import SwiftError
from swift.rl.reward_pool import WORKER
from swift.train.run import RunResult
from swift.train.run import train as train_run

__all__ = ["train"]


def train(resolved: Resolved, **options: Any) -> RunResult:
    """`swift.train.run.train` with what the configuration asks for beyond it.

    Raises what that raises; ConfigError for options of policy optimisation that do not fit together; SwiftError in a
    process that computes rewards, which would start others without end.
    """
    if WORKER in os.environ:
        raise SwiftError(
            "a file that trains was imported to find a reward in it",
            fix='put what trains under: if __name__ == "__main__":',
        )
    if resolved.config.evaluation.eval_tasks is not None:
        from swift.evaluate.training import suite_evaluators

        options.setdefault("evaluators", suite_evaluators(resolved))
    if not resolved.config.rlhf.is_policy:
        return train_run(resolved, **options)
    from swift.rl.parts import policy_parts
    from swift.rl.rewards import Rewards
    from swift.rl.settings import derive_policy

    settings = derive_policy(resolved)
    with contextlib.ExitStack() as closing:
        rewards = None
        if resolved.config.policy.replay is None:
            is_main = resolved.config.parallel.num_processes == 1 or os.environ.get("RANK", "0") == "0"
            rewards = Rewards(resolved.config, is_main=is_main)
            closing.callback(rewards.close)
            rewards.check()
        return train_run(resolved, policy=partial(policy_parts, settings, rewards), **options)
