"""Policy optimisation: which algorithm, what is sampled, what is rewarded."""

from __future__ import annotations

from typing import Any, Literal

from swift.config.option import Section, option


class PolicySection(Section):
    """Reinforcement learning (rlhf_type grpo and its relatives)."""

    algo: str | None = option(
        None,
        "Algorithm: a row of the table (grpo, dapo, gspo...) or your own (FILE.py:ROW, package.module.ROW); default: "
        "rlhf_type.",
        essential=True,
    )
    algo_args: dict[str, Any] = option(
        {}, 'Parts and knobs of the row to replace, beside the options below: JSON object {"dual_clip": 3}.'
    )
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] | None = option(
        None, "Importance ratio of each token, or one for each sequence; default: by algo."
    )
    advantage_estimator: str | None = option(
        None, "How rewards become advantages: grpo, rloo, reinforce_pp_baseline, opo...; default: by algo."
    )
    scale_rewards: Literal["group", "batch", "none", "gdpo"] | None = option(
        None, "Advantages are divided by the standard deviation of the group, of the batch, or not."
    )
    epsilon: float | None = option(None, "Clip ratios below 1 - epsilon; default: by algo.", gt=0)
    epsilon_high: float | None = option(
        None, "Clip ratios above 1 + epsilon_high (cispo: above this); default: by algo.", gt=0
    )
    delta: float | None = option(
        None, "Cut ratios to this first (two-sided clipping, arXiv 2505.07291).", gt=1
    )
    tau_pos: float | None = option(None, "sapo: temperature for positive advantages.", gt=0)
    tau_neg: float | None = option(None, "sapo: temperature for negative advantages.", gt=0)
    real_tau: float | None = option(None, "real: temperature of its scores.", gt=0)
    kl_estimator: Literal["k1", "k2", "k3", "ratio_k3"] | None = option(
        None, "What is differentiated for the KL to the reference; k3 is that of GRPO's paper."
    )
    kl_in_reward: bool | None = option(
        None, "The KL is part of the reward, not of the loss; default: by algo."
    )
    mismatch: (
        Literal[
            "none",
            "token_truncate",
            "token_mask",
            "sequence_truncate",
            "sequence_mask",
            "sequence_mask_tis",
            "geometric_mask",
        ]
        | None
    ) = option(None, "Weight against differences of sampler and trainer; default: by algo.")
    mismatch_threshold: float | None = option(None, "Its upper bound.", gt=0)
    off_policy_sequence_mask_delta: float | None = option(
        None, "Leave out sequences of negative advantage that the policy has left by more than this.", gt=0
    )
    top_entropy_quantile: float = option(
        1.0, "Learn from the tokens of highest entropy only, this share (arXiv 2506.01939: 0.2).", gt=0, le=1
    )
    num_generations: int = option(8, "Answers to each prompt.", essential=True, ge=1)
    generation_batch_size: int | None = option(
        None, "Answers sampled at a time; default: those of an optimizer step (gspo: of four).", ge=1
    )
    steps_per_generation: int | None = option(
        None, "The same in micro-batches of per_device_train_batch_size, as in ms-swift and TRL.", ge=1
    )
    num_iterations: int = option(1, "How often each batch of answers is learned from.", ge=1)
    old_logprobs: Literal["policy", "sampler", "recompute"] | None = option(
        None,
        "Log-probabilities that ratios refer to: those of the update itself (one update per batch only), the "
        "sampler's, or computed anew before the first update; default: policy, or recompute for several updates.",
    )
    max_mismatch: float | None = option(
        None,
        "Stop when mean log-probabilities of sampler and trainer differ by more; default: 1e-3, 0.05 in half "
        "precision.",
        gt=0,
    )
    probe_sequences: int = option(
        1, "Answers of each batch whose log-probabilities are compared with the trainer's; 0: none.", ge=0
    )
    dynamic_sample: bool | None = option(
        None,
        "Sample again for prompts whose answers all have the same reward; default: by algo (dapo: true).",
    )
    max_resample_times: int = option(3, "dynamic_sample: how often at most.", ge=0)
    overlong_filter: bool | None = option(
        None, "Do not learn from answers that were cut off; default: by algo (dapo: true)."
    )
    soft_overlong: bool | None = option(
        None, "Punish answers that come near the limit; default: by algo (dapo: true)."
    )
    soft_max_length: int | None = option(
        None,
        "soft_overlong: where the punishment is -1; default: max_completion_length.",
        unit="tokens",
        ge=1,
    )
    soft_cache_length: int | None = option(
        None, "soft_overlong: how far before it begins; default: a fifth of that.", unit="tokens", ge=1
    )
    sync_ref_model: bool = option(False, "Move the reference towards the policy now and then.")
    ref_model_sync_steps: int = option(512, "sync_ref_model: how often.", unit="steps", ge=1)
    ref_model_mixup_alpha: float = option(0.6, "sync_ref_model: share of the policy.", gt=0, le=1)
    reward_funcs: list[str] = option(
        [],
        "Rewards: built-in (task, accuracy, format, cosine, repetition, soft_overlong, regex, json_schema, code, "
        "judge...) or your own: FILE.py:function, package.module:function.",
        essential=True,
    )
    reward_model: list[str] = option([], "Reward models: folders of swift rlhf --rlhf_type rm.")
    reward_weights: list[float] = option(
        [], "Weight of each of reward_funcs, then of each reward_model; default: 1 each."
    )
    reward_args: dict[str, Any] = option({}, 'Options of rewards: JSON object {"NAME": {"option": value}}.')
    reward_timeout: float = option(30.0, "Deadline of a reward for one answer.", unit="seconds", gt=0)
    on_reward_failure: Literal["zero", "drop", "stop"] = option(
        "zero", "A reward hangs, dies or raises: it counts 0, the answer is left out, or the run stops."
    )
    reward_num_proc: int = option(2, "Processes that compute rewards.", ge=1)
    cosine_min_len_value_wrong: float = option(-0.5, "cosine: wrong, shortest answer.")
    cosine_max_len_value_wrong: float = option(0.0, "cosine: wrong, longest answer.")
    cosine_min_len_value_correct: float = option(1.0, "cosine: right, shortest answer.")
    cosine_max_len_value_correct: float = option(0.5, "cosine: right, longest answer.")
    cosine_max_len: int | None = option(
        None, "cosine: longest answer; default: max_completion_length.", unit="tokens", ge=1
    )
    repetition_n_grams: int = option(3, "repetition: words of an n-gram.", ge=1)
    repetition_max_penalty: float = option(-1.0, "repetition: reward when everything is repeated.", le=0)
    chord_sft_dataset: list[str] = option([], "chord: the expert's answers.")
    chord_sft_per_device_train_batch_size: int = option(1, "chord: its rows of a micro-batch.", ge=1)
    chord_enable_phi_function: bool | None = option(
        None, "chord: weigh each token by p (1 - p); default: by algo."
    )
    chord_mu_warmup_steps: int = option(0, "chord: steps in which its weight rises to the peak.", ge=0)
    chord_mu_decay_steps: int = option(200, "chord: steps in which it falls to the valley.", ge=0)
    chord_mu_peak: float | None = option(None, "chord: largest weight; default: 0.9.", ge=0, le=1)
    chord_mu_valley: float | None = option(None, "chord: weight in the end; default: 0.05.", ge=0, le=1)
    save_rollouts: bool = option(True, "Keep all answers in the run folder, rollouts/ (swift rollouts show).")
    share_prompts: bool = option(
        True, "Compute a prompt once for all its answers in a micro-batch, where the attention allows it."
    )
    replay: str | None = option(
        None,
        "Learn from the answers of another run (its folder) instead of sampling; rewards are those logged.",
    )
    use_vllm_sampler: bool = option(
        False, "Sample with a pool of vLLM servers (planned only: a run samples with the embedded engine)."
    )
    vllm_config: dict[str, Any] = option({}, "Options of that pool (planned only).")
