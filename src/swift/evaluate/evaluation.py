"""``swift eval`` with the built-in evaluators: tasks in, a folder with every answer and the figures out.

The folder holds ``samples.jsonl`` (one line a row, see `swift.evaluate.answers`) and ``results.json``.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.config.schema import Resolved
from swift.core.errors import ConfigError, SwiftError
from swift.core.files import atomic_write_json
from swift.evaluate.answers import Task, answer_limit, answer_tasks, intervals, summarize
from swift.evaluate.endpoint import Endpoint
from swift.evaluate.results import RESULTS, SAMPLES
from swift.evaluate.subjects import LocalModel, ServedModel, Subject
from swift.evaluate.suite import read_tasks, task_specs

if TYPE_CHECKING:
    from swift.inference.context import InferenceContext
    from swift.inference.generate import Generator

__all__ = [
    "evaluate",
    "find_model",
    "identity_of",
    "limited",
    "load_generator",
    "result_folder",
    "set_threads",
]

Progress = Callable[[int, int], None]
"""(rows done, rows in all)"""


def evaluate(
    resolved: Resolved,
    *,
    say: Callable[[str], None] = print,
    on_progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate a model's folder or a served model; returns what ``results.json`` holds.

    Everything that can be wrong with tasks, metrics and data is found before a model is loaded.

    Raises SwiftError.
    """
    config = resolved.config
    context = find_model(resolved)
    tasks = read_tasks(resolved, task_specs(resolved))
    folder = result_folder(resolved, context)
    subject = _subject(resolved, context, tasks)
    closing = subject.generator.engine.close if isinstance(subject, LocalModel) else lambda: None
    for task in tasks:
        for bad in task.questions.bad[:1]:
            say(f"{len(task.questions.bad)} bad rows left out; the first: {bad}")
    total = sum(len(task.questions.good) for task in tasks)
    samples = any(task.options.temperature > 0 for task in tasks)
    try:
        rows = answer_tasks(
            subject,
            tasks,
            folder / SAMPLES,
            seed=config.training.seed if samples else None,
            on_progress=lambda done: on_progress(done, total),
        )
    finally:
        closing()
    results = {
        "name": folder.name,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "model": str(context.model) if context else subject.identity[1],
        "adapter": str(context.adapter.absolute()) if context and context.adapter else None,
        "url": config.suite.eval_url,
        "backend": "native",
        **figures(tasks, rows),
        "folder": str(folder),
    }
    try:
        atomic_write_json(folder / RESULTS, _finite(results))
    except OSError as error:
        raise SwiftError("the results cannot be written", where=str(folder), why=error.strerror) from error
    return results


def _finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figures(tasks: Sequence[Task], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``tasks`` (name -> summary, intervals and options) and ``metrics``, flat: METRIC or TASK.METRIC -> value."""
    told: dict[str, Any] = {}
    flat: dict[str, float] = {}
    start = 0
    for task in tasks:
        own = rows[start : start + len(task.questions.good)]
        start += len(task.questions.good)
        summary = summarize(own, task.evaluators)
        if task.questions.bad:
            summary["num_bad_rows"] = len(task.questions.bad)
        told[task.name or "val_dataset"] = {
            **summary,
            "intervals": {name: asdict(interval) for name, interval in intervals(own).items()},
            "evaluators": {entry.name: dict(entry.options) for entry in task.evaluators},
            "max_new_tokens": task.options.max_new_tokens,
        }
        if not task.name:
            summary["max_new_tokens"] = task.options.max_new_tokens
        flat |= {f"{task.name}.{name}" if task.name else name: value for name, value in summary.items()}
    return {"tasks": told, "metrics": flat}


def result_folder(resolved: Resolved, context: InferenceContext | None) -> Path:
    """Where the results go: as asked, else ``eval/NAME`` in the run, beside the model, or here."""
    options = resolved.config.suite
    if options.eval_output_dir is not None:
        return Path(options.eval_output_dir).expanduser()
    name = options.eval_name
    if name is None and resolved.config.evaluation.eval_tasks is not None:
        name = Path(resolved.config.evaluation.eval_tasks).stem
    name = name or f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if context is None:
        return Path("eval") / name
    return (context.run or context.home.resolve().parent) / "eval" / name


def find_model(resolved: Resolved) -> InferenceContext | None:
    """The model's folders; None for a served model of which nothing lies here."""
    from swift.inference.context import find_context

    if resolved.config.suite.eval_url is not None and resolved.config.model.model is None:
        return None
    return find_context(resolved)


def _subject(resolved: Resolved, context: InferenceContext | None, tasks: Sequence[Task]) -> Subject:
    suite = resolved.config.suite
    if suite.eval_url is not None:
        endpoint = Endpoint(suite.eval_url, suite.eval_model or "", suite.eval_num_proc)
        template = None
        if context is not None:  # its template writes prompts for log-probabilities
            from swift.models.load import load_template

            template = load_template(context.model, context.template, context.pretraining)
        return ServedModel(endpoint, template)
    assert context is not None
    losses = any(task.needs("loss") or task.needs("choice") for task in tasks)
    generator = load_generator(resolved, context, losses=losses)
    for task in tasks:
        if context.run is not None and not task.fixed_length:
            limited(task, generator.tokenizer)
    return LocalModel(generator, identity_of(context))


def identity_of(context: InferenceContext) -> list[str]:
    """What the answers of a loaded model depend on beside the options."""
    return [str(folder.resolve()) for folder in (context.model, context.adapter) if folder is not None]


def limited(task: Task, tokenizer: Any) -> None:
    """Let the answers of a trained model be as long as the references ask for, unless the task says how long."""
    most = answer_limit(task.questions.good, tokenizer, task.options.max_new_tokens)
    task.options = task.options.model_copy(update={"max_new_tokens": most})


def load_generator(resolved: Resolved, context: InferenceContext, *, losses: bool = False) -> Generator:
    """What answers, as the options ask for it. ``losses``: log-probabilities of given texts are wanted, too.

    Raises ConfigError for an engine that cannot tell them.
    """
    from swift.inference.context import load_context
    from swift.inference.engines.blocking import BlockingEngine
    from swift.inference.engines.table import make_engine
    from swift.inference.generate import Generator
    from swift.models.load import load_unloaded

    context.check_writes_text()
    set_threads(resolved)
    if resolved.config.engine.infer_backend == "transformers":
        return Generator(load_context(context, resolved), options=resolved.config.engine)
    if losses:
        raise ConfigError(
            "the log-probabilities of given answers are computed by the embedded engine",
            where=f"--infer_backend {resolved.config.engine.infer_backend}",
            fix="leave loss and choice out of --metric, or --infer_backend transformers",
        )
    bundle = load_unloaded(
        context.model,
        context.template,
        context.pretraining,
        trust_remote_code=resolved.config.model.trust_remote_code,
    )
    return Generator(bundle, BlockingEngine(make_engine(context, resolved)))


def set_threads(resolved: Resolved) -> None:
    """As many threads as ``num_threads`` says."""
    import torch

    if resolved.config.training.num_threads is not None:
        torch.set_num_threads(resolved.config.training.num_threads)
