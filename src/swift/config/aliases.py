"""Other spellings of options, and known options this version lacks. The data is in ``aliases.yaml`` and
``later.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from swift.config.schema import SECTIONS, options

__all__ = ["Alias", "AliasTable", "Unsupported", "UnsupportedValue", "alias_table"]


@dataclass(frozen=True)
class Alias:
    """Another spelling.

    Attributes:
        name: the spelling, with underscores.
        transform: what happens to the value. ``rename``: the value goes to ``target``. ``by_command``: the
            target depends on the command (``targets``). ``fallback``: like rename, but only when the target
            is not set. ``choose``: true and false stand for the settings in ``choices``.
        target: the option meant, when there is one.
        targets: command -> option, for ``by_command``.
        choices: True and False -> options and their values, for ``choose``.
    """

    name: str
    transform: str
    target: str | None = None
    targets: dict[str, str] | None = None
    choices: dict[bool, dict[str, Any]] | None = None

    def all_targets(self) -> list[str]:
        """Every option this spelling can set."""
        names = [self.target] if self.target else []
        names += list((self.targets or {}).values())
        for settings in (self.choices or {}).values():
            names += list(settings)
        return list(dict.fromkeys(names))

    def describe(self) -> str:
        """What it stands for, in one line."""
        if self.choices is not None:
            parts = []
            for flag, settings in self.choices.items():
                meaning = ", ".join(f"{name}={value}" for name, value in settings.items()) or "the default"
                parts.append(f"{str(flag).lower()}: {meaning}")
            return "; ".join(parts)
        if self.targets is not None:
            return ", ".join(f"{command}: {target}" for command, target in self.targets.items())
        return f"{self.target} (when that is not set)" if self.transform == "fallback" else str(self.target)


@dataclass(frozen=True)
class Unsupported:
    """A known option that this version cannot do, or has nothing to switch.

    Attributes:
        name: the option, with underscores.
        say: why not.
        fix: the alternative; None when it is merely not needed.
        off: words (in lower case) that mean "not used": accepted.
        plan_as: an option of ours that stands for it in a plan.
    """

    name: str
    say: str
    fix: str | None
    off: frozenset[str] = frozenset()
    plan_as: str | None = None

    def is_off(self, value: Any) -> bool:
        """True when the value means that the option is not used."""
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        return isinstance(value, str | bool | int | float | None) and str(value).lower() in self.off


@dataclass(frozen=True)
class UnsupportedValue:
    """What is said of a known value that this version cannot do, or of a word that is no option at all."""

    say: str
    fix: str
    able: tuple[str, ...] = ()


@dataclass(frozen=True)
class AliasTable:
    """All of ``aliases.yaml`` and ``later.yaml``.

    Attributes:
        aliases: spelling -> alias.
        sections: another name of a section -> its name.
        values: option -> other word -> the option's word.
        unsupported: name -> known option that cannot be had.
        unneeded: name -> known option that has nothing to switch here.
        unsupported_values: (option, word) -> why not; ``able`` names commands that can.
        value_needs: (option, other word) -> the options of which one belongs to the word.
        mistakes: words of other tools that are no options -> what to do instead.
    """

    aliases: dict[str, Alias]
    sections: dict[str, str]
    values: dict[str, dict[str, str]]
    unsupported: dict[str, Unsupported]
    unneeded: dict[str, Unsupported]
    unsupported_values: dict[tuple[str, str], UnsupportedValue]
    value_needs: dict[tuple[str, str], list[str]]
    mistakes: dict[str, UnsupportedValue]

    def spellings_of(self, option: str) -> list[str]:
        """Plain other names of an option (rename and fallback)."""
        return [alias.name for alias in self.aliases.values() if alias.target == option]


@cache
def alias_table() -> AliasTable:
    """Read and check the table. Raises ValueError when a spelling stands twice or points to nothing."""
    raw, later = _load("aliases.yaml"), _load("later.yaml")
    aliases: dict[str, Alias] = {}
    for alias in _read_aliases(raw):
        if alias.name in aliases:
            raise ValueError(f"aliases.yaml: {alias.name} stands twice")
        aliases[alias.name] = alias
    unsupported = _read_unsupported(raw["unsupported"] + later["unsupported"])
    unneeded = _read_unsupported(raw["unneeded"] + later["unneeded"])
    sections = {name: section for section, names in raw["sections"].items() for name in names}
    refused = {
        (option, str(word).lower()): UnsupportedValue(
            group["say"], group["fix"], tuple(group.get("except", ()))
        )
        for group in raw["unsupported_values"]
        for option in group["options"]
        for word in group["values"]
    }
    needs = {
        (option, word): needed
        for option, words in raw["value_needs"].items()
        for word, needed in words.items()
    }
    mistakes = {
        name: UnsupportedValue(group["say"], group["fix"])
        for group in raw["mistakes"]
        for name in group["names"]
    }
    table = AliasTable(
        aliases, sections, raw["values"], unsupported, unneeded, refused, value_needs=needs, mistakes=mistakes
    )
    _check(table)
    return table


def _load(name: str) -> dict[str, Any]:
    text = resources.files("swift.config").joinpath(name).read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _read_aliases(raw: dict[str, Any]) -> Iterator[Alias]:
    for target, names in raw["spellings"].items():
        for name in names:
            yield Alias(name, "rename", target=target)
    for target, names in raw["fallbacks"].items():
        for name in names:
            yield Alias(name, "fallback", target=target)
    for name, targets in raw["by_command"].items():
        yield Alias(name, "by_command", targets=targets)
    for name, choices in raw["choices"].items():
        yield Alias(name, "choose", choices=choices)


def _read_unsupported(groups: list[dict[str, Any]]) -> dict[str, Unsupported]:
    known: dict[str, Unsupported] = {}
    for group in groups:
        if wrong := group.keys() - {
            "names",
            "say",
            "fix",
            "off",
            "plan_as",
        }:  # YAML reads a bare off as False
            raise ValueError(f"aliases.yaml: {group['names'][0]} has {wrong.pop()!r}")
        off = frozenset(group.get("off", ["false", "none"]))
        for name in group["names"]:
            if name in known:
                raise ValueError(f"aliases.yaml: {name} stands twice")
            known[name] = Unsupported(name, group["say"], group.get("fix"), off, group.get("plan_as"))
    return known


def _check(table: AliasTable) -> None:
    known = options()
    for alias in table.aliases.values():
        for target in alias.all_targets():
            if target not in known:
                raise ValueError(f"aliases.yaml: {alias.name} points to {target}, which is no option")
    seen: set[str] = set(known)
    # loss_type is an option of swift sft and stands for another one in swift rlhf.
    own = [name for name, alias in table.aliases.items() if alias.targets is None or name not in known]
    for name in [*own, *table.unsupported, *table.unneeded, *table.mistakes]:
        if name in seen:
            raise ValueError(f"aliases.yaml: {name} stands twice, or is an option itself")
        seen.add(name)
    for name in [*table.values, *(option for option, _ in table.unsupported_values)]:
        if name not in known:
            raise ValueError(f"aliases.yaml: {name} in values is no option")
    for (option, word), needed in table.value_needs.items():
        if word not in table.values.get(option, {}) or not known.keys() >= set(needed):
            raise ValueError(
                f"aliases.yaml: {option} {word} in value_needs is no other word, or needs no option"
            )
    for section in table.sections.values():
        if section not in SECTIONS:
            raise ValueError(f"aliases.yaml: {section} is no section")
