"""The file that declares everything: defaults, experiments, sweep, resources, and what follows.

Reading checks the structure; the options themselves are bound by ``expand``, which knows each experiment's command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from swift.config.read import Written, read_file, read_text
from swift.config.schema import SECTIONS, options
from swift.core.errors import ConfigError
from swift.core.registry import suggest
from swift.experiments.fields import NOWHERE, Fields, fail, mapping
from swift.experiments.search_space import Sweep, read_sweep
from swift.experiments.stages import (
    Stage,
    check_graph,
    check_name,
    known_command,
    merge_stages,
    read_stages,
    split_command,
)
from swift.experiments.types import TRAINING, Needs

__all__ = [
    "Experiment",
    "ExperimentFile",
    "Resources",
    "is_experiment_file",
    "parse_experiments",
    "read_experiments",
    "read_resources",
]

_KEYS = ("name", "defaults", "experiments", "sweep", "resources", "after", "evaluate", "ENV")
_OWN_KEYS = ("command", "after", "needs", "resources", "evaluate", "words", "ENV")
_RESOURCES = ("devices", "memory", "threads", "time_limit", "priority", "exclusive", "cold", "preemption")
_FILE_RESOURCES = (*_RESOURCES, "max_parallel", "wait")


@dataclass(frozen=True)
class Resources:
    """What jobs ask of the machine.

    Attributes:
        devices: per job; None: as many as the job's plan needs.
        max_parallel: jobs of this file at a time; None: as many as fit.
        wait: jobs that ask for more than this machine has are queued instead of refused.
        cold: start in a fresh process, not in a warm worker.
        preemption: jobs may preempt those of lower priority, and be preempted.
    """

    devices: int | None = None
    memory_bytes: int | None = None
    threads: int | None = None
    time_limit_seconds: float | None = None
    priority: int = 0
    exclusive: bool = False
    cold: bool = False
    preemption: bool = True
    max_parallel: int | None = None
    wait: bool = False

    def needs(self, devices_needed: int = 1) -> Needs:
        """The part that the scheduler looks at."""
        return Needs(
            devices=self.devices or devices_needed,
            memory_bytes=self.memory_bytes,
            threads=self.threads,
            time_limit_seconds=self.time_limit_seconds,
            exclusive=self.exclusive,
            preemption=self.preemption,
        )


@dataclass(frozen=True)
class Experiment:
    """One entry of ``experiments``.

    Attributes:
        options: its overrides, as they stand in the file.
        words: for commands with words of their own.
        stages: what follows, the file's stages included.
        needs: other experiments that must have succeeded.
        evaluate: evaluate after training when there is validation data.
    """

    name: str
    command: str
    options: Written
    resources: Resources
    stages: dict[str, Stage]
    words: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    evaluate: bool = True
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExperimentFile:
    """A whole file.

    Attributes:
        shown: the file as the user named it, for messages.
        text: the file as it was read; reading it again gives the same.
        defaults: options of every experiment.
        base: what trials of the sweep are made of (its name is not used).
    """

    name: str
    shown: str
    text: str
    command: str
    defaults: Written
    experiments: tuple[Experiment, ...]
    base: Experiment
    resources: Resources
    sweep: Sweep | None = None


def is_experiment_file(path: Path) -> bool:
    """True for a file with a key that only a file of experiments has; others are for one command."""
    return bool({"experiments", "sweep", "defaults", "after"} & set(read_file(path, str(path)).items or {}))


def read_experiments(path: str | Path) -> ExperimentFile:
    """Read one YAML (or JSON) file. Raises ConfigError that says file, line, what, and what to do."""
    path = Path(path)
    written = read_file(path, str(path))
    return _read(written, str(path), path.read_text(encoding="utf-8-sig"), path.stem)


def parse_experiments(source: str | Mapping[str, Any], shown: str = "experiments") -> ExperimentFile:
    """The same from the text of such a file, or from a Python dict."""
    text = (
        source
        if isinstance(source, str)
        else yaml.safe_dump(_plain(source), sort_keys=False, allow_unicode=True)
    )
    return _read(read_text(text, shown), shown, text, Path(shown).stem)


def _plain(value: Any) -> Any:
    """Python values as YAML knows them: paths as texts, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ConfigError(
        f"{value!r} cannot stand in an experiments file", fix="use texts, numbers, lists and dicts"
    )


def _read(written: Written, shown: str, text: str, stem: str) -> ExperimentFile:
    fields = Fields(written, "the file", _KEYS, _misplaced(written))
    name = fields.text("name") or stem
    check_name(name, fields.get("name") or written, "the file")
    defaults = Fields(fields.get("defaults") or NOWHERE, "defaults")
    _refuse_record(defaults)
    command = _command(defaults, "sft")
    environment = {**defaults.variables(), **fields.variables()}
    resources = read_resources(fields.get("resources"), Resources(), _FILE_RESOURCES)
    base = Experiment(
        name="",
        command=command,
        options=mapping({}, written.place),
        resources=resources,
        stages=merge_stages(read_stages(fields.get("after")), {}),
        words=tuple(defaults.words("words")),
        evaluate=fields.boolean("evaluate", defaults.boolean("evaluate", True)),
        environment=environment,
    )
    for key in ("after", "needs", "resources"):
        if key in defaults:
            raise defaults.fail(
                "does not belong under defaults", key, fix=f"write {key}: at the top of the file"
            )
    entries = Fields(fields.get("experiments") or NOWHERE, "experiments")
    experiments = tuple(_experiment(key, value, base) for key, value in entries.items.items())
    _check_experiments(experiments, entries)
    sweep = read_sweep(fields.get("sweep"))
    if sweep is not None:
        base = _sweep_base(sweep, experiments, base)
        _check_trial_names(sweep, experiments, entries)
    elif not experiments:
        raise ConfigError(
            "declares no experiment",
            where=shown,
            fix="add experiments: with a name and its options, or a sweep:",
        )
    return ExperimentFile(
        name=name,
        shown=shown,
        text=text,
        command=command,
        defaults=defaults.without(_OWN_KEYS),
        experiments=experiments,
        base=base,
        resources=resources,
        sweep=sweep,
    )


