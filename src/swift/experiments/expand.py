"""From a file of experiments to jobs: each one a snapshot that later edits of files do not change."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swift.config.commands import COMMANDS
from swift.config.read import Written, from_python
from swift.config.schema import Resolved
from swift.core.errors import ConfigError, SwiftError, UsageError
from swift.core.registry import closest
from swift.experiments.binding import (
    TRAINING,
    about,
    bind,
    bind_words,
    has_effect,
    make_absolute,
    only_for,
    option_name,
    snapshot,
)
from swift.experiments.estimates import Estimator
from swift.experiments.estimates import changed_data as _changed_data
from swift.experiments.fields import fail
from swift.experiments.file import Experiment, ExperimentFile, Resources, read_resources, stage_resources
from swift.experiments.search import Parameter, Sweep, candidates
from swift.experiments.stages import Stage, check_command, check_name
from swift.experiments.types import Dependency, JobSpec
from swift.runs.folder import RunFolder
from swift.runs.record import code_version

__all__ = ["changed_data", "expand", "single", "trial_specs"]

_METRICS = ("loss", "eval_loss", "eval_token_accuracy", "eval_perplexity")
_ANSWER_METRICS = ("exact_match", "rouge1", "rouge2", "rougeL", "perplexity")
_INHERITED = (
    "device", "attn_impl", "trust_remote_code", "num_threads", "seed", "columns", "on_bad_rows", "val_dataset",
)  # fmt: skip
"""What a stage takes over from its experiment, where its command has it."""


@dataclass
class _Bound:
    """An experiment or stage whose options are resolved."""

    experiment: Experiment
    name: str
    command: str
    resolved: Resolved | None
    resources: Resources
    after: list[Dependency]
    words: list[str]
    environment: dict[str, str]
    run_dir: Path | None = None
    values: dict[str, Any] | None = None
    place: str = ""


def expand(file: ExperimentFile, cwd: str | Path, *, planning: bool = False) -> list[JobSpec]:
    """All jobs that can be known before anything ran: experiments, grid and random trials, and their stages.

    Trials of a sweep that depend on results (``file.sweep.is_controlled``) come from ``SweepController``; here their
    options are only checked.

    Args:
        cwd: what relative paths are relative to.
        planning: only to look: a run folder that is taken, or a missing model, becomes ``estimate["problems"]``.

    Raises SwiftError that names experiment, file and line.
    """
    cwd = Path(cwd).absolute()
    bound = [_bind_experiment(file, experiment, cwd, None, planning) for experiment in file.experiments]
    sweep = file.sweep
    if sweep is not None:
        _check_sweep(file, sweep, cwd, planning)
        if not sweep.is_controlled:
            bound += [
                _bind_experiment(file, _trial(file, sweep, number), cwd, values, planning)
                for number, values in enumerate(candidates(sweep))
            ]
    return _specs(file, bound, cwd, planning)


def trial_specs(
    file: ExperimentFile, cwd: str | Path, trials: Mapping[int, Mapping[str, Any]]
) -> list[JobSpec]:
    """The jobs of some trials of the sweep: number (from 0) -> values by the names in the file."""
    cwd = Path(cwd).absolute()
    assert file.sweep is not None
    bound = [
        _bind_experiment(file, _trial(file, file.sweep, number), cwd, values, False)
        for number, values in trials.items()
    ]
    return _specs(file, bound, cwd, False)


def single(
    words: Sequence[str],
    cwd: str | Path,
    *,
    name: str | None = None,
    resources: Mapping[str, Any] | None = None,
) -> JobSpec:
    """One command line as a job: the words after ``swift``.

    Args:
        name: of the job; default: the command's ``run_name``, else command and time.
        resources: as under ``resources:`` in a file ("memory": "8GiB", "priority": 5).
    """
    cwd = Path(cwd).absolute()
    if not words:
        raise UsageError("which command?", fix="swift submit -- sft --model PATH --dataset FILE")
    command = words[0] if words[0] in COMMANDS else words[0].replace("_", "-")
    check_command(command, Written(command, command, ""), "")
    asked = read_resources(from_python(resources) if resources else None, Resources())
    rest = list(words[1:])
    bound = _Bound(_EXPERIMENT, name or "", command, None, asked, [], rest, {})
    if COMMANDS[command].own_arguments:
        bound.name = name or _timed(command)
        if command == "resume" and rest and not rest[0].startswith("-"):
            bound.run_dir = cwd / rest[0]
    else:
        resolved, bound.environment = bind_words(command, rest, cwd)
        make_absolute(resolved, cwd)
        bound.resolved, bound.words = resolved, []
        options = resolved.config.checkpoint
        given = options.run_name if command in TRAINING else None
        bound.name = given or name or _timed(command)
        if command in TRAINING and not options.resume_from_checkpoint:
            _take_run_folder(bound, bound.name)
    check_name(bound.name, Written(bound.name, bound.name, ""), "a job")
    bound.experiment = replace(_EXPERIMENT, name=bound.name)
    _check_folders([bound], False)
    made = [bound.run_dir] if bound.run_dir else []
    return _spec(bound, Estimator(made), cwd, None, False)


def changed_data(spec: JobSpec) -> list[str]:
    """The data files of a job that changed since it was submitted, as ``PATH: what happened``."""
    return _changed_data(spec.fingerprints)


_NOWHERE = Written({}, {}, "", {})
_EXPERIMENT = Experiment("", "sft", _NOWHERE, Resources(), {})


def _timed(command: str) -> str:
    return f"{command}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]


def _trial(file: ExperimentFile, sweep: Sweep, number: int) -> Experiment:
    return replace(file.base, name=sweep.trial_name(number))


def _values(sweep: Sweep, values: Mapping[str, Any]) -> Written:
    """The values of a trial as if they stood in the file, each at its parameter's line."""
    places = {parameter.name: parameter.place for parameter in sweep.parameters}
    items = {name: Written(value, _as_text(value), places[name]) for name, value in values.items()}
    plain = {name: item.value for name, item in items.items()}
    return Written(plain, {name: item.text for name, item in items.items()}, sweep.written.place, items)


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_text(entry) for entry in value]
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _bind_experiment(
    file: ExperimentFile, experiment: Experiment, cwd: Path, values: Mapping[str, Any] | None, planning: bool
) -> _Bound:
    command = experiment.command
    after = [Dependency(need) for need in experiment.needs]
    bound = _Bound(
        experiment, experiment.name, command, None, experiment.resources, after, list(experiment.words),
        experiment.environment, place=experiment.options.place,
    )  # fmt: skip
    if COMMANDS[command].own_arguments:
        return bound
    try:
        defaults = file.defaults if command == file.command else only_for(command, file.defaults)
        layers: list[Written | Mapping[str, Any]] = [defaults, experiment.options]
        if values is not None and file.sweep is not None:
            layers.append(_values(file.sweep, values))
        resolved = bind(command, layers, planning=planning)
        if values is not None:
            bound.values = {
                name: resolved.value(name)
                for name in (option_name(command, key, experiment.options) for key in values)
            }
        _check_run_name(resolved, experiment.name)
    except SwiftError as error:
        raise about(error, experiment.name) from None
    make_absolute(resolved, cwd)
    bound.resolved = resolved
    if command in TRAINING:
        _take_run_folder(bound, experiment.name)
    return bound


