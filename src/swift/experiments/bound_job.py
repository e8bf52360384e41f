"""An experiment with its options resolved, and the stages that follow it, whose options come from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swift.config.commands import COMMANDS
from swift.config.read import Written
from swift.config.schema import Resolved
from swift.core.errors import ConfigError, SwiftError
from swift.experiments.fields import NOWHERE, fail, mapping
from swift.experiments.file import Experiment, Resources, read_resources
from swift.experiments.option_layers import about, bind, make_absolute
from swift.experiments.serving import SERVING
from swift.experiments.stages import Stage
from swift.experiments.types import TRAINING, Dependency

__all__ = ["BoundJob", "bind_stages", "check_run_name", "stages_of", "take_run_folder"]

_INHERITED = (
    "device", "attn_impl", "trust_remote_code", "num_threads", "seed", "columns", "on_bad_rows", "val_dataset",
)  # fmt: skip
"""What a stage takes over from its experiment, where its command has it."""


@dataclass
class BoundJob:
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


def check_run_name(resolved: Resolved, name: str) -> None:
    given = resolved.config.checkpoint.run_name
    if given is not None and given != name:
        source = resolved.sources["run_name"]
        raise ConfigError(
            f"run_name {given} is not the experiment's name, which names its run folder",
            where=f"{source}: run_name",
            fix=f"leave run_name out, or call the experiment {given}",
        )


def take_run_folder(bound: BoundJob, name: str) -> None:
    """Fix the run folder before the job starts: ``<output_dir>/<name>``."""
    assert bound.resolved is not None
    options = bound.resolved.config.checkpoint
    options.run_name = name
    bound.resolved.sources["run_name"] = replace(
        bound.resolved.sources["run_name"], kind="python", detail="name"
    )
    bound.run_dir = Path(options.output_dir) / name


def stages_of(bound: BoundJob) -> dict[str, Stage]:
    """The stages of an experiment, the automatic evaluation included, without those that do not apply to it."""
    stages = dict(bound.experiment.stages)
    resolved = bound.resolved
    if resolved is None or bound.command not in TRAINING:
        return stages
    has_evaluation = any(stage.kind == "evaluate" for stage in stages.values())
    # Pre-training data has no questions; its run reports the loss on val_dataset itself.
    wanted = bound.command == "sft" and bound.experiment.evaluate and bool(resolved.config.data.val_dataset)
    if wanted and not has_evaluation and "evaluate" not in stages:
        stages = {"evaluate": Stage("evaluate", "evaluate", "eval", NOWHERE), **stages}
    if not resolved.config.tuner.can_merge:
        _leave_out_merges(stages, bound)
    return stages


def _leave_out_merges(stages: dict[str, Stage], bound: BoundJob) -> None:
    """Full training has nothing to merge, and some adapters cannot be merged. A merge that the file asks of every
    experiment is left out there, with the stages that need it; one that the experiment itself asks for is an error."""
    gone = {name for name, stage in stages.items() if stage.kind == "merge"}
    own = [stages[name] for name in gone if not stages[name].shared]
    if own:
        raise about(fail("there is no adapter that can be merged", own[0].written, own[0].name), bound.name)
    while gone:
        for name in gone:
            stages.pop(name, None)
        gone = {name for name, stage in stages.items() if set(stage.needs) - set(stages)}


def bind_stages(bound: BoundJob, cwd: Path, planning: bool) -> list[BoundJob]:
    stages = stages_of(bound)
    made = []
    for stage in stages.values():
        try:
            made.append(_bind_stage(bound, stage, cwd, planning))
        except SwiftError as error:
            if (
                error.where == f"swift {stage.command}"
            ):  # what the whole command lacks stands nowhere in the file
                error.where = f"{stage.written.place}: {stage.name}"
            raise about(error, f"{bound.name}, stage {stage.name}") from None
    return made


def _bind_stage(bound: BoundJob, stage: Stage, cwd: Path, planning: bool) -> BoundJob:
    needs = [f"{bound.name}/{need}" for need in stage.needs] or [bound.name]
    words = {"{name}": bound.name, "{stage}": stage.name}
    if bound.run_dir is not None:
        words |= {f"{{{name}}}": str(bound.run_dir / name) for name in ("merged", "exported")}
        words["{run}"] = str(bound.run_dir)
    resources = bound.experiment.resources
    if stage.command in SERVING:  # it keeps its place for long, so everything else goes first
        resources = replace(resources, priority=resources.priority - 1, cold=True)
    made = BoundJob(
        experiment=bound.experiment,
        name=f"{bound.name}/{stage.name}",
        command=stage.command,
        resolved=None,
        resources=read_resources(stage.resources, resources),
        after=[Dependency(need, stage.when) for need in needs],
        words=[_filled(word, words) for word in stage.words],
        environment={**bound.environment, **stage.environment},
        values=bound.values,
        place=stage.written.place,
    )
    if COMMANDS[stage.command].own_arguments:
        return made
    options = _filled_mapping(stage.options, words)
    made.resolved = bind(stage.command, [_stage_defaults(bound, stage, options), options], planning=planning)
    _check_stage(bound, stage, made.resolved)
    make_absolute(made.resolved, cwd)
    if stage.command in TRAINING:
        check_run_name(made.resolved, f"{bound.name}-{stage.name}")
        take_run_folder(made, f"{bound.name}-{stage.name}")
    return made


def _stage_defaults(bound: BoundJob, stage: Stage, options: Written) -> dict[str, Any]:
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
        whole = trained.config.tuner.trains_whole_model
        values |= {"model": str(run)} if whole else {"adapters": [str(run)]}
    if stage.command == "merge-lora":
        values["output_dir"] = str(run / "merged")
    elif stage.command == "export":
        values["output_dir"] = str(run / ("exported" if stage.kind == "export" else stage.name))
    elif "result_path" in taken:
        values["result_path"] = str(run / f"{stage.name}.jsonl")
    if "eval_output_dir" in taken:
        values["eval_output_dir"] = str(run / "eval" / stage.name)
    if stage.command in SERVING and "port" not in named:
        values["port"] = 0  # every experiment of the file serves at a port of its own
    if stage.kind == "evaluate":
        values["metric"] = ["exact_match", "rouge", "loss"]
    return values


def _check_stage(bound: BoundJob, stage: Stage, resolved: Resolved) -> None:
    if stage.kind == "infer" and not resolved.config.data.val_dataset:
        raise fail(
            "has no data", stage.written, stage.name, fix="val_dataset: [FILE], here or in the experiment"
        )


def _filled(text: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text


def _filled_mapping(written: Written, words: Mapping[str, str]) -> Written:
    """``{run}``, ``{merged}``, ``{exported}``, ``{name}`` and ``{stage}`` in every text of a mapping."""

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
    return mapping(items, written.place)
