"""Which experiments the words of swift compare mean: submissions, ids, names, run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swift.core.errors import ConfigError, UsageError
from swift.core.registry import closest
from swift.experiments.file import parse_experiments
from swift.experiments.home import Home
from swift.experiments.outcome import job_of_folder
from swift.experiments.store import Group, Store
from swift.experiments.types import Job
from swift.runs.folder import RunFolder

__all__ = ["Selection", "select"]


@dataclass(frozen=True)
class Selection:
    """Jobs in order, what to call them, the metric their sweep declares (and whether it is minimized)."""

    jobs: list[Job]
    name: str | None
    declared: tuple[str, bool] | None
    home: Home | None


def select(words: Sequence[str], home: Home | None = None) -> Selection:
    """Jobs that ``words`` name; without words those of the newest submission.

    A word is the name of a submission, the id or name of a job (it stands for its whole experiment), a run folder, or
    a folder of run folders. A store is only read, and none is made. Raises UsageError for words that name nothing.
    """
    home = home or Home.find()
    store = Store(home.store) if home.store.exists() else None
    try:
        if words:
            return _named(words, store, home)
        newest = store.groups(limit=1) if store is not None else []
        if store is None or not newest:
            raise UsageError("nothing was submitted yet", fix="swift run FILE.yaml, or name run folders")
        return Selection(store.jobs(group=newest[0].name), newest[0].name, _declared(newest[0]), home)
    finally:
        if store is not None:
            store.close()


def _named(words: Sequence[str], store: Store | None, home: Home) -> Selection:
    jobs: dict[str, Job] = {}
    groups: list[Group] = []
    for word in words:
        group = store.group(word) if store is not None else None
        if group is not None and store is not None:
            groups.append(group)
            found = store.jobs(group=group.name)
        else:
            found = _runs_at(Path(word)) or _jobs_called(word, store)
        for job in found:
            jobs.setdefault(job.id or str(job.spec.run_dir), job)
    declared = {_declared(group) for group in groups}
    same = declared.pop() if len(declared) == 1 else None
    return Selection(list(jobs.values()), words[0] if len(words) == 1 else None, same, home)


def _runs_at(path: Path) -> list[Job]:
    """The run at ``path``, else the runs directly below it, by name; empty when there is none."""
    path = path.expanduser().absolute()
    if not path.is_dir():
        return []
    if RunFolder(path).holds_run():
        return [job_of_folder(path)]
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink())
    return [job_of_folder(entry) for entry in inside if RunFolder(entry).holds_run()]


def _jobs_called(word: str, store: Store | None) -> list[Job]:
    if store is None:
        raise UsageError(
            f"{word!r} is no run folder", why="and nothing was submitted yet", fix="swift run FILE.yaml"
        )
    try:
        job = store.job(word)
    except UsageError:
        near = closest(word, [group.name for group in store.groups(limit=500)])
        raise UsageError(
            f"{word!r} is neither a submission nor a job nor a run folder",
            fix=f"did you mean {near}?" if near else "swift ps --all",
        ) from None
    return [entry for entry in store.jobs(group=job.group) if entry.spec.experiment == job.spec.experiment]


def _declared(group: Group) -> tuple[str, bool] | None:
    """The metric of the sweep in the submitted file. Single commands were submitted without a file."""
    try:
        sweep = parse_experiments(group.source_text, group.name).sweep
    except ConfigError:
        return None
    return (sweep.metric, sweep.minimize) if sweep is not None else None
