"""``python -m swift.toolchains.guard``: runs one command and never lets it outlive its owner.

The owner writes one line of JSON to our standard input (``command``, ``environment``, ``cwd``, ``grace_seconds``; not
as arguments, which everybody can read) and keeps it open. When it closes (the owner asks, ends, or is killed), or on
SIGTERM, the command gets SIGTERM and, after the grace, it and everything it started get SIGKILL. When the command ends
by itself, what it left behind is ended too. Killed itself, it takes the command along (Linux). Exit code: the
command's, or 128 + the signal that ended it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from functools import partial

from swift.core.process import (
    ProcessIdentity,
    become_subreaper,
    descendants,
    die_with_parent,
    identify,
    kill_until_gone,
)

__all__ = ["main"]

OWNER_CHECK_SECONDS = 1.0
"""How often it is asked whether the owner lives: a process the owner forked may keep our standard input open."""


def main() -> int:
    """Do what the line on standard input says."""
    owner = os.getppid()
    order = json.loads(_read_line())
    wake, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    asked: list[int] = []
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _: asked.append(got))
    become_subreaper()
    try:
        child = subprocess.Popen(
            order["command"],
            env=order["environment"],
            cwd=order["cwd"],
            stdin=subprocess.DEVNULL,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    except OSError as error:
        print(f"{order['command'][0]}: {error}", file=sys.stderr)
        return 127
    while child.poll() is None and not asked and os.getppid() == owner:
        ready, _, _ = select.select([0, wake], [], [], OWNER_CHECK_SECONDS)
        if 0 in ready and not os.read(0, 1024):
            break
        if wake in ready:
            os.read(wake, 1024)
    code = _stop(child, order["grace_seconds"]) if child.returncode is None else child.returncode
    kill_until_gone(_remaining)
    return code if code >= 0 else 128 - code


def _read_line() -> bytes:
    """The first line, byte for byte: a buffer would hide from ``select`` what follows."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)
        if not part:
            sys.exit(0)  # the owner died before it said what to do
        line += part
    return line


def _stop(child: subprocess.Popen[bytes], grace_seconds: float) -> int:
    child.terminate()
    try:
        return child.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _remaining() -> list[ProcessIdentity]:
    return [found for pid in descendants(os.getpid()) if (found := identify(pid)) is not None]


if __name__ == "__main__":
    sys.exit(main())
