"""Advantages from rewards. Standard deviations are unbiased (n - 1); groups of one sample have advantage 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swift.core.errors import ConfigError
from swift.objectives.inputs import check_shapes
from swift.objectives.knobs import check_knobs, knobs_of, lookup
from swift.objectives.policy.algorithms import ALGORITHMS

__all__ = ["ESTIMATORS", "advantages", "generalised_advantages", "whiten"]


class _Groups:
    """Means and spreads by group, in float64. A group of equal values has mean and spread exactly."""

    def __init__(self, groups: Tensor) -> None:
        self.index = groups.unique(return_inverse=True)[1]
        self.count = int(self.index.max()) + 1 if len(groups) else 0

    def sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.count).index_add_(0, self.index, values)[self.index]

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Weighted mean of the group, at each sample; equal values exactly as they are."""
        weights = torch.ones_like(values) if weights is None else weights
        total = self.sum(weights)
        mean = self.sum(values * weights) / total.where(total > 0, 1)
        low, high = self._extreme(values, "amin"), self._extreme(values, "amax")
        return torch.where(low == high, low, mean)

    def std(self, values: Tensor) -> Tensor:
        """Unbiased; 0 for groups of one."""
        squares = self.sum((values - self.mean(values)).square())
        return (squares / (self.sum(torch.ones_like(values)) - 1).clamp(min=1)).sqrt()

    def sizes(self, values: Tensor) -> Tensor:
        return self.sum(torch.ones_like(values))

    def _extreme(self, values: Tensor, how: str) -> Tensor:
        start = values.new_zeros(self.count)
        return start.scatter_reduce(0, self.index, values, how, include_self=False)[self.index]


def advantages(
    kind: str, rewards: Tensor, groups: Tensor, *, lengths: Tensor | None = None, **knobs: Any
) -> Tensor:
    """Advantages of sampled sequences.

    Args:
        kind: an estimator, or the name of an algorithm, whose estimator is meant.
        rewards: ``[batch]``, or ``[batch, num_rewards]``: their sum with ``weights=`` (default 1 each) is the reward;
            NaN is a reward that does not apply and counts nothing in the sum. Only gdpo keeps them apart.
        groups: ``[batch]``, equal for samples of one prompt. All samples of the optimizer step together.
        lengths: ``[batch]`` tokens of each sequence (opo; whitening over tokens).
        knobs: of the estimator.

    Returns:
        ``[batch]`` in the dtype of the rewards (float32 for integers); reinforce_pp with ``token_kl``:
        ``[batch, tokens]``.

    Raises ConfigError for unknown names and for what is missing, ValueError for shapes that do not fit and for infinite
    rewards.
    """
    name = ALGORITHMS[kind].advantage if kind in ALGORITHMS and kind not in ESTIMATORS else kind
    function = lookup(ESTIMATORS, name, "estimator of advantages")
    weights = knobs.pop("weights", None)
    elsewhere = {other: knobs_of(one) for other, one in ESTIMATORS.items()}
    check_knobs(knobs, knobs_of(function), kind, elsewhere)
    rewards = torch.as_tensor(rewards)
    if groups is None:
        raise ConfigError("which samples are of one prompt?", where="groups", fix="groups=, [batch]")
    groups = torch.as_tensor(groups)
    if rewards.ndim not in (1, 2):
        raise ValueError(f"rewards are [batch] or [batch, num_rewards], not {list(rewards.shape)}")
    sizes = None if lengths is None else torch.as_tensor(lengths, device=rewards.device).double()
    check_shapes(rewards.shape[:1], "[batch]", groups=groups, lengths=sizes)
    if rewards.isinf().any():
        raise ValueError("there is an infinite reward: no mean, and no advantage")
    wide = (rewards if rewards.ndim == 2 else rewards[:, None]).double()
    shares = torch.ones(wide.shape[1], dtype=wide.dtype, device=wide.device)
    if weights is not None:
        shares = torch.as_tensor(weights, dtype=wide.dtype, device=wide.device)
    if shares.shape != wide.shape[1:]:
        raise ValueError(f"{len(shares)} weights for {wide.shape[1]} rewards")
    if function is gdpo:
        values = gdpo(wide, _Groups(groups), shares, **knobs)
    else:
        total = (wide.nan_to_num(0.0) * shares).sum(1)
        values = function(total, _Groups(groups), sizes, **knobs)
    return values.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


