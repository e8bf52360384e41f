"""``swift retry ID ...``."""

from __future__ import annotations

from swift.cli.jobs import control

DESCRIPTION = "Queue failed or cancelled jobs again, from their last checkpoint."


def run(argv: list[str]) -> int:
    """Accepts ids, names and names of groups."""
    return control("retry", argv, DESCRIPTION)
