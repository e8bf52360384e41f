"""From what a user wrote to a repository, or to the reason why it is none."""

from __future__ import annotations

import re
from pathlib import Path

from swift.core.errors import UsageError
from swift.hubs.types import Kind, Repo

__all__ = ["find_repo", "is_local_name", "is_repo_name"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".yaml", ".yml")


def is_local_name(name: str) -> bool:
    """True for what exists here, and for what only a path is written like: ``./x``, ``~/x``, ``/x``, ``a/b/c``,
    ``x.jsonl``, ``runs/x`` where there is a folder ``runs``."""
    if Path(name).expanduser().exists():
        return True
    if name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1 or name.endswith("/"):
        return True
    return name.lower().endswith(_FILE_ENDINGS) or ("/" in name and Path(name).parts[0] in _folders_here())


def _folders_here() -> set[str]:
    return {entry.name for entry in Path().iterdir() if entry.is_dir()}


def is_repo_name(name: str) -> bool:
    """True for ``owner/name``, where that is not a path of this machine."""
    return _NAME.fullmatch(name) is not None and not is_local_name(name)


def find_repo(name: str, kind: Kind, revision: str | None = None, where: str = "--model") -> Repo:
    """The repository of this name; addresses of a hub's page are read as well. Raises UsageError for paths."""
    page = re.fullmatch(r"(?:hf://|https?://[^/]+/)(?:(datasets|models)/)?([^/]+/[^/?#]+)/?", name)
    if page:
        kind, name = ("dataset" if page[1] == "datasets" else kind), page[2]
    elif Path(name).expanduser().exists():
        raise UsageError(f"{name} is on this machine already", where=where, fix="give owner/name, not a path")
    if _NAME.fullmatch(name) is None:
        what = "no such folder" if is_local_name(name) else "not a name on a hub"
        raise UsageError(
            f"{what}: {name!r}", where=where, fix="names on hubs are owner/name: Qwen/Qwen3-0.6B"
        )
    return Repo(kind, name, revision)
