"""The JSON Schema accepts what resolve accepts, and refuses typos."""

from __future__ import annotations

import json
from typing import Any

import pytest

from swift.config.aliases import alias_table
from swift.config.bind import dump, resolve
from swift.config.commands import COMMANDS
from swift.config.json_schema import json_schema

NEEDED = {"model": "m", "dataset": ["d.jsonl"]}
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}


def validates(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """A small JSON Schema validator: the keywords our schema uses, and an error for any other."""
    known = {
        "$ref",
        "$defs",
        "$schema",
        "title",
        "description",
        "default",
        "deprecated",
        "type",
        "enum",
        "anyOf",
    }
    known |= {"properties", "additionalProperties", "items", "minimum", "maximum"}
    known |= {"exclusiveMinimum", "exclusiveMaximum"}
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema and not validates(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root):
        return False
    if "anyOf" in schema and not any(validates(value, part, root) for part in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kind = schema.get("type")
    if kind == "null":
        return value is None
    if kind is not None and (
        not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")
    ):
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        holds = [
            value >= schema.get("minimum", value),
            value <= schema.get("maximum", value),
            "exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"],
            "exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"],
        ]
        return all(holds)
    if isinstance(value, list):
        return all(validates(item, schema.get("items", {}), root) for item in value)
    if isinstance(value, dict):
        return all(_entry_validates(key, item, schema, root) for key, item in value.items())
    return True


def _entry_validates(key: str, item: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    if key in schema.get("properties", {}):
        return validates(item, schema["properties"][key], root)
    rest = schema.get("additionalProperties", True)
    return validates(item, rest, root) if isinstance(rest, dict) else bool(rest)


def accepts(value: Any, command: str | None = "sft") -> bool:
    schema = json.loads(json.dumps(json_schema(COMMANDS[command] if command else None)))
    return validates(value, schema, schema)


@pytest.mark.parametrize(
    ("command", "values"),
    [
        (
            "sft",
            {**NEEDED, "save_strategy": "no", "columns": {"q": "query"}, "system": "x", "val_dataset": ["v"]},
        ),
        ("pt", {**NEEDED, "packing": True}),
        ("infer", {"model": "m"}),
        ("merge-lora", {"adapters": ["a"]}),
    ],
)
def test_what_a_run_records_is_valid(command: str, values: dict[str, Any]) -> None:
    record = dump(resolve(command, values=values))
    assert accepts(record, command)
    assert accepts(record, None)


@pytest.mark.parametrize(
    "values",
    [
        {"model": "path", "dataset": "a.jsonl"},
        {"model": {"model": "path", "device": "cpu"}},
        {"tuner.lora_rank": 4},
        {"tuner": {"lora_rank": 4, "use_lora": True}},
        {"lora": {"lora_r": 4}},
        {"use_lora": True, "lr": 1e-4, "epochs": 2},
        {"learning_rate": None},
        {"torch_dtype": "bf16"},
        {"save_strategy": False},
        {"command": "sft", "ENV": {"A": "1"}, "dry_run": True},
    ],
)
def test_spellings_are_valid(values: dict[str, Any]) -> None:
    assert accepts(values)


@pytest.mark.parametrize(
    "values",
    [
        {"lora_rnk": 4},
        {"lora_rank": "x"},
        {"lora_rank": 0},
        {"lora_rank": True},
        {"learning_rate": 0},
        {"split_dataset_ratio": 1},
        {"tuner_type": "lorra"},
        {"tuner": {"max_steps": 3}},
        {"temperature": 1},
        {"command": "doctor"},
        {"save_steps": None},
    ],
)
def test_mistakes_are_not(values: dict[str, Any]) -> None:
    assert not accepts(values)


def test_every_option_and_spelling_has_a_description() -> None:
    schema = json_schema()
    assert all(entry["description"] for entry in schema["$defs"].values())
    assert set(alias_table().aliases) - set(alias_table().sections) <= set(schema["properties"])
