"""The policy loss: ratio, surrogate, weights, KL and aggregation of an algorithm put together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swift.core.errors import ConfigError
from swift.objectives.base import Denominators
from swift.objectives.inputs import check_shapes
from swift.objectives.knobs import knobs_of, lookup
from swift.objectives.policy.algorithms import Algorithm, surrogate_of, with_knobs
from swift.objectives.policy.corrections import MISMATCH_WEIGHTS, entropy_threshold, off_policy_sequences
from swift.objectives.policy.divergence import KL_ESTIMATORS, k3
from swift.objectives.policy.terms import PolicyTerms, masked_mean, policy_terms

__all__ = ["AGGREGATIONS", "policy_denominators", "policy_loss"]


def policy_denominators(masks: Sequence[Tensor], groups: Sequence[Tensor] | None = None) -> Denominators:
    """Counts over all micro-batches of an optimizer step (and the ranks, when the caller adds theirs up).

    Args:
        masks: ``[batch, tokens]`` of each micro-batch.
        groups: ``[batch]`` of each; only an algorithm with a loss by group needs them.
    """
    num_groups = None
    if groups is not None:
        num_groups = len(torch.cat([one.cpu() for one in groups]).unique()) if groups else 0
    return Denominators(
        target_weight=max(float(sum(int((mask != 0).sum()) for mask in masks)), 1e-12),
        num_sequences=sum(len(mask) for mask in masks),
        num_groups=num_groups,
        num_micro_batches=len(masks),
    )


def policy_loss(
    algo: str | Algorithm,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    groups: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    denominators: Denominators | None = None,
    max_completion_length: int | None = None,
    entropies: Tensor | None = None,
    **knobs: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch, as its share of the step: the shares of a step add up to its loss.

    ``L = aggregate(w keep surrogate + beta KL)``: the mismatch weight w and the masks act on the policy term only.

    Args:
        algo: a row of the table, by name or dotted path, or one itself.
        logprobs: ``[batch, tokens]`` of the sampled tokens under the policy, differentiable.
        old_logprobs: the same when the update began; on-policy, ``logprobs.detach()``.
        advantages: ``[batch]`` or ``[batch, tokens]``.
        mask: 1 where the policy generated the token. What stands elsewhere has no influence.
        groups: ``[batch]``, equal for the samples of one prompt.
        ref_logprobs: of the reference. Without them there is no KL term: a row's own beta is then left out, a beta
            that is given raises.
        sampler_logprobs: as the sampler reported them; weights of the row's ``mismatch`` are made of them. A
            ``mismatch`` that is given without them raises.
        denominators: counts of the whole step (`policy_denominators`); None: this is all of it.
        max_completion_length: what dr_grpo divides by.
        entropies: ``[batch, tokens]`` for top_entropy_quantile and entropy_threshold.
        knobs: parts and knobs of the row to replace.

    Returns:
        The loss, float32 (float64 for such inputs), and metrics as shares of the means over the step, detached:
        ``clip_low`` and ``clip_high`` (share of tokens cut with A < 0 and A > 0), ``ratio``, ``approx_kl`` (k3 of
        policy and old policy), ``kl`` (k3 to the reference), ``mismatch_kl`` (k3 of old policy and sampler),
        ``mismatch_kept``.

    Raises ConfigError for unknown names and for what is missing, ValueError for shapes that do not fit.
    """
    row = with_knobs(algo, knobs)
    _check_given(row, knobs, groups, ref_logprobs, sampler_logprobs)
    terms = policy_terms(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        level=row.ratio,
        groups=groups,
        sampler_logprobs=sampler_logprobs,
    )
    check_shapes(logprobs.shape, "[batch, tokens]", ref_logprobs=ref_logprobs, entropies=entropies)
    counts = denominators or policy_denominators([terms.mask], [terms.groups])
    surrogate = surrogate_of(row)
    taken = set(knobs_of(surrogate))
    losses, clipped = surrogate(terms, **{name: row.knobs[name] for name in row.knobs if name in taken})
    weights = _weights(row, terms, entropies, whole=denominators is None)
    if weights is not None:
        if losses.shape != terms.mask.shape:
            raise ConfigError(
                "this loss is one of whole groups: no weights or masks by token", where=str(algo)
            )
        losses = losses * weights
    loss = _aggregate(row.aggregation, losses, terms.mask, counts, max_completion_length)
    metrics = _metrics(terms, clipped, weights, counts)
    if ref_logprobs is not None:
        reference = ref_logprobs.detach().to(terms.logprobs.dtype).where(terms.mask, 0)
        if row.beta and not row.kl_in_reward:
            kl = KL_ESTIMATORS[row.kl](terms.logprobs, reference, terms.log_ratio)
            how = "sequence_mean" if row.aggregation == "group_mean" else row.aggregation
            loss = loss + row.beta * _aggregate(how, kl, terms.mask, counts, max_completion_length)
        metrics["kl"] = _share(k3(terms.logprobs.detach(), reference), terms.mask, counts)
    return loss, metrics


