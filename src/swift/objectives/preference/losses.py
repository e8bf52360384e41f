"""Losses of preferences between answers, as pure functions of log-probabilities of whole answers.

c, j: log-ratios to the reference of the chosen and the rejected answer; d = c - j; b = beta; ls = log sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swift.core.errors import ConfigError
from swift.objectives.inputs import at_least_float32, check_shapes
from swift.objectives.knobs import check_knobs, knobs_of, lookup

__all__ = [
    "DEPENDS_ON_BATCH",
    "PREFERENCE_LOSSES",
    "Pairs",
    "kto_loss",
    "needs_reference",
    "preference_loss",
    "reward_loss",
]

ls = F.logsigmoid


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers, ``[batch]`` each.

    Attributes:
        chosen, rejected: sums of log-probabilities under the policy, differentiable.
        ref_chosen, ref_rejected: under the reference; 0 without one.
        chosen_lengths, rejected_lengths: tokens, or None.
        beta: b.
        divergence: name and coefficient of the f-divergence to the reference.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    beta: float
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    divergence: tuple[str, float] = ("reverse_kl", 0.5)

    @property
    def c(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def j(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def scores(self) -> tuple[Tensor, Tensor]:
        """f'(ratio) of both answers up to a constant: c and j themselves for the reverse KL (arXiv 2309.16240)."""
        return self._score(self.c), self._score(self.j)

    @property
    def d(self) -> Tensor:
        chosen, rejected = self.scores
        return chosen - rejected

    def _score(self, log_ratio: Tensor) -> Tensor:
        name, coefficient = self.divergence
        if name == "reverse_kl" or (name == "alpha_divergence" and abs(coefficient - 1) < 1e-6):
            return log_ratio
        if name == "forward_kl":
            return 1 - (-log_ratio).exp()
        if name == "js_divergence":
            return math.log(2) + ls(log_ratio)
        if name == "alpha_divergence":
            return ((coefficient - 1) * log_ratio).expm1() / (coefficient - 1)
        raise ConfigError(
            f"unknown f-divergence {name!r}", fix="reverse_kl, forward_kl, js_divergence or alpha_divergence"
        )

    def lengths(self, kind: str) -> tuple[Tensor, Tensor]:
        if self.chosen_lengths is None or self.rejected_lengths is None:
            raise ConfigError(f"{kind} takes means over tokens", where="chosen_lengths, rejected_lengths")
        return self.chosen_lengths.clamp(min=1), self.rejected_lengths.clamp(min=1)

    def averages(self, kind: str) -> tuple[Tensor, Tensor]:
        """Log-probabilities per token."""
        chosen, rejected = self.lengths(kind)
        return self.chosen / chosen, self.rejected / rejected


def sigmoid(pairs: Pairs, *, label_smoothing: float = 0.0) -> Tensor:
    """``-(1-e) ls(b d) - e ls(-b d)``: DPO (arXiv 2305.18290), with label smoothing e cDPO."""
    logits = pairs.beta * pairs.d
    return -(1 - label_smoothing) * ls(logits) - label_smoothing * ls(-logits)


def sigmoid_norm(pairs: Pairs, *, label_smoothing: float = 0.0) -> Tensor:
    """DPO of log-ratios per token (length-normalised; SmPO, Tulu 3 2411.15124)."""
    (chosen, rejected), (long, short) = pairs.scores, pairs.lengths("sigmoid_norm")
    logits = pairs.beta * (chosen / long - rejected / short)
    return -(1 - label_smoothing) * ls(logits) - label_smoothing * ls(-logits)


def robust(pairs: Pairs, *, label_smoothing: float = 0.0) -> Tensor:
    """``[-(1-e) ls(b d) + e ls(-b d)] / (1 - 2e)`` (arXiv 2403.00409)."""
    _check_smoothing("robust", 0 <= label_smoothing < 0.5, "0.1")
    logits = pairs.beta * pairs.d
    loss = -(1 - label_smoothing) * ls(logits) + label_smoothing * ls(-logits)
    return loss / (1 - 2 * label_smoothing)


