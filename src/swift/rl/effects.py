"""Options of policy optimisation that the algorithm, or another option, leaves without any effect."""

from __future__ import annotations

from swift.config.schema import Resolved
from swift.core.errors import ConfigError
from swift.objectives.policy.algorithms import Algorithm

__all__ = ["check_effects"]

_COSINE = (
    "cosine_min_len_value_wrong", "cosine_max_len_value_wrong", "cosine_min_len_value_correct",
    "cosine_max_len_value_correct", "cosine_max_len",
)  # fmt: skip
_REPETITION = ("repetition_n_grams", "repetition_max_penalty")
_SOFT = ("soft_max_length", "soft_cache_length")
_CHORD = (
    "chord_sft_per_device_train_batch_size", "chord_enable_phi_function", "chord_mu_warmup_steps",
    "chord_mu_decay_steps", "chord_mu_peak", "chord_mu_valley",
)  # fmt: skip
_FAILURES = ("reward_timeout", "on_reward_failure", "reward_num_proc")
_SAMPLED = (
    "reward_funcs", "reward_model", "reward_weights", "reward_args", *_FAILURES, "dynamic_sample", "max_resample_times",
    "soft_overlong", *_SOFT, *_COSINE, *_REPETITION, "max_mismatch", "save_rollouts", "top_p", "top_k",
)  # fmt: skip


def check_effects(resolved: Resolved, row: Algorithm) -> None:
    """Refuse what the user set in vain; a plan only warns of it.

    Args:
        row: the algorithm, with all knobs in place; options that it derives are derived.

    Raises ConfigError with what would give the option an effect.
    """
    config = resolved.config
    policy = config.policy
    if row.advantage == "gdpo" and row.kl_in_reward and row.beta:
        raise ConfigError(
            "gdpo normalises each reward on its own, so that the KL can be part of none",
            where="--kl_in_reward",
            fix="--kl_in_reward false",
        )
    rewards = (*policy.reward_funcs, *(["soft_overlong"] if policy.soft_overlong else []))
    reference = ("ref_model", "ref_adapters", "sync_ref_model", "kl_estimator", "kl_in_reward")
    for is_so, names, why, fix in (
        (policy.replay, _SAMPLED, "answers and rewards are those of another run", "leave out --replay"),
        (not row.beta, reference, "beta is 0: there is no reference", "--beta 0.04"),
        (
            row.kl_in_reward and policy.kl_estimator != "k1",
            ("kl_estimator",),
            "the KL is part of the reward, and that is k1",
            "--kl_in_reward false",
        ),
        (
            policy.old_logprobs == "sampler",
            ("mismatch", "mismatch_threshold"),
            "ratios refer to the sampler itself",
            "--old_logprobs recompute",
        ),
        (not policy.dynamic_sample, ("max_resample_times",), "nothing is sampled again", "--dynamic_sample true"),
        (not policy.probe_sequences, ("max_mismatch",), "nothing is compared", "--probe_sequences 1"),
        ("soft_overlong" not in rewards, _SOFT, "long answers are not punished", "--soft_overlong true"),
        ("cosine" not in rewards, _COSINE, "cosine is not among the rewards", "--reward_funcs cosine"),
        ("repetition" not in rewards, _REPETITION, "repetition is not among the rewards", "--reward_funcs repetition"),
        (not rewards, _FAILURES, "there are no reward functions", "--reward_funcs FILE.py:function"),
        (not policy.chord_sft_dataset, _CHORD, "there is no expert", "--chord_sft_dataset FILE"),
    ):  # fmt: skip
        for name in names if is_so else ():
            if resolved.is_explicit(name) and resolved.value(name):
                resolved.refuse(name, "has no effect", why=why, fix=f"leave it out, or {fix}")
