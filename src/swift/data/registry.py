"""Public data sets by name: where they are on the hubs, what their columns mean, under which licence.

The table is ``registry/*.yaml``, one file a task. An entry of it, all keys optional but ``columns`` (or ``shape``) and
one of ``hf``, ``ms`` and ``path``::

    name: {aliases: [...], hf: owner/name, ms: owner/name, subset: default one, subsets: [...], split: train,
           licence: SPDX, shape: a name of shapes.yaml, columns: ["name", "name:kind"], map: {...}, labels: {...},
           files: ["glob"], fill: [...], note: "..."}

``columns`` declares what the published files have (kinds: see ``KINDS``); ``map`` says how they become the columns that
`swift.data.formats` reads (see `swift.data.mapping`). Users add entries of their own in ``$SWIFT_HOME/datasets/*.yaml``
(``path`` instead of a hub id), which win over these.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from swift.core.errors import DataError
from swift.core.home import swift_home
from swift.core.registry import closest
from swift.data.mapping import ColumnMapping

__all__ = ["HUBS", "KINDS", "DatasetEntry", "all_datasets", "find_dataset", "nearest_dataset", "split_hub"]

HUBS = {"HF": "hf", "MS": "ms"}
"""Prefix of a name (``HF::owner/name``) -> the hub it stands for."""
KINDS = (
    "text", "number", "flag", "texts", "image", "tools", "calls", "history",
    "messages", "question", "answer", "sharegpt", "sharegpt_open", "turn", "turns_text", "turn_text",
    "pairs", "exchanges", "transcript", "hashes", "glaive",
)  # fmt: skip
"""What a declared column holds; text where nothing is said."""
_FOLDER = Path(__file__).parent / "registry"
_SHAPES = "shapes.yaml"
_TEXTS = ("hf", "ms", "path", "subset", "split", "licence", "note")
_LISTS = ("aliases", "subsets", "files", "fill")
_KEYS = {*_TEXTS, *_LISTS, "shape", "columns", "map", "labels", "task"}


@dataclass(frozen=True)
class DatasetEntry:
    """One known data set.

    Attributes:
        name, aliases: what it may be called.
        task: pt, sft, agent, dpo, kto, grpo, multimodal, classification, embedding, reranker.
        hf, ms: ids on Hugging Face and ModelScope; None where it is not there.
        path: a local file or folder; in the table, relative to its file.
        subset: the subset that is taken when none is named; None: all files of the split.
        subsets: those there are, where the data set has several.
        split: the split that is taken.
        licence: SPDX or the hub's name of it, where known.
        columns: declared column -> kind.
        mapping: how these become the columns that the readers know.
        files: glob patterns that choose the files of the repository, instead of subset and split.
        fill: placeholders in its texts that options fill (``NAME``, ``AUTHOR``).
        note: a sentence for the user.
    """

    name: str
    task: str
    aliases: tuple[str, ...] = ()
    hf: str | None = None
    ms: str | None = None
    path: str | None = None
    subset: str | None = None
    subsets: tuple[str, ...] = ()
    split: str = "train"
    licence: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    mapping: ColumnMapping = field(default_factory=ColumnMapping)
    files: tuple[str, ...] = ()
    fill: tuple[str, ...] = ()
    note: str | None = None

    def hub_id(self, hub: str) -> str | None:
        """``owner/name`` on ``hf`` or ``ms``."""
        return {"hf": self.hf, "ms": self.ms}[hub]

    def describe(self) -> dict[str, Any]:
        """The entry as a JSON object."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "mapping"}
        return {**facts, "map": dict(self.mapping.targets), "labels": dict(self.mapping.labels)}


def split_hub(name: str) -> tuple[str | None, str]:
    """(``hf``, ``ms`` or None, the rest) of ``HF::owner/name``, ``MS::owner/name`` or a plain name."""
    prefix, colons, rest = name.partition("::")
    hub = HUBS.get(prefix.upper()) if colons else None
    return (hub, rest) if hub else (None, name)


