"""``swift config``: what options resolve to, what a spelling means, schema, reference page, shell completion."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swift.cli.arguments import ArgumentParser
from swift.cli.table import COMMANDS, Command
from swift.config.schema import Resolved
from swift.core.errors import UsageError
from swift.core.files import atomic_write_text
from swift.core.registry import suggest

REFERENCE = Path("docs/en/reference.md")
ACTIONS = "show|alias|schema|reference|completion"


def run(argv: list[str]) -> int:
    """Run ``swift config ACTION ...``."""
    if argv and argv[0] == "show" and not {"--help", "-h"} & set(argv):
        return _show(argv[1:])
    if not argv:
        raise UsageError("what of it?", where="swift config", fix=f"swift config {ACTIONS}")
    if argv[0] == "alias":
        # People paste flags; here they are names.
        argv = ["alias", *(word if word in ("--help", "-h") else word.lstrip("-") for word in argv[1:])]
    arguments = _parser().parse(argv)
    action: Callable[[Any], int] = arguments.action
    return action(arguments)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="swift config", description=COMMANDS["config"].help)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser(
        "show",
        help="resolved values with their sources",
        usage="swift config show [COMMAND] [FILE.yaml ...] [--option value ...] [--all] [--json]",
        description="Shows what is not at its default (--all: everything), and where each value comes from.",
    )
    alias = actions.add_parser("alias", help="what a spelling means")
    alias.add_argument("names", nargs="+", metavar="NAME")
    alias.set_defaults(action=_alias)
    schema = actions.add_parser("schema", help="JSON Schema of configuration files, for editors")
    schema.add_argument("command", nargs="?", help="only what this command takes")
    schema.set_defaults(action=_schema)
    reference = actions.add_parser("reference", help=f"write {REFERENCE}")
    reference.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when it is not current"
    )
    reference.add_argument("--output", type=Path, default=REFERENCE, metavar="FILE")
    reference.set_defaults(action=_reference)
    completion = actions.add_parser("completion", help="print a completion script")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.set_defaults(action=_completion)
    return parser


def _show(words: list[str]) -> int:
    from swift.config.bind import resolve

    as_json, everything = "--json" in words, "--all" in words
    words = [word for word in words if word not in ("--json", "--all")]
    command, rest = _command_and_rest(words)
    resolved = resolve(command.name, rest, planning=True, partial=True)
    names = list(command.options())
    shown = [name for name in names if everything or resolved.sources[name].kind != "default"]
    if as_json:
        entries = {
            name: {"value": resolved.value(name), "source": str(resolved.sources[name])} for name in shown
        }
        print(
            json.dumps({"command": command.name, "values": entries, "warnings": resolved.warnings}, indent=2)
        )
        return 0
    print(f"command: {command.name}")
    for line in _lines(resolved, command, shown):
        print(line)
    if len(shown) < len(names):
        print(f"\n{len(names) - len(shown)} options have their defaults: --all shows them")
    for warning in resolved.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _command_and_rest(words: list[str]) -> tuple[Command, list[str]]:
    """The command named by the first word, else by a file, else sft."""
    from swift.config.bind import command_of
    from swift.config.read import FILE_ENDINGS, read_file

    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]], words[1:]
    for word in words:
        if word.startswith("--"):
            break
        if word.lower().endswith(FILE_ENDINGS) and "command" in (read_file(Path(word), word).items or {}):
            return COMMANDS[command_of(Path(word), word)], words
    return COMMANDS["sft"], words


def _lines(resolved: Resolved, command: Command, shown: list[str]) -> list[str]:
    lines: list[str] = []
    section = ""
    texts = {name: json.dumps(resolved.value(name), ensure_ascii=False) for name in shown}
    name_width = max((len(name) for name in shown), default=0)
    value_width = min(max((len(text) for text in texts.values()), default=0), 40)
    for name in shown:
        option = command.options()[name]
        if option.section != section:
            section = option.section
            lines.append(f"{section}:")
        lines.append(f"  {name:<{name_width}}  {texts[name]:<{value_width}}  {resolved.sources[name]}")
    return lines


def _alias(arguments: Any) -> int:
    for name in arguments.names:
        print(_meaning(name.replace("-", "_").rpartition(".")[2]))
    return 0


def _meaning(word: str) -> str:
    from swift.config.aliases import alias_table
    from swift.config.schema import SECTIONS, options

    table = alias_table()
    if word in options():
        option = options()[word]
        also = table.spellings_of(word)
        spellings = f"\n  also written: {', '.join(also)}" if also else ""
        return f"{word}: option of section {option.section}. {option.help}{spellings}"
    if word in table.aliases:
        return f"{word}: {table.aliases[word].describe()}"
    if word in table.unsupported:
        known = table.unsupported[word]
        return f"{word}: not in this version: {known.say}\n  fix: {known.fix}"
    if word in table.unneeded:
        return f"{word}: not needed: {table.unneeded[word].say}"
    if word in SECTIONS or word in table.sections:
        return f"{word}: the section {table.sections.get(word, word)}"
    if word in table.mistakes:
        return f"{word}: no option: {table.mistakes[word].say}\n  fix: {table.mistakes[word].fix}"
    raise UsageError(
        "unknown option",
        where=word,
        fix=suggest(word, [*options(), *table.aliases, *table.unsupported, *table.unneeded]),
    )


def _schema(arguments: Any) -> int:
    from swift.cli.table import find_command
    from swift.config.json_schema import json_schema

    command = find_command(arguments.command) if arguments.command else None
    if command is not None and not command.options():
        raise UsageError(f"swift {command.name} takes no configuration file", where=command.name)
    print(json.dumps(json_schema(command), indent=2, ensure_ascii=False))
    return 0


def _reference(arguments: Any) -> int:
    from swift.config.reference import reference_page

    page = reference_page()
    current = arguments.output.is_file() and arguments.output.read_text(encoding="utf-8") == page
    if arguments.check:
        if not current:
            print(f"{arguments.output} is not current; run: swift config reference", file=sys.stderr)
        return 0 if current else 1
    if not current:
        atomic_write_text(arguments.output, page)
    print(arguments.output)
    return 0


def _completion(arguments: Any) -> int:
    from swift.config.completion import completion_script

    print(completion_script(arguments.shell), end="")
    return 0
