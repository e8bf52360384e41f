"""What the words of a command mean: jobs, submissions, experiments, run folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from swift.core.errors import ConfigError, UsageError
from swift.core.registry import closest
from swift.experiments.home import Home
from swift.experiments.store import Group, Store
from swift.experiments.types import Job

__all__ = ["Selection", "find_jobs", "select_experiments", "select_jobs"]


def select_jobs(store: Store, words: Iterable[str]) -> list[Job]:
    """The jobs named by ``words`` (ids, names, or a submission's name for all its jobs), in order, each once.

    Raises UsageError with the nearest name for a word that names nothing.
    """
    found: dict[str, Job] = {}
    for word in words:
        jobs = store.jobs(group=word) if store.group(word) is not None else [_job(store, word)]
        for job in jobs:
            found.setdefault(job.id, job)
    return list(found.values())


def find_jobs(home: Home, words: Sequence[str]) -> list[Job]:
    """`select_jobs` for commands that look before they ask the service: nothing is made or started to find out."""
    if not home.store.exists():
        raise UsageError(f"there is no job {words[0]!r}", fix="swift ps")
    store = Store(home.store)
    try:
        return select_jobs(store, words)
    finally:
        store.close()


def _job(store: Store, word: str) -> Job:
    try:
        return store.job(word)
    except UsageError as error:
        near = closest(word, [group.name for group in store.groups(limit=500)])
        if near is None or (error.fix or "").startswith("did you mean"):
            raise
        raise UsageError(error.message, fix=f"did you mean {near}?") from None


@dataclass(frozen=True)
class Selection:
    """Jobs in order, what to call them, the metric their sweep declares (and whether it is minimized)."""

    jobs: list[Job]
    name: str | None
    declared: tuple[str, bool] | None
    home: Home


def select_experiments(words: Sequence[str], home: Home | None = None) -> Selection:
    """Whole experiments that ``words`` name; without words those of the newest submission.

    A word is the name of a submission, the id or name of a job (it stands for its whole experiment), a run folder, or
    a folder of run folders. A store is only read, and none is made. Raises UsageError for words that name nothing.
    """
    home = home or Home.find()
    store = Store(home.store) if home.store.exists() else None
    try:
        if not words:
            newest = store.groups(limit=1) if store is not None else []
            if not newest:
                raise UsageError("nothing was submitted yet", fix="swift run FILE.yaml, or name run folders")
            words = [newest[0].name]
        return _select(words, store, home)
    finally:
        if store is not None:
            store.close()


def _select(words: Sequence[str], store: Store | None, home: Home) -> Selection:
    jobs: dict[str, Job] = {}
    declared: set[tuple[str, bool] | None] = set()
    for word in words:
        group = store.group(word) if store is not None else None
        found = runs_at(Path(word)) if group is None else []
        if store is None and not found:
            raise UsageError(
                f"{word!r} is no run folder", why="and nothing was submitted yet", fix="swift run FILE.yaml"
            )
        if store is not None and not found:
            named = select_jobs(store, [word])
            siblings = store.jobs(group=named[0].group)
            experiments = {job.spec.experiment for job in named}
            found = [job for job in siblings if group is not None or job.spec.experiment in experiments]
            declared |= {_declared(group)} if group is not None else set()
        for job in found:
            jobs.setdefault(job.id or str(job.spec.run_dir), job)
    metric = declared.pop() if len(declared) == 1 else None
    return Selection(list(jobs.values()), words[0] if len(words) == 1 else None, metric, home)


def runs_at(path: Path) -> list[Job]:
    """The run at ``path``, else the runs directly below it, by name; empty when there is none."""
    from swift.experiments.outcome import job_of_folder
    from swift.runs.folder import RunFolder

    path = path.expanduser().absolute()
    if not path.is_dir():
        return []
    if RunFolder(path).holds_run():
        return [job_of_folder(path)]
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink())
    return [job_of_folder(entry) for entry in inside if RunFolder(entry).holds_run()]


def _declared(group: Group) -> tuple[str, bool] | None:
    """The metric of the sweep in the submitted file. Single commands were submitted without a file."""
    from swift.experiments.file import parse_experiments

    try:
        sweep = parse_experiments(group.source_text, group.name).sweep
    except ConfigError:
        return None
    return (sweep.metric, sweep.minimize) if sweep is not None else None
