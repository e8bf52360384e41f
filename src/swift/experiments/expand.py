"""From a file of experiments to jobs: each one a snapshot that later edits of files do not change."""

from __future__ import annotations

import datetime
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift.config.commands import COMMANDS
from swift.config.read import Written, from_python
from swift.config.schema import Resolved
from swift.core.errors import ConfigError, SwiftError, UsageError
from swift.core.registry import suggest
from swift.experiments.bound_job import BoundJob, bind_stages, check_run_name, stages_of, take_run_folder
from swift.experiments.estimator import Estimator
from swift.experiments.fields import NOWHERE, fail, mapping
from swift.experiments.file import Experiment, ExperimentFile, Resources, read_resources
from swift.experiments.fusing import fuse_fields
from swift.experiments.option_layers import (
    about,
    bind,
    bind_words,
    has_effect,
    make_absolute,
    only_for,
    option_name,
    snapshot,
)
from swift.experiments.outcome import ANSWER_METRICS
from swift.experiments.search_space import Parameter, Sweep, candidates
from swift.experiments.stages import check_name, known_command
from swift.experiments.types import TRAINING, Dependency, JobSpec
from swift.runs.folder import RunFolder
from swift.runs.record import code_version
from swift.runs.status import read_status

__all__ = ["expand", "single", "trial_specs"]

_ANSWER_METRICS = tuple(name for name in ANSWER_METRICS if name != "loss")
_METRICS = ("loss", "eval_loss", "eval_token_accuracy", "eval_perplexity")
_LIGHT = ("config", "doctor", "plan")
_LIGHT_BYTES = 1 << 30
"""Commands that load no model, and twice what their imports take (see ``plan.analytic.CONTEXT_BYTES``)."""


def expand(
    file: ExperimentFile, cwd: str | Path, *, planning: bool = False, new_only: bool = False
) -> list[JobSpec]:
    """All jobs that can be known before anything ran: experiments, grid and random trials, and their stages.

    Trials of a sweep that depend on results (``file.sweep.is_controlled``) come from ``SweepController``; here their
    options are only checked. Planning shows each with the largest values.

    Args:
        cwd: what relative paths are relative to.
        new_only: leave out experiments whose run folder holds a run already.
        planning: only to look: a run folder that is taken, or a missing model, becomes ``estimate["problems"]``.

    Raises SwiftError that names experiment, file and line.
    """
    cwd = Path(cwd).absolute()
    bound = [_bind_experiment(file, experiment, cwd, None, planning) for experiment in file.experiments]
    sweep = file.sweep
    if sweep is not None:
        _check_sweep(file, sweep, cwd, planning)
        if new_only and sweep.is_controlled:
            why = "it learns from its trials, so they make a whole"
            raise fail(
                "cannot go on from other trials", sweep.written, "sweep", why=why, fix="leave out --new"
            )
        points: Iterable[Mapping[str, Any]] = () if sweep.is_controlled else candidates(sweep)
        if sweep.is_controlled and planning:
            points = [{entry.name: _largest(entry) for entry in sweep.parameters}] * sweep.trials
        trials = [
            _bind_experiment(file, _trial(file, sweep, number), cwd, values, planning)
            for number, values in enumerate(points)
        ]
        specs = _specs(file, bound + trials, cwd, planning, new_only)
        if not sweep.is_controlled:
            return specs
        names, limit = {trial.name for trial in trials}, sweep.limit(file.resources.max_parallel)
        return [replace(spec, max_parallel=limit) if spec.experiment in names else spec for spec in specs]
    return _specs(file, bound, cwd, planning, new_only)


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
    command = known_command(words[0], NOWHERE, "")
    asked = read_resources(from_python(resources) if resources else None, Resources())
    rest = list(words[1:])
    bound = BoundJob(_EXPERIMENT, name or "", command, None, asked, [], rest, {})
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
            take_run_folder(bound, bound.name)
    check_name(bound.name, NOWHERE, "a job")
    bound.experiment = replace(_EXPERIMENT, name=bound.name)
    _check_folders([bound], False)
    made = [bound.run_dir] if bound.run_dir else []
    return _spec(bound, Estimator(made), cwd, None, False)


