"""Learning from preferences: which loss, against which reference."""

from __future__ import annotations

from typing import Literal, get_args

from swift.config.option import Section, option

DpoType = Literal["dpo", "ipo"]
PairType = Literal[DpoType, "orpo", "simpo", "cpo"]
PolicyType = Literal[
    "grpo", "dapo", "dr_grpo", "bnpo", "gspo", "gspo_token", "cispo", "sapo", "rloo", "reinforce_pp",
    "reinforce_pp_baseline", "gmpo", "dppo", "prime_rl", "vespo", "real", "fipo", "opo", "gdpo", "maxrl", "luspo",
    "chord", "reinforce_mean",
]  # fmt: skip
LaterType = Literal["ppo", "gkd"]
PreferenceLoss = Literal[
    "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "aot", "aot_unpaired", "discopop", "sft", "cpo", "simpo", "orpo", "kto", "apo_zero_unpaired",
]  # fmt: skip
PolicyLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo", "real", "fipo"]

DPO_TYPES: tuple[str, ...] = get_args(DpoType)
PAIR_TYPES: tuple[str, ...] = get_args(PairType)
"""Types whose data are pairs and whose loss reads log-probabilities of whole answers."""
PREFERENCE_TYPES = (*PAIR_TYPES, "kto", "rm")
POLICY_TYPES: tuple[str, ...] = get_args(PolicyType)
"""Policy optimisation: the names of the rows of ``objectives/policy/algorithms.py``."""
LATER_TYPES: tuple[str, ...] = get_args(LaterType)
"""Types that can be planned only."""
POLICY_LOSSES: tuple[str, ...] = get_args(PolicyLoss)
"""Values of ``loss_type`` in policy optimisation."""


class RlhfSection(Section):
    """Preference learning and reward models."""

    rlhf_type: Literal[DpoType, "kto", "orpo", "simpo", "cpo", "rm", PolicyType, LaterType] | None = option(
        None,
        "Method; default: dpo. rm trains a reward model; grpo and what follows learn from rewards.",
        essential=True,
    )
    rlhf_loss_type: list[Literal[PreferenceLoss, PolicyLoss]] = option(
        [], "Loss (in short: loss_type), several of them for a mixture; default: by rlhf_type."
    )
    loss_weights: list[float] = option([], "Weight of each loss of a mixture; default: 1 each.")
    beta: float | None = option(
        None,
        "Weight of the reference (orpo: of the odds ratio); default: 0.1, simpo 2.0; grpo and others: their papers'.",
        essential=True,
        ge=0,
    )
    label_smoothing: float | None = option(
        None, "Share of pairs taken to be the wrong way round; default: 0, exo_pair 0.001.", ge=0, lt=0.5
    )
    rpo_alpha: float | None = option(
        None,
        "dpo: add so much of the chosen answers' negative log-likelihood per token (arXiv 2404.19733).",
        ge=0,
    )
    ld_alpha: float | None = option(
        None,
        "dpo: weight of the tokens behind the length that both answers have (LD-DPO, arXiv 2409.06411).",
        ge=0,
        le=1,
    )
    discopop_tau: float = option(0.05, "discopop: temperature of its mixture.", gt=0)
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = option(
        "reverse_kl", "dpo: divergence to the reference (arXiv 2309.16240)."
    )
    f_alpha_divergence_coef: float = option(0.5, "alpha_divergence: its alpha.")
    cpo_alpha: float | None = option(
        None, "cpo, simpo: weight of the negative log-likelihood per token; default: cpo 1, simpo 0.", ge=0
    )
    simpo_gamma: float = option(1.0, "simpo: margin between the answers.")
    desirable_weight: float = option(1.0, "kto: weight of desirable answers.", ge=0)
    undesirable_weight: float = option(1.0, "kto: weight of undesirable answers.", ge=0)
    center_rewards_coefficient: float = option(
        0.0, "rm: pulls the rewards of a pair towards a sum of 0 (arXiv 2312.09244).", ge=0
    )
    reference_free: bool = option(False, "dpo: a reference that gives all answers the same probability.")
    ref_model: str | None = option(
        None, "Reference model; default: the model as training began (LoRA: the adapter switched off)."
    )
    ref_adapters: list[str] = option([], "Adapter of the reference; on ref_model, or on model.")
    precompute_ref_log_probs: bool = option(
        False, "Compute the reference once before training, and keep it; then no reference stays in memory."
    )

    @property
    def is_policy(self) -> bool:
        """The model's own answers are sampled and rewarded."""
        return self.rlhf_type in POLICY_TYPES

    @property
    def reads_pairs(self) -> bool:
        """Log-probabilities of chosen and rejected answers."""
        return self.rlhf_type in PAIR_TYPES

    @property
    def is_paired(self) -> bool:
        """A sample is two answers."""
        return self.rlhf_type in (*PAIR_TYPES, "rm")

    @property
    def runs_reference(self) -> bool:
        """The reference is computed in every step."""
        reads = self.rlhf_type in (*DPO_TYPES, "kto") or (self.is_policy and bool(self.beta))
        reads = reads and not self.reference_free
        return reads and not self.precompute_ref_log_probs

    @property
    def is_in_batch(self) -> bool:
        """The loss compares the rows of a micro-batch with one another."""
        return bool({"kto", "aot", "aot_unpaired"} & set(self.rlhf_loss_type))
