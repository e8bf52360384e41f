"""The options of one experiment: the file's defaults, the experiment's overrides, and the values of a trial laid
over one another, with file and line in every complaint.

An override replaces what it makes pointless: an experiment with ``tuner_type: full`` may stand beside defaults that
set ``lora_rank``, and one with ``warmup_ratio`` beside a default ``warmup_steps``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swift.config import combinations
from swift.config.adapter_names import split_name
from swift.config.aliases import alias_table
from swift.config.commands import COMMANDS
from swift.config.flags import read_flags
from swift.config.layers import Binder
from swift.config.names import Name, Names
from swift.config.policy_rules import TASK_PREFIX
from swift.config.read import Written, from_python, read_file
from swift.config.schema import SECTIONS, Resolved
from swift.core.errors import ConfigError, SwiftError
from swift.data.readers import READERS
from swift.data.sources import parse_dataset_spec
from swift.experiments.fields import Fields, fail, mapping

__all__ = [
    "about",
    "bind",
    "bind_words",
    "has_effect",
    "make_absolute",
    "only_for",
    "option_name",
    "snapshot",
]

_PATHS = (
    "model", "output_dir", "resume_from_checkpoint", "result_path", "ready_file", "ssl_keyfile", "ssl_certfile",
    "eval_tasks", "eval_output_dir",
)  # fmt: skip
_PATH_LISTS = ("adapters", "dataset", "val_dataset", "parity_dataset")
_MADE_HERE = ("output_dir", "result_path", "ready_file", "eval_output_dir")
"""Paths of what a job writes: they need not exist."""


def about(error: SwiftError, name: str) -> SwiftError:
    """The same error, with the experiment's name in front of its message."""
    return type(error)(f"experiment {name}: {error.message}", where=error.where, why=error.why, fix=error.fix)


def bind(command: str, layers: Sequence[Written | Mapping[str, Any]], *, planning: bool = False) -> Resolved:
    """Resolve a command from mappings of options; later ones win. Raises ConfigError.

    Args:
        layers: as they stand in a file, or Python dicts.
        planning: what this version cannot do becomes a warning.
    """
    binder = Binder(COMMANDS[command])
    for values in layers:
        if isinstance(values, Written):
            binder.take_mapping(binder.new_layer("file"), values)
        else:
            binder.take_mapping(binder.new_layer("python"), from_python(values))
    return _finish(binder, [], planning)


def bind_words(command: str, words: Sequence[str], cwd: Path) -> tuple[Resolved, dict[str, str]]:
    """Resolve a command line typed in ``cwd``; returns the variables of its files' ``ENV`` beside the options."""
    binder = Binder(COMMANDS[command])
    files, flags = read_flags(words, binder.names.arity)
    environment: dict[str, str] = {}
    for name in files:
        fields = Fields(read_file(cwd / name, name), "the file")
        environment |= fields.variables()
        binder.take_mapping(binder.new_layer("file"), fields.without(("ENV",)))
    layer = binder.new_layer("flag")
    for flag in flags:
        binder.take_flag(layer, flag)
    return _finish(binder, files, False), environment


def _finish(binder: Binder, files: list[str], planning: bool) -> Resolved:
    switched = [name for name, on in binder.switches.items() if on]
    if switched:
        raise ConfigError(
            f"{switched[0]} is for one command on a terminal, not for a job",
            fix=f"leave it out; swift plan shows what the jobs will do, {switched[0]} here does not",
        )
    _drop_replaced(binder)
    return binder.finish(files, planning, False)


def _drop_replaced(binder: Binder) -> None:
    """Take out of each layer what a later one makes pointless."""
    for index, later in enumerate(binder.layers):
        gone: set[str] = set()
        for rule in combinations.ONLY_WITH:
            chosen = later.entries.get(rule.option)
            if chosen is not None and chosen.value not in rule.values:
                gone.update(rule.names)
        for first, second, _ in combinations.EXCLUSIVE:
            # Packing is no other way to say the same thing: leaving it out is a decision, so that stays an error.
            if first != "packing":
                for given, replaced in ((first, second), (second, first)):
                    if given in later.entries and later.entries[given].value:
                        gone.add(replaced)
        for earlier in binder.layers[:index]:
            for name in gone & set(earlier.entries):
                del earlier.entries[name]