def _check_run_name(resolved: Resolved, name: str) -> None:
    given = resolved.config.checkpoint.run_name
    if given is not None and given != name:
        source = resolved.sources["run_name"]
        raise ConfigError(
            f"run_name {given} is not the experiment's name, which names its run folder",
            where=f"{source}: run_name",
            fix=f"leave run_name out, or call the experiment {given}",
        )


def _take_run_folder(bound: _Bound, name: str) -> None:
    """Fix the run folder before the job starts: ``<output_dir>/<name>``."""
    assert bound.resolved is not None
    options = bound.resolved.config.checkpoint
    options.run_name = name
    bound.resolved.sources["run_name"] = replace(
        bound.resolved.sources["run_name"], kind="python", detail="name"
    )
    bound.run_dir = Path(options.output_dir) / name


def _check_sweep(file: ExperimentFile, sweep: Sweep, cwd: Path, planning: bool) -> None:
    """Every parameter is an option, every value fits it, and the metric will exist."""
    command = file.base.command
    if command not in TRAINING:
        raise fail(
            f"a sweep trains: it cannot run swift {command}", sweep.written, "sweep", fix="command: sft"
        )
    seen: dict[str, str] = {}
    for parameter in sweep.parameters:
        name = option_name(command, parameter.name, Written(None, None, parameter.place))
        if name in seen:
            raise fail(
                f"is the same option as {seen[name]}", Written(None, None, parameter.place), parameter.name
            )
        if name in ("run_name", "output_dir"):
            raise fail(
                "names the folders of the trials", Written(None, None, parameter.place), parameter.name
            )
        seen[name] = parameter.name
    first = {parameter.name: _ends(parameter)[0] for parameter in sweep.parameters}
    trial = _trial(file, sweep, 0)
    bound = _bind_experiment(file, trial, cwd, first, planning)
    for parameter in sweep.parameters if sweep.is_controlled else ():
        for value in _ends(parameter)[1:]:
            _bind_experiment(file, trial, cwd, {**first, parameter.name: value}, planning)
    _check_metric(sweep, bound)


