"""What a value of an option looks like, read from the field's annotation; checks with clear messages."""

from __future__ import annotations

import json
import math
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from swift.core.errors import ConfigError
from swift.core.registry import suggest

__all__ = ["Kind", "coerce", "is_none_word", "kind_of", "parse_bool"]

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_NONE = frozenset({"none", "null"})


@dataclass(frozen=True)
class Kind:
    """The shape of an option's values.

    Attributes:
        base: bool, int, float, str, choice, list, dict or any (whatever JSON can say).
        choices: the allowed words of a choice.
        item: the kind of a list's items or of a dict's values.
        optional: None is allowed ("derived" or "not used").
    """

    base: str
    choices: tuple[str, ...] = ()
    item: Kind | None = None
    optional: bool = False

    @property
    def is_textual(self) -> bool:
        """True when an unquoted YAML word stands for its own letters (``no`` is not False, ``7`` not a
        number).
        """
        if self.item is not None:
            return self.item.is_textual
        return self.base in ("str", "choice")

    def describe(self) -> str:
        """One word or the choices, for help: ``INT``, ``lora|full``, ``TEXT...``."""
        if self.base == "choice":
            return "|".join(self.choices)
        if self.base == "list" and self.item is not None:
            return f"{self.item.describe()}..."
        return {"any": "JSON", "bool": "BOOL", "int": "INT", "float": "FLOAT", "str": "TEXT", "dict": "JSON"}[
            self.base
        ]


def kind_of(annotation: Any) -> Kind:
    """The kind of a field annotated with ``annotation``. Raises TypeError for shapes options do not have."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"options have one type, or one type and None: {annotation}")
        kind = kind_of(inner[0])
        return Kind(kind.base, kind.choices, kind.item, optional=True)
    if origin is Literal:
        return Kind("choice", choices=tuple(get_args(annotation)))
    if origin is list:
        return Kind("list", item=kind_of(get_args(annotation)[0]))
    if origin is dict:
        return Kind("dict", item=kind_of(get_args(annotation)[1]))
    if annotation is Any:
        return Kind("any")
    for python_type, base in ((bool, "bool"), (int, "int"), (float, "float"), (str, "str")):
        if annotation is python_type:
            return Kind(base)
    raise TypeError(f"options cannot have the type {annotation}")


def is_none_word(value: Any) -> bool:
    """True for None and for the words none and null."""
    return value is None or (isinstance(value, str) and value.lower() in _NONE)


def parse_bool(value: Any) -> bool | None:
    """True or False for booleans, 0, 1 and the usual words; None for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | str):
        word = str(value).lower()
        return True if word in _TRUE else False if word in _FALSE else None
    return None


def coerce(kind: Kind, info: FieldInfo, value: Any, where: str) -> Any:
    """``value`` (words from the command line, or YAML, JSON and Python values) as the option's own type.

    Raises ConfigError at ``where`` saying what is wrong and which values are allowed.
    """
    if value is None:
        raise ConfigError("has no value", where=where, fix="give one, or leave it out for the default")
    if kind.base == "list":
        if "" in _as_list(value, where):  # such as --dataset "$UNSET", which would mean the working folder
            raise ConfigError("an empty word", where=where, fix="leave it out, or name something")
        return [_one(kind.item or kind, info, item, where) for item in _as_list(value, where)]
    if kind.base == "dict":
        return {
            str(key): _one(kind.item or kind, info, item, where)
            for key, item in _as_dict(value, where).items()
        }
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise ConfigError(f"takes one value, not {len(value)}", where=where)
        value = value[0]
    return _one(kind, info, value, where)


def _as_list(value: Any, where: str) -> list[Any]:
    if isinstance(value, list | tuple):
        if len(value) == 1 and isinstance(value[0], str) and value[0].startswith("["):
            return _from_json(value[0], list, where)
        return list(value)
    if isinstance(value, str) and value.startswith("["):
        return _from_json(value, list, where)
    if value is None or isinstance(value, dict):
        raise ConfigError("needs a list", where=where)
    return [value]


def _as_dict(value: Any, where: str) -> dict[Any, Any]:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return _from_json(value, dict, where)
    if not isinstance(value, dict):
        raise ConfigError("needs a mapping", where=where, fix='write it as JSON, such as \'{"old": "new"}\'')
    return value


def _from_json(text: str, wanted: type, where: str) -> Any:
    name = "list" if wanted is list else "object"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{text!r} is not a JSON {name}: {error.msg}", where=where) from None
    if not isinstance(value, wanted):
        raise ConfigError(f"{text!r} is not a JSON {name}", where=where)
    return value


def _one(kind: Kind, info: FieldInfo, value: Any, where: str) -> Any:
    if kind.base == "bool":
        flag = parse_bool(value)
        if flag is None:
            raise ConfigError(f"{value!r} is not true or false", where=where)
        return flag
    if kind.base == "int":
        return _limited(_integer(value, where), info, where)
    if kind.base == "float":
        return _limited(_number(value, where), info, where)
    if kind.base == "choice":
        return _choice(kind, value, where)
    if kind.base == "any":
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{value!r} is not a text", where=where)
    return value


def _integer(value: Any, where: str) -> int:
    number = None
    if isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            number = None
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    if number is None:
        raise ConfigError(f"{value!r} is not an integer", where=where)
    return number


def _number(value: Any, where: str) -> float:
    number = None
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    if number is None or not math.isfinite(number):
        raise ConfigError(f"{value!r} is not a number", where=where)
    return number


def _choice(kind: Kind, value: Any, where: str) -> str:
    if isinstance(value, str):
        for choice in kind.choices:
            if value.lower() == choice.lower():
                return choice
    raise ConfigError(
        f"{value!r} is not one of {', '.join(kind.choices)}",
        where=where,
        fix=suggest(str(value), kind.choices),
    )


def _limited(number: Any, info: FieldInfo, where: str) -> Any:
    for limit in info.metadata:
        for name, words, holds in (
            ("ge", "at least", lambda bound: number >= bound),
            ("gt", "more than", lambda bound: number > bound),
            ("le", "at most", lambda bound: number <= bound),
            ("lt", "less than", lambda bound: number < bound),
        ):
            bound = getattr(limit, name, None)
            if bound is not None and not holds(bound):
                raise ConfigError(f"must be {words} {bound}, not {number}", where=where)
    return number
