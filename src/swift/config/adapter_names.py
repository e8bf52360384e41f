"""``--adapters NAME=FOLDER``: adapters that are called something."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["split_name"]

_NAMED = re.compile(r"([\w.:@-]+)=(.+)", re.DOTALL)


def split_name(text: str) -> tuple[str | None, str]:
    """(name or None, folder) of an entry of ``--adapters``; a folder with = in its name is a folder."""
    found = _NAMED.fullmatch(text)
    if found is None or Path(text).expanduser().exists():
        return None, text
    return found[1], found[2]