def hinge(pairs: Pairs) -> Tensor:
    """``max(0, 1 - b d)`` (SLiC, arXiv 2305.10425; RSO, 2309.06657)."""
    return F.relu(1 - pairs.beta * pairs.d)


def ipo(pairs: Pairs) -> Tensor:
    """``(d - 1/(2b))^2`` (IPO, arXiv 2310.12036).

    With lengths given d is of log-ratios per token, as in TRL and ms-swift; without, of sums, as in OpenRLHF.
    """
    chosen, rejected = pairs.scores
    if pairs.chosen_lengths is not None and pairs.rejected_lengths is not None:
        long, short = pairs.lengths("ipo")
        chosen, rejected = chosen / long, rejected / short
    return (chosen - rejected - 1 / (2 * pairs.beta)).square()


def exo_pair(pairs: Pairs, *, label_smoothing: float = 1e-3) -> Tensor:
    """``sig(b d)(ls(b d) - log(1-e)) + sig(-b d)(ls(-b d) - log e)`` (EXO, arXiv 2402.00856, equation 16)."""
    _check_smoothing("exo_pair", 0 < label_smoothing < 1, "1e-3")
    logits = pairs.beta * pairs.d
    kept = logits.sigmoid() * (ls(logits) - math.log1p(-label_smoothing))
    return kept + (-logits).sigmoid() * (ls(-logits) - math.log(label_smoothing))


def nca_pair(pairs: Pairs) -> Tensor:
    """``-ls(b c) - ls(-b c)/2 - ls(-b j)/2`` (NCA, arXiv 2402.05369)."""
    c, j = pairs.beta * pairs.c, pairs.beta * pairs.j
    return -ls(c) - 0.5 * ls(-c) - 0.5 * ls(-j)


def bco_pair(pairs: Pairs, *, bco_delta: float = 0.0) -> Tensor:
    """``-ls(b c - delta) - ls(-(b j - delta))`` (BCO, arXiv 2404.04656); delta: a mean of rewards, 0 as in TRL."""
    return -ls(pairs.beta * pairs.c - bco_delta) - ls(-(pairs.beta * pairs.j - bco_delta))


def sppo_hard(pairs: Pairs) -> Tensor:
    """``(c - 1/(2b))^2 + (j + 1/(2b))^2`` (SPPO with hard labels, arXiv 2405.00675)."""
    return (pairs.c - 0.5 / pairs.beta).square() + (pairs.j + 0.5 / pairs.beta).square()


def apo_zero(pairs: Pairs) -> Tensor:
    """``1 - sig(b c) + sig(b j)`` (APO-zero, arXiv 2408.06266)."""
    return 1 - (pairs.beta * pairs.c).sigmoid() + (pairs.beta * pairs.j).sigmoid()


def apo_down(pairs: Pairs) -> Tensor:
    """``sig(b c) + 1 - sig(b (c - j))`` (APO-down, arXiv 2408.06266)."""
    return (pairs.beta * pairs.c).sigmoid() + 1 - (pairs.beta * (pairs.c - pairs.j)).sigmoid()


def aot(pairs: Pairs, *, label_smoothing: float = 0.0) -> Tensor:
    """DPO of the sorted margins of policy and reference (AOT paired, arXiv 2406.05882): compares the batch's pairs."""
    policy = (pairs.chosen - pairs.rejected).sort().values
    logits = pairs.beta * (policy - (pairs.ref_chosen - pairs.ref_rejected).sort().values)
    return -(1 - label_smoothing) * ls(logits) - label_smoothing * ls(-logits)


def aot_unpaired(pairs: Pairs, *, label_smoothing: float = 0.0) -> Tensor:
    """DPO of the sorted log-ratios (AOT unpaired, arXiv 2406.05882): compares the batch's answers."""
    logits = pairs.beta * (pairs.c.sort().values - pairs.j.sort().values)
    return -(1 - label_smoothing) * ls(logits) - label_smoothing * ls(-logits)


