"""From a ``--model`` value to a folder on this machine, over the hubs' caches and, if need be, the network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swift.config.schema import Resolved
from swift.config.sections.model import ModelSection
from swift.core.errors import ConfigError, ModelError, NotOnHub, SwiftError
from swift.core.registry import closest
from swift.hubs.clients import find_hub, wants_hf
from swift.hubs.fetch import fetch, find_cached
from swift.hubs.names import find_repo, is_local_name
from swift.models.facts import check_model_folder, resolve_model_path
from swift.models.registry import find_entry, model_entries, own_folder, resolve

__all__ = [
    "LocatedModel",
    "derive_chat_template",
    "find_model",
    "locate_model",
    "not_here",
    "pin_model",
]


@dataclass(frozen=True)
class LocatedModel:
    """A folder, and the hub's commit it holds; None for a folder that the user named."""

    folder: Path
    commit: str | None = None


def locate_model(section: ModelSection) -> LocatedModel:
    """The folder that ``--model`` means; a name on a hub is looked for in the cache first, then downloaded.

    A local path never touches the network.

    Raises:
        ModelError: no such folder, or no such short name.
        HubError: it is not here and cannot be fetched.
    """
    found = find_model(section)
    if found is not None:
        return found
    hub, repo = find_hub(section.use_hf, section.hub_token), find_repo(*_asked(section))
    try:
        fetched = fetch(hub, repo)
    except NotOnHub as error:
        known = (
            entry.hf_id if wants_hf(section.use_hf) else entry.ms_id for entry in model_entries().values()
        )
        near = closest(repo.name, filter(None, known))
        if near is not None and near != repo.name:
            error.fix = f"did you mean {near}? Else: {error.fix}"
        raise
    return LocatedModel(fetched.folder, fetched.commit)


def find_model(section: ModelSection) -> LocatedModel | None:
    """The same without the network; None for a model of a hub that is not on this machine."""
    name = section.model or ""
    own = own_folder(name)
    if own is not None or is_local_name(name) or _names_near_folder(name):
        folder = resolve_model_path(str(own or name))
        if section.model_revision not in (None, folder.resolve().name):
            raise ConfigError(
                f"{name} is a folder: it has no revision {section.model_revision!r}",
                where="--model_revision",
                fix="leave it out, or give the model's name on a hub",
            )
        return LocatedModel(folder)
    repo = find_repo(*_asked(section))
    found = find_cached(find_hub(section.use_hf, section.hub_token), repo, usable=_is_whole)
    return None if found is None else LocatedModel(found.folder, found.commit)


def pin_model(section: ModelSection) -> Path:
    """`locate_model`, and write the folder and its commit into the section: what a run's record then says."""
    found = locate_model(section)
    section.model = str(found.folder)
    if found.commit is not None:
        section.model_revision = found.folder.name if found.commit == found.folder.name else None
    return found.folder


def derive_chat_template(resolved: Resolved, name: str, folder: Path) -> None:
    """Take the built-in chat template of a model that is known by name and brings none of its own."""
    entry = find_entry(name)
    if entry is None or entry.template == "own" or _has_chat_template(folder):
        return
    resolved.derive("chat_template", entry.template, f"{entry.name}, whose tokenizer brings no template")


def _has_chat_template(folder: Path) -> bool:
    if any((folder / file).exists() for file in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = folder / "tokenizer_config.json"
    try:
        return bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError):  # whoever reads the tokenizer says what is wrong with it
        return False


def not_here(section: ModelSection) -> ModelError:
    """What a plan says of a model that is on a hub only."""
    repo = find_repo(*_asked(section))
    flags = " --use_hf true" if wants_hf(section.use_hf) else ""
    flags += f" --revision {repo.revision}" if repo.revision else ""
    return ModelError(
        f"{repo} is not on this machine; a run downloads it",
        where="--model",
        fix=f"swift download {repo.name}{flags}",
    )


def _names_near_folder(name: str) -> bool:
    """Whether a model folder here is called nearly like ``name``: then that is what was meant."""
    folders = [entry.name for entry in Path().iterdir() if (entry / "config.json").is_file()]
    return "/" not in name and find_entry(name) is None and closest(name, folders) is not None


def _asked(section: ModelSection) -> tuple[str, Literal["model"], str | None]:
    name = section.model or ""
    source = resolve(name, wants_hf(section.use_hf))
    return source.hub_id or name, "model", section.model_revision


def _is_whole(folder: Path) -> bool:
    try:
        check_model_folder(folder)
    except SwiftError:
        return False
    return True
