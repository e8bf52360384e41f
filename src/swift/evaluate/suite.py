"""What is to be evaluated: one task from options, or several from a suite file.

A suite is YAML: ``tasks:`` maps names to tasks, ``defaults:`` holds what all of them share. Paths in it are looked for
beside the file first. A task has ``dataset`` (as ``val_dataset``), ``metric`` (names, or ``NAME: {option: value}``),
``columns``, ``few_shot`` (``{dataset, num}``), ``limit``, and any option of sampling (``max_new_tokens``...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from swift.config.bind import resolve
from swift.config.read import Written, read_file
from swift.config.schema import Resolved
from swift.config.sections.generation import METRICS, GenerationSection
from swift.core.errors import ConfigError, SwiftError
from swift.core.registry import suggest
from swift.data.hub import pin_datasets
from swift.data.persona import dataset_specs
from swift.data.sources import parse_dataset_spec
from swift.evaluate.answers import Task
from swift.evaluate.evaluators import find_evaluators
from swift.evaluate.questions import Questions, few_shot_messages, read_questions

__all__ = ["TaskSpec", "metric_names", "read_suite", "read_tasks", "task_specs"]

_OWN_KEYS = ("dataset", "metric", "columns", "few_shot", "limit")
_SAMPLING = tuple(
    name
    for name in GenerationSection.model_fields
    if name not in ("metric", "metric_args", "stream", "result_path")
)


@dataclass(frozen=True)
class TaskSpec:
    """One task as written.

    Attributes:
        name: "" for the only task of a command without a suite.
        metrics: names; ``metric_args``: name -> options.
        few_shot: (data sets, number of examples); the number 0 is none.
        sampling: options of generation that the task itself sets.
    """

    name: str
    dataset: list[str]
    metrics: list[str]
    metric_args: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    few_shot: tuple[list[str], int] = ([], 0)
    limit: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


def task_specs(resolved: Resolved) -> list[TaskSpec]:
    """The tasks that options ask for: those of ``eval_tasks``, and ``val_dataset`` with ``metric``."""
    config = resolved.config
    specs = read_suite(Path(config.evaluation.eval_tasks)) if config.evaluation.eval_tasks else []
    if config.data.val_dataset and resolved.command not in ("pt", "sft", "rlhf"):
        options = config.generation
        specs.append(
            TaskSpec(
                "val_dataset" if specs else "",
                config.data.val_dataset,
                options.metric,
                {name: dict(entry) for name, entry in options.metric_args.items()},
                config.data.columns,
            )
        )
    if config.suite.eval_limit is not None:
        limit = config.suite.eval_limit
        specs = [replace(spec, limit=min(limit, spec.limit or limit)) for spec in specs]
    return specs


def read_tasks(resolved: Resolved, specs: Sequence[TaskSpec], *, answers: bool = False) -> list[Task]:
    """The tasks with their rows. Data, metrics and their options are checked before any model is loaded.

    Raises SwiftError with the task's name.
    """
    tasks = []
    for spec in specs:
        try:
            tasks.append(_read_task(resolved, spec, answers))
        except SwiftError as error:
            if not spec.name:
                raise
            message = f"task {spec.name}: {error.message}"
            raise type(error)(message, where=error.where, why=error.why, fix=error.fix) from None
    return tasks


def _read_task(resolved: Resolved, spec: TaskSpec, answers: bool) -> Task:
    # Bound again, so that a data set of a hub is fetched, and a placeholder filled, as everywhere.
    data = resolved.config.data
    shots, number = spec.few_shot
    options = {"model": "-", "val_dataset": [*spec.dataset, *shots], "columns": spec.columns}
    names = {key: getattr(data, key) for key in ("model_name", "model_author") if getattr(data, key)}
    bound = resolve("infer", values={**options, **names})
    bound.config.model = resolved.config.model
    pin_datasets(bound)
    found = dataset_specs(bound.config.data, bound.config.data.val_dataset)
    rows, examples = found[: len(spec.dataset)], found[len(spec.dataset) :]
    questions = read_questions(rows, spec.columns, data.on_bad_rows, spec.limit)
    if number:
        turns = few_shot_messages(examples, spec.columns, number)
        questions = Questions([_with_turns(question, turns) for question in questions.good], questions.bad)
    generation = resolved.config.generation
    sampling = generation.model_copy(update=spec.sampling)
    fixed = "max_new_tokens" in spec.sampling or resolved.is_explicit("max_new_tokens")
    evaluators = find_evaluators(spec.metrics, spec.metric_args)
    task = Task(spec.name, questions, evaluators, sampling, answers, fixed)
    task.check()
    return task


def _with_turns(question: Any, turns: list[dict[str, Any]]) -> Any:
    """The examples come behind the system prompt."""
    first = 1 if question.messages[0]["role"] == "system" else 0
    messages = [*question.messages[:first], *turns, *question.messages[first:]]
    return replace(question, messages=messages)


def metric_names(specs: Sequence[TaskSpec]) -> list[str]:
    """What an evaluation while training calls its metrics: ``eval_TASK_METRIC``."""
    names = []
    for spec in specs:
        for evaluator in find_evaluators(spec.metrics, spec.metric_args):
            k = evaluator.options.get("k", 1)
            ks = [k] if isinstance(k, int) else k
            own = METRICS.get(evaluator.name) or (evaluator.name.rpartition(":")[2],)
            for metric in own:
                names += [metric.format(k=value) for value in ks] if "{k}" in metric else [metric]
        names = [name if name.startswith("eval_") else f"eval_{spec.name}_{name}" for name in names]
    return names


def read_suite(path: Path) -> list[TaskSpec]:
    """The tasks of a suite file, in order. Raises ConfigError with the line."""
    path = path.expanduser()
    items = read_file(path, str(path)).items or {}
    for key in items:
        if key not in ("tasks", "defaults"):
            raise ConfigError(
                f"unknown key {key!r}", where=items[key].place, fix="tasks: {NAME: {dataset: FILE}}"
            )
    tasks = items.get("tasks")
    if tasks is None or not tasks.items:
        raise ConfigError("there are no tasks", where=str(path), fix="tasks: {NAME: {dataset: FILE}}")
    common = items["defaults"].items or {} if "defaults" in items else {}
    return [_read_spec(name, written, common, path.parent) for name, written in tasks.items.items()]


def _read_spec(name: str, written: Written, common: Mapping[str, Written], folder: Path) -> TaskSpec:
    if written.items is None:
        raise ConfigError(
            f"the task {name} is no mapping", where=written.place, fix=f"{name}: {{dataset: FILE}}"
        )
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(
            f"{name!r} cannot name a task", where=written.place, fix="use letters, digits, - and _"
        )
    items = {**common, **written.items}
    for key, entry in items.items():
        if key not in (*_OWN_KEYS, *_SAMPLING):
            fix = suggest(key, (*_OWN_KEYS, *_SAMPLING), f"known: {', '.join((*_OWN_KEYS, *_SAMPLING))}")
            raise ConfigError(f"unknown key {key!r} of the task {name}", where=entry.place, fix=fix)
    if "dataset" not in items:
        raise ConfigError(f"the task {name} has no dataset", where=written.place, fix="dataset: FILE")
    metrics, metric_args = _read_metrics(items.get("metric"), folder)
    limit = items["limit"].value if "limit" in items else None
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigError("limit is a number of rows", where=items["limit"].place)
    columns = items["columns"].value if "columns" in items else {}
    return TaskSpec(
        name,
        _beside(_texts(items["dataset"]), folder),
        metrics,
        metric_args,
        {str(old): str(new) for old, new in columns.items()},
        _few_shot(items.get("few_shot"), folder),
        limit,
        _sampling(items),
    )


def _read_metrics(written: Written | None, folder: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """``exact_match``, ``[exact_match, {regex: {pattern: x}}]`` or ``{regex: {pattern: x}}``."""
    if written is None:
        return list(GenerationSection().metric), {}
    names: list[str] = []
    options: dict[str, dict[str, Any]] = {}
    for entry in written.entries or (written,):
        if entry.items is None:
            names.append(str(entry.value))
            continue
        for name, chosen in entry.items.items():
            names.append(name)
            options[name] = dict(chosen.value or {})
    names = [_beside([name], folder)[0] if ".py" in name else name for name in names]
    for name, chosen_options in options.items():
        if name == "judge" and chosen_options.get("prompt"):
            chosen_options["prompt"] = _beside([str(chosen_options["prompt"])], folder)[0]
    return names, {(_beside([n], folder)[0] if ".py" in n else n): o for n, o in options.items() if o}


def _few_shot(written: Written | None, folder: Path) -> tuple[list[str], int]:
    if written is None:
        return [], 0
    items = written.items or {}
    number = items["num"].value if "num" in items else None
    if set(items) != {"dataset", "num"} or not isinstance(number, int) or number < 0:
        raise ConfigError(
            "few_shot has a data set and a number",
            where=written.place,
            fix="few_shot: {dataset: FILE, num: 3}",
        )
    return _beside(_texts(items["dataset"]), folder), number


def _sampling(items: Mapping[str, Written]) -> dict[str, Any]:
    chosen = {key: items[key].value for key in _SAMPLING if key in items}
    for key, value in chosen.items():
        try:
            chosen[key] = getattr(GenerationSection(**{key: value}), key)
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            raise ConfigError(f"{key} cannot be {value!r}", where=items[key].place, why=why) from None
    return chosen


def _texts(written: Written) -> list[str]:
    values = written.value if isinstance(written.value, list) else [written.value]
    return [str(value) for value in values]


def _beside(names: Sequence[str], folder: Path) -> list[str]:
    """Names of files that lie beside the suite, with its folder; others as they are."""
    found = []
    for name in names:
        file = name.rpartition(":")[0] if ".py:" in name else str(parse_dataset_spec(name).path)
        is_there = not Path(name).is_absolute() and (folder / file).exists()
        found.append(str(folder / name) if is_there else name)
    return found
