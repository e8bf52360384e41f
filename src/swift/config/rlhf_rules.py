"""Which options belong to which kind of preference learning, what follows from it, what does not go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swift.config.policy_rules import POLICY_DERIVATIONS, POLICY_OPTIONS, check_policy, policy_metrics
from swift.config.schema import SECTIONS, Resolved
from swift.config.sections.rlhf import DPO_TYPES, LATER_TYPES, PAIR_TYPES, POLICY_TYPES, PREFERENCE_TYPES

__all__ = ["RLHF_DERIVATIONS", "RLHF_OPTIONS", "check_rlhf", "rlhf_metrics"]


_ALONE = {"kto": ("kto", "apo_zero_unpaired"), "orpo": ("orpo",), "simpo": ("simpo",), "cpo": ("cpo",)}
"""Types with losses of their own, the default first; dpo has all the others."""
_PAIRED = (
    "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "aot", "aot_unpaired", "discopop", "sft",
)  # fmt: skip
_SMOOTHED = {"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "cpo", "simpo"}

RLHF_OPTIONS: tuple[tuple[tuple[str, ...], str, tuple[Any, ...]], ...] = (
    (("rpo_alpha", "ld_alpha", "reference_free", "f_divergence_type"), "rlhf_type", DPO_TYPES),
    (("f_alpha_divergence_coef",), "f_divergence_type", ("alpha_divergence",)),
    (("loss_weights",), "rlhf_type", DPO_TYPES),
    (("beta",), "rlhf_type", (*PAIR_TYPES, "kto", *POLICY_TYPES, *LATER_TYPES)),
    (("label_smoothing",), "rlhf_type", ("dpo", "cpo", "simpo")),
    (("cpo_alpha",), "rlhf_type", ("cpo", "simpo")),
    (("simpo_gamma",), "rlhf_type", ("simpo",)),
    (("desirable_weight", "undesirable_weight"), "rlhf_type", ("kto",)),
    (("center_rewards_coefficient",), "rlhf_type", ("rm",)),
    (("ref_model", "ref_adapters"), "rlhf_type", (*DPO_TYPES, "kto", *POLICY_TYPES, *LATER_TYPES)),
    (("precompute_ref_log_probs",), "rlhf_type", DPO_TYPES),
    (("ref_model", "ref_adapters", "precompute_ref_log_probs"), "reference_free", (False,)),
    (("enable_dft_loss", "enable_channel_loss", "neftune_noise_alpha"), "rlhf_type", (None,)),
    (tuple(SECTIONS["generation"].model_fields), "rlhf_type", (None, *POLICY_TYPES, *LATER_TYPES)),
    *POLICY_OPTIONS,
)
"""(options, another option, the values of it with which they have an effect)"""


def _rlhf_type(resolved: Resolved) -> str | None:
    return "dpo" if resolved.command == "rlhf" else None


def _losses(resolved: Resolved) -> list[str] | None:
    kind = resolved.config.rlhf.rlhf_type
    if kind in DPO_TYPES:
        return ["ipo" if kind == "ipo" else "sigmoid"]
    return [_ALONE[kind][0]] if kind in _ALONE else None


def _beta(resolved: Resolved) -> float | None:
    kind = resolved.config.rlhf.rlhf_type
    return None if kind in ("rm", *POLICY_TYPES, *LATER_TYPES) else 2.0 if kind == "simpo" else 0.1


def _smoothing(resolved: Resolved) -> float | None:
    rlhf = resolved.config.rlhf
    return (1e-3 if rlhf.rlhf_loss_type == ["exo_pair"] else 0.0) if rlhf.reads_pairs else None


def _cpo_alpha(resolved: Resolved) -> float | None:
    return {"cpo": 1.0, "simpo": 0.0}.get(resolved.config.rlhf.rlhf_type or "")


def _task_type(resolved: Resolved) -> str | None:
    return "seq_cls" if resolved.config.rlhf.rlhf_type == "rm" else None


def _num_labels(resolved: Resolved) -> int | None:
    return 1 if resolved.config.rlhf.rlhf_type == "rm" else None


RLHF_DERIVATIONS: tuple[tuple[str, tuple[str, ...], Callable[[Resolved], Any]], ...] = (
    ("rlhf_type", ("command",), _rlhf_type),
    ("rlhf_loss_type", ("rlhf_type",), _losses),
    ("beta", ("rlhf_type",), _beta),
    ("label_smoothing", ("rlhf_loss_type",), _smoothing),
    ("cpo_alpha", ("rlhf_type",), _cpo_alpha),
    ("task_type", ("rlhf_type",), _task_type),
    ("num_labels", ("rlhf_type",), _num_labels),
    *POLICY_DERIVATIONS,
)
"""(option, what it follows from, how)"""

_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def rlhf_metrics(resolved: Resolved) -> tuple[str, ...]:
    """Names of the metrics of an evaluation, those of TRL and ms-swift."""
    kind = resolved.config.rlhf.rlhf_type
    if kind in POLICY_TYPES:
        return policy_metrics(resolved)
    if kind == "rm":
        names: tuple[str, ...] = ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")
    elif kind == "kto":
        names = (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "logps/chosen",
            "logps/rejected",
            "kl",
        )
    else:
        names = (*_REWARDS, "logps/chosen", "logps/rejected")
    return ("eval_loss", *(f"eval_{name}" for name in names))


def check_rlhf(resolved: Resolved) -> None:
    """Raises ConfigError for what does not go together; warns where a loss depends on the micro-batch."""
    rlhf = resolved.config.rlhf
    if rlhf.rlhf_type is None:
        return
    if rlhf.rlhf_type in LATER_TYPES:
        fix = f"train with one of {', '.join((*PREFERENCE_TYPES, 'grpo'))}; swift plan rlhf shows the layout"
        resolved.refuse("rlhf_type", f"{rlhf.rlhf_type} comes with a later version", fix=fix)
        return
    _check_task(resolved)
    _check_start(resolved)
    if rlhf.is_policy:
        check_policy(resolved)
        return
    _check_losses(resolved)
    training = resolved.config.training
    if not rlhf.is_in_batch:
        return
    at_once = training.per_device_train_batch_size
    if "kto" in rlhf.rlhf_loss_type and at_once < 2 and not resolved.config.data.packing:
        raise resolved.error(
            "per_device_train_batch_size",
            "kto compares the answers of a micro-batch with questions they do not belong to, and there is only one",
            fix="--per_device_train_batch_size 8 (or --loss_type apo_zero_unpaired)",
        )
    if (training.gradient_accumulation_steps or 1) > 1:
        resolved.warnings.append(
            f"{resolved.place('gradient_accumulation_steps')}: {' and '.join(rlhf.rlhf_loss_type)}: the loss compares"
            f" the {at_once} rows of a micro-batch only, not the whole step;"
            " a larger --per_device_train_batch_size with --gradient_accumulation_steps 1 compares all"
        )


def _check_losses(resolved: Resolved) -> None:
    rlhf = resolved.config.rlhf
    kind, losses = rlhf.rlhf_type or "", rlhf.rlhf_loss_type
    if rlhf.beta == 0:
        fix = "leave it out: 0.1 (simpo 2.0)" + ("; or --reference_free true" if kind in DPO_TYPES else "")
        raise resolved.error("beta", "must be above 0", fix=fix)
    known = () if kind == "rm" else ("ipo",) if kind == "ipo" else _ALONE.get(kind, _PAIRED)
    for loss in losses:
        if loss not in known:
            raise resolved.error(
                "rlhf_loss_type",
                f"{loss} is no loss of rlhf_type {kind}",
                fix=f"--loss_type {' or '.join(known)}" if known else "leave it out: it is Bradley-Terry",
            )
    if len(losses) > 1 and (kind not in DPO_TYPES or len(set(losses)) < len(losses)):
        raise resolved.error("rlhf_loss_type", "one loss, or several different ones of dpo")
    if rlhf.loss_weights and len(rlhf.loss_weights) != len(losses):
        raise resolved.error(
            "loss_weights",
            f"{len(rlhf.loss_weights)} weights for {len(losses)} losses",
            fix="give one weight for each --loss_type",
        )
    if rlhf.label_smoothing and resolved.is_explicit("label_smoothing") and not _SMOOTHED & set(losses):
        raise resolved.error(
            "label_smoothing",
            f"has no effect on {' and '.join(losses)}",
            fix=f"leave it out; it belongs to {', '.join(sorted(_SMOOTHED))}",
        )
    if "exo_pair" in losses and not rlhf.label_smoothing and resolved.is_explicit("label_smoothing"):
        raise resolved.error("label_smoothing", "exo_pair needs more than 0", fix="leave it out: 0.001")
    if resolved.is_explicit("discopop_tau") and "discopop" not in losses:
        raise resolved.error(
            "discopop_tau", f"has no effect on {' and '.join(losses) or kind}", fix="leave it out"
        )
    if rlhf.f_divergence_type != "reverse_kl":
        fixed = {"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired"} & set(
            losses
        )
        if fixed:
            raise resolved.error(
                "f_divergence_type",
                f"{' and '.join(sorted(fixed))} has no form for {rlhf.f_divergence_type}",
                fix="leave it out",
            )


def _check_task(resolved: Resolved) -> None:
    task, kind = resolved.config.task, resolved.config.rlhf.rlhf_type
    wanted = "seq_cls" if kind == "rm" else "causal_lm"
    if task.task_type != wanted:
        raise resolved.error(
            "task_type", f"rlhf_type {kind} trains a model of task_type {wanted}", fix="leave it out"
        )
    if kind == "rm" and task.num_labels != 1:
        raise resolved.error("num_labels", "a reward is one number", fix="leave it out")


def _check_start(resolved: Resolved) -> None:
    config = resolved.config
    if config.tuner.init_weights in ("eva", "lora-ga"):
        raise resolved.error(
            "init_weights",
            f"{config.tuner.init_weights} measures the model on next tokens, not on preferences or rewards",
            fix="--init_weights default or pissa",
        )
    if config.data.streaming and (config.rlhf.rlhf_type == "kto" or config.rlhf.precompute_ref_log_probs):
        name = "precompute_ref_log_probs" if config.rlhf.precompute_ref_log_probs else "rlhf_type"
        raise resolved.error(name, "does not go together with streaming", fix="leave one out")
