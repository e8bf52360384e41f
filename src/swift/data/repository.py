"""Which files of a downloaded data set belong to a subset and a split.

In this order: the patterns of the registry's entry; the ``configs`` in the front matter of README.md, as Hugging Face
reads them; else names: a subset is a folder or the beginning of a file's name, a split is a word of the path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from swift.core.errors import DataError

__all__ = ["choose_files"]

_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")


def choose_files(
    folder: Path,
    files: Sequence[Path],
    *,
    subsets: Sequence[str] = (),
    split: str = "train",
    patterns: Sequence[str] = (),
) -> list[Path]:
    """Those of ``files`` (all in ``folder``) that make up ``split`` of ``subsets`` (none: the default one).

    Raises DataError naming what there is when nothing fits.
    """
    names = {file.relative_to(folder).as_posix(): file for file in files}
    if patterns:
        chosen = _matching(names, patterns)
    elif declared := _declared(folder / "README.md", subsets, split):
        chosen = _matching(names, declared)
    else:
        chosen = _of_split(_of_subsets(list(names), subsets), split)
    if not chosen:
        there = ", ".join(sorted(names)[:6]) + (", ..." if len(names) > 6 else "")
        wanted = f"split {split}" + (f" of {', '.join(subsets)}" if subsets else "")
        raise DataError(
            f"no file for {wanted}", where=str(folder), why=f"there are {there or 'no data files'}"
        )
    return [names[name] for name in chosen]


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, _plain(pattern)) for pattern in patterns)]


def _plain(pattern: str) -> str:
    """``**/`` also stands for no folder at all; fnmatch's ``*`` crosses folders anyway."""
    return pattern.replace("**/", "*").removeprefix("./")


def _declared(readme: Path, subsets: Sequence[str], split: str) -> list[str]:
    """The patterns that README.md's ``configs`` give for the subsets and the split."""
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    found = re.match(r"---\s*\n(.*?)\n---\s*\n", text, flags=re.S)
    try:
        card = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return []  # written for people as well; then names decide
    configs = [
        one for one in (card or {}).get("configs") or [] if isinstance(one, dict) and one.get("data_files")
    ]
    if subsets:
        configs = [one for one in configs if str(one.get("config_name")) in subsets]
    else:
        configs = [
            one for one in configs if one.get("default") or one.get("config_name") == "default"
        ] or configs[:1]
    return [pattern for config in configs for pattern in _patterns(config["data_files"], split)]


def _patterns(data_files: Any, split: str) -> list[str]:
    if isinstance(data_files, str):
        return [data_files]
    found: list[str] = []
    for one in data_files:
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, dict) and one.get("split") == split:
            paths = one.get("path") or []
            found += [paths] if isinstance(paths, str) else list(paths)
    return found


def _of_subsets(names: list[str], subsets: Sequence[str]) -> list[str]:
    if not subsets:
        return names
    chosen = [name for name in names if any(_in_subset(name, subset) for subset in subsets)]
    return names if not chosen and set(subsets) == {"default"} else chosen


def _in_subset(name: str, subset: str) -> bool:
    path = PurePosixPath(name)
    folders = f"/{path.parent.as_posix()}/"
    return (
        f"/{subset}/" in folders or re.match(rf"{re.escape(subset)}($|[^A-Za-z0-9])", path.name) is not None
    )


def _of_split(names: list[str], split: str) -> list[str]:
    exact = [
        name for name in names if re.search(rf"(^|[^A-Za-z0-9]){re.escape(split)}($|[^A-Za-z0-9_])", name)
    ]
    if exact:
        return exact
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in names}
    unnamed = [name for name in names if not words[name] & set(_SPLITS)]
    return unnamed if split == "train" else []
