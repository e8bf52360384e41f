"""The name somebody meant, when the one they wrote is not known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path


def closest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like ``name``, or None when nothing is near. Hyphens and underscores are alike."""
    by_key = {candidate.replace("-", "_").lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.replace("-", "_").lower(), by_key, n=1, cutoff=0.6)
    return by_key[matches[0]] if matches else None


def suggest(
    name: str, candidates: Iterable[str], otherwise: str | None = None, *, before: str = ""
) -> str | None:
    """What to do about an unknown name: the nearest candidate behind ``before``, else ``otherwise``."""
    near = closest(name, candidates)
    return f"did you mean {before}{near}?" if near else otherwise


def looks_like_hub_name(name: str) -> bool:
    """True for ``Qwen/Qwen3-0.6B``: an owner and a name, where no folder is called like the owner."""
    owner, _, rest = name.partition("/")
    is_name = all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in (owner, rest))
    return is_name and not Path(owner).is_dir()
