"""JSON Schema of configuration files, for editors and forms; nested sections and flat keys alike."""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo

from swift.config.aliases import Alias, alias_table
from swift.config.commands import COMMANDS, Command
from swift.config.kinds import Kind
from swift.config.schema import SECTIONS, Option, options

__all__ = ["json_schema"]

_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def json_schema(command: Command | None = None) -> dict[str, Any]:
    """The schema of files for one command, or for any (draft 2020-12)."""
    taken = command.options() if command else options()
    definitions = {name: _option_schema(option) for name, option in taken.items()}
    properties: dict[str, Any] = {}
    for name in taken:
        properties[name] = {"$ref": f"#/$defs/{name}"}
        properties[f"{taken[name].section}.{name}"] = {"$ref": f"#/$defs/{name}"}
    spellings = _spellings(taken)
    properties |= spellings
    for section, model in SECTIONS.items():
        inside = {name: {"$ref": f"#/$defs/{name}"} for name in taken if taken[name].section == section}
        if not inside:
            continue
        inside |= {name: schema for name, schema in spellings.items() if _home(name, section)}
        nested = {
            "type": "object",
            "description": (model.__doc__ or "").strip(),
            "properties": inside,
            "additionalProperties": False,
        }
        # ``model`` is a section and an option: a mapping is the section, anything else the option.
        properties[section] = {"anyOf": [properties[section], nested]} if section in taken else nested
        for other, meaning in alias_table().sections.items():
            if meaning == section:
                properties[other] = {"anyOf": [properties[other], nested]} if other in properties else nested
    words = [command.name] if command else [name for name in COMMANDS if not COMMANDS[name].own_arguments]
    properties["command"] = {"enum": words, "description": "The command this file is for."}
    properties["ENV"] = {"type": "object", "description": "Environment variables; those set already win."}
    properties["explicit"] = {
        "type": "array",
        "items": {"type": "string"},
        "description": "Written by a run.",
    }
    for name, text in (command.switches if command else {}).items():
        properties[name] = {"type": "boolean", "description": text}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"swift {command.name}" if command else "swift",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": definitions,
    }


def _home(spelling: str, section: str) -> bool:
    targets = alias_table().aliases[spelling].all_targets()
    return any(options()[target].section == section for target in targets)


def _option_schema(option: Option) -> dict[str, Any]:
    schema = _kind_schema(option.kind, option.info, option.name)
    schema["description"] = option.help + (f" Unit: {option.unit}." if option.unit else "")
    if option.default is not None:
        schema["default"] = option.default
    return schema


def _kind_schema(kind: Kind, info: FieldInfo, name: str) -> dict[str, Any]:
    schema: dict[str, Any]
    if kind.base == "choice":
        schema = {"enum": [*kind.choices, *alias_table().values.get(name, {})]}
        if "no" in kind.choices:
            schema["enum"].append(False)  # what YAML makes of an unquoted no
    elif kind.base == "list" and kind.item is not None:
        item = _kind_schema(kind.item, info, name)
        schema = {"anyOf": [{"type": "array", "items": item}, item]}
    elif kind.base == "dict":
        inner = {} if kind.item is not None and kind.item.base == "any" else {"type": "string"}
        schema = {"type": "object", "additionalProperties": inner}
    else:
        types = {"bool": "boolean", "int": "integer", "float": "number", "str": "string"}
        schema = {"type": types[kind.base]}
        for limit in info.metadata:
            schema |= {word: getattr(limit, key) for key, word in _LIMITS.items() if hasattr(limit, key)}
    return {"anyOf": [schema, {"type": "null"}]} if kind.optional else schema


def _spellings(taken: dict[str, Option]) -> dict[str, Any]:
    return {
        alias.name: _alias_schema(alias)
        for alias in alias_table().aliases.values()
        if any(target in taken for target in alias.all_targets())
    }


def _alias_schema(alias: Alias) -> dict[str, Any]:
    text = f"Another spelling: {alias.describe()}."
    if alias.choices is not None:
        return {"type": "boolean", "description": text, "deprecated": True}
    targets = alias.all_targets()
    schema: dict[str, Any] = {"description": text, "deprecated": True}
    if len(targets) == 1:
        schema["$ref"] = f"#/$defs/{targets[0]}"
    return schema