def _misplaced(written: Written) -> dict[str, str]:
    """Hints for keys at the top that are options or sections of options."""
    return {
        key: f"write {key} under defaults:"
        for key in written.items or {}
        if key in options() or key in SECTIONS
    }


def _refuse_record(fields: Fields) -> None:
    """``explicit`` marks the record of a run, which is not what an experiment wants."""
    if "explicit" in fields.items:
        fix = "copy only the options that you mean to set"
        raise fields.fail("belongs to the config.yaml of a run", "explicit", fix=fix)


def _command(fields: Fields, default: str) -> str:
    command = fields.text("command")
    return default if command is None else known_command(command, fields.items["command"])


def _experiment(name: str, written: Written, base: Experiment) -> Experiment:
    check_name(name, written, "an experiment")
    fields = Fields(written, name)
    command = _command(fields, base.command)
    _refuse_record(fields)
    options, words = split_command(fields, command, _OWN_KEYS)
    # The stages of the file follow its trainings; an infer or a doctor beside them has only its own.
    common = base.stages if command in TRAINING else {}
    return Experiment(
        name=name,
        command=command,
        options=options,
        resources=read_resources(fields.get("resources"), base.resources),
        stages=merge_stages(common, read_stages(fields.get("after"))),
        words=words or (base.words if command == base.command else ()),
        needs=tuple(fields.words("needs")),
        evaluate=fields.boolean("evaluate", base.evaluate),
        environment={**base.environment, **fields.variables()},
    )


def read_resources(
    written: Written | None, inherited: Resources, known: tuple[str, ...] = _RESOURCES
) -> Resources:
    """A ``resources:`` on top of those of the file or the experiment. Raises ConfigError."""
    if written is None:
        return inherited
    hints = {
        "max_parallel": "write max_parallel under resources: at the top of the file; it is for all its jobs",
        "wait": "write wait under resources: at the top of the file",
        "gpus": "write devices: 1",
        "gpu": "write devices: 1",
    }
    fields = Fields(written, "resources", known, hints)
    devices = fields.text("devices")
    changes: dict[str, Any] = {
        "devices": None if devices in (None, "auto") else fields.integer("devices", 1),
        "memory_bytes": fields.size("memory") if fields.text("memory") != "auto" else None,
        "threads": fields.integer("threads", 1) if fields.text("threads") != "auto" else None,
        "time_limit_seconds": fields.duration("time_limit"),
        "priority": fields.integer("priority"),
        "max_parallel": fields.integer("max_parallel", 1),
        "exclusive": fields.boolean("exclusive", False),
        "cold": fields.boolean("cold", False),
        "wait": fields.boolean("wait", False),
        "preemption": fields.boolean("preemption", True),
    }
    named = {"memory": "memory_bytes", "time_limit": "time_limit_seconds"}
    given = {named.get(key, key) for key in known if key in fields}
    return replace(inherited, **{key: value for key, value in changes.items() if key in given})


def _check_experiments(experiments: tuple[Experiment, ...], entries: Fields) -> None:
    """Names that fall together on some file systems, needs that are not there, circles."""
    by_folder: dict[str, str] = {}
    for experiment in experiments:
        other = by_folder.setdefault(experiment.name.casefold(), experiment.name)
        if other != experiment.name:
            raise entries.fail(
                f"{other} and {experiment.name} differ in capitals only: on some disks that is one folder",
                experiment.name,
                fix="rename one of them",
            )
    graph = {experiment.name: experiment.needs for experiment in experiments}
    check_graph(graph, entries.items, "experiment")


def _sweep_base(sweep: Sweep, experiments: tuple[Experiment, ...], base: Experiment) -> Experiment:
    if sweep.base is None:
        return base
    for experiment in experiments:
        if experiment.name == sweep.base:
            return experiment
    others = [experiment.name for experiment in experiments]
    fix = suggest(sweep.base, others, "leave base out: trials then start from the defaults")
    place = (sweep.written.items or {})["base"]
    raise fail(f"there is no experiment {sweep.base!r} to start from", place, "base", fix=fix)


def _check_trial_names(sweep: Sweep, experiments: tuple[Experiment, ...], entries: Fields) -> None:
    trials = {sweep.trial_name(number) for number in range(sweep.trials)}
    for experiment in experiments:
        if experiment.name in trials:
            raise entries.fail("the sweep calls one of its trials so", experiment.name, fix="rename it")
