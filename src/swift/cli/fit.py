"""``swift fit``: train for what ``train_type`` says. And ``megatron sft`` in the words of ours."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["command_meant", "run"]


def run(argv: list[str]) -> int:
    from swift.cli.table import find_command, load_command

    command, words = command_meant("fit", argv)
    return load_command(find_command(command))(words)


def command_meant(command: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command that ``fit`` or ``megatron COMMAND`` stands for, and its words; other commands as they are."""
    words = list(argv)
    if command == "fit":
        from swift.config.bind import command_of_train_type

        meant = command_of_train_type(words)
        if meant is None:
            print("swift fit: no train_type says for what: this is swift sft", file=sys.stderr)
        return meant or "sft", words
    if command == "megatron":
        return megatron_words(words)
    return command, words


def megatron_words(argv: Sequence[str]) -> tuple[str, list[str]]:
    """``megatron sft ...`` is ``swift sft ... --use_megatron true``, with Megatron-SWIFT's default of full training.

    Raises UsageError when no command follows.
    """
    from swift.core.errors import UsageError

    if not argv or argv[0].startswith("-"):
        raise UsageError("which command?", where="megatron", fix="megatron sft --model PATH --dataset FILE")
    command, words = argv[0], [*argv[1:], "--use_megatron=true"]
    spelled = {
        word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")
    }
    if command in ("pt", "sft", "rlhf") and not spelled & {"tuner_type", "train_type", "sft_type"}:
        words.append("--tuner_type=full")
    return command, words
