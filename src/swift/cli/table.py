"""The commands of ``swift``, as the command line sees them. To add one: a line in ``config/commands.py`` and
a file here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from swift.config.commands import COMMANDS, LATER_COMMANDS, Command
from swift.core.errors import UsageError
from swift.core.registry import suggest

__all__ = ["COMMANDS", "LATER_COMMANDS", "Command", "find_command", "load_command"]


def find_command(name: str) -> Command:
    """The command of this name (``merge_lora`` is ``merge-lora``). Raises UsageError with the nearest name."""
    name = name.replace("_", "-")
    command = COMMANDS.get(name)
    if name in LATER_COMMANDS:
        raise UsageError(
            f"swift {name} comes with a later version",
            fix=f"{LATER_COMMANDS[name].instead} (swift plan {name} ... plans it)",
        )
    if command is None:
        raise UsageError(
            f"unknown command {name!r}",
            fix=suggest(name, COMMANDS, "swift --help lists the commands", before="swift "),
        )
    return command


def load_command(command: Command) -> Callable[[list[str]], int]:
    """Import what runs the command: ``run(argv) -> exit code``."""
    module, _, function = command.runs.partition(":")
    run: Callable[[list[str]], int] = getattr(importlib.import_module(f"swift.cli.{module}"), function)
    return run
