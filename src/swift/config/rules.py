"""What follows from what, and what does not go together.

Derivations fill options that nobody set; they never touch a value the user gave. Checks raise ConfigError, or
add a warning where the run can go on. Both read options by their flat names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swift.config.combinations import check_combinations
from swift.config.commands import Command
from swift.config.export_rules import check_export
from swift.config.memory_rules import check_memory, quant_bits, quant_method
from swift.config.parallel_rules import check_parallel, settle_parallel
from swift.config.policy_rules import best_metric, whole_groups
from swift.config.rlhf_rules import RLHF_DERIVATIONS, check_rlhf, rlhf_metrics
from swift.config.schema import Resolved, Source, options
from swift.config.sections.evaluation import smaller_is_better
from swift.config.sections.generation import METRICS
from swift.config.task_rules import TASK_DERIVATIONS, check_task, eval_metrics, take_environment
from swift.config.tuner_rules import check_tuner, derived_dropout
from swift.core.errors import ConfigError
from swift.core.registry import suggest

__all__ = ["DERIVATIONS", "Derivation", "apply"]

SAMPLES_PER_STEP = 16
"""Samples an optimizer step should see when nobody says otherwise (as in ms-swift)."""
PACKED_ROWS_PER_STEP = 4
"""The same in packed rows: a row of max_length holds about four samples of usual length."""


@dataclass(frozen=True)
class Derivation:
    """``target`` gets ``compute(resolved)`` when nobody set it; None means there is nothing to derive."""

    target: str
    inputs: tuple[str, ...]
    compute: Callable[[Resolved], Any]

    def source(self, resolved: Resolved) -> Source:
        """Names the inputs that matter: those that differ from their defaults, else the first."""
        known = options()
        changed = [
            name for name in self.inputs if name in known and resolved.value(name) != known[name].default
        ]
        return Source("derived", f"derived from {', '.join(changed or self.inputs[:1])}")


def _accumulation(resolved: Resolved) -> int:
    wanted = PACKED_ROWS_PER_STEP if resolved.config.data.packing else SAMPLES_PER_STEP
    at_once = _samples_at_once(resolved)
    if resolved.config.rlhf.is_policy and resolved.config.training.global_batch_size is None:
        wanted = whole_groups(resolved, wanted, at_once)
    if resolved.config.training.global_batch_size is not None:
        return -(-resolved.config.training.global_batch_size // at_once)
    return max(1, wanted // at_once)


def _samples_at_once(resolved: Resolved) -> int:
    """Samples of one micro-batch, over all devices."""
    return resolved.config.training.per_device_train_batch_size * resolved.config.parallel.data_parallel_size


def _min_lr_ratio(resolved: Resolved) -> float | None:
    training = resolved.config.training
    if training.min_lr is None or training.learning_rate is None:
        return None
    return min(1.0, training.min_lr / training.learning_rate)


def has_validation(resolved: Resolved) -> bool:
    """True when the configuration names validation data, sets some aside, or has tasks to measure."""
    return has_validation_rows(resolved) or resolved.config.evaluation.eval_tasks is not None


def has_validation_rows(resolved: Resolved) -> bool:
    """True when there will be a loss on validation data."""
    data = resolved.config.data
    return bool(data.val_dataset) or data.split_dataset_ratio > 0


def _eval_strategy(resolved: Resolved) -> str:
    if not has_validation(resolved):
        return "no"
    if resolved.is_explicit("eval_steps"):
        return "steps"
    saving = resolved.config.checkpoint.save_strategy
    if saving == "no":
        return "steps" if resolved.config.data.streaming else "epoch"
    return saving


def _greater_is_better(resolved: Resolved) -> bool:
    return not smaller_is_better(resolved.config.evaluation.metric_for_best_model)


def _loss_scale(resolved: Resolved) -> str | None:
    """What a preference is about is the last answer; those before it are the same in both."""
    return {"pt": "all", "rlhf": "last_round"}.get(resolved.command)


_VALIDATION = ("val_dataset", "split_dataset_ratio", "eval_tasks")

DERIVATIONS: tuple[Derivation, ...] = (
    Derivation(*RLHF_DERIVATIONS[0]),  # many others depend on the kind of training
    Derivation(
        "learning_rate",
        ("tuner_type",),
        lambda resolved: 1e-5 if resolved.config.tuner.tuner_type == "full" else 1e-4,
    ),
    Derivation(
        "gradient_accumulation_steps",
        (
            "global_batch_size",
            "per_device_train_batch_size",
            "packing",
            "data_parallel_size",
            "num_generations",
        ),
        _accumulation,
    ),
    Derivation("min_lr_ratio", ("min_lr", "learning_rate"), _min_lr_ratio),
    Derivation("lora_dropout", ("target_parameters", "rlhf_type"), derived_dropout),
    Derivation("data_seed", ("seed",), lambda resolved: resolved.config.training.seed),
    Derivation("eval_strategy", (*_VALIDATION, "eval_steps", "save_strategy", "streaming"), _eval_strategy),
    Derivation("eval_steps", ("save_steps",), lambda resolved: resolved.config.checkpoint.save_steps),
    Derivation(
        "per_device_eval_batch_size",
        ("per_device_train_batch_size",),
        lambda resolved: resolved.config.training.per_device_train_batch_size,
    ),
    Derivation("metric_for_best_model", ("rlhf_type",), best_metric),
    Derivation("greater_is_better", ("metric_for_best_model",), _greater_is_better),
    Derivation("quant_method", ("quant_bits",), quant_method),
    Derivation("quant_bits", ("quant_method",), quant_bits),
    Derivation(
        "lr_scheduler_type",
        ("optim",),
        lambda resolved: "constant" if resolved.config.optimizer.optim == "schedule_free_adamw" else None,
    ),
    *(Derivation(*row) for row in (*RLHF_DERIVATIONS[1:], *TASK_DERIVATIONS)),
    Derivation("loss_scale", ("command",), _loss_scale),
)


def apply(resolved: Resolved, command: Command, *, partial: bool, recorded: bool) -> None:
    """Fill derived values, then check. A plan gets warnings of what only a run needs."""
    taken = command.options()
    take_environment(resolved, taken)
    if "tensor_parallel_size" in taken:
        settle_parallel(resolved, recorded=recorded)
    for rule in DERIVATIONS:
        if rule.target in taken and _may_derive(rule, resolved):
            value = rule.compute(resolved)
            if value is not None:
                resolved.put(rule.target, value, rule.source(resolved))
    if not partial:
        _check_required(resolved, command)
    for check in _CHECKS:
        check(resolved)
    check_combinations(resolved)
    check_tuner(resolved)
    check_task(resolved)
    check_rlhf(resolved)
    if not partial:
        check_memory(resolved)
        check_export(resolved)
    _check_devices(resolved)
    if "tensor_parallel_size" in taken and not partial:
        check_parallel(resolved)


def _may_derive(rule: Derivation, resolved: Resolved) -> bool:
    if resolved.is_explicit(rule.target):
        return False
    if resolved.sources[rule.target].kind != "recorded":
        return True
    # A value recorded with a run stands, unless something it follows from was changed since.
    recorded = resolved.sources[rule.target].detail.rpartition(":")[0]
    return any(
        resolved.is_explicit(name) and resolved.sources[name].detail.rpartition(":")[0] != recorded
        for name in rule.inputs
        if name != "command"
    )


def _check_required(resolved: Resolved, command: Command) -> None:
    for group in command.required:
        if any(resolved.value(name) for name in group):
            continue
        if not resolved.planning:
            how = "PATH" if group[0] in ("model", "adapters") else "FILE"
            others = [name for name in group[1:] if name != "resume_from_checkpoint"]
            alternatives = "".join(f" or --{name} {how}" for name in others)
            raise ConfigError("missing", where=f"--{group[0]}", fix=f"add --{group[0]} {how}{alternatives}")
        resolved.warnings.append(f"--{group[0]}: missing; a run needs it")


def _check_evaluation(resolved: Resolved) -> None:
    evaluation = resolved.config.evaluation
    if resolved.command not in ("pt", "sft", "rlhf"):
        return
    is_rlhf = resolved.config.rlhf.rlhf_type is not None
    metric, known = (
        evaluation.metric_for_best_model,
        rlhf_metrics(resolved) if is_rlhf else eval_metrics(resolved),
    )
    if not metric.startswith("eval_"):
        raise resolved.error(
            "metric_for_best_model",
            f"{metric!r} is not a metric of the evaluation",
            fix=suggest(metric, known, f"built in: {', '.join(known)}"),
        )
    of_tasks = evaluation.eval_tasks is not None
    if of_tasks and metric in known and not has_validation_rows(resolved):
        raise resolved.error(
            "metric_for_best_model",
            f"{metric} needs validation data; the tasks alone have no such metric",
            fix="--metric_for_best_model eval_TASK_METRIC, or add --val_dataset FILE",
        )
    if metric not in known and not resolved.config.report.callbacks and not of_tasks:
        raise resolved.error(
            "metric_for_best_model",
            f"there is no metric {metric!r}",
            why=f"built in: {', '.join(known)}",
            fix="name one of these, or what adds it: --eval_tasks SUITE.yaml or --callbacks FILE.py",
        )
    if not has_validation(resolved):
        wanted = [
            name
            for name in ("eval_strategy", "eval_steps", "metric_for_best_model", "per_device_eval_batch_size")
            if resolved.is_explicit(name) and resolved.value(name) != "no"
        ]
        if evaluation.early_stop_interval is not None:
            raise resolved.error(
                "early_stop_interval",
                "there is no validation data to decide when to stop",
                fix="add --val_dataset FILE or --split_dataset_ratio 0.05",
            )
        if wanted:
            resolved.warnings.append(
                f"{resolved.place(wanted[0])}: no validation data, so nothing is evaluated; "
                "add --val_dataset FILE or --split_dataset_ratio 0.05"
            )
    elif evaluation.eval_strategy == "no":
        for name in ("early_stop_interval", "eval_steps"):
            if resolved.is_explicit(name) and resolved.value(name) is not None:
                raise resolved.error(
                    name,
                    "nothing is evaluated with eval_strategy no",
                    fix="set --eval_strategy steps or epoch",
                )


def _check_metrics(resolved: Resolved) -> None:
    """Found here, not when a job that waits for a training starts."""
    names = resolved.config.generation.metric
    for name in names:
        if name not in METRICS and ".py:" not in name:
            raise resolved.error(
                "metric",
                f"there is no metric {name!r}",
                why=f"known: {', '.join(METRICS)}; your own: FILE.py:function",
                fix=suggest(name, METRICS),
            )
    for name in resolved.config.generation.metric_args:
        if name not in names:
            fix = f"--metric {name}"
            raise resolved.error("metric_args", f"{name} is not among the metrics", fix=fix)


def _check_data(resolved: Resolved) -> None:
    data = resolved.config.data
    if data.dataset_weights:
        if len(data.dataset_weights) != len(data.dataset):
            raise resolved.error(
                "dataset_weights",
                f"{len(data.dataset_weights)} weights for {len(data.dataset)} data sets",
                fix="give one weight per data set",
            )
        if min(data.dataset_weights) < 0 or sum(data.dataset_weights) <= 0:
            raise resolved.error("dataset_weights", "weights must not be negative, and not all zero")
    if data.truncation_strategy == "split" and resolved.command in ("sft", "rlhf"):
        raise resolved.error(
            "truncation_strategy",
            "split is for swift pt: a conversation cut in pieces loses its question",
            fix="use delete, left or right",
        )


def _check_streaming(resolved: Resolved) -> None:
    if resolved.config.data.streaming and resolved.config.training.max_steps <= 0:
        raise resolved.error(
            "streaming",
            "needs max_steps: how long a stream is nobody knows before its end",
            fix="--max_steps 1000",
        )
    if resolved.config.data.streaming and resolved.config.training.enable_channel_loss:
        why = "the rows of a stream are not known beforehand"
        raise resolved.error("enable_channel_loss", "not with a stream", why=why)


def _check_checkpoint(resolved: Resolved) -> None:
    name = resolved.config.checkpoint.run_name
    if name is not None and (not name.strip() or name in (".", "..") or re.search(r"[/\\\0]", name)):
        raise resolved.error(
            "run_name",
            f"{name!r} cannot name a folder",
            fix="use a name without / and \\, and --output_dir for the folder above it",
        )


def _check_training(resolved: Resolved) -> None:
    training = resolved.config.training
    if training.max_steps == 0:
        raise resolved.error("max_steps", "0 steps train nothing", fix="-1 trains num_train_epochs epochs")
    if (
        training.max_steps > 0
        and training.warmup_steps is not None
        and training.warmup_steps > training.max_steps
    ):
        raise resolved.error(
            "warmup_steps",
            f"{training.warmup_steps} warm-up steps, but only {training.max_steps} steps",
            fix="lower --warmup_steps or raise --max_steps",
        )
    peak = training.learning_rate
    if training.min_lr is not None and peak is not None and training.min_lr > peak:
        raise resolved.error(
            "min_lr",
            f"{training.min_lr:g} is above the peak of {peak:g}",
            fix="lower --min_lr or raise --learning_rate",
        )
    _check_global_batch(resolved)
    if training.max_steps > 0 and all(map(resolved.is_explicit, ("max_steps", "num_train_epochs"))):
        resolved.warnings.append(
            f"{resolved.place('num_train_epochs')}: no effect, max_steps {training.max_steps} sets the length"
        )
    trackers = resolved.config.report.report_to
    if "none" in trackers and len(trackers) > 1:
        raise resolved.error("report_to", "none stands beside other trackers")


def _check_global_batch(resolved: Resolved) -> None:
    training = resolved.config.training
    # Of several processes some may have a micro-batch less: only their size has to fit.
    wanted, at_once = training.global_batch_size, training.per_device_train_batch_size
    if wanted is None:
        return
    if resolved.is_explicit("gradient_accumulation_steps") and resolved.is_explicit("global_batch_size"):
        raise resolved.error(
            "global_batch_size",
            "does not go together with gradient_accumulation_steps: each follows from the other",
            fix="leave one of them out",
        )
    if wanted % at_once:
        raise resolved.error(
            "global_batch_size",
            f"{wanted} samples per step cannot be made of micro-batches of {at_once}",
            fix=f"set it to {max(1, round(wanted / at_once)) * at_once}, or change --per_device_train_batch_size",
        )


def _check_generation(resolved: Resolved) -> None:
    if resolved.command != "infer":
        return
    if resolved.config.generation.temperature == 0:
        for name in ("top_p", "top_k"):
            if resolved.is_explicit(name):
                resolved.warnings.append(
                    f"{resolved.place(name)}: no effect at temperature 0; raise --temperature to sample"
                )
    if not resolved.config.data.val_dataset:
        for name in ("result_path", "metric", "columns", "on_bad_rows"):
            if resolved.is_explicit(name):
                resolved.warnings.append(
                    f"{resolved.place(name)}: used for rows of a file only; add --val_dataset FILE"
                )


def _check_patterns(resolved: Resolved) -> None:
    for name in ("target_regex", "freeze_parameters_regex", "trainable_parameters_regex"):
        try:
            re.compile(resolved.value(name) or "")
        except re.error as error:
            raise resolved.error(
                name, f"{resolved.value(name)!r} is not a regular expression", why=str(error)
            ) from None


_CHECKS: tuple[Callable[[Resolved], None], ...] = (
    _check_patterns,
    _check_data,
    _check_streaming,
    _check_evaluation,
    _check_metrics,
    _check_checkpoint,
    _check_training,
    _check_generation,
)


def _check_devices(resolved: Resolved) -> None:
    model = resolved.config.model
    if model.device not in ("auto", "cpu"):
        from swift.core.devices import split_device

        split_device(model.device, resolved.place("device"))
    if model.device == "cpu":
        if model.torch_dtype == "float16":
            resolved.warnings.append(
                f"{resolved.place('torch_dtype')}: float16 is slow and overflows on CPU; bfloat16 is safer"
            )
        for name, active in (
            ("attn_impl", model.attn_impl.startswith("flash")),
            ("use_liger_kernel", resolved.config.training.use_liger_kernel),
        ):
            if active and resolved.is_explicit(name):
                raise resolved.error(name, "needs a CUDA device, not cpu", fix="leave it out")
