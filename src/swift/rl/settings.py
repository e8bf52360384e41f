"""What the options of policy optimisation come to: the algorithm with all knobs in place, and sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from swift.config.schema import Config, Resolved
from swift.core.errors import ConfigError
from swift.objectives.knobs import check_knobs, knobs_of, lookup
from swift.objectives.policy.algorithms import Algorithm, find_algorithm, surrogate_of, with_knobs
from swift.objectives.policy.corrections import MISMATCH_WEIGHTS
from swift.objectives.policy.estimators import ESTIMATORS
from swift.objectives.policy.loss import AGGREGATIONS
from swift.rl.effects import check_effects
from swift.rl.sizes import derive_sizes
from swift.train.preflight import find_checkpoint
from swift.train.prepare import data_order

__all__ = ["PolicySettings", "derive_policy"]

_KNOBS = {
    "epsilon": "epsilon",
    "epsilon_high": "epsilon_high",
    "delta": "delta",
    "tau_pos": "tau_pos",
    "tau_neg": "tau_neg",
    "real_tau": "real_tau",
    "off_policy_sequence_mask_delta": "opsm_delta",
    "importance_sampling_level": "ratio",
    "kl_estimator": "kl",
    "kl_in_reward": "kl_in_reward",
}
"""Option -> part or knob of a row."""


_SCALES = {
    **dict.fromkeys(("dr_grpo", "rloo", "opo", "reinforce_mean"), "none"),
    **dict.fromkeys(("batch", "reinforce_pp", "reinforce_pp_baseline"), "batch"),
}
"""What estimators without the option scale_rewards do."""


@dataclass(frozen=True)
class PolicySettings:
    """Attributes:
    algorithm: the row. ``estimator``: knobs of its estimator of advantages.
    num_prompts: asked at a time; ``num_generations``: answers to each.
    num_updates: optimizer steps that one pass over a batch of answers makes; ``num_iterations``: passes.
    answers_per_step: of an optimizer step; ``micro_batch``: of a forward pass.
    old_logprobs: policy, sampler or recompute.
    """

    algorithm: Algorithm
    estimator: dict[str, Any]
    num_prompts: int
    num_generations: int
    num_updates: int
    num_iterations: int
    answers_per_step: int
    micro_batch: int
    old_logprobs: str

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps for one batch of answers."""
        return self.num_updates * self.num_iterations

    @property
    def needs_entropies(self) -> bool:
        """Tokens are chosen by the entropy of the policy."""
        knobs = self.algorithm.knobs
        return knobs.get("top_entropy_quantile", 1.0) < 1 or knobs.get("entropy_threshold") is not None

    @classmethod
    def read(cls, config: Config, in_step: int) -> PolicySettings:
        """From options that `derive_policy` has completed; ``in_step``: answers of an optimizer step, over all ranks.

        Raises ConfigError for knobs without effect, and for sizes that do not fit.
        """
        policy, training = config.policy, config.training
        algorithm, estimator = _algorithm(config)
        sampled = policy.generation_batch_size or in_step
        if sampled % in_step or sampled % policy.num_generations:
            raise ConfigError(
                f"{sampled} answers sampled at a time are no whole steps of {in_step} in groups of "
                f"{policy.num_generations}",
                where="--generation_batch_size",
                fix=f"--generation_batch_size {math.lcm(in_step, policy.num_generations)}",
            )
        updates = sampled // in_step * policy.num_iterations
        old = policy.old_logprobs or ("policy" if updates == 1 else "recompute")
        if old == "policy" and updates > 1:
            raise ConfigError(
                f"{updates} updates learn from each batch, and only the first has the policy that it was sampled with",
                where="--old_logprobs policy",
                fix="--old_logprobs recompute (or sampler)",
            )
        if (
            algorithm.aggregation == "group_mean"
            and training.per_device_train_batch_size % policy.num_generations
        ):
            raise ConfigError(
                "this loss compares all answers to a prompt, which must lie in one micro-batch",
                where="--per_device_train_batch_size",
                fix=f"--per_device_train_batch_size {policy.num_generations}",
            )
        return cls(
            algorithm,
            estimator,
            sampled // policy.num_generations,
            policy.num_generations,
            sampled // in_step,
            policy.num_iterations,
            in_step,
            training.per_device_train_batch_size,
            old,
        )


