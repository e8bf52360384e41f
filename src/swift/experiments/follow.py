"""Watching a group of jobs to its end: one calm table on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from swift.experiments.home import Home
from swift.experiments.open_sweeps import sweep_failure, sweep_is_open
from swift.experiments.serving import is_settled
from swift.experiments.show import COLOURS, live_row, next_commands, summary_rows, table_text, terminal_width
from swift.experiments.store import Store
from swift.experiments.types import ACTIVE, Job

__all__ = ["follow", "is_over", "live_table", "newest_samples", "print_summary"]

REFRESH_SECONDS = 1.0
_COLUMNS = (
    "id", "name", "state", "step", "loss", "tokens/s", "ETA", "time", "devices", "memory", "util", "reason",
)  # fmt: skip
_DISPENSABLE = ("util", "memory", "tokens/s", "devices", "time", "step")
"""Columns that a narrow terminal goes without, the first one first."""
_LEAST_REASON = 24
_ROWS = 40


def is_over(home: Home, group: str, jobs: Sequence[Job]) -> bool:
    """Whether nothing more will happen by itself: all ended, paused or serving, and no sweep brings more."""
    return is_settled(jobs) and (not sweep_is_open(home, group) or any(job.state == "paused" for job in jobs))


def follow(home: Home, store: Store, group: str, pause: Callable[[float], None] = time.sleep) -> list[Job]:
    """Show how the jobs of a group go until all have ended (or wait paused); returns them.

    Args:
        pause: waits about so many seconds; an inline run works meanwhile.
    """
    if sys.stdout.isatty():
        return _follow_table(home, store, group, pause)
    known: dict[str, str] = {}
    while True:
        jobs = store.jobs(group=group)
        for job in jobs:
            text = f"{job.spec.name}: {job.state}" + (f" ({job.reason})" if job.reason else "")
            told = job.state if job.state in ("queued", "waiting", "running") else text
            if known.get(job.id) != told:
                known[job.id] = told
                print(f"{time.strftime('%H:%M:%S')}  {job.id:<5} {text}", flush=True)
        if is_over(home, group, jobs):
            return jobs
        pause(REFRESH_SECONDS / 2)


def _follow_table(home: Home, store: Store, group: str, pause: Callable[[float], None]) -> list[Job]:
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        while True:
            jobs = store.jobs(group=group)
            samples, width = newest_samples(store), live.console.width
            live.update(live_table(jobs, samples, title=group, width=width), refresh=True)
            if is_over(home, group, jobs):
                return jobs
            pause(REFRESH_SECONDS)


def newest_samples(store: Store) -> dict[str, dict[str, Any]]:
    """The newest measurement of every device and of the host, not older than half a minute."""
    return {sample["subject"]: sample for sample in store.samples(time.time() - 30)}


def live_table(
    jobs: Sequence[Job], samples: dict[str, dict[str, Any]], title: str = "", width: int | None = None
) -> Any:
    """A rich table: active jobs first, then those that wait, then the newest that ended.

    ``width``: of the terminal; cells are shown whole in fewer columns rather than all cut to pieces.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    order = dict.fromkeys(ACTIVE, 0) | {"queued": 1, "waiting": 1, "paused": 1}
    shown = sorted(jobs, key=lambda job: order.get(job.state, 2))[:_ROWS]
    cells = [live_row(job, samples) for job in shown]
    used = [name for name in _COLUMNS if any(row[name] for row in cells)] or ["id", "name", "state"]
    for name in _DISPENSABLE:
        if width is not None and name in used and _width(used, cells) > width:
            used.remove(name)
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for name in used:
        numeric = name in ("step", "loss", "tokens/s", "ETA", "time", "memory", "util")
        table.add_column(
            name, justify="right" if numeric else "left", no_wrap=name != "reason",
            overflow="ellipsis", ratio=None,
        )  # fmt: skip
    for job, row in zip(shown, cells, strict=True):
        style = COLOURS.get(job.state, "")
        table.add_row(*(Text(row[name], style=style if name == "state" else "") for name in used))
    if len(jobs) > len(shown):
        table.caption = f"and {len(jobs) - len(shown)} more"
    return table


def _width(columns: Sequence[str], cells: Sequence[dict[str, str]]) -> int:
    """Characters that the columns take; the reason may be cut, the others not."""
    sizes = {name: max([len(name), *(len(row[name]) for row in cells)]) for name in columns}
    if "reason" in sizes:
        sizes["reason"] = min(sizes["reason"], _LEAST_REASON)
    return sum(sizes.values()) + 3 * len(sizes)  # with what the table puts between and around them


def print_summary(group: str, jobs: Sequence[Job], home: Home) -> None:
    """The table at the end, and what one may want to do now."""
    header, rows = summary_rows(jobs)
    print()
    print(table_text(header, rows, terminal_width(sys.stdout)))
    failure = sweep_failure(home, group)
    if failure:
        print(f"\nthe sweep ended before its time: {failure}")
    commands = next_commands(group, jobs)
    if commands:
        print("\nnext: " + "\n      ".join(commands))