def _check_given(
    row: Algorithm,
    knobs: dict[str, Any],
    groups: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
) -> None:
    """Raise ConfigError for a knob whose tensors are missing, and for an unknown KL estimator."""
    lookup(KL_ESTIMATORS, row.kl, "KL estimator")
    if row.aggregation == "group_mean" and groups is None:
        raise ConfigError("this loss compares the samples of a prompt", where="groups", fix="groups=")
    if knobs.get("mismatch", "none") != "none" and sampler_logprobs is None:
        raise ConfigError(
            "a weight against the mismatch needs the sampler's log-probabilities",
            where="mismatch",
            fix="sampler_logprobs=",
        )
    if knobs.get("beta") and not row.kl_in_reward and ref_logprobs is None:
        raise ConfigError(
            "a KL term needs the log-probabilities of the reference", where="beta", fix="ref_logprobs="
        )


def _weights(row: Algorithm, terms: PolicyTerms, entropies: Tensor | None, *, whole: bool) -> Tensor | None:
    """Product of mismatch weight, off-policy mask and entropy mask, without gradient; None when there is none."""
    parts: list[Tensor] = []
    if row.mismatch != "none" and terms.log_mismatch is not None:
        function = MISMATCH_WEIGHTS[row.mismatch]
        taken = knobs_of(function)
        chosen = {name: value for name, value in row.knobs.items() if name in taken}
        parts.append(function(terms, terms.log_mismatch, **chosen))
    if row.knobs.get("opsm_delta") is not None:
        parts.append(~off_policy_sequences(terms, row.knobs["opsm_delta"]))
    if row.knobs.get("top_entropy_quantile", 1.0) != 1 or row.knobs.get("entropy_threshold") is not None:
        if entropies is None:
            raise ConfigError("a mask by entropy needs entropies", where="entropies")
        parts.append(entropies.detach() >= _threshold(row, entropies.detach(), terms.mask, whole))
    if not parts:
        return None
    product = torch.ones_like(terms.advantages)
    for part in parts:
        product = product * part
    return product.where(terms.mask, 0)


def _threshold(row: Algorithm, entropies: Tensor, mask: Tensor, whole: bool) -> float:
    threshold = row.knobs.get("entropy_threshold")
    if threshold is not None:
        return float(threshold)
    if not whole:
        raise ConfigError(
            "the quantile of a micro-batch is not that of the step",
            where="top_entropy_quantile",
            fix="entropy_threshold=swift.objectives.policy.corrections.entropy_threshold(...) of the whole step",
        )
    return entropy_threshold(entropies, mask, row.knobs["top_entropy_quantile"])


