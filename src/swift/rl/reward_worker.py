"""The process that computes rewards: one message in, one out, until its parent ends it.

Messages are pickles over a socket pair; what functions print goes to standard error. A function may hang, crash or
use up memory here: `swift.rl.reward_pool` ends the process and starts another one.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from swift.core.errors import SwiftError
from swift.core.process import die_with_parent
from swift.rl.reward_functions import RewardFunction, WrongShape, find_reward

__all__ = ["main"]


def main() -> None:
    """Serve on the file descriptor named on the command line, as long as the process named there lives."""
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides what these mean for the run
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)
    functions: list[RewardFunction] = []
    while True:
        try:
            kind, content = connection.recv()
        except EOFError:
            return
        connection.send(_answer(kind, content, functions))


def _answer(kind: str, content: Any, functions: list[RewardFunction]) -> tuple[str, Any]:
    try:
        if kind == "load":
            functions[:] = [find_reward(text, options) for text, options in content]
            return "ok", None
        number, batch = content
        return "ok", functions[number](batch)
    except SwiftError as error:
        return "error", (type(error).__name__, error.message, error.where, error.why, error.fix)
    except WrongShape as error:
        return "shape", str(error)
    except (
        BaseException
    ) as error:  # whatever a user's function raises, SystemExit included, belongs to its caller
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "raised", f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"


if __name__ == "__main__":
    importlib.import_module(
        "swift.rl.reward_worker"
    ).main()  # under its own name, so that pickles find its classes
