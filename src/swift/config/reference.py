"""The reference page of all commands, options and spellings, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from swift.config.aliases import Unsupported, alias_table
from swift.config.commands import COMMANDS
from swift.config.help import format_default
from swift.config.rules import DERIVATIONS
from swift.config.schema import SECTIONS, Option, options

__all__ = ["reference_page"]

_MEASURED = """\
ms-swift's command lines are read as they are. Measured on 2026-11-21 against the scripts in `examples/` of its
repository: of the 177 command lines in 161 scripts (every third path of a sorted list of 483), 175 (98.9 %) resolve as
`swift plan` resolves them, with warnings for what this version cannot do; 74.6 % did before these tables were completed
from that sample. Of 28 lines in 26 scripts that were drawn afterwards, all 28 do (24 before). The two others fail in
ms-swift too: a comment after a line's backslash, and a command that it no longer has. The option names of its 4.6.0,
and of 3.0.2, 3.3.0, 3.6.0, 3.9.0 and 3.12.0, are known here.
"""

_HEAD = """\
# Reference

This page is written by `swift config reference` from the table of options. Do not edit it by hand.

An option can be written as a flag (`--lora_rank 8`, `--lora-rank=8`, `--tuner.lora_rank 8`), as a flat key of
a YAML or JSON file (`lora_rank: 8`), or under its section (`tuner: {lora_rank: 8}`). Several files may be
given; later files win over earlier ones, and flags over files. `--packing`, `--packing true` and
`--no_packing` set a switch; lists are `--dataset a.jsonl b.jsonl`, repeated flags, or JSON; `none` takes back
a value. Names are never abbreviated.
"""


def reference_page() -> str:
    """The whole page."""
    parts = [_HEAD, _commands(), *(_section(name) for name in SECTIONS), _spellings(), _unsupported()]
    return "\n".join(parts)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _commands() -> str:
    rows = []
    for command in COMMANDS.values():
        takes = ", ".join(command.sections)
        if command.extra:
            takes += ("; " if takes else "") + ", ".join(f"`{name}`" for name in command.extra)
        if command.without:
            takes += "; not " + ", ".join(f"`{name}`" for name in command.without)
        rows.append((f"`swift {command.name} {command.usage}`", command.help, takes))
    switches = {name: text for command in COMMANDS.values() for name, text in command.switches.items()}
    users = ", ".join(f"`{name}`" for name, command in COMMANDS.items() if command.switches)
    notes = "\n".join(f"- `--{name}` ({users}): {text}" for name, text in switches.items())
    table = _table(("Command", "What it does", "Sections and options it takes"), rows)
    return f"## Commands\n\n{table}\n{notes}\n- `--debug` (all): show the traceback of a failure.\n"


def _section(name: str) -> str:
    text = (SECTIONS[name].__doc__ or "").strip().splitlines()[0]
    rows = [_option_row(option) for option in options().values() if option.section == name]
    return f"## {name}\n\n{text}\n\n" + _table(
        ("Option", "Values", "Default", "Meaning", "Also written"), rows
    )


def _option_row(option: Option) -> tuple[str, ...]:
    derived = [rule.inputs for rule in DERIVATIONS if rule.target == option.name]
    default = format_default(option.default)
    default = f"`{default}`" if default else ""
    if derived and option.default is None:
        default = "derived from " + ", ".join(f"`{name}`" for name in derived[0])
    meaning = option.help
    if option.unit and option.unit not in meaning.lower():
        meaning += f" In {option.unit}."
    also = ", ".join(f"`{spelling}`" for spelling in alias_table().spellings_of(option.name))
    values = f"`{option.kind.describe()}`" + (" or none" if option.kind.optional else "") + _limits(option)
    return f"`{option.name}`", values, default, meaning, also


def _limits(option: Option) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {getattr(limit, key)}"
        for limit in option.info.metadata
        for key, sign in signs.items()
        if hasattr(limit, key)
    ]
    return f" ({', '.join(found)})" if found else ""


def _spellings() -> str:
    table = alias_table()
    rows = [
        (f"`{alias.name}`", alias.describe())
        for alias in table.aliases.values()
        if alias.choices is not None or alias.targets is not None
    ]
    values = [
        (f"`{option}`", ", ".join(f"`{word}` = `{meaning}`" for word, meaning in words.items()))
        for option, words in table.values.items()
    ]
    sections = ", ".join(f"`{other}` = `{name}`" for other, name in table.sections.items())
    return (
        f"## Other spellings\n\n{_MEASURED}\nPlain other names stand beside each option above. These stand for a "
        f"value, or depend on the command:\n\n{_table(('Spelling', 'Meaning'), rows)}\nOther words for values:\n\n"
        f"{_table(('Option', 'Words'), values)}\nSections under other names: {sections}.\n"
    )


def _unsupported() -> str:
    table = alias_table()
    return (
        "## Known, but not in this version\n\nThese are refused in a run and reported in a plan.\n\n"
        + _table(("Options", "Why", "Instead"), _groups(table.unsupported.values()))
        + "\nThese have nothing to switch here; they are accepted with a warning.\n\n"
        + _table(("Options", "Why"), (row[:2] for row in _groups(table.unneeded.values())))
    )


def _groups(known: Iterable[Unsupported]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in known:
        groups.setdefault((entry.say, entry.fix or ""), []).append(f"`{entry.name}`")
    return [(", ".join(names), say, fix) for (say, fix), names in groups.items()]
