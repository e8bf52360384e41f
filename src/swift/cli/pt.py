"""``swift pt``: pre-train on plain text."""

from __future__ import annotations

from swift.cli.training import run_command


def run(argv: list[str]) -> int:
    return run_command("pt", argv)