def discopop(pairs: Pairs, *, discopop_tau: float = 0.05) -> Tensor:
    """``-ls(b d)(1 - m) + exp(-b d) m``, ``m = sig(b d / tau)`` (DiscoPOP, arXiv 2406.08414)."""
    logits = pairs.beta * pairs.d
    share = (logits / discopop_tau).sigmoid()
    return -ls(logits) * (1 - share) + (-logits).exp() * share


def sft(pairs: Pairs) -> Tensor:
    """Negative log-likelihood per token of the chosen answer; for mixtures (MPO, arXiv 2411.10442)."""
    return -pairs.averages("sft")[0]


def cpo(pairs: Pairs, *, label_smoothing: float = 0.0, cpo_alpha: float = 0.0) -> Tensor:
    """``-ls(b (log p_c - log p_j)) + alpha NLL`` (CPO, arXiv 2401.08417): DPO without a reference.

    Here alpha is 0, the preference term alone; training sets it to the paper's 1. NLL is per token.
    """
    logits = pairs.beta * (pairs.chosen - pairs.rejected)
    loss = -(1 - label_smoothing) * ls(logits) - label_smoothing * ls(-logits)
    return loss + cpo_alpha * sft(pairs) if cpo_alpha else loss


def simpo(
    pairs: Pairs, *, simpo_gamma: float = 1.0, label_smoothing: float = 0.0, cpo_alpha: float = 0.0
) -> Tensor:
    """``-ls(b (mean log p_c - mean log p_j) - gamma)`` (SimPO, arXiv 2405.14734); cpo_alpha NLL: CPO-SimPO."""
    chosen, rejected = pairs.averages("simpo")
    logits = pairs.beta * (chosen - rejected) - simpo_gamma
    loss = -(1 - label_smoothing) * ls(logits) - label_smoothing * ls(-logits)
    return loss + cpo_alpha * sft(pairs) if cpo_alpha else loss


def orpo(pairs: Pairs) -> Tensor:
    """``NLL - b ls(log odds ratio)`` (ORPO, arXiv 2403.07691; its lambda is beta here), of means per token."""
    chosen, rejected = pairs.averages("orpo")
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - pairs.beta * ls(log_odds)


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        sigmoid,
        sigmoid_norm,
        robust,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        bco_pair,
        sppo_hard,
        apo_zero,
        apo_down,
        aot,
        aot_unpaired,
        discopop,
        sft,
        cpo,
        simpo,
        orpo,
    )
}
_NAMES = {**PREFERENCE_LOSSES, "dpo": sigmoid, "cdpo": sigmoid, "aot_pair": aot_unpaired}
_DIVERGENT = (sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair, discopop)
_WITHOUT_REFERENCE = (cpo, simpo, orpo, sft)
DEPENDS_ON_BATCH = ("aot", "aot_unpaired")
"""Losses that compare the pairs of a micro-batch with one another."""


def needs_reference(kind: str) -> bool:
    """Whether the loss reads log-probabilities of a reference."""
    return lookup(_NAMES, kind, "preference loss") not in _WITHOUT_REFERENCE


