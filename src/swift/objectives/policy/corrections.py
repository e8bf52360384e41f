"""Weights for tokens that another distribution sampled, and masks of what is too far off. All without gradient.

The sampler computes in another precision or with older weights than the trainer: x = o - s, w = exp(x).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swift.core.errors import ConfigError
from swift.objectives.policy.terms import PolicyTerms, masked_mean

__all__ = ["MISMATCH_WEIGHTS", "entropy_threshold", "off_policy_sequences"]


def token_truncate(terms: PolicyTerms, log_mismatch: Tensor, *, mismatch_cap: float = 2.0) -> Tensor:
    """``min(w, cap)`` (truncated importance sampling)."""
    return log_mismatch.exp().clamp(max=mismatch_cap)


def token_mask(
    terms: PolicyTerms, log_mismatch: Tensor, *, mismatch_low: float = 0.5, mismatch_high: float = 5.0
) -> Tensor:
    """``w`` where it lies in [low, high], else 0 (IcePop; bounds as in verl)."""
    return _inside(log_mismatch.exp(), log_mismatch.exp(), mismatch_low, mismatch_high)


def sequence_truncate(terms: PolicyTerms, log_mismatch: Tensor, *, mismatch_cap: float = 2.0) -> Tensor:
    """``min(exp(sum_t x), cap)``, one weight for a sequence."""
    return _sequence(log_mismatch).clamp(max=mismatch_cap).expand_as(log_mismatch)


def sequence_mask(
    terms: PolicyTerms, log_mismatch: Tensor, *, mismatch_low: float = 0.0, mismatch_high: float = 3.0
) -> Tensor:
    """``exp(sum_t x)`` where it lies in [low, high], else 0 (high 3: TRL's default)."""
    weights = _sequence(log_mismatch)
    return _inside(weights, weights, mismatch_low, mismatch_high).expand_as(log_mismatch)


def sequence_mask_tis(
    terms: PolicyTerms,
    log_mismatch: Tensor,
    *,
    mismatch_low: float = 0.5,
    mismatch_high: float = 2.0,
    mismatch_cap: float = 2.0,
) -> Tensor:
    """``min(w, cap)`` of each token, in sequences whose geometric mean ``exp(mean_t x)`` lies in [low, high]."""
    geometric = masked_mean(log_mismatch, terms.mask).exp()
    return _inside(log_mismatch.exp().clamp(max=mismatch_cap), geometric, mismatch_low, mismatch_high)


def geometric_mask(
    terms: PolicyTerms, log_mismatch: Tensor, *, mismatch_low: float = 0.999, mismatch_high: float = 1.001
) -> Tensor:
    """1 in sequences whose geometric mean lies in [low, high], else 0 (rejection sampling)."""
    geometric = masked_mean(log_mismatch, terms.mask).exp()
    return _inside(torch.ones_like(log_mismatch), geometric, mismatch_low, mismatch_high)


def _sequence(log_mismatch: Tensor) -> Tensor:
    return log_mismatch.sum(-1, keepdim=True).exp()


def _inside(weights: Tensor, judged: Tensor, low: float, high: float) -> Tensor:
    return weights * ((judged >= low) & (judged <= high))


MISMATCH_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        token_truncate,
        token_mask,
        sequence_truncate,
        sequence_mask,
        sequence_mask_tis,
        geometric_mask,
    )
}


def off_policy_sequences(terms: PolicyTerms, delta: float) -> Tensor:
    """``[batch, tokens]`` bool: A < 0 and ``mean_t (s - l) > delta`` (DeepSeek-V3.2, arXiv 2512.02556).

    delta 0.5 is TRL's, 1e-4 slime's. What the policy has already moved away from teaches nothing more.
    """
    drift = masked_mean(terms.behaviour_logprobs - terms.logprobs.detach(), terms.mask)
    return (terms.advantages < 0) & (drift > delta)


def entropy_threshold(entropies: Tensor, mask: Tensor, quantile: float) -> float:
    """The entropy that the share ``quantile`` of the tokens reach or exceed (arXiv 2506.01939: 0.2).

    To be taken over the whole optimizer step: over a micro-batch the loss would depend on the split.
    """
    if not 0 < quantile <= 1:
        raise ConfigError(f"{quantile} is not a share of the tokens", where="top_entropy_quantile", fix="0.2")
    kept = entropies[mask != 0].double().sort().values
    if not len(kept) or quantile == 1:
        return -float("inf")
    # torch.quantile refuses more than 16 million values; this is its linear interpolation.
    place = (1 - quantile) * (len(kept) - 1)
    low = int(place)
    above = kept[min(low + 1, len(kept) - 1)]
    return float(kept[low] + (place - low) * (above - kept[low]))