def _ends(parameter: Parameter) -> list[Any]:
    if parameter.choices is not None:
        return list(parameter.choices)
    return [parameter.low, parameter.high]


def _check_metric(sweep: Sweep, bound: _Bound) -> None:
    place = (sweep.written.items or {}).get("metric", sweep.written)
    assert bound.resolved is not None
    data = bound.resolved.config.data
    metric = sweep.metric
    if not metric.startswith("eval_") and metric not in (*_METRICS, *_ANSWER_METRICS):
        known = (*_METRICS, *_ANSWER_METRICS)
        near = closest(metric, known)
        raise fail(
            f"unknown metric {metric!r}",
            place,
            "metric",
            why=f"known: {', '.join(known)}",
            fix=f"did you mean {near}?" if near else None,
        )
    if metric != "loss" and not data.val_dataset and not data.split_dataset_ratio:
        raise fail(
            f"{metric} needs validation data", place, "metric", fix="val_dataset: [FILE], or metric: loss"
        )
    if metric in _ANSWER_METRICS:
        if sweep.early_stop is not None:
            raise fail(f"{metric} is known after training only, too late for early_stop", place, "metric")
        if not any(stage.kind == "evaluate" for stage in _stages(bound).values()):
            raise fail(f"{metric} comes from the stage evaluate", place, "metric", fix="after: [evaluate]")


# Stages


def _stages(bound: _Bound) -> dict[str, Stage]:
    """The stages of an experiment, the automatic evaluation included, without those that do not apply to it."""
    stages = dict(bound.experiment.stages)
    resolved = bound.resolved
    if resolved is None or bound.command not in TRAINING:
        return stages
    has_evaluation = any(stage.kind == "evaluate" for stage in stages.values())
    # Pre-training data has no questions; its run reports the loss on val_dataset itself.
    wanted = bound.command == "sft" and bound.experiment.evaluate and bool(resolved.config.data.val_dataset)
    if wanted and not has_evaluation and "evaluate" not in stages:
        stages = {"evaluate": Stage("evaluate", "evaluate", "infer", _NOWHERE), **stages}
    if resolved.config.tuner.tuner_type != "lora":
        _leave_out_merges(stages, bound)
    return stages


def _leave_out_merges(stages: dict[str, Stage], bound: _Bound) -> None:
    """Full training has nothing to merge. A merge that the file asks of every experiment is left out there, with the
    stages that need it; one that the experiment itself asks for is an error."""
    gone = {name for name, stage in stages.items() if stage.kind == "merge"}
    own = [stages[name] for name in gone if not stages[name].shared]
    if own:
        raise about(
            fail("there is no adapter to merge: this trains the whole model", own[0].written, own[0].name),
            bound.name,
        )
    while gone:
        for name in gone:
            stages.pop(name, None)
        gone = {name for name, stage in stages.items() if set(stage.needs) - set(stages)}


def _bind_stages(bound: _Bound, cwd: Path, planning: bool) -> list[_Bound]:
    stages = _stages(bound)
    made = []
    for stage in stages.values():
        try:
            made.append(_bind_stage(bound, stage, cwd, planning))
        except SwiftError as error:
            raise about(error, f"{bound.name}, stage {stage.name}") from None
    return made


