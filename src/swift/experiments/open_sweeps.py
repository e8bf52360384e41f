"""OpenSweeps whose trials depend on results: asks their controllers for jobs, and tells them how these went."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.core.errors import SwiftError
from swift.core.logging import get_logger
from swift.experiments.database import StoreUnusable
from swift.experiments.home import Home
from swift.experiments.store import Group, Store
from swift.experiments.types import FINISHED, Job, JobSpec
from swift.runs.metrics import read_metrics

if TYPE_CHECKING:
    from swift.experiments.sweep_controller import SweepController

__all__ = ["OpenSweeps", "sweep_failure", "sweep_is_open"]

logger = get_logger(__name__)
_FINISHED_MARK = "finished"


def sweep_is_open(home: Home, group: str) -> bool:
    """Whether the sweep of this group may still bring jobs; False for groups without a controlled sweep."""
    folder = home.root / "sweeps" / group
    return folder.is_dir() and not (folder / _FINISHED_MARK).exists()


def sweep_failure(home: Home, group: str) -> str:
    """Why the sweep of this group ended before its time; "" when it did not."""
    mark = home.root / "sweeps" / group / _FINISHED_MARK
    return mark.read_text(encoding="utf-8") if mark.is_file() else ""


class OpenSweeps:
    """All controlled sweeps of one store; each has the folder ``sweeps/GROUP``.

    Optuna is imported only when there is one.

    Args:
        prune: gives up a job (id, reason).
    """

    def __init__(self, home: Home, store: Store, prune: Callable[[str, str], Any]) -> None:
        self.home, self.store = home, store
        self._prune = prune
        self._open: dict[str, SweepController] = {}
        self._sizes: dict[str, int] = {}
        self._found = False

    @property
    def names(self) -> list[str]:
        """Groups whose sweeps are not done."""
        return list(self._open)

    def submit(
        self,
        name: str,
        source_text: str,
        specs: Sequence[JobSpec],
        sweep: dict[str, str],
        environment: Mapping[str, str] | None = None,
    ) -> Group:
        """Record a group and the first trials of its sweep. Raises SwiftError; nothing is left then."""
        from swift.experiments.file import parse_experiments
        from swift.experiments.sweep_controller import SweepController

        name = self.store.free_name(name)
        folder = self._folder(name)
        if folder.exists():
            shutil.rmtree(folder)  # of a submission that was cut before its jobs were recorded
        controller = SweepController(parse_experiments(sweep["text"], sweep["shown"]), folder, sweep["cwd"])
        try:
            trials = controller.next_specs(controller.limit)
            group = self.store.add_group(name, source_text, [*specs, *trials], environment)
        except BaseException:
            controller.close()
            shutil.rmtree(folder)
            raise
        self._open[group.name] = controller
        return group

    def tick(self) -> None:
        """Report metrics, give up trials that fell behind, settle those that ended, queue the next."""
        if not self._found:
            self._find()
            self._found = True
        for name, controller in list(self._open.items()):
            with self._ending_on_errors(name):
                self._advance(name, controller)

    @contextmanager
    def _ending_on_errors(self, name: str) -> Iterator[None]:
        """A sweep that cannot go on ends and says why: neither the queue nor whoever follows may hang on it.

        A store that cannot be used just now ends no sweep; the engine's next round tries again.
        """
        try:
            yield
        except StoreUnusable:
            raise
        except (
            SwiftError,
            ValueError,
            KeyError,
        ) as error:  # the latter two: a damaged sweep.json or trials.jsonl
            message = error.render() if isinstance(error, SwiftError) else f"its files are damaged: {error!r}"
            logger.error("the sweep of %s cannot go on: %s", name, message)
            self.store.event(None, "sweep_failed", {"group": name, "message": message})
            self.stop(name, message)

    def stop(self, name: str, failure: str = "") -> None:
        """No more trials; those that run go on. Nothing happens for a group without a sweep."""
        controller = self._open.pop(name, None)
        if self.store.group(name) is not None and sweep_is_open(self.home, name):
            (self._folder(name) / _FINISHED_MARK).write_text(failure, encoding="utf-8")
        if controller is not None:
            controller.close()

    def close(self) -> None:
        """Close the files; a later engine goes on."""
        for controller in self._open.values():
            controller.close()
        self._open.clear()

    def _folder(self, name: str) -> Path:
        return self.home.root / "sweeps" / name

    def _find(self) -> None:
        """Open the sweeps that an earlier engine left."""
        folders = (self.home.root / "sweeps").glob("*")
        for folder in sorted(folders):
            if sweep_is_open(self.home, folder.name) and self.store.group(folder.name) is not None:
                from swift.experiments.sweep_controller import SweepController

                with self._ending_on_errors(folder.name):
                    self._open[folder.name] = SweepController.open(folder)

    def _advance(self, name: str, controller: SweepController) -> None:
        jobs = {job.spec.name: job for job in self.store.jobs(group=name)}
        for trial in controller.running:
            training = jobs.get(trial)
            if training is not None:
                self._follow(controller, trial, training)
                self._settle(controller, trial, training, jobs.get(controller.judge_of(trial)))
        known = {job.spec.experiment for job in jobs.values()}
        specs = controller.next_specs(controller.limit, known)
        if specs:
            self.store.extend_group(name, specs)
        if controller.done:
            self.stop(name)

    def _follow(self, controller: SweepController, trial: str, job: Job) -> None:
        """Tell the controller the new values of the metric."""
        if controller.sweep.early_stop is None or job.state != "running" or job.spec.run_dir is None:
            return
        file = Path(job.spec.run_dir) / "metrics.jsonl"
        size = file.stat().st_size if file.exists() else 0
        if self._sizes.get(job.id) == size:
            return
        self._sizes[job.id] = size
        metric = controller.sweep.metric
        for row in read_metrics(file):
            if metric in row and controller.report(trial, int(row["step"]), row[metric]) == "stop":
                self._prune(job.id, f"given up by the sweep: {metric} fell behind at step {row['step']}")
                return

    def _settle(self, controller: SweepController, trial: str, job: Job, judge: Job | None) -> None:
        from swift.experiments.sweep_controller import metric_of

        judge = judge or job
        if judge.state not in FINISHED:
            return
        value = metric_of(job.spec.run_dir or "", controller.sweep.metric)
        if judge.state == "succeeded":
            controller.finish(trial, value)
        else:
            given_up = job.state == "cancelled" and controller.should_stop(trial)
            controller.finish(trial, None, "stopped" if given_up else "failed")
        self._sizes.pop(job.id, None)