def grpo(
    rewards: Tensor,
    groups: _Groups,
    lengths: Tensor | None,
    *,
    eps: float = 1e-4,
    scale_rewards: str | bool = "group",
) -> Tensor:
    """``(R - mean) / (std + eps)`` (GRPO, arXiv 2402.03300; eps of TRL and ms-swift, verl has 1e-6).

    scale_rewards: the std of the group, of the raw rewards of the batch (Lite-PPO, 2508.08221), or none.
    """
    centred = rewards - groups.mean(rewards)
    if scale_rewards in ("group", True):
        return centred / (groups.std(rewards) + eps)
    if scale_rewards == "batch":
        return centred / (_std(rewards) + eps)
    if scale_rewards in ("none", False):
        return centred
    raise ConfigError(f"{scale_rewards!r} scales nothing", where="scale_rewards", fix="group, batch or none")


def dr_grpo(rewards: Tensor, groups: _Groups, lengths: Tensor | None) -> Tensor:
    """``R - mean`` (Dr. GRPO, arXiv 2503.20783); its expected gradient is (G - 1) / G of the true one."""
    return rewards - groups.mean(rewards)


def batch(rewards: Tensor, groups: _Groups, lengths: Tensor | None, *, eps: float = 1e-4) -> Tensor:
    """``(R - group mean) / (std of the batch's rewards + eps)`` (Lite-PPO, arXiv 2508.08221)."""
    return grpo(rewards, groups, lengths, eps=eps, scale_rewards="batch")


def rloo(rewards: Tensor, groups: _Groups, lengths: Tensor | None) -> Tensor:
    """``R_i - mean of the others = G / (G - 1) (R_i - mean)`` (RLOO, arXiv 2402.14740)."""
    sizes = groups.sizes(rewards)
    return (rewards - groups.mean(rewards)) * sizes / (sizes - 1).clamp(min=1)


def reinforce_mean(rewards: Tensor, groups: _Groups, lengths: Tensor | None) -> Tensor:
    """``R - E[R]`` with the mean over the batch."""
    return rewards - _Groups(torch.zeros_like(groups.index)).mean(rewards)