def option_name(command: str, key: str, written: Written) -> str:
    """The option that a key of a sweep means. Raises ConfigError for unknown keys and for switches."""
    where = ": ".join(part for part in (written.place, key) if part)
    names = Names(COMMANDS[command])
    targets = _targets(names.find(None, key, where), command)
    if len(targets) != 1:
        raise fail("cannot be searched", written, key, fix="name one option")
    if targets[0] not in names.options:
        users = [name for name, entry in COMMANDS.items() if targets[0] in entry.options()]
        raise names.not_used(targets[0], where, users)
    return targets[0]


def _targets(name: Name, command: str) -> list[str]:
    if name.option:
        return [name.option.name]
    if name.alias and name.alias.targets is not None:
        return [name.alias.targets[command]] if command in name.alias.targets else []
    return name.alias.all_targets() if name.alias else []


def only_for(command: str, written: Written) -> Written:
    """The options of a mapping that ``command`` takes: an ``infer`` beside trainings leaves out their defaults.

    Unknown keys stay, so that they are complained about.
    """
    names = Names(COMMANDS[command])

    def is_taken(key: str, section: str | None, value: Written) -> bool:
        name = names.find(section, key, ": ".join(part for part in (value.place, key) if part))
        if name.switch or name.known:
            return True
        return bool(set(_targets(name, command)) & set(names.options))

    items: dict[str, Written] = {}
    for key, value in (written.items or {}).items():
        section = alias_table().sections.get(key, key)
        if value.items is not None and section in SECTIONS:
            inner = {name: entry for name, entry in value.items.items() if is_taken(name, section, entry)}
            items[key] = mapping(inner, value.place)
        elif is_taken(key, None, value):
            items[key] = value
    return mapping(items, written.place)


def make_absolute(resolved: Resolved, cwd: Path) -> None:
    """Paths relative to ``cwd`` become absolute: a job must mean the same files wherever it is started.

    Names that are no path there (a hub id, ``last``) stay as they are.
    """
    taken = COMMANDS[resolved.command].options()
    for name in (*_PATHS, *_PATH_LISTS):
        if name not in taken or resolved.value(name) is None:
            continue
        section = getattr(resolved.config, taken[name].section)
        value = resolved.value(name)
        if name in _PATH_LISTS:
            setattr(section, name, [_absolute(entry, cwd, name) for entry in value])
        elif resolved.is_explicit(name) or name == "output_dir":
            setattr(section, name, _absolute(value, cwd, name))


def _absolute(text: str, cwd: Path, name: str) -> str:
    path = cwd / Path(text).expanduser()
    label, folder = split_name(text) if name == "adapters" and not path.exists() else (None, text)
    if label is not None:
        return f"{label}={_absolute(folder, cwd, name)}"
    if name in _MADE_HERE or path.exists():
        return str(path)
    rows = re.fullmatch(r"(.+)(#\d+)", text) if name in ("dataset", "val_dataset") else None
    if rows is not None and (cwd / Path(rows[1]).expanduser()).exists():
        return str(cwd / Path(rows[1]).expanduser()) + rows[2]
    if name in ("dataset", "val_dataset") and _is_elsewhere(text):
        return text
    looks_like_path = text.startswith((".", "/", "~")) or name in ("dataset", "val_dataset", "adapters")
    return str(path) if looks_like_path else text


def _is_elsewhere(text: str) -> bool:
    """Data that is made on the spot (``task:``), or that the registry or a hub knows by this name."""
    spec = parse_dataset_spec(text)
    return text.startswith(TASK_PREFIX) or not (spec.is_local or spec.path.suffix.lower() in READERS)


def snapshot(resolved: Resolved) -> dict[str, Any]:
    """The options that were set, flat, with the values now in force: what ``JobSpec.options`` holds."""
    taken = COMMANDS[resolved.command].options()
    chosen = [name for name in taken if resolved.is_explicit(name) or name == "output_dir"]
    return {name: resolved.value(name) for name in chosen if resolved.value(name) is not None}


def has_effect(resolved: Resolved, name: str) -> bool:
    """False for an option that another one makes pointless (``lora_rank`` in full training)."""
    if any(resolved.value(rule.option) for rule in combinations.IMPLIED if name in rule.names):
        return False
    return all(
        resolved.value(rule.option) in rule.values for rule in combinations.ONLY_WITH if name in rule.names
    )
