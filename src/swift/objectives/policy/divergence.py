"""Estimators of KL(policy || reference) from one sample a token (Schulman, joschu.net/blog/kl-approx.html).

As values k1 and k3 are unbiased, k2 is not. As losses: k1's expected gradient is 0, k3's is wrong, that of k2 is exact
on samples of this policy, and ratio * k3 (DeepSeek-V3.2, arXiv 2512.02556) is exact on those of an older one.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["KL_ESTIMATORS", "k1", "k2", "k3", "kl_in_reward", "ratio_k3"]

_LARGEST = 20.0
"""Differences of log-probabilities are cut there, so that their exponentials stay finite."""


def k1(logprobs: Tensor, reference: Tensor, log_ratio: Tensor | None = None) -> Tensor:
    """``l - ref``."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor, log_ratio: Tensor | None = None) -> Tensor:
    """``(l - ref)^2 / 2``."""
    return (logprobs - reference).square() / 2


def k3(logprobs: Tensor, reference: Tensor, log_ratio: Tensor | None = None) -> Tensor:
    """``exp(ref - l) - (ref - l) - 1``; GRPO's paper (2402.03300) differentiates it."""
    difference = (reference - logprobs).clamp(-_LARGEST, _LARGEST)
    return difference.exp() - difference - 1


def ratio_k3(logprobs: Tensor, reference: Tensor, log_ratio: Tensor | None = None) -> Tensor:
    """``r k3`` with ``r = exp(l - o)``, differentiated as a whole."""
    ratio = (logprobs - logprobs.detach() if log_ratio is None else log_ratio).exp()
    return ratio * k3(logprobs, reference)


KL_ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (k1, k2, k3, ratio_k3)
}


def kl_in_reward(
    rewards: Tensor, old_logprobs: Tensor, reference: Tensor, mask: Tensor, *, beta: float
) -> Tensor:
    """``R - beta sum_t (o - ref)``, ``[batch]``: the penalty as part of the reward."""
    gaps = (old_logprobs - reference).where(mask != 0, 0)
    return rewards - beta * gaps.sum(-1).to(rewards.dtype)
