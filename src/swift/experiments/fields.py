"""Reading the keys of one mapping in an experiments file, with file and line in every complaint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from swift.config.kinds import is_none_word, parse_bool
from swift.config.read import Written
from swift.core.errors import ConfigError
from swift.core.format import parse_size
from swift.core.registry import suggest

__all__ = ["NOWHERE", "Fields", "as_number", "fail", "mapping", "parse_duration"]

Amount = TypeVar("Amount", int, float)

NOWHERE = Written({}, {}, "", {})
"""An empty mapping that stands in no file."""

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?")


def fail(
    message: str, written: Written, key: str = "", *, why: str | None = None, fix: str | None = None
) -> ConfigError:
    """The error for one value: ``file.yaml:12: key: message``."""
    where = ": ".join(part for part in (written.place, key) if part)
    return ConfigError(message, where=where or None, why=why, fix=fix)


def mapping(items: dict[str, Written], place: str) -> Written:
    """Entries as one mapping, as if they stood at ``place``."""
    values = {key: entry.value for key, entry in items.items()}
    return Written(values, {key: entry.text for key, entry in items.items()}, place, items)


def parse_duration(text: str) -> float | None:
    """Seconds of ``2h30m``, ``45m``, ``1d``, ``90s`` or a plain number; None for other words."""
    word = text.strip().replace(" ", "").lower()
    match = _DURATION.fullmatch(word)
    if not word or match is None:
        return None
    return sum(
        float(number or 0) * unit for number, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True)
    )


class Fields:
    """A mapping whose keys are known.

    Args:
        written: the mapping as it stands in the file; an empty value counts as an empty mapping.
        what: what it is, for messages ("resources").
        known: the keys it may have; None: any (they are checked elsewhere).
        hints: key -> what to do instead, for keys that people may expect here.
    """

    def __init__(
        self,
        written: Written,
        what: str,
        known: Sequence[str] | None = None,
        hints: dict[str, str] | None = None,
    ) -> None:
        if written.items is None and written.value is not None:
            raise fail(
                "needs a mapping", written, what, fix=f"write {what}: and the entries below it, indented"
            )
        self.written = written
        self.what = what
        self.items: dict[str, Written] = dict(written.items or {})
        for key, value in self.items.items():
            if known is not None and key not in known:
                fix = (hints or {}).get(key) or suggest(key, known)
                why = None if fix else f"known: {', '.join(known)}"
                raise fail(f"unknown key in {what}", value, key, why=why, fix=fix)

    def __contains__(self, key: str) -> bool:
        return key in self.items and self.items[key].value is not None

    def get(self, key: str) -> Written | None:
        """The value of a key; None when it is not there, or empty."""
        return self.items[key] if key in self else None

    def fail(self, message: str, key: str, *, why: str | None = None, fix: str | None = None) -> ConfigError:
        """The error for the value of a key."""
        return fail(message, self.items.get(key, self.written), key, why=why, fix=fix)

    def text(self, key: str) -> str | None:
        """One word or text, with its letters as they stand in the file."""
        written = self.get(key)
        if written is None:
            return None
        if not isinstance(written.text, str):
            raise self.fail(f"{written.value!r} is not a text", key)
        return written.text

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        """One of some words."""
        word = self.text(key)
        if word is None:
            return default
        for choice in choices:
            if word.lower() == choice:
                return choice
        raise self.fail(f"{word!r} is not one of {', '.join(choices)}", key, fix=suggest(word, choices))

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        written = self.get(key)
        if written is None:
            return default
        flag = parse_bool(written.value)
        if flag is None:
            raise self.fail(f"{written.value!r} is not true or false", key)
        return flag

    def integer(self, key: str, least: int | None = None) -> int | None:
        """A whole number; None when it is not there. ``least``: the smallest allowed."""
        number = self.number(key)
        if number is None:
            return None
        if not float(number).is_integer():
            raise self.fail(f"{number} is not an integer", key)
        if least is not None and number < least:
            raise self.fail(f"must be at least {least}, not {int(number)}", key)
        return int(number)

    def number(self, key: str) -> float | None:
        """A finite number; ``1e-4`` and ``"1e-4"`` alike (YAML takes the first for a text)."""
        written = self.get(key)
        if written is None:
            return None
        number = as_number(written.value)
        if number is None:
            raise self.fail(f"{written.value!r} is not a number", key)
        return number

    def size(self, key: str) -> int | None:
        """Bytes."""
        return self._parsed(key, parse_size, "size", "8GiB or 500MiB")

    def duration(self, key: str) -> float | None:
        """Seconds."""
        return self._parsed(key, parse_duration, "time", "2h30m, 45m or 90s")

    def _parsed(self, key: str, parse: Callable[[str], Amount | None], what: str, like: str) -> Amount | None:
        text = self.text(key)
        if text is None:
            return None
        amount = parse(text)
        if not amount:
            raise self.fail(f"{text!r} is not a {what}", key, fix=f"write it like {like}")
        return amount

    def words(self, key: str) -> list[str]:
        """A list of words; one word counts as a list of one."""
        written = self.get(key)
        if written is None or is_none_word(written.value):
            return []
        values = written.text if isinstance(written.text, list) else [written.text]
        if not all(isinstance(value, str) for value in values):
            raise self.fail("needs a list of words", key)
        return list(values)

    def variables(self) -> dict[str, str]:
        """The environment variables under ``ENV``: for the jobs, not for the process that reads the file."""
        variables = Fields(self.get("ENV") or NOWHERE, "ENV")
        for key, value in variables.items.items():
            if value.items is not None or value.entries is not None:
                raise variables.fail("needs one value", key)
        return {key: "" if value.text is None else str(value.text) for key, value in variables.items.items()}

    def without(self, keys: Iterable[str]) -> Written:
        """The other entries."""
        left = {key: value for key, value in self.items.items() if key not in keys}
        return mapping(left, self.written.place)


def as_number(value: Any) -> float | None:
    """A finite number, also one written as a text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return value if isinstance(value, int) else number