def _bind_stage(bound: _Bound, stage: Stage, cwd: Path, planning: bool) -> _Bound:
    needs = [f"{bound.name}/{need}" for need in stage.needs] or [bound.name]
    words = {"{name}": bound.name, "{stage}": stage.name}
    if bound.run_dir is not None:
        words |= {"{run}": str(bound.run_dir), "{merged}": str(bound.run_dir / "merged")}
    made = _Bound(
        experiment=bound.experiment,
        name=f"{bound.name}/{stage.name}",
        command=stage.command,
        resolved=None,
        resources=stage_resources(stage, bound.experiment),
        after=[Dependency(need, stage.when) for need in needs],
        words=[_filled(word, words) for word in stage.words],
        environment={**bound.environment, **_variables(stage)},
        values=bound.values,
        place=stage.written.place,
    )
    if COMMANDS[stage.command].own_arguments:
        return made
    options = _filled_mapping(stage.options or _NOWHERE, words)
    made.resolved = bind(stage.command, [_stage_defaults(bound, stage, options), options], planning=planning)
    _check_stage(bound, stage, made.resolved)
    make_absolute(made.resolved, cwd)
    if stage.command in TRAINING:
        _check_run_name(made.resolved, f"{bound.name}-{stage.name}")
        _take_run_folder(made, f"{bound.name}-{stage.name}")
    return made


def _variables(stage: Stage) -> dict[str, str]:
    items = (stage.environment.items or {}) if stage.environment is not None else {}
    return {key: "" if value.text is None else str(value.text) for key, value in items.items()}


def _stage_defaults(bound: _Bound, stage: Stage, options: Written) -> dict[str, Any]:
    """What a stage knows from its experiment: the run it works on, the validation data, where results go."""
    taken = COMMANDS[stage.command].options()
    trained, run = bound.resolved, bound.run_dir
    if trained is None:
        return {}
    values: dict[str, Any] = {}
    if stage.command in TRAINING:
        return {"output_dir": trained.config.checkpoint.output_dir}
    for name in _INHERITED:
        if name in taken and trained.is_explicit(name):
            values[name] = trained.value(name)
    named = {key.replace("-", "_").rpartition(".")[2] for key in options.items or {}}
    if run is None:
        return values
    if "adapters" in taken and not named & {"model", "adapters"}:
        is_lora = trained.config.tuner.tuner_type == "lora"
        values |= {"adapters": [str(run)]} if is_lora else {"model": str(run)}
    if stage.command == "merge-lora":
        values["output_dir"] = str(run / "merged")
    elif "result_path" in taken:
        values["result_path"] = str(run / f"{'evaluation' if stage.name == 'evaluate' else stage.name}.jsonl")
    if stage.kind == "evaluate":
        values["metric"] = ["exact_match", "rouge", "loss"]
    return values


def _check_stage(bound: _Bound, stage: Stage, resolved: Resolved) -> None:
    if stage.kind in ("evaluate", "infer") and not resolved.config.data.val_dataset:
        raise fail(
            "has no data", stage.written, stage.name, fix="val_dataset: [FILE], here or in the experiment"
        )


