"""Experiments from Python: run them, get their results as rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swift.core.files import read_json
from swift.core.logging import get_logger
from swift.evaluate.results import RESULTS
from swift.experiments.follow import follow, is_over
from swift.experiments.home import Home
from swift.experiments.open_sweeps import sweep_failure
from swift.experiments.outcome import RESULT_FOLDER
from swift.experiments.progress import seconds_of
from swift.experiments.store import Store
from swift.experiments.submission import check_machine, from_file, from_mapping
from swift.experiments.types import Job

__all__ = ["result_rows", "run_experiments"]

logger = get_logger(__name__)


def run_experiments(
    experiments: str | Path | Mapping[str, Any],
    *,
    inline: bool = False,
    wait: bool = False,
    show: bool = True,
    home: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Run a file of experiments (or its content as a dict) to the end.

    ``pandas.DataFrame(run_experiments(...))`` gives a table.

    Args:
        inline: run them in this process instead of in the experiment service.
        wait: queue jobs that this machine cannot run, instead of refusing the file.
        show: print progress.
        home: default: ``$SWIFT_HOME``, else ``~/.swift``.

    Returns one row for each experiment: ``experiment``, ``state``, ``run_dir``, what makes it differ from the others
    (``lora_rank``, ...), the summary of its run (``last_loss``, ``best_metric``, ``num_tokens``, ...), what its
    evaluation said (``evaluate_*``), ``retries`` and ``reason``.

    Raises SwiftError for a file that cannot be run; a failed experiment is a row, not an exception.
    """
    from swift.experiments.inventory import take_inventory

    if isinstance(experiments, Mapping):
        submission = from_mapping(experiments, Path.cwd(), wait=wait)
    else:
        submission = from_file(str(experiments), Path.cwd(), wait=wait)
    check_machine(submission, take_inventory())
    place = Home.find(home)
    watch = follow if show else _wait_quietly
    if inline:
        from swift.experiments.inline import run_inline

        return _rows(place, *run_inline(place, submission, watch))
    from swift.experiments.client import Client

    group = Client(place).submit(submission)["group"]
    return _rows(place, group, watch(place, Store(place.store), group, time.sleep))


def _rows(home: Home, group: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    failure = sweep_failure(home, group)
    if failure:
        logger.warning("the sweep of %s ended before its time: %s", group, failure)
    return result_rows(jobs)


def _wait_quietly(home: Home, store: Store, group: str, pause: Callable[[float], None]) -> list[Job]:
    while not is_over(home, group, jobs := store.jobs(group=group)):
        pause(0.5)
    return jobs


def result_rows(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """One row for each experiment among the jobs of a group."""
    rows = []
    for job in jobs:
        if job.spec.name != job.spec.experiment:
            continue  # a stage: its results stand in the row of its experiment
        stages = [
            other for other in jobs if other.spec.experiment == job.spec.experiment and other is not job
        ]
        rows.append(
            {
                "experiment": job.spec.experiment,
                "id": job.id,
                "state": job.state,
                "run_dir": job.spec.run_dir,
                **job.spec.parameters,
                **_read(job, "summary.json"),
                **{f"evaluate_{name}": value for name, value in _evaluation(job).items()},
                "seconds": seconds_of(job, time.time()),
                "retries": len(job.retries),
                "reason": job.reason,
                "stages": {other.spec.name.rpartition("/")[2]: other.state for other in stages},
            }
        )
    return rows


def _evaluation(job: Job) -> dict[str, Any]:
    folder = Path(job.spec.run_dir) / RESULT_FOLDER if job.spec.run_dir is not None else None
    metrics: dict[str, Any] = read_json(folder / RESULTS).get("metrics", {}) if folder else {}
    return metrics


def _read(job: Job, name: str) -> dict[str, Any]:
    """Plain values of a JSON file in the run folder; nothing when it is not there."""
    record = read_json(Path(job.spec.run_dir) / name) if job.spec.run_dir is not None else {}
    skipped = ("folder", "command", "evaluation")
    return {key: value for key, value in record.items() if key not in skipped and not isinstance(value, dict)}
