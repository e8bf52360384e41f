"""``swift rlhf``: learn from preferences, or train a reward model."""

from __future__ import annotations

from swift.cli.training import run_command


def run(argv: list[str]) -> int:
    return run_command("rlhf", argv)
