"""What a key means: an option, another spelling, a switch, a known option that this version lacks, or a
mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from swift.config.aliases import Alias, Unsupported, alias_table
from swift.config.commands import Command
from swift.config.schema import SECTIONS, Option, options
from swift.core.errors import ConfigError
from swift.core.registry import closest

__all__ = ["Name", "Names", "UnknownOptionError", "unknown_options"]


class UnknownOptionError(ConfigError):
    """A key that is no option. One command line may have several: `unknown_options` tells them together."""


def unknown_options(errors: Sequence[UnknownOptionError]) -> ConfigError:
    """One error for all of ``errors``; of several each gets one line with its remedy."""
    if len(errors) == 1:
        return errors[0]
    lines = []
    for error in errors:
        parts = [error.message] if error.message != "unknown option" else []
        lines.append(f"\n  {error.where}: {'; '.join([*parts, error.fix or 'nothing is called like it'])}")
    return ConfigError(f"{len(errors)} unknown options{''.join(lines)}")


@dataclass(frozen=True)
class Name:
    """A key looked up: exactly one of the four, or a switch."""

    option: Option | None = None
    alias: Alias | None = None
    known: Unsupported | None = None
    switch: str | None = None
    negated: bool = False


class Names:
    """The keys that one command understands."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.options = command.options()

    def arity(self, spelling: str, key: str) -> str:
        """How many words may follow a flag: ``flag`` (an optional true or false), ``one``, ``many`` or
        ``any``.
        """
        name = self.find(None, key, spelling, "--")
        if name.negated or name.switch:
            return "flag"
        if name.known:
            return "any"
        target = name.option
        if name.alias:
            if name.alias.choices is not None:
                return "flag"
            target = options()[self.target(name.alias, spelling)]
        assert target is not None
        return {"bool": "flag", "list": "many"}.get(target.kind.base, "one")

    def find(
        self, section: str | None, key: str, where: str, dashes: str = "", *, is_mapping: bool = False
    ) -> Name:
        """What a key means. ``section`` is the mapping it stands in, ``is_mapping`` says that its value is one.

        Raises UnknownOptionError for unknown keys, ConfigError for keys that stand in a wrong place.
        """
        word = key.replace("-", "_")
        if "." in word:
            head, _, word = word.partition(".")
            section = alias_table().sections.get(head, head)
            if section not in SECTIONS:
                near = closest(head, SECTIONS)
                raise UnknownOptionError(
                    f"no section {head!r}",
                    where=where,
                    fix=f"did you mean {dashes}{near}.{word}?" if near else None,
                )
        name = self._find_word(word)
        if name is None and word.startswith("no_"):
            positive = self._find_word(word.removeprefix("no_"))
            if positive and self._is_bool(positive):
                name = replace(positive, negated=True)
        if name is None:
            raise self._unknown(word, where, dashes, is_mapping and section is None)
        if section is not None:
            self._check_section(name, section, where, dashes)
        return name

    def _find_word(self, word: str) -> Name | None:
        table = alias_table()
        elsewhere = table.aliases.get(word)
        if elsewhere is not None and self.command.name in (elsewhere.targets or {}):
            return Name(alias=elsewhere)
        if word in options():
            return Name(option=options()[word])
        if word in self.command.switches:
            return Name(switch=word)
        if word in table.aliases:
            return Name(alias=table.aliases[word])
        known = table.unsupported.get(word) or table.unneeded.get(word)
        return Name(known=known) if known else None

    @staticmethod
    def _is_bool(name: Name) -> bool:
        if name.option:
            return name.option.kind.base == "bool"
        if name.alias:
            target = options().get(name.alias.target or "")
            return name.alias.choices is not None or (target is not None and target.kind.base == "bool")
        return True

    def _unknown(self, word: str, where: str, dashes: str, is_mapping: bool) -> UnknownOptionError:
        table = alias_table()
        if word in SECTIONS or word in table.sections:
            return UnknownOptionError(
                "is a section, not an option", where=where, fix=f"write {dashes}{word}.NAME"
            )
        if word in table.mistakes:
            mistake = table.mistakes[word]
            return UnknownOptionError(
                mistake.say, where=where, fix=mistake.fix.replace("COMMAND", self.command.name)
            )
        sections = [*SECTIONS, *table.sections]
        own = [*self.options, *self.command.switches]
        others = [*options(), *table.aliases, *table.unsupported, *table.unneeded]
        # A mapping is most likely a section; a flag cannot be one.
        tiers = (
            [sections, own, others] if is_mapping else [own, others] if dashes else [own, sections, others]
        )
        near = next(filter(None, (closest(word, tier) for tier in tiers)), None)
        return UnknownOptionError(
            "unknown option" if near or not is_mapping else "neither a section nor an option",
            where=where,
            fix=f"did you mean {dashes}{near}?"
            if near
            else f"swift {self.command.name} --help all lists the options",
        )

    def _check_section(self, name: Name, section: str, where: str, dashes: str) -> None:
        targets = [name.option.name] if name.option else name.alias.all_targets() if name.alias else []
        homes = [options()[target].section for target in targets]
        if homes and section not in homes:
            raise ConfigError(
                f"is in section {homes[0]}, not in {section}",
                where=where,
                fix=f"write {dashes}{homes[0]}.{targets[0]}",
            )

    def target(self, alias: Alias, where: str) -> str:
        """The option that an alias means in this command."""
        if alias.targets is None:
            assert alias.target is not None
            return alias.target
        if self.command.name not in alias.targets:
            raise self.not_used(alias.name, where, list(alias.targets))
        return alias.targets[self.command.name]

    def not_used(self, name: str, where: str, users: list[str]) -> ConfigError:
        """The error for an option that belongs to other commands."""
        return ConfigError(
            f"not used by swift {self.command.name}",
            where=where,
            fix=f"leave it out ({name} is an option of {', '.join(users)})",
        )