def find_dataset(name: str) -> DatasetEntry | None:
    """The entry with this short name, alias or hub id (``owner/name``, ``HF::owner/name``); None when unknown.

    Capitals, ``-`` and ``_`` do not matter. With a prefix only that hub's ids and the short names are looked at.
    """
    hub, rest = split_hub(name)
    names, ids = _index(_own_folder())
    found = names.get(_key(rest))
    if found is None:
        found = next(
            (ids[one, _key(rest)] for one in ([hub] if hub else ["hf", "ms"]) if (one, _key(rest)) in ids),
            None,
        )
    return found


def nearest_dataset(name: str) -> str | None:
    """The known name most like ``name``."""
    names, _ = _index(_own_folder())
    return closest(split_hub(name)[1], [entry.name for entry in names.values()])


def all_datasets(pattern: str | None = None) -> list[DatasetEntry]:
    """All entries, or those whose name, alias, id or task is like ``pattern`` (a glob, or a part of the name)."""
    names, _ = _index(_own_folder())
    entries = list({id(entry): entry for entry in names.values()}.values())
    if pattern is None:
        return entries
    wanted = pattern.lower() if set(pattern) & set("*?[") else f"*{pattern.lower()}*"

    def texts(entry: DatasetEntry) -> Iterable[str]:
        return (text.lower() for text in (entry.name, *entry.aliases, entry.hf, entry.ms, entry.task) if text)

    return [entry for entry in entries if any(fnmatch.fnmatchcase(text, wanted) for text in texts(entry))]


def _own_folder() -> Path:
    return swift_home() / "datasets"


def _key(name: str) -> str:
    return name.lower().replace("_", "-")


@cache
def _index(own: Path) -> tuple[dict[str, DatasetEntry], dict[tuple[str, str], DatasetEntry]]:
    """(by name and alias, by (hub, id)). Names win over aliases, entries of users over ours."""
    entries = [entry for folder in (own, _FOLDER) if folder.is_dir() for entry in _read_folder(folder)]
    names: dict[str, DatasetEntry] = {}
    for entry in entries:
        names.setdefault(_key(entry.name), entry)
    for entry in entries:
        for alias in entry.aliases:
            names.setdefault(_key(alias), entry)
    ids: dict[tuple[str, str], DatasetEntry] = {}
    for entry in entries:
        for hub in HUBS.values():
            if known := entry.hub_id(hub):
                ids.setdefault((hub, _key(known)), entry)
    return names, ids


def _read_folder(folder: Path) -> Iterator[DatasetEntry]:
    shapes = yaml.safe_load((_FOLDER / _SHAPES).read_text(encoding="utf-8"))
    for file in sorted(folder.glob("*.yaml")):
        if file.name == _SHAPES:
            continue
        try:
            table = yaml.load(
                file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            )
        except (OSError, yaml.YAMLError) as error:
            raise DataError("cannot be read", where=str(file), why=" ".join(str(error).split())) from error
        task = table.pop("task", "sft") if isinstance(table, dict) else None
        if task is None:
            raise DataError(
                "not a table of data sets", where=str(file), fix="my-data: {path: /data/my.jsonl}"
            )
        for name, raw in table.items():
            yield _entry(name, raw or {}, str(task), shapes, file)


def _entry(
    name: str, raw: Mapping[str, Any], task: str, shapes: Mapping[str, Any], file: Path
) -> DatasetEntry:
    unknown = sorted(set(raw) - _KEYS)
    shape = shapes.get(raw.get("shape", ""), {})
    if unknown or ("shape" in raw and not shape) or not any(raw.get(key) for key in ("hf", "ms", "path")):
        why = (
            f"unknown keys: {', '.join(unknown)}" if unknown else "it needs hf, ms or path, and a known shape"
        )
        raise DataError(f"data set {name!r} is not described rightly", where=str(file), why=why)
    columns = dict(_column(text) for text in [*shape.get("columns", []), *raw.get("columns", [])])
    mapping = ColumnMapping({**shape.get("map", {}), **raw.get("map", {})}, raw.get("labels", {}))
    values: dict[str, Any] = {key: raw[key] for key in _TEXTS if key in raw}
    values |= {key: tuple(map(str, raw[key])) for key in _LISTS if key in raw}
    if "path" in values:
        values["path"] = str(file.parent / Path(values["path"]).expanduser())
    return DatasetEntry(name, raw.get("task", task), columns=columns, mapping=mapping, **values)


def _column(text: str) -> tuple[str, str]:
    name, _, kind = text.partition(":")
    return name, kind or "text"
