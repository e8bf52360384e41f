"""The process of a fused group: members connect (`swift.experiments.fused_member`), and their runs advance together.

A connection carries lines of JSON. The first names the run, in the words that would have run it alone; later ones ask
for a stop. What goes back is text for the member's log, and in the end the exit code of its run. A connection that
breaks stops its run, with a checkpoint.

Where the runs take several processes, the first one has the connections and tells the others who joins; stops are
agreed upon by the runs themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from swift.config.schema import Resolved
from swift.core.errors import SwiftError
from swift.core.files import atomic_write_json, read_json
from swift.experiments.fusing import FUSED_SOCKET, GROUP_FILE
from swift.experiments.warm import short_address
from swift.parallel.world import said_by_main
from swift.runs.cards import print_end_card
from swift.train.callbacks.progress import ProgressLine
from swift.train.fused import FusedGroup, Member
from swift.train.signals import StopSignals

__all__ = ["Host", "num_processes"]

WAIT_SECONDS = 120.0
"""For the members that are expected; then the others begin."""
FIRST_FILE = "first.json"
"""Who joins first: before that the processes of a group know nothing of one another."""
IDLE_SECONDS = 2.0
"""Without a member, before the host ends."""

Read = Callable[[Sequence[str]], tuple[Resolved, dict[str, Any]]]
"""The words of a run -> its configuration, and options of `swift.train.run.run_steps`."""


def num_processes(folder: Path) -> int:
    """Of the group in a folder."""
    return int(read_json(folder / GROUP_FILE).get("processes") or 1)


class _Link:
    """The connection of one member; also the file that its progress lines go to."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.member: Member | None = None
        self.stop: int | None = None
        self._lock = threading.Lock()
        self._rest = ""

    def send(self, **message: Any) -> None:
        """Nobody may be there any more: the run stops when the reader finds out."""
        with self._lock, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self.send(text=line)

    def flush(self) -> None:
        """A line is sent when it is complete."""

    def isatty(self) -> bool:
        return False

    def follow(self, lines: Any) -> None:
        """In a thread of its own: pass stops on, and take the end of the connection for one."""
        with contextlib.suppress(OSError, ValueError):
            for line in lines:
                self.ask(int(json.loads(line)["stop"]))
        self.ask(signal.SIGTERM)

    def ask(self, number: int) -> None:
        self.stop = number
        if self.member is not None:
            self.member.signals.receive(number)


_Request = tuple[_Link | None, dict[str, Any]]
"""A connection (None on other processes than the first), and its first line."""


class Host:
    """Serves the group in ``folder`` until nobody is left.

    Args:
        read: makes a configuration of a member's words.
    """

    def __init__(self, folder: Path, read: Read) -> None:
        self.read, self.folder = read, folder
        self.is_one = num_processes(folder) == 1
        self.is_main = self.is_one or int(os.environ.get("RANK", "0")) == 0
        self.expected = set(read_json(folder / GROUP_FILE).get("members", []))
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if self.is_main:
            (folder / FUSED_SOCKET).unlink(missing_ok=True)
            with short_address(folder / FUSED_SOCKET) as address:
                self.listener.bind(address)
            self.listener.listen(64)
        self.signals = StopSignals()
        self.group = FusedGroup(signals=self.signals, on_done=self._tell)
        self._links: dict[int, _Link] = {}

    def run(self) -> int:
        """0 when no run failed, else 1."""
        failed = False
        with contextlib.closing(self.listener), self.signals, contextlib.closing(self.group):
            self._let_in(self._first())
            idle_since = time.monotonic()
            # Several processes know of one another through their members alone, so they end with the last of these.
            while self.group.members or (self.is_one and self.signals.received is None):
                self._let_in(self._told(self._accept(0.0 if self.group.members else 0.2)))
                if self.group.members:
                    self.group.step()
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > IDLE_SECONDS:
                    break
            failed = any(link.member and link.member.error for link in self._links.values())
        return 1 if failed else 0

    def _first(self) -> list[_Request]:
        """Those who were placed together, so that they begin together."""
        file = self.folder / FIRST_FILE
        deadline = time.monotonic() + WAIT_SECONDS
        found: list[_Request] = []
        if self.is_main:
            while self.expected and time.monotonic() < deadline and self.signals.received is None:
                found += self._accept(0.2)
            if not self.is_one:
                atomic_write_json(file, {"requests": [request for _, request in found]})
            return found
        while not file.is_file():
            if time.monotonic() > deadline + WAIT_SECONDS:
                raise SwiftError(
                    "the first process of the group does not say who takes part", where=str(file)
                )
            time.sleep(0.05)
        return [(None, request) for request in read_json(file)["requests"]]

    def _told(self, found: list[_Request]) -> list[_Request]:
        """What the first process has accepted, on all of them; they are in touch, for they have members."""
        if self.is_one:
            return found
        requests = said_by_main([request for _, request in found])
        return found if self.is_main else [(None, request) for request in requests]

    def _accept(self, seconds: float) -> list[_Request]:
        """Everybody who knocks within so many seconds."""
        found: list[_Request] = []
        while self.is_main and select.select([self.listener], [], [], seconds)[0]:
            connection, _ = self.listener.accept()
            link = _Link(connection)
            lines = connection.makefile("rb")
            connection.settimeout(10.0)
            try:
                request = json.loads(lines.readline())
            except (OSError, ValueError):
                connection.close()
                continue
            connection.settimeout(None)
            threading.Thread(target=link.follow, args=(lines,), name="swift-member", daemon=True).start()
            self.expected.discard(request.get("job"))
            found.append((link, request))
            seconds = 0.0
        return found

    def _let_in(self, found: Sequence[_Request]) -> None:
        for link, request in found:
            if link is not None:
                self._join(link, request)
            else:
                with contextlib.suppress(SwiftError):  # the first process tells
                    resolved, options = self.read(request["words"])
                    self.group.join(resolved, request.get("name", ""), **options)

    def _join(self, link: _Link, request: dict[str, Any]) -> None:
        try:
            resolved, options = self.read(request["words"])
        except SwiftError as error:
            link.write(f"error: {error.render()}\n")
            link.send(exit=error.exit_code)
            return
        options |= {
            "say": partial(_say, link),
            "callbacks": [ProgressLine(cast(Any, link))],
            "arguments": ["swift", *request["words"]],
        }
        for warning in resolved.warnings:
            link.write(f"warning: {warning}\n")
        member = self.group.join(resolved, request.get("name", ""), **options)
        link.member = member
        self._links[id(member)] = link
        if link.stop is not None:
            member.signals.receive(link.stop)
        if member.is_done:
            self._tell(member)

    def _tell(self, member: Member) -> None:
        """The last words to a member."""
        link = self._links.get(id(member))
        if link is None:  # it ended while it joined: `_join` tells
            return
        if member.error is None:
            assert member.result is not None
            print_end_card(member.result.folder, member.result.summary, cast(Any, link))
        elif isinstance(member.error, SwiftError):
            link.write(f"error: {member.error.render()}\n")
        else:
            link.write(f"error: {type(member.error).__name__}: {' '.join(str(member.error).split())}\n")
            link.write("  fix: run again with --debug for the traceback\n")
        link.send(exit=member.exit_code)
        with contextlib.suppress(OSError):
            link.connection.shutdown(socket.SHUT_WR)


def _say(link: _Link, text: str) -> None:
    link.write(f"{text}\n")
