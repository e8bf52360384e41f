"""CHORD (arXiv 2508.11408): learning from expert answers beside the policy loss, with a weight that changes."""

from __future__ import annotations

import math

from torch import Tensor

from swift.objectives.inputs import at_least_float32, check_shapes

__all__ = ["chord_loss", "chord_mu", "chord_sft_loss"]


def chord_mu(step: int, *, warmup_steps: int, decay_steps: int, peak: float, valley: float) -> float:
    """The weight of the expert: 0 to ``peak`` by a line, a cosine down to ``valley``, then ``valley``."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= warmup_steps + decay_steps:
        return valley
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))
    return (peak - valley) * cosine + valley


def chord_sft_loss(
    logprobs: Tensor, mask: Tensor, *, phi: bool = False, num_tokens: float | None = None
) -> Tensor:
    """Mean negative log-likelihood of the expert's tokens; with ``phi`` each weighted by p (1 - p), p detached.

    Args:
        num_tokens: expert tokens of the whole optimizer step, so that micro-batches add up (ms-swift divides by
            those of the micro-batch); None: this is all of it.
    """
    check_shapes(logprobs.shape, "[batch, tokens]", mask=mask)
    kept, logprobs = mask != 0, at_least_float32(logprobs)
    losses = -logprobs.where(kept, 0)
    if phi:
        probabilities = (-losses).detach().exp()
        losses = losses * probabilities * (1 - probabilities)
    return losses.sum() / (kept.sum().clamp(min=1) if num_tokens is None else num_tokens)


def chord_loss(policy: Tensor, expert: Tensor, mu: float) -> Tensor:
    """``(1 - mu) L_policy + mu L_expert``."""
    return (1 - mu) * policy + mu * expert
