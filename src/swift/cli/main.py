"""The ``swift`` command: finds the command, runs it, and turns failures into lines and exit codes.

Exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from swift.cli.table import COMMANDS, LATER_COMMANDS, Command, find_command, load_command
from swift.core.errors import SwiftError, Terminated, UsageError
from swift.core.registry import suggest

__all__ = ["main", "megatron"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: ``sys.argv``) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SwiftError as error:
        if debug:
            raise
        print(f"error: {error.render()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        # The reader (head, less) went away. Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # the last line of defence: anything we did not foresee
        if debug:
            raise
        text = " ".join(str(error).split())
        print(f"error: {type(error).__name__}: {text}", file=sys.stderr)
        print("  fix: run again with --debug for the traceback", file=sys.stderr)
        return 1


def megatron() -> int:
    """The ``megatron`` command of ms-swift: ``megatron sft ...`` is ``swift megatron sft ...``."""
    return main(["megatron", *sys.argv[1:]])


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        return _help(words[1:])
    if words[0] == "--version":
        print(f"swift {_version()}")
        return 0
    first = words[0]
    if first == "megatron":
        from swift.cli.fit import megatron_words

        first, rest = megatron_words(words[1:])
        words = [first, *rest]
    if first.replace("_", "-") in LATER_COMMANDS and {"--dry_run", "--dry-run"} & set(words):
        words = ["plan", *words]
        first = "plan"
    if first.lower().endswith((".yaml", ".yml", ".json")):
        command, rest = _command_of_file(first), words
    elif first.startswith("-"):
        fix = suggest(first, ("--help", "--version"), "swift COMMAND --option: the command comes first")
        raise UsageError("unknown option", where=first, fix=fix)
    else:
        command, rest = find_command(first), words[1:]
    if not command.own_arguments or command.name == "plan":
        asked = _help_topic(rest)
        if asked is not None:
            if command.name == "plan" and rest[0] in COMMANDS:
                command = COMMANDS[rest[0]]
            return _print_help(command, asked)
    with _closing_on_sigterm(command.name):
        return load_command(command)(rest)


_CLOSED_ON_SIGTERM = (
    "data", "demo", "download", "eval", "export", "infer", "merge-lora", "models", "plan", "run", "toolchain",
)  # fmt: skip
"""Trainings, servers and services see to it themselves: they save, or end what they answer."""


@contextlib.contextmanager
def _closing_on_sigterm(name: str) -> Iterator[None]:
    """Within the block SIGTERM raises Terminated, so that folders on the way are removed and children ended."""
    if name not in _CLOSED_ON_SIGTERM or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise Terminated(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _help(words: list[str]) -> int:
    from swift.config.help import general_help

    if words:
        return _print_help(find_command(words[0]), words[1] if len(words) > 1 else "")
    print(general_help())
    return 0


def _help_topic(words: list[str]) -> str | None:
    """None when no help is asked for, else the topic ("" for the essential options)."""
    for position, word in enumerate(words):
        if word in ("--help", "-h"):
            return words[position + 1] if position + 1 < len(words) else ""
        if word.startswith("--help="):
            return word.partition("=")[2]
    return None


def _print_help(command: Command, topic: str) -> int:
    from swift.config.help import command_help

    print(command_help(command, topic or None))
    return 0


def _command_of_file(name: str) -> Command:
    from pathlib import Path

    from swift.config.bind import command_of

    return COMMANDS[command_of(Path(name), name)]


def _version() -> str:
    from importlib.metadata import version

    return version("swift-forge")


if __name__ == "__main__":
    sys.exit(main())
