"""``swift run FILE.yaml``: submit experiments and follow them to the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from swift.cli.arguments import ArgumentParser

if TYPE_CHECKING:
    from swift.experiments.home import Home
    from swift.experiments.submission import Submission
    from swift.experiments.types import Job

__all__ = ["follow_group", "run"]


def run(argv: list[str]) -> int:
    """Exit 0 when all jobs succeeded, 1 when one failed or was stopped or the sweep could not go on, 130 after Ctrl-C
    (jobs go on)."""
    parser = ArgumentParser(
        prog="swift run",
        description="Submit a file of experiments and follow them. Ctrl-C stops following; jobs go on.",
    )
    parser.add_argument("file", help="a file with experiments or a sweep, or one command's configuration")
    parser.add_argument("--inline", action="store_true", help="run in this process, without a service")
    parser.add_argument("--wait", action="store_true", help="queue jobs that this machine cannot run now")
    parser.add_argument("--cold", action="store_true", help="a fresh process for each job, no warm workers")
    parser.add_argument(
        "--fuse",
        choices=("auto", "always", "never"),
        default="auto",
        help="LoRA trainings on one base model in one process: when it pays (measured once), whenever it can be, never",
    )
    parser.add_argument("--new", action="store_true", help="only experiments that have no run yet")
    options = parser.parse(argv)
    from swift.experiments.home import Home
    from swift.experiments.inventory import take_inventory
    from swift.experiments.submission import check_machine, from_file

    submission = from_file(
        options.file, Path.cwd(), wait=options.wait, cold=options.cold, new_only=options.new
    )
    for problem in check_machine(submission, take_inventory()):
        print(f"warning: {problem}", file=sys.stderr)
    home = Home.find()
    submission = _with_fusing(submission, options.fuse, home)
    if options.inline:
        from swift.experiments.inline import run_inline

        return _end(*run_inline(home, submission), home)
    from swift.experiments.client import Client

    group = Client(home).submit(submission)["group"]
    return follow_group(home, group)


def _with_fusing(submission: Submission, mode: str, home: Home) -> Submission:
    """Decide which trainings run fused, and say so."""
    from dataclasses import replace

    from swift.experiments.fuse_choice import Choice, measure_in_process
    from swift.experiments.fusing import apply_verdicts, told_verdicts

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    specs = apply_verdicts(submission.specs, mode, Choice(home, measure_in_process, say))
    if mode != "never":
        for line in told_verdicts(specs):
            say(line)
    return replace(submission, specs=specs)


def follow_group(home: Home, group: str) -> int:
    """Follow a submitted group; a service that was killed meanwhile is started again."""
    from swift.experiments.client import Client, find_service
    from swift.experiments.follow import follow
    from swift.experiments.store import Store

    def pause(seconds: float) -> None:
        time.sleep(seconds)
        if find_service(home) is None:
            Client(home)

    try:
        return _end(group, follow(home, Store(home.store), group, pause), home)
    except KeyboardInterrupt:
        print(f"\njobs go on; watch them: swift top; stop them: swift stop {group}", file=sys.stderr)
        return 130


def _end(group: str, jobs: list[Job], home: Home) -> int:
    from swift.experiments.follow import print_summary
    from swift.experiments.open_sweeps import sweep_failure

    print_summary(group, jobs, home)
    bad = [job for job in jobs if job.state == "failed" or job.reason.startswith("stopped by the user")]
    return 1 if bad or sweep_failure(home, group) else 0
