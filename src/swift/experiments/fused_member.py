"""A member of a fused group, as the child of its supervisor: it hands its run to the group's process and waits.

``python -m swift.experiments.fused_member SOCKET REQUEST`` connects to the host, sends what it would have run, prints
what the host says about it, passes stop signals on, and ends with the exit code of the run. When the host dies, it
ends with `EXIT_HOST_DIED`, and the job is tried again by itself.

One of these lives for each member, so it imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

__all__ = ["EXIT_HOST_DIED", "connect_deadline", "main"]

EXIT_HOST_DIED = 70
WAIT_SECONDS = 180.0
"""For the host, which imports torch first."""


def connect_deadline(path: Path, seconds: float = WAIT_SECONDS) -> socket.socket:
    """A connection to the host. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(_short(path))
            return connection
        except OSError:
            connection.close()
        if (path.parent / "attempt-1" / "exit.json").exists():
            raise TimeoutError("it has ended")
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer in {seconds:.0f} s")
        time.sleep(0.05)


def _short(path: Path) -> str:
    """An address of at most about 100 bytes: relative where the path is longer."""
    if len(os.fsencode(path)) < 100:
        return str(path)
    os.chdir(path.parent)
    return path.name


def main(argv: list[str] | None = None) -> int:
    path, request = (sys.argv[1:] if argv is None else argv)[:2]
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stopped.append(received))
    try:
        connection = connect_deadline(Path(path))
    except TimeoutError as error:
        print(f"the process of the fused group cannot be reached: {error}", file=sys.stderr)
        return EXIT_HOST_DIED
    try:
        return _follow(connection, Path(request).read_bytes().strip(), stopped)
    except ConnectionError:
        print("the process of the fused group died; the run goes on alone", file=sys.stderr)
        return EXIT_HOST_DIED


def _follow(connection: socket.socket, request: bytes, stopped: list[int]) -> int:
    """Print and pass on until the run has ended; its exit code. Raises ConnectionError."""
    connection.sendall(request + b"\n")
    connection.settimeout(0.2)
    buffer, told = b"", 0
    while True:
        for received_signal in stopped[told:]:
            told += 1
            connection.sendall(json.dumps({"stop": received_signal}).encode() + b"\n")
        try:
            received = connection.recv(65536)
        except TimeoutError:
            continue
        if not received:
            raise ConnectionError("the host has ended")
        *lines, buffer = (buffer + received).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "exit" in message:
                return int(message["exit"])
            stream = sys.stderr if message.get("error") else sys.stdout
            print(message["text"], file=stream, flush=True)


if __name__ == "__main__":
    sys.exit(main())
