"""What must hold for jobs that are submitted together, before anything is recorded."""

from __future__ import annotations

import graphlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from swift.core.errors import UsageError
from swift.core.registry import suggest
from swift.experiments.types import JobSpec

__all__ = ["check_specs", "find_circle", "run_folder"]


def check_specs(specs: Sequence[JobSpec]) -> None:
    """Raise UsageError unless names are unique, the jobs waited for exist, no circle, and run folders are apart."""
    names = Counter(spec.name for spec in specs)
    if not names:
        raise UsageError("there is nothing to submit", fix="name at least one experiment")
    folders: dict[str, JobSpec] = {}
    for spec in specs:
        if names[spec.name] > 1:
            raise UsageError(f"two jobs are called {spec.name}", fix="give one of them another name")
        for entry in spec.after:
            if entry.job not in names:
                raise UsageError(
                    f"{spec.name} waits for {entry.job}, which is not there",
                    fix=suggest(entry.job, names, "submit both in one file"),
                )
        folder = run_folder(spec)
        # The stages of one experiment run one after another and may share its folder.
        other = folders.setdefault(folder, spec) if folder is not None else spec
        if other.experiment != spec.experiment:
            raise UsageError(
                f"{other.name} and {spec.name} have the same run folder",
                where=folder,
                fix="rename one of them",
            )
    circle = find_circle({spec.name: [entry.job for entry in spec.after] for spec in specs})
    if circle:
        raise UsageError(
            f"jobs wait for each other in a circle: {' -> '.join(circle)}", fix="remove one of the waits"
        )


def find_circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The names along one circle of needs, the first again at the end; empty when there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def run_folder(spec: JobSpec) -> str | None:
    """The run folder under its one true name, so that a link cannot hide that two jobs share it."""
    return os.path.realpath(Path(spec.cwd) / spec.run_dir) if spec.run_dir is not None else None
