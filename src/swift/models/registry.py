"""Short names of models: ids on both hubs, template, licence and enough sizes to plan without a download.

The table is registry.yaml. A ``--model`` value is, in this order: a folder on disk, a name of the user's own
(``$SWIFT_HOME/models.yaml``), a short name, an id with a slash.
Imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from swift.core.errors import ModelError
from swift.core.home import swift_home
from swift.core.registry import closest, looks_like_hub_name
from swift.models.facts import ModelFacts

__all__ = [
    "ModelEntry",
    "ModelSource",
    "find_entry",
    "model_entries",
    "nearest_name",
    "own_folder",
    "own_models",
    "resolve",
    "short_names",
]

# Words of registry.yaml -> keys of a Hugging Face config.json.
_CONFIG_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "experts": "num_experts",
    "active_experts": "num_experts_per_tok",
    "expert_ffn": "moe_intermediate_size",
    "shared_ffn": "shared_expert_intermediate_size",
    "dense_layers": "first_k_dense_replace",
    "dtype": "dtype",
}
_SHAPE = ("layers", "hidden", "ffn", "heads", "vocab")
_PLAIN = {
    "size",
    "active",
    "vision",
    "ms",
    "licence",
    "gated",
    "template",
    "arch",
    "note",
    "remote_code",
    "like",
}


@dataclass(frozen=True)
class ModelEntry:
    """One checkpoint.

    Attributes:
        name: its short name: the last part of its Hugging Face id in small letters.
        aliases: other short names that mean it, with a note where the name does not say exactly this checkpoint.
        hf_id, ms_id: ids on Hugging Face and ModelScope; None where it is not known to be there.
        architecture: class name of transformers.
        template: ``own`` (the tokenizer's chat template) or the name of a built-in one.
        licence: as the model card names it.
        gated: whether Hugging Face wants its terms accepted first.
        remote_code: whether it needs ``--trust_remote_code true``.
        size, active: parameters in 10^9 as its authors state them; active ones of a mixture of experts.
        config: what its config.json says about sizes; empty when they are not known here.
        vision: parameters in 10^9 beside the decoder (image or audio encoder), included in size.
        note: what a user should know.
    """

    name: str
    family: str
    hf_id: str
    ms_id: str | None
    architecture: str | None
    template: str
    licence: str | None
    gated: bool
    remote_code: bool
    size: float | None
    active: float | None
    vision: float
    note: str | None
    aliases: Mapping[str, str | None] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def notes(self, spelling: str) -> list[str]:
        """What a user who wrote ``spelling`` should know."""
        own = [note for alias, note in self.aliases.items() if note and _key(alias) == _key(spelling)]
        return [*own, self.note] if self.note else own

    def facts(self) -> ModelFacts:
        """Sizes for a plan, computed from the table. Raises ModelError when it does not have them."""
        if not self.config:
            raise ModelError(
                f"the sizes of {self.name} are not known here",
                where="--model",
                fix=f"swift download {self.name}, then plan with the folder",
            )
        return ModelFacts.from_config(dict(self.config), "registry.yaml", beside=round(self.vision * 10**9))


@dataclass(frozen=True)
class ModelSource:
    """What a ``--model`` value means.

    Attributes:
        kind: ``folder`` (on this disk), ``name`` (a short name) or ``hub`` (an id with a slash).
        hf_id, ms_id: ids on the hubs, None for a folder and where the model is not known to be there.
        entry: the registry's entry, also for an id that the registry knows.
        path: the folder, for kind ``folder``.
        use_hf: which hub is meant.
    """

    kind: Literal["folder", "name", "hub"]
    hf_id: str | None
    ms_id: str | None
    entry: ModelEntry | None = None
    path: Path | None = None
    use_hf: bool = True

    @property
    def hub_id(self) -> str | None:
        """The id on the hub that is meant."""
        return self.hf_id if self.use_hf else self.ms_id


@functools.cache
def model_entries() -> dict[str, ModelEntry]:
    """Short name -> entry, in the order of the table; aliases left out."""
    text = Path(__file__).with_name("registry.yaml").read_text(encoding="utf-8")
    table = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    aliases: dict[str, dict[str, str | None]] = {}
    for alias, target in table["aliases"].items():
        name, note = (target, None) if isinstance(target, str) else (target["to"], target["note"])
        aliases.setdefault(name, {})[alias] = note
    rows: dict[str, dict[str, Any]] = {}
    entries: dict[str, ModelEntry] = {}
    for family, group in table["families"].items():
        shared = {key: value for key, value in group.items() if key != "models"}
        for hf_id, own in group["models"].items():
            own = own or {}
            name = hf_id.rpartition("/")[2].lower()
            if name in entries:
                raise ValueError(f"registry.yaml: {name!r} stands there twice")
            inherited = _shape_of(rows[own["like"]]) if "like" in own else {}
            rows[name] = {**shared, **inherited, **own}
            entries[name] = _entry(name, family, hf_id, rows[name], aliases.pop(name, {}))
    if aliases:
        raise ValueError(f"registry.yaml: aliases of unknown models {sorted(aliases)}")
    return entries


def _shape_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a model built like another one shares with it: sizes, not licence or ids."""
    return {key: row[key] for key in row if key not in _PLAIN or key in ("size", "active", "vision", "arch")}


def _entry(
    name: str, family: str, hf_id: str, row: Mapping[str, Any], aliases: Mapping[str, str | None]
) -> ModelEntry:
    ms_id = row.get("ms", hf_id)
    if ms_id == "none":
        ms_id = None
    elif "/" not in ms_id:
        ms_id = f"{ms_id}/{hf_id.rpartition('/')[2]}"
    config: dict[str, Any] = {}
    if all(key in row for key in _SHAPE):
        extra = row.get("config", {})
        config = {_CONFIG_KEYS[key]: row[key] for key in _CONFIG_KEYS if key in row} | extra
        config["architectures"] = [row["arch"]]
        config.setdefault("dtype", "bfloat16")
    if unknown := set(row) - _PLAIN - set(_CONFIG_KEYS) - {"config"}:
        raise ValueError(f"registry.yaml: {name}: unknown words {sorted(unknown)}")
    return ModelEntry(
        name=name,
        family=family,
        hf_id=hf_id,
        ms_id=ms_id,
        architecture=row.get("arch"),
        template=row.get("template", "own"),
        licence=row.get("licence"),
        gated=row.get("gated", False),
        remote_code=row.get("remote_code", False),
        size=row.get("size"),
        active=row.get("active"),
        vision=row.get("vision", 0.0),
        note=row.get("note"),
        aliases=aliases,
        config=config,
    )


def _key(name: str) -> str:
    """Capitals, points, hyphens and underscores make no difference: qwen2_5-7b is Qwen2.5-7B."""
    return re.sub(r"[-_.]+", "-", name.lower())


@functools.cache
def _index() -> dict[str, ModelEntry]:
    index: dict[str, ModelEntry] = {}
    for name, entry in model_entries().items():
        for spelling in (name, *entry.aliases):
            if index.setdefault(_key(spelling), entry) is not entry:
                raise ValueError(f"registry.yaml: {spelling!r} means two models")
    for entry in model_entries().values():
        for hub_id in (entry.hf_id, entry.ms_id):
            if hub_id:
                index.setdefault(_key(hub_id), entry)
    return index


def own_models() -> dict[str, Path]:
    """Name -> folder, as the user wrote them into ``$SWIFT_HOME/models.yaml``; folders are relative to it.

    Raises ModelError when the file is not such a table.
    """
    file = swift_home() / "models.yaml"
    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError) as error:
        raise ModelError("cannot be read", where=str(file), why=" ".join(str(error).split())) from error
    if not isinstance(table, dict) or not all(isinstance(folder, str) for folder in table.values()):
        raise ModelError("not a table of models", where=str(file), fix="my-model: /folder/of/the/model")
    return {str(name): file.parent / Path(folder).expanduser() for name, folder in table.items()}


