"""What every part of a policy loss reads, and sums over masked tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swift.core.errors import ConfigError
from swift.objectives.inputs import at_least_float32, check_shapes

__all__ = ["PolicyTerms", "masked_mean", "policy_terms"]


@dataclass(frozen=True)
class PolicyTerms:
    """One micro-batch. All tensors are ``[batch, tokens]`` unless said; where the mask is False they are 0.

    They are float32, or float64 where the log-probabilities are.

    Attributes:
        logprobs: l, log-probabilities under the policy, differentiable.
        old_logprobs: o, under the policy that the update began with.
        sampler_logprobs: s, as the sampler gave them, or None where it is o itself.
        log_ratio: l - o, differentiable.
        level_log_ratio: the logarithm of the importance ratio at the level of the algorithm, differentiable.
        log_mismatch: o - s, or None.
        advantages: A.
        mask: bool, tokens that the policy generated.
        groups: ``[batch]`` int64, 0 to number of groups - 1.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    sampler_logprobs: Tensor | None
    log_ratio: Tensor
    level_log_ratio: Tensor
    log_mismatch: Tensor | None
    advantages: Tensor
    mask: Tensor
    groups: Tensor

    @property
    def behaviour_logprobs(self) -> Tensor:
        """s, or o where no sampler is told apart."""
        return self.old_logprobs if self.sampler_logprobs is None else self.sampler_logprobs


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """``[batch, 1]``: mean over the tokens of each sequence; 0 for a sequence without tokens."""
    return (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def policy_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    level: str,
    groups: Tensor | None,
    sampler_logprobs: Tensor | None,
) -> PolicyTerms:
    """Masked tensors and the ratio at its level.

    Levels: token, ``exp(l - o)``; sequence (GSPO, arXiv 2507.18071), ``s_i = exp(mean_t (l - o))`` for every token;
    sequence_token (GSPO-token, there section 4.3), ``sg[s_i] exp(l - sg[l])``.

    Raises ConfigError for an unknown level, ValueError for shapes that do not fit.
    """
    if logprobs.ndim != 2:
        raise ValueError(f"logprobs must be [batch, tokens], not {list(logprobs.shape)}")
    check_shapes(
        logprobs.shape,
        "[batch, tokens]",
        old_logprobs=old_logprobs,
        mask=mask,
        sampler_logprobs=sampler_logprobs,
    )
    check_shapes(logprobs.shape[:1], "[batch]", groups=groups)
    if advantages.shape not in (logprobs.shape[:1], logprobs.shape):
        raise ValueError(f"advantages are [batch] or [batch, tokens], not {list(advantages.shape)}")
    kept = mask != 0
    # Whatever stands at masked tokens (padding may hold -inf) must touch neither values nor gradients.
    new = at_least_float32(logprobs).where(kept, 0)
    old = old_logprobs.detach().to(new.dtype).where(kept, 0)
    sampler = None if sampler_logprobs is None else sampler_logprobs.detach().to(new.dtype).where(kept, 0)
    wide = advantages if advantages.ndim == 2 else advantages[:, None].expand_as(new)
    log_ratio = new - old
    if level == "token":
        at_level = log_ratio
    elif level in ("sequence", "sequence_token"):
        at_level = masked_mean(log_ratio, kept).expand_as(new)
        if level == "sequence_token":
            at_level = at_level.detach() + new - new.detach()
    else:
        raise ConfigError(f"unknown ratio level {level!r}", fix="token, sequence or sequence_token")
    numbers = torch.arange(len(new), device=new.device) if groups is None else groups.to(new.device)
    return PolicyTerms(
        logprobs=new,
        old_logprobs=old,
        sampler_logprobs=sampler,
        log_ratio=log_ratio,
        level_log_ratio=at_level,
        log_mismatch=None if sampler is None else old - sampler,
        advantages=wide.detach().to(new.dtype).where(kept, 0),
        mask=kept,
        groups=numbers.unique(return_inverse=True)[1],
    )
