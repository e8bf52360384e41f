"""Which options belong to which task, what follows from it, and what of it does not go together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ValidationError

from swift.config.schema import Resolved, Source
from swift.core.errors import ConfigError

__all__ = ["TASK_DERIVATIONS", "TASK_OPTIONS", "check_task", "eval_metrics", "take_environment"]


_RERANKERS = ("reranker", "generative_reranker")
_INFONCE = (
    "infonce_temperature",
    "infonce_use_batch",
    "infonce_hard_negatives",
    "infonce_mask_fake_negative",
    "infonce_fake_neg_margin",
    "infonce_include_qq",
    "infonce_include_dd",
)
_LISTWISE = ("listwise_reranker_temperature", "listwise_reranker_min_group_size")
_ANSWERS = ("generative_reranker_positive_token", "generative_reranker_negative_token")

TASK_OPTIONS: tuple[tuple[tuple[str, ...], str, tuple[Any, ...]], ...] = (
    (("num_labels", "problem_type"), "task_type", ("seq_cls",)),
    (("mrl_dims", "embedding_pooling"), "task_type", ("embedding",)),
    (("max_positive_samples", "max_negative_samples"), "task_type", _RERANKERS),
    (_ANSWERS, "task_type", ("generative_reranker",)),
    (
        (
            "loss_scale",
            "use_loss_scale",
            "use_liger_kernel",
            "enable_channel_loss",
            "enable_dft_loss",
            "eval_tasks",
        ),
        "task_type",
        ("causal_lm",),
    ),
    (_INFONCE, "loss_type", ("infonce",)),
    (("contrastive_margin",), "loss_type", ("contrastive", "online_contrastive")),
    (_LISTWISE, "loss_type", ("listwise_reranker",)),
    (("infonce_include_qq", "infonce_include_dd"), "infonce_use_batch", (True,)),
    (("infonce_fake_neg_margin",), "infonce_mask_fake_negative", (True,)),
)
"""(options, another option, the values of it with which they have an effect)"""

_LOSSES: dict[str, tuple[str, ...]] = {
    "causal_lm": ("cross_entropy",),
    "embedding": ("infonce", "cosine_similarity", "contrastive", "online_contrastive"),
    **dict.fromkeys(_RERANKERS, ("pointwise_reranker", "listwise_reranker")),
}
"""Task -> its losses, the default first; seq_cls has its losses by problem type."""
_CLASSIFICATION_LOSSES: dict[str, tuple[str, ...]] = {
    "single_label_classification": ("cross_entropy",),
    "multi_label_classification": (),
    "regression": ("mse",),
}
_CLASSES = ("eval_accuracy", "eval_macro_f1", "eval_micro_f1")
_CORRELATIONS = ("eval_pearson", "eval_spearman")


def eval_metrics(resolved: Resolved) -> tuple[str, ...]:
    """Names of the built-in metrics of an evaluation."""
    task = resolved.config.task
    if task.task_type == "causal_lm":
        return ("eval_loss", "eval_token_accuracy", "eval_perplexity")
    if task.task_type in _RERANKERS:
        return ("eval_loss", "eval_mrr", "eval_ndcg_at_10")
    if task.task_type == "seq_cls":
        regression = task.problem_type == "regression"
        return ("eval_loss", *((*_CORRELATIONS, "eval_mae") if regression else _CLASSES))
    if task.loss_type == "infonce":
        return ("eval_loss", "eval_mean_positive", "eval_mean_negative", "eval_margin")
    return ("eval_loss", *_CORRELATIONS)


def _problem_type(resolved: Resolved) -> str | None:
    task = resolved.config.task
    if task.task_type != "seq_cls":
        return None
    return "regression" if task.num_labels == 1 else "single_label_classification"


def _num_labels(resolved: Resolved) -> int | None:
    task = resolved.config.task
    return 1 if task.task_type == "reranker" or task.problem_type == "regression" else None


def _loss_type(resolved: Resolved) -> str | None:
    task = resolved.config.task
    if task.task_type == "causal_lm":
        return None
    return next(iter(_losses(resolved)), None)


def _losses(resolved: Resolved) -> tuple[str, ...]:
    task = resolved.config.task
    if task.task_type == "seq_cls":
        return _CLASSIFICATION_LOSSES[task.problem_type or "single_label_classification"]
    return _LOSSES[task.task_type]


def _enable_thinking(resolved: Resolved) -> bool | None:
    return False if resolved.config.task.task_type == "generative_reranker" else None


def _use_chat_template(resolved: Resolved) -> bool:
    return resolved.command != "pt" and resolved.config.task.task_type != "embedding"


TASK_DERIVATIONS: tuple[tuple[str, tuple[str, ...], Callable[[Resolved], Any]], ...] = (
    ("problem_type", ("task_type", "num_labels"), _problem_type),
    ("num_labels", ("task_type", "problem_type"), _num_labels),
    ("loss_type", ("task_type", "problem_type"), _loss_type),
    ("enable_thinking", ("task_type",), _enable_thinking),
    ("use_chat_template", ("command", "task_type"), _use_chat_template),
)
"""(option, what it follows from, how)"""


def take_environment(resolved: Resolved, taken: Iterable[str]) -> None:
    """The variables by which ms-swift sets these losses (INFONCE_TEMPERATURE): the option's name in capitals.

    Raises ConfigError for a value the option cannot have.
    """
    task = resolved.config.task
    for name in {*_INFONCE, *_LISTWISE, *_ANSWERS, "max_positive_samples", "max_negative_samples"} & set(
        taken
    ):
        written = os.environ.get(name.upper())
        if written is None or task.task_type == "causal_lm" or resolved.sources[name].kind != "default":
            continue
        place = f"{name.upper()} of the environment"
        try:
            resolved.put(name, written, Source("derived", f"derived from {place}"))
        except ValidationError as error:
            raise ConfigError(
                f"{written!r} is no value of {name}",
                where=place,
                why=error.errors()[0]["msg"],
                fix=f"unset {name.upper()}",
            ) from None


def check_task(resolved: Resolved) -> None:
    """Raises ConfigError for what does not go together; warns where a loss depends on the micro-batch."""
    task = resolved.config.task
    _check_loss(resolved)
    if task.task_type == "causal_lm":
        return
    _check_labels(resolved)
    _check_layout(resolved)
    _check_model(resolved)
    if any(size < 1 for size in task.mrl_dims):
        raise resolved.error("mrl_dims", "sizes of vectors are at least 1")
    training = resolved.config.training
    if task.is_in_batch and (training.gradient_accumulation_steps or 1) > 1:
        resolved.warnings.append(
            f"{resolved.place('gradient_accumulation_steps')}: {task.loss_type} compares the"
            f" {training.per_device_train_batch_size} rows of a micro-batch only, not the whole step;"
            " a larger --per_device_train_batch_size with --gradient_accumulation_steps 1 compares all"
        )


def _check_loss(resolved: Resolved) -> None:
    task = resolved.config.task
    if task.loss_type is None or task.loss_type in _losses(resolved):
        return
    of = f"{task.task_type} ({task.problem_type})" if task.problem_type else task.task_type
    losses = _losses(resolved)
    raise resolved.error(
        "loss_type",
        f"{task.loss_type} is no loss of task_type {of}",
        fix=f"--loss_type {' or '.join(losses)}" if losses else "leave it out: it is binary cross-entropy",
    )


def _check_labels(resolved: Resolved) -> None:
    task = resolved.config.task
    if task.task_type == "seq_cls" and task.num_labels is None:
        raise resolved.error(
            "task_type", "how many classes are there?", fix="--num_labels 2 (or --problem_type regression)"
        )
    if task.problem_type == "single_label_classification" and task.num_labels == 1:
        raise resolved.error(
            "num_labels",
            "one class leaves nothing to decide",
            fix="--num_labels 2, or --problem_type regression",
        )


def _check_layout(resolved: Resolved) -> None:
    data, task = resolved.config.data, resolved.config.task
    if data.packing and task.task_type != "seq_cls":
        raise resolved.error(
            "packing",
            f"does not go together with task_type {task.task_type}",
            why="a row of data becomes several sequences, and packing would put any number of rows in a batch",
            fix="leave it out: sequences are joined without padding anyway where the model allows it",
        )
    if data.truncation_strategy == "right" and task.task_type == "generative_reranker":
        raise resolved.error(
            "truncation_strategy",
            "cuts off the end of the prompt, where the answer is read",
            fix="--truncation_strategy delete, or a larger --max_length",
        )


def _check_model(resolved: Resolved) -> None:
    config = resolved.config
    tuner, task = config.tuner, config.task
    if tuner.init_weights in ("eva", "lora-ga"):
        raise resolved.error(
            "init_weights",
            f"{tuner.init_weights} measures the model on next tokens, not on task_type {task.task_type}",
            fix="--init_weights default or pissa",
        )
    if not task.has_score_head:
        return
    kind = "use_dora" if tuner.use_dora else "target_parameters" if tuner.target_parameters else "tuner_type"
    if tuner.tuner_type not in ("lora", "full") or kind != "tuner_type":
        raise resolved.error(
            kind,
            f"the score head of task_type {task.task_type} is trained beside LoRA, or with the whole model",
            fix="--tuner_type lora or full" if kind == "tuner_type" else f"leave out --{kind}",
        )
    if config.quantization.is_active:
        raise resolved.error(
            "quant_method",
            f"does not go together with task_type {task.task_type}: the score head is no part of the folder",
            fix="leave it out (--torch_dtype bfloat16 halves the base), or use generative_reranker",
        )
