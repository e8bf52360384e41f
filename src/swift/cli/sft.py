"""``swift sft``: fine-tune on conversations or instructions."""

from __future__ import annotations

from swift.cli.training import run_command


def run(argv: list[str]) -> int:
    return run_command("sft", argv)
