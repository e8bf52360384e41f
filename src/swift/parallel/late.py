"""Which rank keeps the others waiting: its stage, its step and its stack."""

from __future__ import annotations

import faulthandler
import json
import platform
import signal
import time
from pathlib import Path

from swift.core.process import ProcessIdentity, send_signal
from swift.runs.status import STATUS_NAME

__all__ = ["describe_ranks", "leave_stacks_in"]

_SECONDS = 10.0
_LINES = 8


def _stack_file(run: Path, rank: int) -> Path:
    return run / "logs" / f"rank-{rank}.stack.txt"


def leave_stacks_in(run: Path, rank: int) -> None:
    """From now on SIGUSR1 makes this process write the stacks of its threads into the run's logs."""
    file = _stack_file(run, rank)
    file.parent.mkdir(exist_ok=True)
    opened = file.open("w")
    faulthandler.register(signal.SIGUSR1, file=opened, all_threads=True)
    _open_files[rank] = opened


_open_files: dict[
    int, object
] = {}  # a file that is collected is closed, and its number may be another file's


def describe_ranks(run: Path, rank: int | None = None) -> str:
    """What every rank of the run in ``run`` is doing: stage and step, and of those that live here the stack.

    ``rank``: the one that asks; its own stack is of no interest.
    """
    lines, asked = [], {}
    for number, folder in [(0, run), *sorted((int(path.name), path) for path in (run / "ranks").glob("*"))]:
        try:
            status = json.loads((folder / STATUS_NAME).read_text(encoding="utf-8"))
            identity = ProcessIdentity(status["pid"], status["start_time"], status["boot_id"])
        except (OSError, ValueError, KeyError):
            continue
        here = status["host"] == platform.node()
        ended = status["state"] in ("failed", "stopped") or (here and not identity.is_alive())
        what = f"rank {number}: {'ended in' if ended else 'in'} stage {status['stage'] or status['state']!r}"
        lines.append((number, f"{what}, step {status['step']}, last word at {status['updated']}"))
        if here and not ended and number != rank and send_signal(identity, signal.SIGUSR1):
            asked[number] = _stack_file(run, number)
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end and not all(map(_is_whole, asked.values())):
        time.sleep(0.02)
    text = []
    for number, line in lines:
        text.append(line)
        if number in asked:
            text += [f"  {entry}" for entry in _main_thread(_text(asked[number]))]
    return "\n".join(text)


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


def _is_whole(file: Path) -> bool:
    """Whether the main thread, the last one, is written down to its outermost call or to where faulthandler stops."""
    lines = _text(file).splitlines()
    return bool(lines) and lines[-1].endswith((" in <module>", " in _run_module_as_main", "  ..."))


def _main_thread(text: str) -> list[str]:
    """The innermost calls of the main thread, which faulthandler writes last."""
    block = text.rstrip().rpartition("\n\n")[2]
    return [line.strip() for line in block.splitlines() if line.strip().startswith("File ")][:_LINES]