def _metrics(
    terms: PolicyTerms, clipped: Tensor | None, weights: Tensor | None, counts: Denominators
) -> dict[str, Tensor]:
    log_ratio, mask = terms.level_log_ratio.detach(), terms.mask
    metrics = {
        "ratio": _share(log_ratio.exp(), mask, counts),
        "approx_kl": _share(k3(terms.old_logprobs, terms.logprobs.detach()), mask, counts),
    }
    if clipped is not None:
        metrics["clip_low"] = _share((clipped & (terms.advantages < 0)).to(log_ratio), mask, counts)
        metrics["clip_high"] = _share((clipped & (terms.advantages > 0)).to(log_ratio), mask, counts)
    if terms.log_mismatch is not None:
        metrics["mismatch_kl"] = _share(k3(terms.behaviour_logprobs, terms.old_logprobs), mask, counts)
    if weights is not None:
        metrics["mismatch_kept"] = _share((weights != 0).to(log_ratio), mask, counts)
    return metrics


def _share(values: Tensor, mask: Tensor, counts: Denominators) -> Tensor:
    return (values * mask).sum() / counts.target_weight


def _aggregate(
    name: str, losses: Tensor, mask: Tensor, counts: Denominators, max_completion_length: int | None
) -> Tensor:
    if name == "constant_length" and max_completion_length is None:
        raise ConfigError(
            "this aggregation divides by the longest completion allowed", where="max_completion_length"
        )
    return lookup(AGGREGATIONS, name, "aggregation")(losses, mask, counts, max_completion_length)


def _sequence_mean(losses: Tensor, mask: Tensor, counts: Denominators, _: int | None) -> Tensor:
    """``(1/N) sum_i (1/T_i) sum_t``: GRPO, GSPO."""
    return masked_mean(losses, mask).sum() / _sequences(counts)


def _token_mean(losses: Tensor, mask: Tensor, counts: Denominators, _: int | None) -> Tensor:
    """``sum / tokens of the step``: DAPO, CISPO."""
    return (losses * mask).sum() / counts.target_weight


def _micro_batch_mean(losses: Tensor, mask: Tensor, counts: Denominators, _: int | None) -> Tensor:
    """``sum / tokens of this micro-batch``, averaged over micro-batches: BNPO. Depends on how the step is split."""
    if counts.num_micro_batches > 1:
        warnings.warn("bnpo: the loss depends on how the step is split into micro-batches", stacklevel=4)
    return (losses * mask).sum() / mask.sum().clamp(min=1) / counts.num_micro_batches


def _constant_length(losses: Tensor, mask: Tensor, counts: Denominators, longest: int | None) -> Tensor:
    """``sum / (N L_max)``: Dr. GRPO."""
    assert longest is not None
    return (losses * mask).sum() / (_sequences(counts) * longest)


def _sequence_sum(losses: Tensor, mask: Tensor, counts: Denominators, _: int | None) -> Tensor:
    """``(1/N) sum_i sum_t``: the gradient of whole sequences' log-probabilities (RLOO, OPO, MaxRL); LUSPO."""
    return (losses * mask).sum() / _sequences(counts)


def _group_mean(losses: Tensor, mask: Tensor, counts: Denominators, _: int | None) -> Tensor:
    """``(1/G) sum_g`` of losses ``[groups]``: REAL."""
    if losses.ndim != 1 or counts.num_groups is None:
        raise ConfigError("group_mean is the aggregation of real, and needs groups", where="aggregation")
    return losses.sum() / max(counts.num_groups, 1)


def _sequences(counts: Denominators) -> int:
    if counts.num_sequences is None:
        raise ConfigError("the denominators hold no number of sequences", fix="policy_denominators(masks)")
    return max(counts.num_sequences, 1)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, Denominators, int | None], Tensor]] = {
    "sequence_mean": _sequence_mean,
    "token_mean": _token_mean,
    "micro_batch_mean": _micro_batch_mean,
    "constant_length": _constant_length,
    "sequence_sum": _sequence_sum,
    "group_mean": _group_mean,
}
