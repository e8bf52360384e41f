"""``swift logs ID [-f]``: what a job printed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from swift.cli.arguments import ArgumentParser
from swift.core.errors import UsageError

POLL_SECONDS = 0.3


def run(argv: list[str]) -> int:
    """All attempts, one after another, each under a header line."""
    parser = ArgumentParser(prog="swift logs", description="What a job printed, all attempts.")
    parser.add_argument("job", metavar="ID|NAME")
    parser.add_argument("-f", "--follow", action="store_true", help="until the job ends, or Ctrl-C")
    parser.add_argument("-n", "--tail", type=int, metavar="LINES", help="only the last so many lines")
    options = parser.parse(argv)
    from swift.experiments.home import Home
    from swift.experiments.progress import OUTPUT_LOG, tail_start
    from swift.experiments.store import Store
    from swift.experiments.types import FINISHED

    home = Home.find()
    if not home.store.exists():
        raise UsageError(f"there is no job {options.job!r}", fix="swift ps")
    store = Store(home.store)
    try:
        job = store.job(options.job)
    except UsageError as error:
        if (group := store.group(options.job)) is None:
            raise
        fix = f"swift logs {' or '.join(group.jobs)}"
        raise UsageError(f"{options.job} is a submission of several jobs", fix=fix) from error
    path = home.job_dir(job.id) / OUTPUT_LOG
    if not path.exists() and not options.follow:
        print(f"{job.id} has printed nothing yet: it is {job.state} ({job.reason})", file=sys.stderr)
        return 0
    position = 0 if options.tail is None else tail_start(path, max(0, options.tail))
    try:
        while True:
            over = not options.follow or store.job(job.id).state in (*FINISHED, "paused")
            position = _copy(path, position)
            if over:
                return 0
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        return 0  # the way to leave


def _copy(path: Path, position: int) -> int:
    """Print a growing file from ``position`` on; returns where it ended."""
    if path.exists():
        with path.open("rb") as file:
            file.seek(position)
            while block := file.read(65_536):
                position += len(block)
                sys.stdout.buffer.write(block)
        sys.stdout.flush()
    return position
