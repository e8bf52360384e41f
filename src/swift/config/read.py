"""Configuration files as written: every value with its line, and as the letters that stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from swift.core.errors import ConfigError
from swift.core.registry import closest

__all__ = ["FILE_ENDINGS", "Written", "from_python", "read_file", "read_text"]

FILE_ENDINGS = (".yaml", ".yml", ".json")
_TABS_OUTSIDE_STRINGS = re.compile(r'"(?:\\.|[^"\\])*"|\t')


@dataclass(frozen=True)
class Written:
    """One value of a file or of a Python dict.

    Attributes:
        value: the value as YAML, JSON or Python understands it.
        text: the same, but unquoted words kept as letters: ``no`` is "no" and not False.
        place: ``run.yaml:12``, or "" for Python values.
        items: for a mapping, its entries.
        entries: for a list in a file, its entries.
    """

    value: Any
    text: Any
    place: str
    items: dict[str, Written] | None = None
    entries: tuple[Written, ...] | None = None


def from_python(values: Mapping[str, Any]) -> Written:
    """A Python dict in the same form as a file."""
    items = {
        str(key): from_python(value) if isinstance(value, Mapping) else Written(value, value, "")
        for key, value in values.items()
    }
    plain = {str(key): value for key, value in values.items()}
    return Written(plain, plain, "", items)


def read_file(path: Path, shown: str) -> Written:
    """Read a YAML or JSON file whose top level is a mapping.

    ``shown`` names the file in messages. Raises ConfigError with the line for anything else, for keys that
    stand twice, and for broken syntax.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError("cannot be read", where=shown, why=error.strerror, fix=_near_file(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", where=shown, why=str(error)) from None
    if path.suffix.lower() == ".json":
        text = _checked_json(text, shown)
    return read_text(text, shown)


def _near_file(path: Path) -> str:
    """What to do about a file that is not there: the nearest configuration file beside it, if there is one."""
    folder = path.parent
    names = (
        [entry.name for entry in folder.iterdir() if entry.suffix in FILE_ENDINGS] if folder.is_dir() else []
    )
    near = closest(path.name, names)
    return f"did you mean {folder / near}?" if near else "give the path of a YAML or JSON file of options"


def read_text(text: str, shown: str) -> Written:
    """Read YAML text like ``read_file``."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Written({}, {}, shown, {})
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError("is not a mapping of options", where=f"{shown}:{_line(node)}")
        return _convert(loader, node, shown)
    except RecursionError:
        raise ConfigError("is nested without end", where=shown) from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"is not valid YAML: {error.problem}", where=f"{shown}{line}") from None
    except yaml.YAMLError as error:
        raise ConfigError("is not valid YAML", where=shown, why=str(error).splitlines()[0]) from None
    finally:
        loader.dispose()


def _checked_json(text: str, shown: str) -> str:
    """The text with tabs between tokens as spaces: the rest of JSON is YAML. Raises ConfigError if it is not
    JSON.
    """
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"is not valid JSON: {error.msg}", where=f"{shown}:{error.lineno}") from None
    return _TABS_OUTSIDE_STRINGS.sub(lambda match: " " if match[0] == "\t" else match[0], text)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _convert(loader: yaml.SafeLoader, node: yaml.Node, shown: str) -> Written:
    place = f"{shown}:{_line(node)}"
    if isinstance(node, yaml.MappingNode):
        _refuse_duplicates(node, shown)
        loader.flatten_mapping(node)
        items: dict[str, Written] = {}
        for key_node, value_node in node.value:
            entry = _convert(loader, value_node, shown)
            # The line of the key is what people look for, also when the value starts on a later line.
            items[_key(key_node, shown)] = Written(
                entry.value, entry.text, f"{shown}:{_line(key_node)}", entry.items, entry.entries
            )
        plain = {key: entry.value for key, entry in items.items()}
        return Written(plain, {key: entry.text for key, entry in items.items()}, place, items)
    if isinstance(node, yaml.SequenceNode):
        entries = tuple(_convert(loader, child, shown) for child in node.value)
        return Written(
            [entry.value for entry in entries], [entry.text for entry in entries], place, entries=entries
        )
    value = loader.construct_object(node)
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        # JSON writes letters beyond 16 bits as two escapes; YAML reads these as two halves.
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Written(value, value, place)
    return Written(value, None if value is None else node.value, place)


def _key(node: yaml.Node, shown: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError("a key must be a word", where=f"{shown}:{_line(node)}")
    return str(node.value)


def _refuse_duplicates(node: yaml.MappingNode, shown: str) -> None:
    first: dict[str, int] = {}
    for key_node, _ in node.value:
        key = _key(key_node, shown)
        if key == "<<":
            continue
        if key in first:
            raise ConfigError(
                f"{key} is set twice (first in line {first[key]})", where=f"{shown}:{_line(key_node)}"
            )
        first[key] = _line(key_node)
