"""Words of a command line: which are files, which are flags, and which words belong to a flag."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swift.config.kinds import is_none_word, parse_bool
from swift.config.read import FILE_ENDINGS
from swift.core.errors import UsageError

__all__ = ["Flag", "read_flags"]


@dataclass(frozen=True)
class Flag:
    """``--lora-rank 8``: the spelling as typed, the key without dashes, the words (None: there are none)."""

    spelling: str
    key: str
    words: list[str] | None


def read_flags(argv: Sequence[str], arity: Callable[[str, str], str]) -> tuple[list[str], list[Flag]]:
    """Split words into configuration files and flags.

    ``arity(spelling, key)`` tells what may follow a flag: ``flag`` an optional true or false, ``one`` exactly
    one word, ``many`` one or more, ``any`` any number. It raises for unknown flags. Raises UsageError for
    words that belong to nothing and for flags without a value.
    """
    files: list[str] = []
    flags: list[Flag] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--"):
            _check_file(word, flags[-1].spelling if flags else None)
            files.append(word)
            continue
        spelling, equals, value = word.partition("=")
        key = spelling[2:]
        if not key:
            raise UsageError("a flag needs a name", where=word)
        if key == "config" and (equals or position < len(argv)):  # ms-swift: --config FILE
            if not equals:
                value = argv[position]
                position += 1
            _check_file(value, None)
            files.append(value)
            continue
        takes = arity(spelling, key)
        if equals:
            flags.append(Flag(spelling, key, [value]))
            continue
        start = position
        while position < len(argv) and _belongs(argv[position], takes, position - start):
            position += 1
        words = list(argv[start:position])
        if not words and takes in ("one", "many"):
            raise UsageError("needs a value", where=spelling)
        flags.append(Flag(spelling, key, words or None))
    return files, flags


def _belongs(word: str, takes: str, taken: int) -> bool:
    if word.startswith("--") and len(word) > 2:
        return False
    if takes == "one":
        return taken == 0
    if takes == "flag":
        return taken == 0 and (parse_bool(word) is not None or is_none_word(word))
    return True


def _check_file(word: str, last_flag: str | None) -> None:
    if word.lower().endswith(FILE_ENDINGS):
        return
    if last_flag:
        raise UsageError(f"one word too many after {last_flag}", where=repr(word))
    raise UsageError(
        "neither a flag nor a configuration file",
        where=repr(word),
        fix="flags start with --, configuration files end in .yaml, .yml or .json",
    )
