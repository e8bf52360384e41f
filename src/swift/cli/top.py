"""``swift top``: what the jobs do just now."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from swift.cli.arguments import ArgumentParser

REFRESH_SECONDS = 1.0


def run(argv: list[str]) -> int:
    """A live table on a terminal until Ctrl-C; elsewhere, or with ``--once``, one look."""
    parser = ArgumentParser(
        prog="swift top", description="Jobs that run and wait, with progress and devices."
    )
    parser.add_argument("--once", action="store_true", help="print once and stop")
    parser.add_argument("--json", action="store_true", help="one look as JSON")
    options = parser.parse(argv)
    from swift.experiments.home import Home
    from swift.experiments.store import Store

    home = Home.find()
    if not home.store.exists():
        print('{"jobs": [], "samples": {}}' if options.json else "no jobs; queue some: swift run FILE.yaml")
        return 0
    store = Store(home.store)
    if options.json:
        print(json.dumps(_record(store), ensure_ascii=False, indent=2))
    elif options.once or not sys.stdout.isatty():
        print(_plain(store))
    else:
        _live(store)
    return 0


def _jobs(store: Any) -> list[Any]:
    """Everything that has not ended, and the newest few that have."""
    from swift.experiments.types import FINISHED, STATES

    going = store.jobs(states=[state for state in STATES if state not in FINISHED])
    return [*going, *store.jobs(states=FINISHED, limit=5)]


def _record(store: Any) -> dict[str, Any]:
    from swift.experiments.follow import newest_samples
    from swift.experiments.show import progress_of

    jobs = [{**job.to_dict(), "progress": progress_of(job)} for job in _jobs(store)]
    return {"jobs": jobs, "samples": newest_samples(store)}


def _plain(store: Any) -> str:
    from swift.experiments.follow import newest_samples
    from swift.experiments.show import live_row, table_text, terminal_width

    samples = newest_samples(store)
    rows = [live_row(job, samples) for job in _jobs(store)]
    if not rows:
        return "no jobs; queue some: swift run FILE.yaml"
    header = list(rows[0])
    table = table_text(
        [name if name == "ETA" else name.upper() for name in header],
        [list(row.values()) for row in rows],
        terminal_width(sys.stdout),
    )
    return "\n".join([*_machine(samples), table])


def _machine(samples: dict[str, dict[str, Any]]) -> list[str]:
    from swift.core.format import format_bytes

    lines = []
    for name, sample in samples.items():
        used, total = sample.get("memory_used_bytes"), sample.get("memory_bytes")
        busy = sample.get("cpu_percent", sample.get("utilisation_percent"))
        parts = [f"{busy:.0f}% busy"] if busy is not None else []
        parts += [f"{format_bytes(used)} of {format_bytes(total)}"] if used is not None and total else []
        parts += [f"{sample['power_watts']:.0f} W"] if sample.get("power_watts") is not None else []
        lines.append(f"{name}: {', '.join(parts)}")
    return lines


def _live(store: Any) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from swift.experiments.follow import live_table, newest_samples

    with Live(auto_refresh=False, screen=True) as live:
        try:
            while True:
                samples = newest_samples(store)
                head = [Text(line, style="dim") for line in _machine(samples)]
                table = live_table(_jobs(store), samples, width=live.console.width)
                live.update(Group(*head, table), refresh=True)
                time.sleep(REFRESH_SECONDS)
        except KeyboardInterrupt:
            return  # the way to leave
