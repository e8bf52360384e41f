"""``swift deploy``: serve a model and adapters on it, as OpenAI's API does."""

from __future__ import annotations

import gc
import logging
import sys

from swift.config.bind import resolve


def run(argv: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; exit 0 then. One line on standard output says when it answers."""
    gc.disable()  # `deploy` switches it on when the model is there: millions of objects are made that stay
    resolved = resolve("deploy", argv)
    for warning in resolved.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    from swift.inference.server.deploy import deploy

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("swift")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def say(line: str) -> None:
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)

    deploy(resolved, say)
    return 0
