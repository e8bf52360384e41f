"""What follows an experiment: stages in a graph, each a job of its own.

A stage has a kind that knows its options (evaluate, merge, infer, export), or names any command. ``when`` says how the
jobs it needs must have ended; without ``needs`` it follows the experiment itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

from swift.config.commands import COMMANDS, LATER_COMMANDS
from swift.config.read import Written
from swift.core.errors import ConfigError
from swift.core.registry import suggest
from swift.experiments.fields import NOWHERE, Fields, fail
from swift.experiments.serving import SERVING
from swift.experiments.submit_checks import find_circle
from swift.experiments.types import Condition

__all__ = [
    "KINDS",
    "Stage",
    "check_graph",
    "check_name",
    "known_command",
    "merge_stages",
    "read_stages",
    "split_command",
]

KINDS: dict[str, str] = {
    "evaluate": "eval",
    "merge": "merge-lora",
    "infer": "infer",
    "export": "export",
    "deploy": "deploy",
}
"""Kind of stage -> the command it runs."""

_LATER = ("quantize", "sample", "rollout")
"""Stages that later versions bring."""

_WITH_WORDS = ("data", "config", "doctor", "demo", "plan", "resume")
"""Commands with words of their own that can be a job (not: those that talk to the service)."""

_OWN_KEYS = ("name", "command", "words", "when", "needs", "resources", "ENV")
_CONDITIONS: tuple[str, ...] = get_args(Condition)
_NAME = re.compile(r"[^\W_][\w.+=,@-]*")
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Stage:
    """One entry of ``after``.

    Attributes:
        name: unique within the experiment.
        kind: evaluate, merge, infer, export or command.
        command: the word after ``swift``.
        options: the rest of its mapping: options of the command.
        words: for commands with words of their own.
        when: how the jobs in ``needs`` must have ended.
        needs: other stages, or nothing for the experiment itself.
        resources: its own, or None for the experiment's.
        environment: variables beside the experiment's.
        written: where it stands.
        shared: it stands at the top of the file, for all experiments.
        removed: an experiment takes a stage of the file away with ``NAME: false``.
    """

    name: str
    kind: str
    command: str
    written: Written
    options: Written = NOWHERE
    words: tuple[str, ...] = ()
    when: Condition = "success"
    needs: tuple[str, ...] = ()
    resources: Written | None = None
    environment: dict[str, str] = field(default_factory=dict)
    shared: bool = False
    removed: bool = False


def check_name(name: str, written: Written, what: str) -> None:
    """Raise ConfigError unless the name can be a folder and a word of a command line."""
    if _NAME.fullmatch(name) is None or len(name) > _LONGEST_NAME or name.endswith("."):
        raise fail(
            f"{name!r} cannot be the name of {what}",
            written,
            why="it becomes the name of a folder",
            fix="use letters, digits, - and _ (first a letter or digit)",
        )


def known_command(word: str, written: Written, key: str = "command") -> str:
    """The command of this name (``merge_lora`` is ``merge-lora``). Raises ConfigError unless it can be a job."""
    command = word.replace("_", "-")
    known = [name for name, entry in COMMANDS.items() if not entry.own_arguments or name in _WITH_WORDS]
    if command in known:
        return command
    if command in COMMANDS:
        raise fail(f"swift {command} cannot be a job", written, key, fix=f"one of {', '.join(known)}")
    if command in LATER_COMMANDS or command in _LATER:
        fix = LATER_COMMANDS[command].instead if command in LATER_COMMANDS else "leave it out"
        raise fail(f"{command} comes with a later version", written, key, fix=fix)
    why = f"known: {', '.join(known)}"
    raise fail(f"unknown command {word!r}", written, key, why=why, fix=suggest(command, known))


def split_command(fields: Fields, command: str, own_keys: Iterable[str]) -> tuple[Written, tuple[str, ...]]:
    """(options, words) of an experiment or stage. Raises ConfigError for those that its command does not take."""
    options, words = fields.without(own_keys), tuple(fields.words("words"))
    own = COMMANDS[command].own_arguments
    if own and options.items:
        key, value = next(iter(options.items.items()))
        raise fail(f"swift {command} takes words, not options", value, key, fix=f"words: [--{key}, ...]")
    if "words" in fields and not own:
        raise fields.fail(f"swift {command} takes options, not words", "words", fix="write NAME: value")
    return options, words


def read_stages(written: Written | None) -> dict[str, Stage]:
    """The stages of an ``after:``, a list or a mapping, in order. Raises ConfigError with the line."""
    if written is None or written.value is None:
        return {}
    stages: dict[str, Stage] = {}
    for name, entry in _entries(written):
        stage = _read_stage(name, entry)
        if stage.name in stages:
            first = stages[stage.name].written.place
            raise fail(
                f"two stages are called {stage.name} (the first: {first})", entry, "after", fix="add a name:"
            )
        stages[stage.name] = stage
    return stages


def _entries(written: Written) -> Iterable[tuple[str | None, Written]]:
    """(name or None, what stands there) of a mapping, a list or one word."""
    if written.items is not None:
        yield from written.items.items()
        return
    for entry in written.entries if written.entries is not None else (written,):
        if isinstance(entry.text, str):
            yield entry.text, Written(None, None, entry.place)
        elif entry.items is not None and len(entry.items) == 1 and not set(entry.items) & {"command", "name"}:
            yield next(iter(entry.items.items()))
        elif entry.items is not None:
            yield None, entry
        else:
            raise fail(f"{entry.value!r} is not a stage", entry, "after", fix="after: [evaluate, merge]")


def _read_stage(name: str | None, written: Written) -> Stage:
    if name is not None and written.value is False:
        return Stage(name, "command", "", written, removed=True)
    if name is not None and name not in KINDS and written.items is None:
        raise _unknown_stage(name, written)
    fields = Fields(written, name or "after")
    name = fields.text("name") or name or fields.text("command")
    if name is None:
        raise fail("the stage has neither a name nor a command", written, "after", fix="add command: infer")
    check_name(name, written, "a stage")
    command = fields.text("command")
    if command is not None:
        kind, command = "command", known_command(command, fields.items["command"])
    elif name in KINDS:
        kind, command = name, KINDS[name]
    else:
        raise _unknown_stage(name, written)
    options, words = split_command(fields, command, _OWN_KEYS)
    return Stage(
        name=name,
        kind=kind,
        command=command,
        written=written,
        options=options,
        words=words,
        when=fields.choice("when", _CONDITIONS, "success"),  # type: ignore[arg-type]
        needs=tuple(fields.words("needs")),
        resources=fields.get("resources"),
        environment=fields.variables(),
    )


def _unknown_stage(name: str, written: Written) -> ConfigError:
    if name in _LATER or name in LATER_COMMANDS:
        why = f"this one has {', '.join(KINDS)}"
        message = f"the stage {name} comes with a later version"
        return fail(message, written, "after", why=why, fix="leave it out")
    why = f"known: {', '.join(KINDS)}; any other needs a command:"
    fix = suggest(name, KINDS, f"{name}: {{command: infer, ...}}")
    return fail(f"unknown stage {name!r}", written, "after", why=why, fix=fix)


def merge_stages(common: Mapping[str, Stage], own: Mapping[str, Stage]) -> dict[str, Stage]:
    """The file's stages with those of one experiment on top; a removed one goes, and nothing waits for it.

    Raises ConfigError for stages that need one that is not there, or each other in a circle.
    """
    merged = {name: replace(stage, shared=True) for name, stage in common.items()}
    for name, stage in own.items():
        if stage.removed and name not in common:
            fix = suggest(name, common, "remove the line")
            raise fail(f"there is no stage {name} to leave out", stage.written, name, fix=fix)
        merged[name] = stage
    gone = {name for name, stage in merged.items() if stage.removed}
    left = {
        name: replace(stage, needs=tuple(need for need in stage.needs if need not in gone))
        for name, stage in merged.items()
        if name not in gone
    }
    for stage in left.values():
        for need in stage.needs:
            if need in left and left[need].command in SERVING:
                raise fail(
                    f"the stage {stage.name} needs {need}, which serves until it is stopped",
                    stage.written,
                    stage.name,
                    fix=f"let {need} come last",
                )
    graph = {name: stage.needs for name, stage in left.items()}
    check_graph(graph, {name: stage.written for name, stage in left.items()}, "stage")
    return left


def check_graph(graph: Mapping[str, Iterable[str]], places: Mapping[str, Written], what: str) -> None:
    """Raise ConfigError for an entry that needs one that is not there, and for a circle, which it names.

    Args:
        graph: name -> the names it needs.
        places: where each stands.
        what: "experiment" or "stage".
    """
    for name, needs in graph.items():
        others = [other for other in graph if other != name]
        for need in needs:
            if need not in graph:
                message = f"the {what} {name} needs {need}, which is no {what}"
                fix = suggest(need, others, f"one of {', '.join(others)}" if others else "leave needs out")
                raise fail(message, places[name], name, fix=fix)
    circle = find_circle(graph)
    if circle:
        message = f"the {what}s wait for each other in a circle: {' -> '.join(circle)}"
        fix = f"remove needs: {circle[1]} from {circle[0]}"
        raise fail(message, places[circle[0]], circle[0], fix=fix)