def _filled(text: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text


def _filled_mapping(written: Written, words: Mapping[str, str]) -> Written:
    """``{run}``, ``{merged}``, ``{name}`` and ``{stage}`` in every text of a mapping."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return _filled(value, words)
        return [fill(entry) for entry in value] if isinstance(value, list) else value

    items = {
        key: _filled_mapping(entry, words)
        if entry.items is not None
        else Written(fill(entry.value), fill(entry.text), entry.place)
        for key, entry in (written.items or {}).items()
    }
    plain = {key: entry.value for key, entry in items.items()}
    return Written(plain, {key: entry.text for key, entry in items.items()}, written.place, items)


# Jobs


def _specs(file: ExperimentFile, bound: list[_Bound], cwd: Path, planning: bool) -> list[JobSpec]:
    """Experiments and stages as jobs, in the order of the file."""
    differences = _differences(bound)
    everything: list[_Bound] = []
    for experiment in bound:
        everything += [experiment, *_bind_stages(experiment, cwd, planning)]
    _check_folders(everything, planning)
    estimator = Estimator(job.run_dir for job in everything if job.run_dir is not None)
    specs: list[JobSpec] = []
    trained: dict[str, dict[str, Any]] = {}
    for job in everything:
        like = trained.get(job.experiment.name)
        spec = _spec(job, estimator, cwd, file.resources.max_parallel, planning, like)
        trained.setdefault(job.experiment.name, spec.estimate)
        parameters = {**differences.get(job.experiment.name, {}), **(job.values or {})}
        specs.append(replace(spec, parameters=parameters))
    return specs


def _differences(bound: Sequence[_Bound]) -> dict[str, dict[str, Any]]:
    """Experiment -> the options in which it differs from its siblings: those that somebody set, as resolved."""
    resolved = {job.name: job.resolved for job in bound if job.resolved is not None}
    set_somewhere = {
        name
        for entry in resolved.values()
        for name in COMMANDS[entry.command].options()
        if entry.is_explicit(name) and name != "run_name"
    }
    found: dict[str, dict[str, Any]] = {job.name: {} for job in bound}
    if len({job.command for job in bound}) > 1:
        found = {job.name: {"command": job.command} for job in bound}
    for name in sorted(set_somewhere):
        takers = {
            job: entry.value(name)
            for job, entry in resolved.items()
            if name in COMMANDS[entry.command].options() and has_effect(entry, name)
        }
        if len({repr(value) for value in takers.values()}) > 1:
            for job, value in takers.items():
                found[job][name] = value
    return found


def _check_folders(jobs: Iterable[_Bound], planning: bool) -> None:
    """Refuse two jobs with one run folder, and a folder that holds a run already."""
    owners: dict[str, str] = {}
    for job in jobs:
        if job.run_dir is None or job.command not in TRAINING:
            continue
        folder = os.path.realpath(job.run_dir)
        other = owners.setdefault(folder.casefold(), job.name)
        if other != job.name:
            raise ConfigError(
                f"{other} and {job.name} have one run folder: {job.run_dir}",
                where=job.place or None,
                fix="give one of them another name or output_dir",
            )
        if not planning and RunFolder(job.run_dir).holds_run():
            raise ConfigError(
                f"experiment {job.name}: {job.run_dir} already holds a run",
                where=job.place or None,
                fix="choose another output_dir or name; swift resume goes on with the run that is there",
            )


def _spec(
    job: _Bound,
    estimator: Estimator,
    cwd: Path,
    max_parallel: int | None,
    planning: bool,
    like: dict[str, Any] | None = None,
) -> JobSpec:
    """The snapshot of a job. ``like``: the estimate of the training it follows."""
    estimate: dict[str, Any] = {}
    fingerprints: list[dict[str, Any]] = []
    problems: list[str] = []
    if job.resolved is not None:
        try:
            estimator.check_inputs(job.resolved)
            fingerprints = estimator.fingerprints(job.resolved, cwd)
        except SwiftError as error:
            if not planning:
                raise about(error, job.name) from None
            problems.append(error.render())
        try:
            estimate = estimator.estimate(job.resolved, like)
        except SwiftError as error:
            raise about(error, job.name) from None
        problems += job.resolved.warnings if planning else []
    if (
        planning
        and job.run_dir is not None
        and job.command in TRAINING
        and RunFolder(job.run_dir).holds_run()
    ):
        problems.append(f"{job.run_dir} already holds a run")
    if problems:
        estimate["problems"] = problems
    return JobSpec(
        name=job.name,
        experiment=job.experiment.name,
        command=job.command,
        options=snapshot(job.resolved) if job.resolved is not None else {},
        words=job.words,
        cwd=str(cwd),
        env=job.environment,
        run_dir=str(job.run_dir) if job.run_dir is not None else None,
        needs=job.resources.needs(int(estimate.get("devices_needed") or 1)),
        priority=job.resources.priority,
        max_parallel=max_parallel,
        after=job.after,
        fingerprints=fingerprints,
        estimate=estimate,
        code_version=code_version(),
        cold=job.resources.cold,
    )
