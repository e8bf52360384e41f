"""The experiment service: one process for one ``SWIFT_HOME``, started on demand, reachable on 127.0.0.1 only.

``python -m swift.experiments.service --home HOME`` runs it in the foreground. It holds ``service.lock`` as long as it
lives, so that two services on one store are impossible. SIGTERM ends the service; jobs go on, and the next one
adopts them.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from swift.core.errors import SwiftError
from swift.core.files import atomic_write_json
from swift.core.logging import get_logger
from swift.core.process import ProcessIdentity
from swift.experiments.home import Home
from swift.experiments.supervisor import EXIT_LOCKED

__all__ = ["EXIT_LOCKED", "HomeTaken", "ServiceLock", "main", "read_token", "serve"]

logger = get_logger(__name__)

_GRACE_SECONDS = 2


class HomeTaken(SwiftError):
    """Another engine runs the jobs of this home."""


class ServiceLock:
    """The right to run the jobs of a home; held until ``release`` or the end of the process, however it ends.

    Raises HomeTaken when another engine has it, SwiftError when the home cannot be written.
    """

    def __init__(self, home: Home) -> None:
        path = home.root / "service.lock"
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise home.unusable("the home of the experiment service cannot be written", error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise HomeTaken(
                "another service runs the jobs of this home",
                where=str(home.root),
                fix="use it (swift ps), stop it (swift service stop), or set another SWIFT_HOME",
            ) from None

    def release(self) -> None:
        """Let others in. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_token(home: Home) -> str:
    """The token of this home; made, readable for the user alone, when there is none."""
    try:
        descriptor = os.open(home.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        token = home.token_file.read_text(encoding="utf-8").strip()
        if token:
            home.token_file.chmod(0o600)
            return token
        home.token_file.unlink()  # a kill between creating and writing it
        return read_token(home)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        token = secrets.token_urlsafe(32)
        file.write(token + "\n")
    return token


def serve(home: Home, **settings: Any) -> int:
    """Run the service until SIGTERM or SIGINT. Raises SwiftError when it cannot start.

    ``settings``: of the Engine.
    """
    import uvicorn

    from swift.experiments.api import create_app
    from swift.experiments.engine import Engine
    from swift.experiments.store import Store

    lock = ServiceLock(home)
    started = time.time()
    engine = Engine(home, Store(home.store), **settings)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        create_app(engine, read_token(home), started),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    thread = threading.Thread(target=engine.run, name="swift-engine", daemon=True)
    # uvicorn gives a signal back to whoever handled it before, once it has shut down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        thread.start()
        listener.listen(128)  # who connects from here on waits until we serve
        record: dict[str, Any] = {
            **ProcessIdentity.of().to_dict(),
            "port": port,
            "url": f"http://127.0.0.1:{port}",
            "started": started,
        }
        atomic_write_json(home.service_file, record)
        logger.info("service %d on %s for %s", os.getpid(), record["url"], home.root)
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        logger.info("service %d ends; jobs go on", os.getpid())
    finally:
        engine.stop_running()
        thread.join(timeout=10)
        engine.close()
        home.service_file.unlink(missing_ok=True)
        lock.release()
    return 0


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 stopped as asked, 1 could not start, 75 another service has this home."""
    parser = argparse.ArgumentParser(prog="python -m swift.experiments.service")
    parser.add_argument("--home", type=Path)
    options = parser.parse_args(argv)
    _log_to_stderr()
    try:
        home = Home.find(options.home)
        return serve(home)
    except SwiftError as error:
        print(f"error: {error.render()}", file=sys.stderr)
        return EXIT_LOCKED if isinstance(error, HomeTaken) else error.exit_code


if __name__ == "__main__":
    sys.exit(main())
