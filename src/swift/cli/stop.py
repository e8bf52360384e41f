"""``swift stop ID ...``."""

from __future__ import annotations

from swift.cli.jobs import control

DESCRIPTION = "Cancel jobs. A running one saves a checkpoint first; swift retry goes on from it."


def run(argv: list[str]) -> int:
    """Accepts ids, names and names of groups."""
    return control("stop", argv, DESCRIPTION, grace=True)
