"""Evaluation of a trained or served model."""

from __future__ import annotations

from typing import Any, Literal

from swift.config.option import Section, option


class SuiteSection(Section):
    """What swift eval evaluates, with which program, and where results go."""

    eval_backend: Literal["native", "evalscope", "lm-eval"] = option(
        "native",
        "Who evaluates: native: the built-in evaluators on val_dataset and eval_tasks (EvalScope for names in "
        "eval_dataset, as ms-swift's Native); evalscope and lm-eval: those programs, in their toolchains.",
        essential=True,
    )
    eval_dataset: list[str] = option([], "Benchmarks by their names in EvalScope or lm-eval.", essential=True)
    eval_dataset_args: dict[str, Any] = option(
        {}, 'Options of benchmarks: JSON object {"NAME": {...}}, as EvalScope has them.'
    )
    eval_limit: int | None = option(
        None, "Rows of each task or benchmark; default: all.", ge=1, essential=True
    )
    eval_generation_config: dict[str, Any] = option(
        {}, "EvalScope, lm-eval: sampling options of theirs, over those of ours: JSON object."
    )
    eval_num_proc: int = option(16, "Requests to a server at the same time.", ge=1)
    extra_eval_args: dict[str, Any] = option(
        {}, "More options of EvalScope's TaskConfig or lm-eval's simple_evaluate: JSON object."
    )
    eval_url: str | None = option(
        None,
        "Evaluate the model behind this OpenAI server (http://HOST:PORT/v1) instead of a folder.",
        essential=True,
    )
    eval_model: str | None = option(None, "Its name on the server of eval_url; default: the first it lists.")
    eval_output_dir: str | None = option(
        None, "Folder of the results; default: eval/NAME in the run's folder, or beside the model."
    )
    eval_name: str | None = option(
        None, "NAME of that folder; default: the suite's name, or the time.", essential=True
    )