def own_folder(name: str) -> Path | None:
    """The folder to which the user gave this name. A folder that is called so itself is meant before it."""
    if Path(name).expanduser().exists():
        return None
    return next((folder for own, folder in own_models().items() if _key(own) == _key(name)), None)


def short_names() -> list[str]:
    """All short names, aliases included."""
    return [spelling for name, entry in model_entries().items() for spelling in (name, *entry.aliases)]


def find_entry(name: str) -> ModelEntry | None:
    """The entry of a short name or of an id on either hub; None when the table does not have it."""
    return _index().get(_key(name))


def nearest_name(name: str) -> str | None:
    """The short name most like ``name``, for an error's ``did you mean``."""
    return closest(name, short_names())


def resolve(name: str, use_hf: bool = True) -> ModelSource:
    """What a ``--model`` value means; asks no network.

    Raises:
        ModelError: it is no folder, no short name and no id, or the model is not on the hub that is meant.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelSource("folder", None, None, path=path, use_hf=use_hf)
    entry = find_entry(name)
    if entry is None and looks_like_hub_name(name):
        return ModelSource("hub", name, name, use_hf=use_hf)
    if entry is None:
        near = nearest_name(name)
        raise ModelError(
            f"no model folder and no short name {name!r}",
            where="--model",
            fix=f"did you mean {near}?" if near else "swift models ls lists the short names",
        )
    source = ModelSource("hub" if "/" in name else "name", entry.hf_id, entry.ms_id, entry, use_hf=use_hf)
    if source.hub_id is None:
        raise ModelError(
            f"{entry.name} is not known to be on ModelScope", where="--model", fix="--use_hf true"
        )
    return source