def reinforce_pp(
    rewards: Tensor,
    groups: _Groups,
    lengths: Tensor | None,
    *,
    mask: Tensor | None = None,
    token_kl: Tensor | None = None,
    beta: float = 0.0,
    gamma: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """Whitened returns ``G_t = sum_{k>=t} gamma^(k-t) r_k`` (REINFORCE++, arXiv 2501.03262).

    Token rewards are ``-beta kl_t`` (k1, ``o - ref``) and the sequence's reward at its last token. Whitening is over
    all tokens of the batch; tokens outside the mask are passed over and carry the return through.
    Without ``token_kl`` and with gamma 1 every token has the return R: ``[batch]``, whitened by ``lengths``.
    """
    if token_kl is None and gamma == 1.0:
        weights = lengths if lengths is not None else None if mask is None else (mask != 0).sum(1).double()
        return _whiten_by(rewards, torch.ones_like(rewards) if weights is None else weights, eps)
    if mask is None:
        raise ConfigError("returns of tokens need the mask of the tokens", where="mask")
    kept = mask != 0
    last = kept & (kept.flip(1).cumsum(1).flip(1) == 1)
    token_rewards = last * rewards[:, None]
    if token_kl is not None:
        token_rewards = token_rewards - beta * token_kl.double().where(kept, 0)
    returns = torch.zeros_like(token_rewards)
    running = torch.zeros_like(rewards)
    for place in range(kept.shape[1] - 1, -1, -1):
        running = torch.where(kept[:, place], token_rewards[:, place] + gamma * running, running)
        returns[:, place] = running
    return whiten(returns, kept, eps=eps)


def reinforce_pp_baseline(
    rewards: Tensor,
    groups: _Groups,
    lengths: Tensor | None,
    *,
    eps: float = 1e-8,
    whiten_over: str = "sequences",
) -> Tensor:
    """``a = R - group mean``, whitened over the batch (REINFORCE++-baseline, arXiv 2501.03262).

    whiten_over: sequences, as ms-swift does (the mean of a is 0 by itself); tokens, as verl does: mean and std
    weighted by lengths. They differ where lengths do.
    """
    centred = rewards - groups.mean(rewards)
    if whiten_over == "sequences":
        return centred / (_std(centred) + eps)
    if whiten_over != "tokens":
        raise ConfigError(f"no whitening over {whiten_over!r}", where="whiten_over", fix="sequences, tokens")
    if lengths is None:
        raise ConfigError("whitening over tokens needs the lengths", where="lengths")
    return _whiten_by(centred, lengths, eps)


def opo(rewards: Tensor, groups: _Groups, lengths: Tensor | None) -> Tensor:
    """``R - sum L R / sum L``: the baseline of least variance (OPO, arXiv 2505.23585)."""
    if lengths is None:
        raise ConfigError("opo weighs its baseline by the lengths", where="lengths")
    return rewards - groups.mean(rewards, lengths)


def maxrl(rewards: Tensor, groups: _Groups, lengths: Tensor | None) -> Tensor:
    """``(R - mean) / mean``, 0 where the mean is not positive (MaxRL, arXiv 2602.02710)."""
    mean = groups.mean(rewards)
    return torch.where(mean > 0, (rewards - mean) / mean.where(mean > 0, 1), 0)


def gpg(
    rewards: Tensor, groups: _Groups, lengths: Tensor | None, *, normaliser: float = 1.0, eps: float = 1e-8
) -> Tensor:
    """``(B / number of sequences in groups that differ) (R - mean) / normaliser`` (GPG, arXiv 2504.02546)."""
    centred = rewards - groups.mean(rewards)
    useful = (groups.std(rewards) > eps).sum().clamp(min=1)
    return centred * len(rewards) / useful / normaliser


def remax(
    rewards: Tensor, groups: _Groups, lengths: Tensor | None, *, baselines: Tensor | None = None
) -> Tensor:
    """``R - reward of the greedy answer`` (ReMax, arXiv 2310.10505); ``baselines`` ``[batch]``."""
    if baselines is None:
        raise ConfigError("remax needs the rewards of the greedy answers", where="baselines")
    return rewards - baselines.double()


def gdpo(rewards: Tensor, groups: _Groups, weights: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Each reward normalised within its group, their weighted sum whitened over the batch (GDPO, arXiv 2601.05242).

    ``rewards`` are ``[batch, num_rewards]``. A reward that does not apply to a sample (NaN) counts for nothing there.
    """
    total = rewards.new_zeros(len(rewards))
    for column, weight in zip(rewards.T, weights, strict=True):
        present = ~column.isnan()
        within = _Groups(groups.index[present])
        values = column[present]
        normal = (values - within.mean(values)) / (within.std(values) + eps)
        total[present] += weight * normal
    # The mean over the batch is 0: every group is centred.
    return total / (_std(total) + eps)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        grpo,
        dr_grpo,
        batch,
        rloo,
        reinforce_mean,
        reinforce_pp,
        reinforce_pp_baseline,
        opo,
        maxrl,
        gpg,
        remax,
        gdpo,
    )
}


def _std(values: Tensor) -> Tensor:
    return values.std() if len(values) > 1 else values.new_zeros(())


def _whiten_by(values: Tensor, weights: Tensor, eps: float) -> Tensor:
    """``(v - mean) / std`` as if each value stood there ``weights`` times; unbiased."""
    total = weights.sum()
    mean = (values * weights).sum() / total.clamp(min=1)
    variance = ((values - mean).square() * weights).sum() / (total - 1).clamp(min=1)
    return (values - mean) / (variance.sqrt() + eps)


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """``(v - mean) / std`` over the tokens of the mask, 0 elsewhere."""
    return _whiten_by(values, (mask != 0).to(values.dtype), eps).where(mask != 0, 0)


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) ``[batch, tokens]`` (GAE, arXiv 1506.02438).

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``, ``returns = A + V``. Tokens outside
    the mask are passed over.
    """
    kept = mask != 0
    result = torch.zeros_like(values)
    running, following = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for place in range(values.shape[1] - 1, -1, -1):
        now = kept[:, place]
        delta = rewards[:, place] + gamma * following - values[:, place]
        running = torch.where(now, delta + gamma * lam * running, running)
        following = torch.where(now, values[:, place], following)
        result[:, place] = running.where(now, 0)
    return result, (result + values).where(kept, 0)