def preference_loss(
    kind: str,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    beta: float,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    **knobs: Any,
) -> Tensor:
    """The loss of each pair, ``[batch]``.

    Args:
        kind: a name of ``PREFERENCE_LOSSES`` (dpo and cdpo are sigmoid).
        chosen, rejected: ``[batch]`` sums of log-probabilities of the answers, differentiable.
        ref_chosen, ref_rejected: the same under the reference; None: a reference that gives all answers the same.
        beta: weight of the reference (orpo: of the odds ratio).
        chosen_lengths, rejected_lengths: ``[batch]`` tokens; what takes means needs them.
        f_divergence_type, f_alpha_divergence_coef: divergence to the reference, for losses of d.
        knobs: of the loss.

    Raises ConfigError for unknown names, for what is missing and for numbers that make no sense, ValueError for shapes
    that do not fit.
    """
    function = lookup(_NAMES, kind, "preference loss")
    check_knobs(
        knobs, knobs_of(function), kind, {name: knobs_of(one) for name, one in PREFERENCE_LOSSES.items()}
    )
    if (ref_chosen is None) != (ref_rejected is None):
        raise ConfigError(
            "the reference of one answer of each pair is missing", where="ref_chosen, ref_rejected"
        )
    if f_divergence_type != "reverse_kl" and function not in _DIVERGENT:
        raise ConfigError(
            f"{kind} has no form for {f_divergence_type}", where="f_divergence_type", fix="reverse_kl"
        )

    if not beta > 0:
        raise ConfigError(f"beta must be above 0, not {beta}", where="beta", fix="0.1")
    if not 0 <= knobs.get("label_smoothing", 0.0) <= 1:
        raise ConfigError("a share of the pairs, from 0 to 1", where="label_smoothing", fix="0.1")
    chosen = at_least_float32(chosen)

    given = {
        "rejected": rejected,
        "ref_chosen": torch.zeros_like(chosen) if ref_chosen is None else ref_chosen.detach(),
        "ref_rejected": torch.zeros_like(chosen) if ref_rejected is None else ref_rejected.detach(),
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    known = {
        name: torch.as_tensor(one, device=chosen.device).to(chosen.dtype)
        for name, one in given.items()
        if one is not None
    }
    check_shapes(tuple(chosen.shape[:1]), "[batch]", chosen=chosen, **known)
    divergence = (f_divergence_type, f_alpha_divergence_coef)
    return function(Pairs(chosen, beta=beta, divergence=divergence, **known), **knobs)


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
) -> Tensor:
    """The loss of each answer, ``[batch]`` (KTO, arXiv 2402.01306).

    ``lam_D (1 - sig(b (r - z0)))`` for desirable answers, ``lam_U (1 - sig(b (z0 - r)))`` for others, r the log-ratio.
    ``apo_zero_unpaired`` (APO, 2408.06266) has z0 = 0.

    Args:
        logprobs, ref_logprobs: ``[batch]`` sums over the answer.
        desirable: ``[batch]`` bool.
        kl: z0, the mean log-ratio of mismatched pairs; what is below 0 counts as 0, and nothing is learned through it.

    Raises ConfigError for an unknown loss, ValueError for shapes that do not fit.
    """
    if loss_type not in ("kto", "apo_zero_unpaired"):
        raise ConfigError(f"unknown loss {loss_type!r}", where="loss_type", fix="kto or apo_zero_unpaired")
    logprobs, ref_logprobs = at_least_float32(logprobs), at_least_float32(ref_logprobs)
    check_shapes(
        tuple(logprobs.shape[:1]),
        "[batch]",
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        desirable=desirable,
    )
    baseline = torch.as_tensor(kl, dtype=logprobs.dtype, device=logprobs.device).detach().clamp(min=0)
    if loss_type == "apo_zero_unpaired":
        baseline = torch.zeros_like(baseline)
    gain = beta * (logprobs - ref_logprobs.detach() - baseline)
    good = desirable_weight * (1 - gain.sigmoid())
    return torch.where(desirable != 0, good, undesirable_weight * (1 - (-gain).sigmoid()))


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """``-ls(r_c - r_j - margin) + coefficient (r_c + r_j)^2``, ``[batch]``.

    Bradley-Terry (InstructGPT, arXiv 2203.02155), margin (Llama 2, 2307.09288), centering (2312.09244). Raises
    ValueError for shapes that do not fit.
    """
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    check_shapes(tuple(chosen.shape[:1]), "[batch]", chosen=chosen, rejected=rejected, margin=margin)
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -ls(difference)
    if center_rewards_coefficient:
        loss = loss + center_rewards_coefficient * (chosen + rejected).square()
    return loss


def _check_smoothing(kind: str, fits: bool, fix: str) -> None:
    if not fits:
        raise ConfigError(f"{kind} needs another label_smoothing", where="label_smoothing", fix=fix)


def _log1mexp(values: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x < 0, exact at both ends (Maechler 2012)."""
    values = values.clamp(max=-1e-12)
    near = values > -math.log(2)
    # Each branch sees only values that it can take: a masked-out infinity would make NaN gradients.
    small = (-values.where(near, -1.0).expm1()).log()
    large = (-values.where(~near, -1.0).exp()).log1p()
    return torch.where(near, small, large)