_EXPERIMENT = Experiment("", "sft", NOWHERE, Resources(), {})


def _timed(command: str) -> str:
    return f"{command}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]


def _trial(file: ExperimentFile, sweep: Sweep, number: int) -> Experiment:
    return replace(file.base, name=sweep.trial_name(number))


def _values(sweep: Sweep, values: Mapping[str, Any]) -> Written:
    """The values of a trial as if they stood in the file, each at its parameter's line."""
    places = {parameter.name: parameter.place for parameter in sweep.parameters}
    items = {name: Written(value, _as_text(value), places[name]) for name, value in values.items()}
    return mapping(items, sweep.written.place)


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_text(entry) for entry in value]
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _bind_experiment(
    file: ExperimentFile, experiment: Experiment, cwd: Path, values: Mapping[str, Any] | None, planning: bool
) -> BoundJob:
    command = experiment.command
    after = [Dependency(need) for need in experiment.needs]
    bound = BoundJob(
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
        check_run_name(resolved, experiment.name)
    except SwiftError as error:
        raise about(error, experiment.name) from None
    make_absolute(resolved, cwd)
    bound.resolved = resolved
    if command in TRAINING:
        take_run_folder(bound, experiment.name)
    return bound


def _check_sweep(file: ExperimentFile, sweep: Sweep, cwd: Path, planning: bool) -> None:
    """Every parameter is an option, every value fits it, and the metric will exist."""
    command = file.base.command
    if command not in TRAINING:
        raise fail(
            f"a sweep trains: it cannot run swift {command}", sweep.written, "sweep", fix="command: sft"
        )
    if sweep.is_controlled and not planning and importlib.util.find_spec("optuna") is None:
        raise fail(
            "this sweep needs Optuna",
            sweep.written,
            "sweep",
            why="grid and random without early_stop need nothing more",
            fix='pip install "swift-forge[sweep]"',
        )
    seen: dict[str, str] = {}
    for parameter in sweep.parameters:
        written = Written(None, None, parameter.place)
        name = option_name(command, parameter.name, written)
        if name in seen:
            raise fail(f"is the same option as {seen[name]}", written, parameter.name)
        if name in ("run_name", "output_dir"):
            raise fail("names the folders of the trials", written, parameter.name)
        seen[name] = parameter.name
    first = {parameter.name: parameter.ends()[0] for parameter in sweep.parameters}
    trial = _trial(file, sweep, 0)
    bound = _bind_experiment(file, trial, cwd, first, planning)
    for parameter in sweep.parameters if sweep.is_controlled else ():
        for value in parameter.ends()[1:]:
            _bind_experiment(file, trial, cwd, {**first, parameter.name: value}, planning)
    _check_metric(sweep, bound)


def _largest(parameter: Parameter) -> Any:
    values = parameter.ends()
    return max(values) if all(isinstance(value, int | float) for value in values) else values[-1]


def _check_metric(sweep: Sweep, bound: BoundJob) -> None:
    place = (sweep.written.items or {}).get("metric", sweep.written)
    assert bound.resolved is not None
    data = bound.resolved.config.data
    metric = sweep.metric
    # A task's is written task.metric, a user's own evaluation.metric.
    of_answers = metric in _ANSWER_METRICS or "." in metric
    if not metric.startswith("eval_") and metric not in _METRICS and not of_answers:
        known = (*_METRICS, *_ANSWER_METRICS)
        why = f"known: {', '.join(known)}"
        raise fail(f"unknown metric {metric!r}", place, "metric", why=why, fix=suggest(metric, known))
    tasks = bound.resolved.config.evaluation.eval_tasks
    if metric != "loss" and not of_answers and not (data.val_dataset or data.split_dataset_ratio or tasks):
        raise fail(
            f"{metric} needs validation data", place, "metric", fix="val_dataset: [FILE], or metric: loss"
        )
    if of_answers:
        if sweep.early_stop is not None:
            raise fail(f"{metric} is known after training only, too late for early_stop", place, "metric")
        if not any(stage.kind == "evaluate" for stage in stages_of(bound).values()):
            raise fail(f"{metric} comes from the stage evaluate", place, "metric", fix="after: [evaluate]")


# Jobs


def _specs(
    file: ExperimentFile, bound: list[BoundJob], cwd: Path, planning: bool, new_only: bool = False
) -> list[JobSpec]:
    """Experiments and stages as jobs, in the order of the file."""
    differences = _differences(bound)
    if new_only:
        bound = _without_runs(bound)
    everything: list[BoundJob] = []
    for experiment in bound:
        everything += [experiment, *bind_stages(experiment, cwd, planning)]
    _check_folders(everything, planning)
    estimator = Estimator(job.run_dir for job in everything if job.run_dir is not None)
    specs: list[JobSpec] = []
    trained: dict[str, dict[str, Any]] = {}
    for job in everything:
        like = trained.get(job.experiment.name)
        spec = _spec(job, estimator, cwd, file.resources.max_parallel, planning, like)
        if job.command in TRAINING:
            trained.setdefault(job.experiment.name, spec.estimate)
        parameters = {**differences.get(job.experiment.name, {}), **(job.values or {})}
        specs.append(replace(spec, parameters=parameters))
    return specs


def _differences(bound: Sequence[BoundJob]) -> dict[str, dict[str, Any]]:
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


def _without_runs(bound: Sequence[BoundJob]) -> list[BoundJob]:
    """The experiments that have no run yet. Raises ConfigError when one of them needs a run that did not succeed."""
    there = {job.name: job.run_dir for job in bound if job.run_dir and RunFolder(job.run_dir).holds_run()}
    left = [job for job in bound if job.name not in there]
    for job in left:
        for name in [need.job for need in job.after if need.job in there]:
            if (read_status(there[name]) or {}).get("state") != "succeeded":
                raise ConfigError(
                    f"{job.name} needs {name}, which did not succeed",
                    where=job.place or None,
                    why=f"its run is in {there[name]}",
                    fix="swift resume goes on with it",
                )
        job.after = [need for need in job.after if need.job not in there]
    if not left:
        raise UsageError("every experiment of this file has a run already", fix="swift compare shows them")
    return left


def _check_folders(jobs: Iterable[BoundJob], planning: bool) -> None:
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
                fix="choose another output_dir or name; swift resume goes on with the run that is there; "
                "swift run FILE --new leaves out what has a run",
            )


