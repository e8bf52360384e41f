"""Checking keyword arguments of losses that are chosen by name: what is unknown or without effect is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from swift.core.errors import ConfigError
from swift.core.registry import closest

__all__ = ["check_knobs", "knobs_of", "lookup"]

T = TypeVar("T")


def knobs_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the keyword-only parameters of a function."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY)


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """The entry of a table. Raises ConfigError with the nearest name."""
    if name in table:
        return table[name]
    near = closest(name, table)
    raise ConfigError(
        f"unknown {kind} {name!r}",
        why=f"known: {', '.join(sorted(table))}",
        fix=f"did you mean {near!r}?" if near else None,
    )


def check_knobs(
    given: Iterable[str], allowed: Collection[str], owner: str, elsewhere: Mapping[str, Collection[str]]
) -> None:
    """Refuse names that ``owner`` does not take.

    Args:
        elsewhere: other owners and what they take, so that a name without effect here is told apart from a mistake.

    Raises ConfigError with the nearest name, or with whom it belongs to.
    """
    for name in given:
        if name in allowed:
            continue
        owners = sorted(other for other, names in elsewhere.items() if name in names)
        if owners:
            raise ConfigError(f"{name} has no effect on {owner}", why=f"it belongs to {', '.join(owners)}")
        near = closest(name, {*allowed, *(one for names in elsewhere.values() for one in names)})
        raise ConfigError(
            f"{owner} has no knob {name!r}",
            why=f"it has: {', '.join(sorted(allowed)) or 'none'}",
            fix=f"did you mean {near!r}?" if near else None,
        )
