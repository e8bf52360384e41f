"""The folder of what belongs to this user and to no run: ``SWIFT_HOME``."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["swift_home"]


def swift_home() -> Path:
    """``$SWIFT_HOME``, else ``~/.swift``; absolute, not made here."""
    return Path(os.environ.get("SWIFT_HOME") or "~/.swift").expanduser().absolute()