def _at_its_line(error: SwiftError, resolved: Resolved) -> SwiftError:
    """The same error at the line of the file that set the option, where it names the option's flag."""
    flag = error.where or ""
    option = flag.removeprefix("--")
    if option == flag or option not in resolved.sources or resolved.sources[option].kind != "file":
        return error
    fix = error.fix.replace(f"{flag} ", f"{option}: ") if error.fix else None
    return type(error)(error.message, where=f"{resolved.sources[option]}: {option}", why=error.why, fix=fix)


def _spec(
    job: BoundJob,
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
            error = _at_its_line(error, job.resolved)
            if not planning:
                raise about(error, job.name) from None
            problems.append(error.render())
        try:
            estimate = estimator.estimate(job.resolved, like)
        except SwiftError as error:
            raise about(error, job.name) from None
        problems += job.resolved.warnings if planning else []
    elif job.command in _LIGHT:
        estimate = {"memory_bytes": _LIGHT_BYTES}
    if planning and job.command in TRAINING and job.run_dir and RunFolder(job.run_dir).holds_run():
        problems.append(f"{job.run_dir} already holds a run")
    if problems:
        estimate["problems"] = problems
    fuse = fuse_fields(job.resolved, job.environment, estimate) if job.resolved is not None else {}
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
        fuse=fuse,
    )
