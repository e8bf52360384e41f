"""Which jobs a user means: ids, names, or names of groups."""

from __future__ import annotations

from collections.abc import Iterable

from swift.core.errors import UsageError
from swift.core.registry import closest
from swift.experiments.store import Store
from swift.experiments.types import Job

__all__ = ["select_jobs"]


def select_jobs(store: Store, words: Iterable[str]) -> list[Job]:
    """The jobs named by ``words``, in order, each once. A group's name stands for all its jobs.

    Raises UsageError with the nearest name for a word that names nothing.
    """
    found: dict[str, Job] = {}
    for word in words:
        for job in _jobs_of(store, word):
            found.setdefault(job.id, job)
    return list(found.values())


def _jobs_of(store: Store, word: str) -> list[Job]:
    if store.group(word) is not None:
        return store.jobs(group=word)
    try:
        return [store.job(word)]
    except UsageError as error:
        groups = [group.name for group in store.groups(limit=500)]
        near = closest(word, groups)
        if near is None or (error.fix or "").startswith("did you mean"):
            raise
        raise UsageError(error.message, fix=f"did you mean {near}?") from None
