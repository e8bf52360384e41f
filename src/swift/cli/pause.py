"""``swift pause ID ...``."""

from __future__ import annotations

from swift.cli.jobs import control

DESCRIPTION = "Save a checkpoint, free the devices and wait for swift resume."


def run(argv: list[str]) -> int:
    """Accepts ids, names and names of groups."""
    return control("pause", argv, DESCRIPTION, grace=True)
