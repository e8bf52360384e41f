"""Evaluation while training."""

from __future__ import annotations

import re
from typing import Literal

from swift.config.option import Section, option


def smaller_is_better(metric: str) -> bool:
    """True for losses, perplexities, errors, similarities to negatives and rewards of rejected answers."""
    return re.search(r"loss|perplexity|ppl|mae|negative|rejected", metric) is not None


class EvaluationSection(Section):
    """How often the model is evaluated, and which checkpoint counts as best."""

    eval_strategy: Literal["steps", "epoch", "no"] | None = option(
        None, "When to evaluate; default: as save_strategy when there is validation data."
    )
    eval_steps: int | None = option(
        None, "Steps between evaluations; default: save_steps.", unit="steps", ge=1, essential=True
    )
    per_device_eval_batch_size: int | None = option(
        None, "Samples per evaluation batch; default: the training batch size.", ge=1
    )
    eval_tasks: str | None = option(
        None,
        "Suite file (YAML) of tasks whose answers are measured too, by swift eval or at each evaluation of a training: "
        "eval_TASK_METRIC.",
    )
    metric_for_best_model: str = option("eval_loss", "Metric that decides which checkpoint is best.")
    greater_is_better: bool | None = option(
        None, "Whether that metric should rise; default: no for losses and perplexity, else yes."
    )
    early_stop_interval: int | None = option(
        None, "Stop after this many evaluations in a row without a better metric.", ge=1
    )
