"""What users (and sweeps) ask of jobs: submit, stop, pause, resume, retry, clone, priority.

A wish about a running job is recorded as an event ``intent`` of its attempt before the supervisor is told, so that a
service that is killed in between still knows, once the attempt has ended, what was meant.
"""

from __future__ import annotations

import abc
import itertools
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift.core.errors import UsageError
from swift.experiments.dependencies import dependents
from swift.experiments.fuse_choice import Choice
from swift.experiments.fusing import apply_verdicts
from swift.experiments.home import Home
from swift.experiments.open_sweeps import OpenSweeps
from swift.experiments.runner import Runner
from swift.experiments.store import Group, StateConflict, Store
from swift.experiments.types import ACTIVE, FINISHED, TRAINING, Job, JobSpec, State
from swift.runs.folder import RunFolder

__all__ = ["Control", "intent_of"]

_WAITING: tuple[State, ...] = ("queued", "waiting", "paused")
_OUTPUTS = ("result_path", "output_dir", "eval_output_dir")
"""Options of commands without a run folder that name what they write."""
_ATTEMPTS = 10
"""A job may change its state while it is being changed; so often it is looked at again."""


def intent_of(store: Store, job: Job) -> dict[str, Any] | None:
    """What was last asked of the job's attempt: ``action`` (cancel, pause, preempt, prune, stall) and ``reason``."""
    wishes = [
        event.data
        for event in store.events(job=job.id)
        if event.kind == "intent" and event.data.get("attempt") == job.attempt
    ]
    return wishes[-1] if wishes else None


