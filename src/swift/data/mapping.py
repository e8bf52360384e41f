"""Columns of a published data set become those that `swift.data.formats` reads, as a table says.

A target column is made of one of

- ``question`` or ``answers.text.0``: a column, or a value inside it;
- ``{context}\\n\\n{question}``: a text with columns in it;
- ``=Describe the picture.``: this very text;
- ``conversations + chosen``: lists joined (a single value is a list of one);

each followed, if need be, by a filter: ``chosen | transcript``. Columns that no known target takes are kept as they are
unless a reader would mistake them for a part of the conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from swift.data.rows import Row

__all__ = ["FILTERS", "NO_MAPPING", "ColumnMapping"]

_CONVERSATION = {"messages", "query", "response", "history"}
_MISLEADING = {
    "messages", "conversations", "conversation", "prompt", "completion", "instruction", "input", "output", "query",
    "question", "problem", "response", "answer", "targets", "target", "answers", "text", "content", "history",
}  # fmt: skip
_FIELD = re.compile(r"\{(\w[\w.]*)\}")


@dataclass(frozen=True)
class ColumnMapping:
    """How the columns of a row change.

    Attributes:
        targets: target column -> how it is made.
        labels: column -> names of its numbers, put in their place first; a target ``label`` gets the number itself.
        fill: placeholder (``NAME`` for ``{{NAME}}``) -> (Chinese, other) texts; the column ``language`` chooses.
    """

    targets: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, list[str]] = field(default_factory=dict)
    fill: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def apply(self, row: Row) -> Row:
        """The row with its columns mapped; a column that is missing gives a row with an error."""
        if not (self.targets or self.labels or self.fill) or row.error is not None:
            return row
        values = dict(row.values)
        for placeholder, texts in self.fill.items():
            text = texts[values.get("language") != "zh"]
            for name, value in values.items():
                if isinstance(value, str):
                    values[name] = value.replace("{{" + placeholder + "}}", text)
        try:
            numbers = dict(values)
            for name, names in self.labels.items():
                if isinstance(values.get(name), int):
                    if values[name] < 0:  # some data sets mark rows without a label so
                        raise IndexError(f"{name} {values[name]} names no class")
                    values[name] = names[values[name]]
            made = {
                target: _make(text, numbers if target == "label" else values)
                for target, text in self.targets.items()
            }
        except (KeyError, IndexError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            columns = ", ".join(row.values)
            return Row(
                {}, row.source, row.number, f"the registry expects other columns ({what}); found [{columns}]"
            )
        if _CONVERSATION & set(made):
            values = {name: value for name, value in values.items() if name not in _MISLEADING}
        return Row({**values, **made}, row.source, row.number)


NO_MAPPING = ColumnMapping()


def _make(text: str, values: Mapping[str, Any]) -> Any:
    if text.startswith("="):
        return text[1:]
    if "{" in text or " + " not in text:
        return _term(text, values)
    parts = [_term(part, values) for part in text.split(" + ")]
    return [item for part in parts for item in (part if isinstance(part, list) else [part])]


def _term(text: str, values: Mapping[str, Any]) -> Any:
    source, bar, name = text.rpartition(" | ")
    source = source if bar else name
    if "{" in source:
        value: Any = _FIELD.sub(lambda found: _text(_get(found[1], values)), source)
    else:
        value = _get(source, values)
    return FILTERS[name](value) if bar else value


def _get(path: str, values: Mapping[str, Any]) -> Any:
    if path in values:
        return values[path]
    value: Any = values
    for part in path.split("."):
        value = value[int(part)] if part.isdecimal() and isinstance(value, list) else value[part]
    return value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return "" if value is None else str(value)


def _split(text: str, roles: Mapping[str, str]) -> list[dict[str, str]]:
    """A transcript whose turns begin with the keys of ``roles``, as messages."""
    parts = re.split(f"({'|'.join(map(re.escape, roles))})", text)[1:]
    return [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _glaive(text: str) -> list[dict[str, str]]:
    """The transcripts of Glaive: calls stand in an answer as ``<functioncall> {...}``."""
    roles = {"USER:": "user", "ASSISTANT:": "assistant", "FUNCTION RESPONSE:": "tool"}
    messages = []
    for message in _split(text.replace("<|endoftext|>", ""), roles):
        content, found, call = message["content"].partition("<functioncall>")
        if content.strip() or not found:
            messages.append({**message, "content": content.strip()})
        if found:  # the arguments stand in single quotes inside the JSON text
            messages.append(
                {"role": "tool_call", "content": re.sub(r"'(\{.*\})'", r"\1", call.strip(), flags=re.S)}
            )
    return messages


def _turns(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def _calls(value: Any) -> list[dict[str, str]]:
    calls = json.loads(value) if isinstance(value, str) else value
    return [{"role": "tool_call", "content": json.dumps(call, ensure_ascii=False)} for call in calls]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


FILTERS: Mapping[str, Callable[[Any], Any]] = {
    "transcript": lambda text: _split(text, {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}),
    "hashes": lambda text: _split(text, {"### Human:": "user", "### Assistant:": "assistant"}),
    "glaive": _glaive,
    "turns": _turns,
    "exchanges": lambda pairs: _turns([text for pair in pairs for text in (pair["input"], pair["output"])]),
    "calls": _calls,
    "user": lambda text: [{"role": "user", "content": text}],
    "users": lambda texts: [[{"role": "user", "content": text}] for text in _list(texts)],
    "text_content": lambda turns: [{"role": turn["role"], "content": turn["text"]} for turn in _list(turns)],
    "list": _list,
    "final": lambda text: text.rpartition("####")[2].strip(),
    "letter": lambda number: chr(ord("A") + int(number)),
}
"""Filter -> what it makes of a value. ``turns``: texts of user and assistant in turn; ``exchanges``: objects with
input and output; ``user``: a question alone; ``users``: a list of such; ``final``: what follows ``####`` (GSM8K);
``letter``: A, B, C of 0, 1, 2; ``text_content``: messages whose content is called text."""
