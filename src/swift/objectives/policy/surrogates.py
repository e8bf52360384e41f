"""Surrogates: what a token contributes to the loss, before it is averaged. Keyword arguments are the knobs.

l, o, s, r, A: log-probabilities under policy, old policy and sampler, importance ratio, advantage; sg: no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from swift.objectives.policy.terms import PolicyTerms, masked_mean

__all__ = ["SURROGATES", "SurrogateLoss"]


class SurrogateLoss(NamedTuple):
    """Losses ``[batch, tokens]`` (real: ``[groups]``), and which tokens were cut off from the gradient."""

    losses: Tensor
    clipped: Tensor | None = None


def clip(
    terms: PolicyTerms,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    dual_clip: float | None = None,
) -> SurrogateLoss:
    """``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`` (PPO, arXiv 1707.06347; clip-higher: DAPO, 2503.14476).

    delta: two-sided clipping, r is cut to delta before the minimum (INTELLECT-2, 2505.07291; usually 4).
    dual_clip: for A < 0 the loss is at most ``-dual_clip A`` (1912.09729; usually 3).
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio, advantages = terms.level_log_ratio.exp(), terms.advantages
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    losses = -torch.minimum(bounded * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    above, below = ratio > 1 + high, ratio < 1 - epsilon
    return SurrogateLoss(losses, ((advantages > 0) & above) | ((advantages < 0) & below))


def ratio(terms: PolicyTerms) -> SurrogateLoss:
    """``-r A``: the policy gradient with importance weights, unclipped; on-policy its gradient is REINFORCE's."""
    return SurrogateLoss(-terms.level_log_ratio.exp() * terms.advantages)


def reinforce(terms: PolicyTerms) -> SurrogateLoss:
    """``-A l``: REINFORCE (Williams 1992); for samples of this very policy."""
    return SurrogateLoss(-terms.advantages * terms.logprobs)


def cispo(terms: PolicyTerms, *, cap: float = 5.0, floor: float | None = None) -> SurrogateLoss:
    """``-sg[min(r, cap)] A l`` (CISPO, arXiv 2506.13585); no token loses its gradient.

    cap is absolute, 5 as in ScaleRL (2510.13786), TRL and ms-swift. open-instruct means 1 + epsilon_high by it
    (cap 1.272), verl and slime cut on both sides (floor 1 - epsilon, cap 1 + epsilon_high).
    """
    weights = terms.level_log_ratio.exp().detach()
    bounded = weights.clamp(min=floor, max=cap)
    return SurrogateLoss(-bounded * terms.advantages * terms.logprobs, bounded != weights)


def _by_sign(positive: Tensor, first: float, second: float, like: Tensor) -> Tensor:
    """``torch.where`` of two numbers in the precision of ``like`` (of its own it makes float32)."""
    return torch.where(positive, like.new_tensor(first), like.new_tensor(second))


def sapo(terms: PolicyTerms, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> SurrogateLoss:
    """``-A sigmoid(tau (r - 1)) 4 / tau`` with a temperature by the sign of A (SAPO, arXiv 2511.20347).

    At r = 1 the gradient is REINFORCE's for every tau; the value there is ``-2 A / tau``.
    """
    advantages = terms.advantages
    tau = _by_sign(advantages > 0, tau_pos, tau_neg, advantages)
    gate = torch.sigmoid(tau * (terms.level_log_ratio.exp() - 1)) * 4 / tau
    return SurrogateLoss(-gate * advantages)


def gmpo(terms: PolicyTerms, *, epsilon: float = 0.4, epsilon_high: float | None = None) -> SurrogateLoss:
    """``-A exp(mean_t x)``, ``x = sgn(A) min(sgn(A) d, sgn(A) clip(d, -epsilon, epsilon_high))``, d = l - o.

    The geometric mean of ratios that are clipped as logarithms (GMPO, arXiv 2507.20673).
    """
    high = epsilon if epsilon_high is None else epsilon_high
    difference, sign = terms.log_ratio, terms.advantages.sign()
    bounded = sign * torch.minimum(sign * difference, sign * difference.clamp(-epsilon, high))
    losses = -terms.advantages * masked_mean(bounded, terms.mask).exp()
    return SurrogateLoss(losses, terms.mask & (bounded != difference) & (sign != 0))


def _probability_gap(terms: PolicyTerms, low: float, high: float) -> Tensor:
    """1 where the probability has not moved too far in the direction of the advantage since it was sampled."""
    gap = terms.logprobs.detach().exp() - terms.behaviour_logprobs.exp()
    return torch.where(terms.advantages > 0, gap <= high, gap >= -low)


def dppo(
    terms: PolicyTerms, *, delta_low: float = 0.15, delta_high: float = 0.15, ratio_cap: float = 20.0
) -> SurrogateLoss:
    """``-A sg[min(r, ratio_cap)] l keep``, keep = p - p_s <= delta_high if A > 0 else p - p_s >= -delta_low.

    The trust region is one of total variation (DPPO Binary-TV, arXiv 2602.04879); p_s is the sampler's probability.
    """
    keep = _probability_gap(terms, delta_low, delta_high)
    weights = terms.level_log_ratio.exp().detach().clamp(max=ratio_cap)
    return SurrogateLoss(-terms.advantages * weights * terms.logprobs * keep, terms.mask & ~keep)


def prime_rl(
    terms: PolicyTerms, *, delta_low: float = 0.2, delta_high: float = 0.2, kl_tau: float = 1e-3
) -> SurrogateLoss:
    """``-A r keep + kl_tau (l - s)^2``: the default of prime-rl, with DPPO's keep; the second term is never cut."""
    keep = _probability_gap(terms, delta_low, delta_high)
    away = (terms.logprobs - terms.behaviour_logprobs).square()
    policy = -terms.advantages * terms.level_log_ratio.exp() * keep
    return SurrogateLoss(policy + kl_tau * away, terms.mask & ~keep)


def vespo(
    terms: PolicyTerms, *, k_pos: float = 2.0, lam_pos: float = 3.0, k_neg: float = 3.0, lam_neg: float = 2.0
) -> SurrogateLoss:
    """``-sg[phi] A l``, ``phi = exp(lam + k log w - lam w)``, ``w = exp(sum_t (l - o) + sum_t (o - s))``.

    Sequence weights shaped like a gamma density (VESPO, arXiv 2602.10693); it holds the sampler's mismatch as well.
    """
    drift = terms.log_ratio if terms.log_mismatch is None else terms.log_ratio + terms.log_mismatch
    log_weight = drift.detach().sum(-1, keepdim=True)
    positive = terms.advantages >= 0
    k = _by_sign(positive, k_pos, k_neg, log_weight)
    lam = _by_sign(positive, lam_pos, lam_neg, log_weight)
    phi = (lam + k * log_weight - lam * log_weight.exp()).exp()
    return SurrogateLoss(-phi * terms.advantages * terms.logprobs)


def real(terms: PolicyTerms, *, real_tau: float = 0.5) -> SurrogateLoss:
    """``log(1 + sum_{A>0} e^(-s/tau)) + log(1 + sum_{A<0} e^(s/tau))`` of each group, s = mean_t (l - o).

    Rewards as class labels (REAL, arXiv 2602.05630); only the sign of A counts. Groups of one sign contribute 0 but
    are counted. A group has to lie whole in one micro-batch.
    """
    scores = masked_mean(terms.log_ratio, terms.mask)[:, 0] / real_tau
    # The sign of the sequence; a sequence without tokens takes no part.
    signs = (terms.advantages * terms.mask).sum(-1).sign()
    num_groups = int(terms.groups.max()) + 1 if len(terms.groups) else 0
    total = scores.new_zeros(num_groups)
    both = torch.ones(num_groups, dtype=torch.bool, device=scores.device)
    for sign in (1.0, -1.0):
        member = (torch.arange(num_groups, device=scores.device)[:, None] == terms.groups) & (signs == sign)
        logits = (-sign * scores).expand(num_groups, -1).masked_fill(~member, -torch.inf)
        with_one = torch.cat([logits, logits.new_zeros(num_groups, 1)], 1)
        total = total + with_one.logsumexp(1)
        both = both & member.any(1)
    return SurrogateLoss(total * both)


def fipo(
    terms: PolicyTerms,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    dual_clip: float | None = None,
    fipo_decay: float = 32.0,
    fipo_range: float = 0.2,
    fipo_high_only: bool = True,
    fipo_safety: float = 4.0,
) -> SurrogateLoss:
    """The clipped loss times ``f_t = clip(exp F_t, 1, 1 + range)``, ``F_t = sum_{k>=t} g^(k-t) (l_k - o_k)``, sg.

    g = 2^(-1 / fipo_decay) (FIPO, arXiv 2603.19835). With A < 0 and r > fipo_safety, f is cut to [1 - range, 1];
    without fipo_high_only to [1 - range, 1 + range] elsewhere.
    """
    losses, clipped = clip(
        terms, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta, dual_clip=dual_clip
    )
    decay, steps = 2 ** (-1 / fipo_decay), terms.log_ratio.detach()
    future = torch.zeros_like(steps)
    running = steps.new_zeros(len(steps))
    for place in range(steps.shape[1] - 1, -1, -1):
        running = steps[:, place] + decay * running
        future[:, place] = running
    low = 1.0 if fipo_high_only else 1 - fipo_range
    weights = future.exp()
    unsafe = (terms.advantages < 0) & (terms.level_log_ratio.detach().exp() > fipo_safety)
    weights = torch.where(unsafe, weights.clamp(1 - fipo_range, 1.0), weights.clamp(low, 1 + fipo_range))
    return SurrogateLoss(losses * weights, clipped)


SURROGATES: dict[str, Callable[..., SurrogateLoss]] = {
    function.__name__: function
    for function in (clip, ratio, reinforce, cispo, sapo, gmpo, dppo, prime_rl, vespo, real, fipo)
}
