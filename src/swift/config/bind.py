"""From command line, files and Python values to one resolved configuration, and from a run's record back to
it.

The order is: files as they stand on the command line, then Python values, then flags; later wins. Every value
keeps its source. Nothing is guessed: no abbreviations, and a word that cannot be used is an error with the
nearest name.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from swift.config.commands import COMMANDS, TRAIN_TYPES, Command, known_command
from swift.config.flags import read_flags
from swift.config.layers import Binder
from swift.config.read import from_python, read_file
from swift.config.schema import Option, Resolved
from swift.core.errors import ConfigError, UsageError
from swift.core.registry import suggest

__all__ = ["command_of", "command_of_train_type", "dump", "dump_text", "load_run_config", "resolve"]

_TRAIN_TYPE = ("train_type", "sft_type", "rlhf_type")
_SECRET = re.compile(r"(^|_)(API)?(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)(_|$)", re.IGNORECASE)


def resolve(
    command: str,
    argv: Sequence[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
    planning: bool = False,
    partial: bool = False,
    recorded: bool = False,
) -> Resolved:
    """Bind the words after ``swift COMMAND`` (files and flags) and a Python dict to the options of a command.

    Args:
        command: a name of ``COMMANDS`` that takes options.
        argv: configuration files (``.yaml``, ``.yml``, ``.json``) and ``--option value`` words.
        values: options as a Python dict, flat, dotted or nested; they win over files, flags win over them.
        planning: what this version cannot do becomes a warning instead of an error (also with ``--dry_run``).
        partial: required options may be missing (to show or edit a configuration).
        recorded: read what a run was, whatever processes the environment names for another.

    Raises ConfigError or UsageError (exit code 2) that say where, what, and what to do.
    """
    binder = Binder(_command(command, planning))
    files, flags = read_flags(argv, binder.arity)
    try:
        for name in files:
            layer = binder.new_layer("file")
            binder.take_mapping(layer, read_file(Path(name), name))
        if values is not None:
            binder.take_mapping(binder.new_layer("python"), from_python(values))
        layer = binder.new_layer("flag")
        for flag in flags:
            binder.take_flag(layer, flag)
    except ConfigError:
        binder.refuse_unknown()  # a wrong name is often why a value looks wrong
        raise
    return binder.finish(files, planning, partial, recorded)


def _command(name: str, planning: bool) -> Command:
    """The command, if it takes options. Raises UsageError."""
    command = known_command(name)
    if command is not None and command.instead is not None and not planning:
        raise UsageError(f"swift {name} comes with a later version", fix=command.instead)
    if command is None or command.own_arguments:
        takers = [other.name for other in COMMANDS.values() if not other.own_arguments]
        raise UsageError(
            f"{name!r} is not a command with options ({', '.join(takers)})",
            fix=suggest(name, takers),
        )
    return command


def command_of_train_type(argv: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> str | None:
    """The command that ``train_type`` names, in flags, files or a Python dict; None when it names none.

    ``train_type: dpo`` says what is trained for (`TRAIN_TYPES`), ``train_type: lora`` how: that is a tuner.
    """
    binder = Binder(COMMANDS["sft"])
    files, flags = read_flags(argv, binder.arity)
    layers = [read_file(Path(name), name) for name in files]
    if values is not None:
        layers.append(from_python(values))
    words = [
        str(entry.value)
        for layer in layers
        for section in (layer, (layer.items or {}).get("tuner"))
        for key, entry in ((section.items if section else None) or {}).items()
        if key.replace("-", "_") in _TRAIN_TYPE
    ]
    words += [flag.words[0] for flag in flags if flag.key.replace("-", "_") in _TRAIN_TYPE and flag.words]
    return next((TRAIN_TYPES[word.lower()] for word in reversed(words) if word.lower() in TRAIN_TYPES), None)


def command_of(path: Path, shown: str | None = None) -> str:
    """The command that a configuration file names. Raises ConfigError when it names none."""
    shown = shown or str(path)
    entry = (read_file(path, shown).items or {}).get("command")
    if entry is None:
        raise ConfigError(
            "does not say which command it is for", where=shown, fix="add a line such as: command: sft"
        )
    if entry.value not in COMMANDS or COMMANDS[entry.value].own_arguments:
        raise ConfigError(
            f"unknown command {entry.value!r}",
            where=entry.place,
            fix=suggest(str(entry.value), COMMANDS),
        )
    return str(entry.value)


def dump(resolved: Resolved) -> dict[str, Any]:
    """The configuration as nested sections of all values that are not None, ready for ``config.yaml``.

    ``command`` names the command, ``explicit`` the options that the user set; the others are defaults and
    derived values. ``ENV`` repeats environment variables that the configuration set, but no secrets.
    """
    record: dict[str, Any] = {"command": resolved.command}
    command = known_command(resolved.command)
    assert command is not None
    taken = command.options()
    for name, option in taken.items():
        value = resolved.value(name)
        if value is not None and not _is_secret(option):
            record.setdefault(option.section, {})[name] = value
    record["explicit"] = [
        name
        for name, option in taken.items()
        if resolved.is_explicit(name) and resolved.value(name) is not None and not _is_secret(option)
    ]
    environment = {name: value for name, value in resolved.environment.items() if not _SECRET.search(name)}
    if environment:
        record["ENV"] = environment
    return record


def _is_secret(option: Option) -> bool:
    """A text called token or key; ``token_cache_gib`` is a number."""
    return option.kind.base == "str" and _SECRET.search(option.name) is not None


def dump_text(resolved: Resolved, path: str = "config.yaml") -> str:
    """The text of ``config.yaml``: ``dump`` as YAML under a comment that says how to run it again."""
    head = (
        f"# All options of this run. Run it again: swift {resolved.command} {path}\n"
        "# explicit: the options that were set; the others are defaults and derived values of that time.\n"
    )
    lines = [head]
    for key, value in dump(resolved).items():
        if isinstance(value, dict):
            lines.append(
                f"{key}:\n" + "".join(textwrap.indent(_entry(*item), "  ") for item in value.items())
            )
        else:
            lines.append(_entry(key, value))
    return "".join(lines)


def _entry(key: str, value: Any) -> str:
    """One YAML entry; lists and mappings on one line where they fit."""
    flow = None if isinstance(value, list | dict) else False
    return yaml.safe_dump({key: value}, allow_unicode=True, default_flow_style=flow, width=100)


def load_run_config(path: str | Path) -> Resolved:
    """Read back the ``config.yaml`` of a run: give the file, the run folder or one of its checkpoints.

    Options in ``explicit`` have the source kind "file", the others "recorded". Raises ConfigError when there
    is none.
    """
    path = Path(path)
    candidates = [path] if path.is_file() else [path / "config.yaml", path.resolve().parent / "config.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return resolve(command_of(candidate), [str(candidate)], partial=True, recorded=True)
    raise ConfigError(
        "no config.yaml here", where=str(path), fix="give a run folder, or one of its checkpoints"
    )
