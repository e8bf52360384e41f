"""Plain-text help, written from the table of options: the essential ones, all, or those about a topic."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

from swift.config.commands import COMMANDS, Command
from swift.config.schema import SECTIONS, Option
from swift.core.errors import UsageError
from swift.core.registry import suggest

__all__ = ["command_help", "format_default", "general_help", "options_about"]

_NAME_COLUMN = 36


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, 60), 120)


def general_help() -> str:
    """What ``swift --help`` prints."""
    lines = [
        "usage: swift COMMAND [FILE.yaml ...] [--option value ...]",
        "",
        "Trains language models: from a model folder and a data file to a resumable, evaluated run.",
        "",
        "Commands",
    ]
    lines += [f"  {command.name:<12}{command.help}" for command in COMMANDS.values()]
    lines += [
        "",
        "swift COMMAND --help      the main options of a command",
        "swift COMMAND --help all  every option;  --help WORD: those about WORD, such as lora",
        "swift --version           --debug with any command shows the traceback of a failure",
    ]
    return "\n".join(lines)


def command_help(command: Command, topic: str | None = None) -> str:
    """Help of one command: its essential options, ``all`` of them, or those about a topic.

    Raises UsageError when no option is about the topic.
    """
    lines = [f"usage: swift {command.name} {command.usage}", "", command.help]
    taken = list(command.options().values())
    if not taken:
        if command.name == "plan":
            lines += ["", "It takes the options of the command it plans: swift sft --help lists them."]
        return "\n".join(lines)
    if topic is None:
        shown = [option for option in taken if option.essential]
    elif topic == "all":
        shown = taken
    else:
        shown = options_about(topic, taken)
    lines += _sections(shown, with_spellings=topic not in (None, "all"))
    if topic in (None, "all") and command.switches:
        lines += ["", "How it runs"]
        for name, help_line in command.switches.items():
            lines += _entry(f"--{name}", help_line)
    if topic is None:
        lines += ["", *textwrap.wrap(_MORE.format(name=command.name, rest=len(taken) - len(shown)), _width())]
    return "\n".join(lines)


_MORE = (
    "{rest} more options: swift {name} --help all; about one thing: swift {name} --help lora. "
    "Files are YAML or JSON with the same names, flat or under their section; later words win."
)


def options_about(topic: str, taken: Iterable[Option]) -> list[Option]:
    """Options of the section ``topic``, else those whose name, spellings or help contain the word."""
    from swift.config.aliases import alias_table

    word = topic.lstrip("-").replace("-", "_").lower()
    table = alias_table()
    section = table.sections.get(word, word)
    meant = table.aliases[word].all_targets() if word in table.aliases else []
    about = word.replace("_", " ")

    def matches(option: Option) -> bool:
        if option.section == section or option.name in meant:
            return True
        return word not in SECTIONS and (word in option.name or about in option.help.lower())

    taken = list(taken)
    found = [option for option in taken if matches(option)]
    if not found:
        fix = suggest(
            word,
            [*SECTIONS, *(option.name for option in taken), *table.aliases],
            "--help all lists every option",
            before="--help ",
        )
        raise UsageError("no option is about this", where=f"--help {topic}", fix=fix)
    return found


def _sections(shown: list[Option], with_spellings: bool) -> list[str]:
    lines: list[str] = []
    section = ""
    for option in shown:
        if option.section != section:
            section = option.section
            about = (SECTIONS[section].__doc__ or "").strip().splitlines()[0].rstrip(".")
            lines += ["", *textwrap.wrap(f"{section.capitalize()} - {about}", _width())]
        text = option.help
        if option.unit and option.unit not in text.lower():
            text += f" In {option.unit}."
        default = format_default(option.default)
        if default:
            text += f" [{default}]"
        if with_spellings:
            text += _also(option)
        lines += _entry(f"--{option.name} {_metavar(option)}", text)
    return lines


def _also(option: Option) -> str:
    from swift.config.aliases import alias_table

    spellings = alias_table().spellings_of(option.name)
    return f" Also: {', '.join('--' + name for name in spellings)}." if spellings else ""


def _metavar(option: Option) -> str:
    kind = option.kind
    return "" if kind.base == "bool" and not kind.optional else kind.describe()


def _entry(name: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, max(_width() - _NAME_COLUMN - 2, 20))
    head = f"  {name.rstrip()}"
    if len(head) > _NAME_COLUMN:
        return [head, *(" " * (_NAME_COLUMN + 2) + line for line in wrapped)]
    first, *rest = wrapped
    return [f"{head:<{_NAME_COLUMN + 2}}{first}", *(" " * (_NAME_COLUMN + 2) + line for line in rest)]


def format_default(value: Any) -> str:
    """A default as a person would write it; "" when there is nothing to show."""
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
