"""``swift service start|stop|status|run``: the process that runs the queue."""

from __future__ import annotations

import json
from typing import Any

from swift.cli.arguments import ArgumentParser


def run(argv: list[str]) -> int:
    """The service starts by itself when something is submitted; these are for looking and for ending it."""
    parser = ArgumentParser(
        prog="swift service", description="The process that runs the queue of experiments."
    )
    commands = parser.add_subparsers(dest="action", required=True)
    commands.add_parser("start", help="start it in the background, unless it runs")
    commands.add_parser("stop", help="end it; jobs go on, and the next service adopts them")
    status = commands.add_parser("status", help="whether it runs, and what its jobs do")
    status.add_argument("--json", action="store_true")
    commands.add_parser("run", help="run it in the foreground")
    options = parser.parse(argv)
    from swift.experiments.home import Home

    home = Home.find()
    if options.action == "status":
        return _status(home, as_json=options.json)
    if options.action == "run":
        from swift.experiments.service import main

        return main(["--home", str(home.root)])
    from swift.experiments.client import Client, find_service, stop_service

    if options.action == "stop":
        print("stopped; jobs go on" if stop_service(home) else "no service runs")
        return 0
    before = find_service(home)
    record = Client(home).record
    print(
        f"{'runs already' if before else 'started'}: pid {record['pid']}, {record['url']}, home {home.root}"
    )
    return 0


def _status(home: Any, *, as_json: bool) -> int:
    from swift.experiments.client import find_service
    from swift.experiments.store import Store

    record = find_service(home)
    counts = Store(home.store).counts() if home.store.exists() else {}
    if as_json:
        fields = {key: record[key] if record else None for key in ("pid", "url", "port", "started")}
        print(
            json.dumps(
                {"running": record is not None, **fields, "home": str(home.root), "jobs": counts}, indent=2
            )
        )
        return 0
    if record is None:
        print(f"no service runs for {home.root}")
    else:
        print(
            f"runs: pid {record['pid']}, {record['url']} (description: {record['url']}/docs), home {home.root}"
        )
    there = [f"{count} {state}" for state, count in counts.items() if count]
    print("jobs: " + (", ".join(there) or "none"))
    return 0
