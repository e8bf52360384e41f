"""Named things that can be looked up, with the nearest name when the lookup fails."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from swift.core.errors import UsageError

T = TypeVar("T")


def closest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like ``name``, or None when nothing is near. Hyphens and underscores are alike."""
    by_key = {candidate.replace("-", "_").lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.replace("-", "_").lower(), by_key, n=1, cutoff=0.6)
    return by_key[matches[0]] if matches else None


def suggest(
    name: str, candidates: Iterable[str], otherwise: str | None = None, *, before: str = ""
) -> str | None:
    """What to do about an unknown name: the nearest candidate behind ``before``, else ``otherwise``."""
    near = closest(name, candidates)
    return f"did you mean {before}{near}?" if near else otherwise


def looks_like_hub_name(name: str) -> bool:
    """True for ``Qwen/Qwen3-0.6B``: an owner and a name, where no folder is called like the owner."""
    owner, _, rest = name.partition("/")
    is_name = all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in (owner, rest))
    return is_name and not Path(owner).is_dir()


class Registry(Generic[T]):
    """A table from name to object.

    Args:
        kind: what the names stand for, used in messages ("schedule", "callback").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: ``@schedules.register("cosine")``. Raises ValueError when the name is taken."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry, or UsageError naming the nearest one."""
        if name in self._entries:
            return self._entries[name]
        near = closest(name, self._entries)
        raise UsageError(
            f"unknown {self.kind} {name!r}",
            why=f"known: {', '.join(sorted(self._entries))}",
            fix=f"did you mean {near!r}?" if near else None,
        )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def items(self) -> Iterable[tuple[str, T]]:
        """All (name, entry) pairs in the order of registration."""
        return self._entries.items()
