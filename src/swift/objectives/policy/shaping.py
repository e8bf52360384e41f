"""What surrounds a policy loss: rewards by length, groups without a signal, the value function of PPO."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["moving_baseline", "soft_overlong", "value_loss", "without_signal"]


def soft_overlong(lengths: Tensor, *, max_length: int, cache_length: int) -> Tensor:
    """Punishment of long answers (DAPO, arXiv 2503.14476, equation 13), ``[batch]``.

    0 up to ``max_length - cache_length``, then falling by a line to -1 at ``max_length``, -1 beyond.
    """
    exceeding = (lengths - (max_length - cache_length)) / cache_length
    return -exceeding.clamp(0.0, 1.0)


def without_signal(rewards: Tensor, groups: Tensor) -> Tensor:
    """``[batch]`` bool: the sample's group has equal rewards, so it teaches nothing (dynamic sampling drops it)."""
    index = groups.unique(return_inverse=True)[1]
    count = int(index.max()) + 1 if len(index) else 0
    start = rewards.new_zeros(count)
    low = start.scatter_reduce(0, index, rewards, "amin", include_self=False)
    high = start.scatter_reduce(0, index, rewards, "amax", include_self=False)
    return (low == high)[index]


def moving_baseline(baseline: float, reward: float, *, decay: float = 0.95) -> float:
    """``decay b + (1 - decay) R``: one for each pair of environment and role (RAE of SPIRAL, arXiv 2506.24119)."""
    return decay * baseline + (1 - decay) * reward


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """``max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2`` of each token (PPO, arXiv 1707.06347)."""
    bounded = torch.clamp(values, old_values - clip, old_values + clip)
    return torch.maximum((values - returns).square(), (bounded - returns).square()) / 2
