"""The parser of commands with words of their own (data, config, doctor...): argparse with our manners."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from swift.core.errors import UsageError
from swift.core.registry import closest, suggest

__all__ = ["ArgumentParser"]


class ArgumentParser(argparse.ArgumentParser):
    """No abbreviations, hyphens and underscores alike, errors as UsageError with the nearest name.

    Declare options with underscores (``--max_rows``). Subcommands (``add_subparsers``) behave the same way.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """All words, or UsageError (exit code 2)."""
        words = [_with_underscores(word) for word in argv]
        namespace, extra = self.parse_known_args(words)
        if extra:
            self._refuse(extra)
        return namespace

    def _refuse(self, words: Sequence[str]) -> NoReturn:
        names = list(dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--")))
        if not names:
            raise UsageError("one word too many", where=repr(words[0]))
        known = self._known_flags()
        fixes = [f"did you mean {near}?" if (near := closest(name, known)) else None for name in names]
        if len(names) == 1:
            raise UsageError(
                "unknown option", where=names[0], fix=fixes[0] or f"{self.prog} --help lists them"
            )
        lines = [
            f"\n  {name}: {fix or 'nothing is called like it'}"
            for name, fix in zip(names, fixes, strict=True)
        ]
        raise UsageError(f"{len(names)} unknown options{''.join(lines)}")

    def _known_flags(self) -> list[str]:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    flags += [flag for flag in parser._option_string_actions if flag.startswith("--")]
        return flags

    def error(self, message: str) -> NoReturn:
        """argparse calls this; its sentence becomes ours."""
        wrong = re.match(r"argument (.+?): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong:
            choices = [choice.strip(" '") for choice in wrong[3].split(",")]
            raise UsageError(
                f"{wrong[2]!r} is not one of {', '.join(choices)}",
                where=self.prog,
                fix=suggest(wrong[2], choices),
            )
        raise UsageError(message, where=self.prog)


def _with_underscores(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
