"""``swift submit FILE.yaml`` or ``swift submit -- COMMAND ...``: queue and return at once."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from swift.cli.arguments import ArgumentParser
from swift.cli.table import COMMANDS, LATER_COMMANDS
from swift.core.errors import UsageError

USAGE = "swift submit [options] FILE.yaml | -- COMMAND [...]"


def run(argv: list[str]) -> int:
    """Prints the ids of the jobs."""
    own, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = ArgumentParser(
        prog="swift submit",
        usage=USAGE,
        description="Queue a file of experiments, or one command (after --), and return.",
    )
    parser.add_argument(
        "file", nargs="?", help="a file with experiments or a sweep, or one command's options"
    )
    parser.add_argument("--name", help="name of the job (for a command)")
    parser.add_argument("--wait", action="store_true", help="queue jobs that this machine cannot run now")
    parser.add_argument("--cold", action="store_true", help="a fresh process for each job, no warm workers")
    parser.add_argument("--new", action="store_true", help="only experiments that have no run yet")
    parser.add_argument("--priority", help="larger goes first (for a command)")
    parser.add_argument("--devices", help="devices of the job (for a command)")
    parser.add_argument("--memory", help="memory on each device, such as 8GiB (for a command)")
    parser.add_argument("--threads", help="CPU threads (for a command)")
    parser.add_argument("--time_limit", help="such as 2h30m: then it is stopped (for a command)")
    parser.add_argument("--json", action="store_true", help="print the group and its jobs as JSON")
    if own[:1] and not words and (own[0].replace("_", "-") in COMMANDS or own[0] in LATER_COMMANDS):
        raise UsageError("a command stands after --", where=own[0], fix=f"swift submit -- {shlex.join(own)}")
    options = parser.parse(own)
    from swift.experiments.client import Client
    from swift.experiments.home import Home
    from swift.experiments.inventory import take_inventory
    from swift.experiments.submission import check_machine, from_file, from_words

    wanted = _resources(options)
    if bool(words) == bool(options.file):
        raise UsageError("what shall be queued?", fix=USAGE)
    if words:
        if options.new:
            raise UsageError("is for a file of experiments", where="--new", fix="leave it out")
        submission = from_words(
            words, Path.cwd(), name=options.name, resources=wanted or None, wait=options.wait
        )
    else:
        if options.name or set(wanted) - {"cold"}:
            raise UsageError(
                "name and resources of experiments stand in their file", fix="name: and resources: there"
            )
        submission = from_file(
            options.file, Path.cwd(), wait=options.wait, cold=options.cold, new_only=options.new
        )
    for problem in check_machine(submission, take_inventory()):
        print(f"warning: {problem}", file=sys.stderr)
    answer = Client(Home.find()).submit(submission)
    if options.json:
        print(json.dumps(answer, ensure_ascii=False, indent=2))
    else:
        for job in answer["jobs"]:
            print(f"{job['id']}  {job['name']}")
        print(f"queued as {answer['group']}; watch: swift top, swift ps", file=sys.stderr)
    return 0


def _resources(options: Any) -> dict[str, Any]:
    names = ("priority", "devices", "memory", "threads", "time_limit")
    found = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return {**found, **({"cold": True} if options.cold else {})}