def derive_policy(resolved: Resolved) -> PolicySettings:
    """Fill in what the algorithm's row says where the user did not; check it all. Raises ConfigError."""
    config = resolved.config
    in_step = config.training.per_device_train_batch_size * data_order(resolved, find_checkpoint(resolved))[2]
    row = derive_sizes(resolved, in_step)
    for name in ("dynamic_sample", "overlong_filter", "soft_overlong", "chord_enable_phi_function"):
        resolved.derive(name, bool(row.sampling.get(name, False)), "algo")
    for name, usual in (("chord_mu_peak", 0.9), ("chord_mu_valley", 0.05)):
        resolved.derive(name, row.sampling.get(name, usual), "algo")
    settings = PolicySettings.read(config, in_step)
    resolved.derive("old_logprobs", settings.old_logprobs, "num_iterations and generation_batch_size")
    check_effects(resolved, settings.algorithm)
    return settings


def _algorithm(config: Config) -> tuple[Algorithm, dict[str, Any]]:
    """The row with all knobs in place, and the knobs of its estimator of advantages."""
    policy = config.policy
    knobs: dict[str, Any] = {"beta": config.rlhf.beta} if config.rlhf.beta is not None else {}
    if config.rlhf.rlhf_loss_type:
        knobs["loss_type"] = config.rlhf.rlhf_loss_type[0]
    if policy.advantage_estimator is not None:
        knobs["advantage"] = policy.advantage_estimator
    if policy.mismatch is not None:
        knobs["mismatch"] = policy.mismatch
    if policy.scale_rewards == "gdpo":
        knobs["advantage"] = "gdpo"
    knobs |= {
        knob: getattr(policy, name) for name, knob in _KNOBS.items() if getattr(policy, name) is not None
    }
    if policy.top_entropy_quantile < 1:
        knobs["top_entropy_quantile"] = policy.top_entropy_quantile
    kind = (
        knobs.get("advantage", policy.algo_args.get("advantage"))
        or find_algorithm(policy.algo or "grpo").advantage
    )
    if "beta" in policy.algo_args:
        raise ConfigError("beta is an option of its own", where="--algo_args", fix="--beta 0.04")
    takes = set(knobs_of(lookup(ESTIMATORS, kind, "estimator of advantages"))) - {"beta", "mask", "token_kl"}
    if kind == "remax":
        raise ConfigError(
            "remax needs the rewards of greedy answers, which are not sampled here",
            where="--advantage_estimator",
            fix="--advantage_estimator rloo",
        )
    estimator = {name: value for name, value in policy.algo_args.items() if name in takes}
    if policy.scale_rewards not in (None, "gdpo", _SCALES.get(kind)):
        check_knobs(["scale_rewards"], takes, f"advantage_estimator {kind}", {"grpo": ("scale_rewards",)})
        estimator["scale_rewards"] = policy.scale_rewards
    knobs |= {name: value for name, value in policy.algo_args.items() if name not in takes}
    if policy.mismatch_threshold is not None:
        mismatch = knobs.get("mismatch") or find_algorithm(policy.algo or "grpo").mismatch
        known = knobs_of(MISMATCH_WEIGHTS[mismatch]) if mismatch in MISMATCH_WEIGHTS else ()
        if not known:
            raise ConfigError(
                "has no effect without a weight",
                where="--mismatch_threshold",
                fix="--mismatch token_truncate",
            )
        knobs["mismatch_cap" if "mismatch_cap" in known else "mismatch_high"] = policy.mismatch_threshold
    row = with_knobs(policy.algo or "grpo", knobs)
    surrogate_of(row)
    lookup(AGGREGATIONS, row.aggregation, "aggregation")
    return row, estimator
