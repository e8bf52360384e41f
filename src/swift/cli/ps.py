"""``swift ps``: the jobs, from the store itself, so that it works with and without a service."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from swift.cli.arguments import ArgumentParser

if TYPE_CHECKING:
    from swift.experiments.store import Store
    from swift.experiments.types import Job

SHOWN_FINISHED = 500
SHOWN_FINISHED_ON_TERMINAL = 20


def run(argv: list[str]) -> int:
    """``--json`` prints ``{"jobs": [...]}``."""
    parser = ArgumentParser(
        prog="swift ps", description="Jobs: those that wait and run, and the newest ended."
    )
    parser.add_argument(
        "jobs", nargs="*", metavar="ID|NAME", help="only these (a group's name: all its jobs)"
    )
    parser.add_argument("--all", action="store_true", help="all jobs that ever ended, too")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument("--why", metavar="ID", help="why this job waits, and every decision about it")
    options = parser.parse(argv)
    from swift.experiments.home import Home
    from swift.experiments.store import Store

    home = Home.find()
    store = Store(home.store) if home.store.exists() else None
    if options.why is not None:
        return _explain(store, options.why, as_json=options.json)
    limit = None if options.all else SHOWN_FINISHED if options.json else SHOWN_FINISHED_ON_TERMINAL
    jobs, hidden = _jobs(store, options.jobs, limit)
    if options.json:
        record: dict[str, Any] = {"jobs": [job.to_dict() for job in jobs], "finished_not_shown": hidden}
        print(json.dumps(record, ensure_ascii=False, indent=2))
        return 0
    _print(jobs, hidden)
    return 0


def _jobs(store: Store | None, words: list[str], limit: int | None) -> tuple[list[Job], int]:
    """The jobs to show, and how many finished ones are left out."""
    from swift.experiments.lookup import select_jobs
    from swift.experiments.types import FINISHED, STATES

    if store is None:
        return [], 0
    if words:
        return select_jobs(store, words), 0
    if limit is None:
        return store.jobs(), 0
    going = store.jobs(states=[state for state in STATES if state not in FINISHED])
    # One question a state: the index then gives the newest without sorting thousands.
    ended = [job for state in FINISHED for job in store.jobs(states=[state], limit=limit)]
    ended = sorted(ended, key=lambda job: int(job.id[1:]))[-limit:]
    counts = store.counts()
    hidden = sum(counts[state] for state in FINISHED) - len(ended)
    return sorted([*ended, *going], key=lambda job: int(job.id[1:])), max(0, hidden)


def _print(jobs: list[Job], hidden: int) -> None:
    from swift.experiments.show import live_row, table_text, terminal_width

    if not jobs:
        print("no jobs; queue some: swift run FILE.yaml")
        return
    columns = ("id", "name", "group", "state", "step", "loss", "time", "devices", "reason")
    rows = [{**live_row(job, {}), "group": job.group} for job in jobs]
    cells = [[row[name] for name in columns] for row in rows]
    print(table_text([name.upper() for name in columns], cells, terminal_width(sys.stdout)))
    if hidden:
        print(f"({hidden} more have ended: swift ps --all)")


def _explain(store: Store | None, word: str, *, as_json: bool) -> int:
    import datetime

    from swift.core.errors import UsageError
    from swift.experiments.types import state_words

    if store is None:
        raise UsageError(f"there is no job {word!r}", fix="swift ps")
    job = store.job(word)
    events = store.events(job=job.id)
    if as_json:
        record = {**job.to_dict(), "events": [event.to_dict() for event in events]}
        print(json.dumps(record, ensure_ascii=False, indent=2))
        return 0
    print(f"{job.id} {job.spec.name} {state_words(job.state)}: {job.reason}\n")
    for event in events:
        when = datetime.datetime.fromtimestamp(event.at).strftime("%m-%d %H:%M:%S")
        print(f"  {when}  {event.kind:<12} {_sentence(event.data)}")
    return 0


def _sentence(data: dict[str, Any]) -> str:
    if "from" in data and "to" in data:
        return f"{data['from']} -> {data['to']}: {data.get('reason', '')}"
    why = [str(data[name]) for name in ("reason", "message") if data.get(name)]
    rest = ", ".join(
        f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in data.items()
        if name not in ("reason", "message")
    )
    return " ".join([*why, f"({rest})"] if why and rest else why or [rest])