class Control(abc.ABC):
    """The part of the engine that changes jobs on request. Safe to call from any thread."""

    sweeps: OpenSweeps
    clock: Callable[[], float]

    def __init__(self, home: Home, store: Store, runner: Runner, grace_seconds: float) -> None:
        self.home, self.store, self.runner = home, store, runner
        self.grace_seconds = grace_seconds
        self._submitting = threading.Lock()

    @abc.abstractmethod
    def wake(self) -> None:
        """Let the engine look again at once."""

    def submit(
        self,
        name: str,
        source_text: str,
        specs: Sequence[JobSpec],
        sweep: dict[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Group:
        """Queue jobs, all or none. Whether they run fused is looked up where nobody has decided yet.

        Args:
            sweep: ``{"text", "shown", "cwd"}`` of a file whose trials depend on results; its first trials are added.
            environment: of the submitting shell (`isolation.from_shell`).
        """
        if not any("plan" in spec.fuse for spec in specs):
            specs = apply_verdicts(specs, "auto", Choice(self.home))
        with self._submitting:
            if sweep is None:
                group = self.store.add_group(name, source_text, specs, environment)
            else:
                group = self.sweeps.submit(name, source_text, specs, sweep, environment)
        self.wake()
        return group

    def stop(
        self, job_id: str, reason: str = "stopped by the user", grace_seconds: float | None = None
    ) -> Job:
        """Cancel a job; a running one gets time to save a checkpoint. Raises StateConflict when it has ended."""
        return self._end(job_id, "cancel", reason, grace_seconds)

    def prune(self, job_id: str, reason: str) -> Job:
        """Give up a trial that has fallen behind."""
        return self._end(job_id, "prune", reason, None)

    def stop_stalled(self, job: Job, reason: str) -> None:
        """End an attempt that stands still; the policy then decides about another one."""
        self._wish(job, "stall", reason)
        self.store.update(job.id, reason=f"stalled: {reason}; being stopped")
        self.runner.stop(job.id, job.attempt, self.grace_seconds)

    def pause(
        self, job_id: str, reason: str = "paused by the user", grace_seconds: float | None = None
    ) -> Job:
        """Checkpoint and set aside until ``resume``; one that is being preempted does not come back by itself then.

        Raises UsageError when it has ended or is paused.
        """

        def change(job: Job) -> Job:
            if job.state in ("queued", "waiting"):
                return self.store.transition(job_id, job.state, "paused", reason)
            if job.state == "pausing" and job.preempted:
                return self._wish_while_active(job, "pause", reason, "saves a checkpoint", grace_seconds)
            if job.state in FINISHED or job.state in ("paused", "pausing"):
                raise UsageError(f"{job.id} ({job.spec.name}) is {job.state} already")
            self._wish(job, "pause", reason)
            changed = self.store.transition(job_id, job.state, "pausing", f"{reason}; saves a checkpoint")
            self.runner.stop(job.id, job.attempt, self._grace(grace_seconds))
            return changed

        return self._change(job_id, change)

    def preempt(self, job_id: str, by: str, reason: str) -> bool:
        """Have a running job checkpoint and wait until ``by`` has its place. False when it is about to end anyway."""
        job = self.store.job(job_id)
        if job.state != "running" or intent_of(self.store, job) is not None:
            return False
        mark = {"by": by, "at": self.clock()}
        self._wish(job, "preempt", f"preempted: {reason}")
        try:
            self.store.transition(
                job_id, "running", "pausing", f"preempted: {reason}; saves a checkpoint", preempted=mark
            )
        except StateConflict:
            return False
        self.runner.stop(job.id, job.attempt, self.grace_seconds)
        return True

    def resume(self, job_id: str) -> Job:
        """Back to the queue. A job that is still being paused goes on after its checkpoint."""
        job = self.store.job(job_id)
        if job.state == "pausing":
            raise UsageError(
                f"{job.id} ({job.spec.name}) is still saving its checkpoint", fix="try again soon"
            )
        if job.state != "paused":
            fix = f"swift retry {job.id}" if job.state in ("failed", "cancelled") else None
            raise UsageError(f"{job.id} ({job.spec.name}) is {job.state}, not paused", fix=fix)
        changed = self.store.transition(job_id, "paused", _ready(job), "resumed by the user")
        self.wake()
        return changed

    def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again, from its last checkpoint, with what was cancelled because of it."""
        job = self.store.job(job_id)
        if job.state not in ("failed", "cancelled"):
            raise UsageError(
                f"{job.id} ({job.spec.name}) is {job.state}: only failed and cancelled jobs are tried again",
                fix=f"a second run with the same options: swift clone {job.id}",
            )
        # The policies' counters start anew: somebody looked at it.
        changed = self.store.transition(job_id, job.state, _ready(job), "tried again by the user", retries=[])
        for other in dependents(job, self.store.jobs(group=job.group)):
            if other.state == "cancelled" and other.attempt == 0:
                self.store.transition(other.id, "cancelled", "waiting", f"waits for {job.spec.name} again")
        self.wake()
        return changed

    def clone(self, job_id: str, name: str | None = None) -> Group:
        """The same job once more, under another name and in a run folder of its own, in a new group."""
        job = self.store.job(job_id)
        with self._submitting:
            spec = self._copy(job, name)
            environment = self.store.environment(job.group)
            group = self.store.add_group(
                spec.name.replace("/", "-"), f"clone of {job.id}", [spec], environment
            )
        self.wake()
        return group

    def set_priority(self, job_id: str, priority: int) -> Job:
        """Larger goes first. Changes nothing for a job that runs."""
        job = self.store.update(job_id, priority=priority)
        self.wake()
        return job

    def _end(self, job_id: str, action: str, reason: str, grace_seconds: float | None) -> Job:
        def change(job: Job) -> Job:
            if job.state in FINISHED:
                raise UsageError(f"{job.id} ({job.spec.name}) has ended already: {job.state}")
            if job.state in _WAITING:
                return self.store.transition(job_id, job.state, "cancelled", reason)
            return self._wish_while_active(job, action, reason, "stopping", grace_seconds)

        return self._change(job_id, change)

    def _wish_while_active(
        self, job: Job, action: str, reason: str, doing: str, grace_seconds: float | None
    ) -> Job:
        """Ask for the end of an attempt whose state stays as it is. Raises StateConflict when it was over already."""
        self._wish(job, action, reason)
        self.runner.stop(job.id, job.attempt, self._grace(grace_seconds))
        now = self.store.job(job.id)
        if now.attempt != job.attempt or now.state not in ACTIVE:
            raise StateConflict("it ended by itself meanwhile", now.state)
        return self.store.update(job.id, reason=f"{reason}; {doing}")

    def _change(self, job_id: str, change: Callable[[Job], Job]) -> Job:
        """Change a job, looking again when it has changed its state meanwhile."""
        for _ in range(_ATTEMPTS):
            try:
                changed = change(self.store.job(job_id))
            except StateConflict:
                continue
            self.wake()
            return changed
        raise UsageError(f"{job_id} changes its state faster than it can be told", fix="try again")

    def _grace(self, seconds: float | None) -> float:
        return self.grace_seconds if seconds is None else seconds

    def _wish(self, job: Job, action: str, reason: str) -> None:
        self.store.event(job.id, "intent", {"action": action, "attempt": job.attempt, "reason": reason})

    def _copy(self, job: Job, name: str | None) -> JobSpec:
        spec = job.spec
        taken = {other.spec.name for other in self.store.jobs()}
        if name is None:
            name = _free_name(spec, taken)
        elif name in taken:
            raise UsageError(f"there is a job called {name}", fix="choose another --name")
        options, run_dir = dict(spec.options), spec.run_dir
        if spec.command not in TRAINING:
            # A stage: it must neither go on with the answers of its original nor find its folder taken.
            run_dir = None
            for option in _OUTPUTS:
                if options.get(option):
                    options[option] = str(_free_path(Path(spec.cwd) / str(options[option])))
        elif run_dir is not None:
            folder = Path(run_dir).with_name(name)
            if RunFolder(folder).holds_run():
                raise UsageError("this folder holds a run already", where=str(folder), fix="another --name")
            run_dir, options["run_name"] = str(folder), name
        return replace(spec, name=name, experiment=name, options=options, run_dir=run_dir, after=[])


def _free_path(path: Path) -> Path:
    """``evaluation-2.jsonl``, ``evaluation-3.jsonl``...: beside ``path``, and not there yet."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(other for other in numbered if not other.exists())


def _ready(job: Job) -> State:
    """Where a job goes that may go on: its dependencies are looked at once more."""
    return "waiting" if job.spec.after else "queued"


def _free_name(spec: JobSpec, taken: set[str]) -> str:
    """``NAME-2``, ``NAME-3``... that neither a job nor a folder beside the run has."""
    base = re.sub(r"-\d+$", "", spec.name.rpartition("/")[2])
    for number in itertools.count(2):
        name = f"{base}-{number}"
        if name not in taken and not (spec.run_dir and Path(spec.run_dir).with_name(name).exists()):
            return name
    raise AssertionError("unreachable")
