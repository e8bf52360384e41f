"""The heart of the experiment service: look how jobs go, decide what that means, start what fits.

``tick`` does one round and never waits; ``run`` calls it when something happens. Nothing is kept in memory that is not
also in the store or in the job folders, so a new engine goes on where a killed one stopped: adopting the jobs that
run is just its first round.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from swift.config.commands import COMMANDS
from swift.core.errors import SwiftError
from swift.core.files import free_bytes
from swift.core.format import format_bytes
from swift.core.logging import get_logger
from swift.experiments.attempt import (
    attempt_log,
    build_host,
    build_launch,
    effective_options,
    processes_of,
    run_status,
)
from swift.experiments.control import Control, intent_of
from swift.experiments.demand import device_peak, estimate_memory, memory_key, placed, queued
from swift.experiments.dependencies import settle_waiting
from swift.experiments.estimator import changed_data
from swift.experiments.fuse_choice import Choice
from swift.experiments.fusing import FusedGroup, accounted, form_groups, host_id, joining, write_group
from swift.experiments.home import Home
from swift.experiments.inventory import take_inventory
from swift.experiments.isolation import as_submitted
from swift.experiments.monitor import Monitor
from swift.experiments.open_sweeps import OpenSweeps
from swift.experiments.policies import Failure, Policies, after_failure, classify, is_stalled
from swift.experiments.preemption import Preemption, preempt
from swift.experiments.progress import OUTPUT_LOG, median_step_seconds
from swift.experiments.runner import AlreadyRunning, Exit, Observation, Runner, Supervisors
from swift.experiments.scheduler import Decision, Policy, decide
from swift.experiments.serving import serving_line
from swift.experiments.store import StateConflict, Store
from swift.experiments.types import ACTIVE, Inventory, Job, Launch, Placement

__all__ = ["Engine"]

logger = get_logger(__name__)

BUSY_SECONDS = 1.0
"""Between two looks while jobs run; the end of a job is seen at once."""
IDLE_SECONDS = 60.0
RESCHEDULE_SECONDS = 5.0
"""Other people's processes come and go without telling: look again so often while jobs wait."""
STALL_CHECK_SECONDS = 10.0
LEAST_FREE_BYTES = 2**30
_HIDDEN = ("SWIFT_ATTEMPT_TOKEN", "SWIFT_DEVICE_MEMORY_BYTES")
"""Variables of a job that must not be handed on, should the service have been started by one."""


class Engine(Control):
    """Runs the jobs of one store. One engine for a store at a time: see ``service.lock``.

    Args:
        take: the machine as it is now (own pids, reserved bytes) -> Inventory.
        runner: starts and watches attempts.
        build: makes the command line of an attempt.
        base_env: environment of jobs, below what their snapshot and placement say.
        warm: start jobs from pre-imported workers where they fit.
        threads: so many jobs are being started at the same time; 0: in ``tick`` itself (tests).
        clock: wall clock; monotonic: for delays and stalls.
        least_free_bytes: nothing is started while a disk that jobs write to has less.
    """

    def __init__(
        self,
        home: Home,
        store: Store,
        *,
        take: Callable[..., Inventory] = take_inventory,
        runner: Runner | None = None,
        build: Callable[..., Launch] = build_launch,
        schedule: Policy | None = None,
        policies: Policies | None = None,
        base_env: Mapping[str, str] | None = None,
        warm: bool = True,
        threads: int = 4,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        least_free_bytes: int = LEAST_FREE_BYTES,
        grace_seconds: float = 30.0,
    ) -> None:
        super().__init__(home, store, runner or Supervisors(home), grace_seconds)
        self.policies = policies or Policies()
        self.schedule_policy = schedule or Policy()
        env = os.environ if base_env is None else base_env
        self.base_env = {name: value for name, value in env.items() if name not in _HIDDEN}
        self.warm = warm
        self.clock, self.monotonic = clock, monotonic
        self.least_free_bytes = least_free_bytes
        self.sweeps = OpenSweeps(home, store, self.prune)
        self.monitor = Monitor(store, clock=monotonic)
        self.inventory: Inventory | None = None
        self._take, self._build = take, build
        self._pool = ThreadPoolExecutor(threads, "swift-launch") if threads else None
        self._hosts: set[str] = set()
        self._fuses = Choice(home)  # what was measured; nothing is measured here
        self._hosts_lock = threading.Lock()
        self._launching: set[str] = set()
        self._not_before: dict[str, float] = {}
        self._watched: dict[tuple[str, int], int] = {}
        self._met: set[tuple[str, int]] = set()
        self._progress: dict[tuple[str, int], tuple[Any, float]] = {}
        self._stall_checked = self._scheduled_at = float("-inf")
        self._scheduled_event = -1
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopping = threading.Event()

    # The rounds

    def run(self) -> None:
        """Tick until ``stop_running``. A round that fails is logged and tried again: jobs must not depend on it."""
        while not self._stopping.is_set():
            try:
                pause = self.tick()
            except Exception:  # a full disk, a store that is locked: the next round may succeed
                logger.exception("a round of the engine failed")
                pause = RESCHEDULE_SECONDS
            self.wait(pause)

    def stop_running(self) -> None:
        """Let ``run`` return. Jobs go on."""
        self._stopping.set()
        self.wake()

    def close(self) -> None:
        """Wait until starts under way are done, and give back what is held. Jobs go on."""
        self.stop_running()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._watched.values():
            os.close(descriptor)
        self._watched.clear()
        self.sweeps.close()

    def wake(self) -> None:
        """Have the next round now. From any thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full: it is awake
            os.write(self._wake_write, b"1")

    def wait(self, seconds: float) -> None:
        """Sleep until somebody wakes us, a watched attempt ends, or the time is over."""
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        for descriptor in self._watched.values():
            poll.register(descriptor, select.POLLIN)
        poll.poll(max(0.0, seconds) * 1000)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass

    def tick(self) -> float:
        """One round; returns after how many seconds the next is due if nothing happens."""
        active = self.store.jobs(states=ACTIVE)
        for job in active:
            self._reconcile(job)
        self.sweeps.tick()
        settle_waiting(self.store)
        self._schedule()
        counts = self.store.counts()
        num_active = sum(counts[state] for state in ACTIVE)
        if num_active:
            self._check_stalls()
            self.monitor.sample(self.inventory, self._disks(self.store.jobs(states=ACTIVE)))
            return BUSY_SECONDS
        if counts["queued"]:
            delays = [moment - self.monotonic() for moment in self._not_before.values()]
            return max(0.05, min([RESCHEDULE_SECONDS, *(delay for delay in delays if delay > 0)]))
        return IDLE_SECONDS

    # How jobs go

    def _reconcile(self, job: Job) -> None:
        if job.id in self._launching:
            return
        try:
            seen = self.runner.observe(job.id, job.attempt)
        except SwiftError as error:  # leftovers that cannot be killed: nothing may be started in their place
            self.store.update(job.id, reason=error.message)
            return
        if seen.state in ("starting", "running"):
            self._watch(job)
            if (job.id, job.attempt) not in self._met:
                self._met.add((job.id, job.attempt))
                if intent_of(self.store, job) is not None:  # an engine killed in between may not have told it
                    self.runner.stop(job.id, job.attempt, self.grace_seconds)
            if seen.state == "running" and job.state == "starting":
                self._move(job, "running", f"on {_place(job.placement)}")
            elif (line := serving_line(self.home, job)) is not None and line != job.reason:
                self.store.update(job.id, reason=line)
            return
        self._unwatch(job)
        try:
            self._conclude(job, seen)
        except StateConflict as error:
            logger.info("%s changed meanwhile: %s", job.id, error.message)

    def _watch(self, job: Job) -> None:
        key = (job.id, job.attempt)
        if key not in self._watched:
            descriptor = self.runner.watch(job.id, job.attempt)
            if descriptor is not None:
                self._watched[key] = descriptor

    def _unwatch(self, job: Job) -> None:
        descriptor = self._watched.pop((job.id, job.attempt), None)
        if descriptor is not None:
            os.close(descriptor)
        self._progress.pop((job.id, job.attempt), None)
        self._met.discard((job.id, job.attempt))

    def _conclude(self, job: Job, seen: Observation) -> None:
        """An attempt is over: what the job becomes."""
        exit, intent = seen.exit, intent_of(self.store, job) or {}
        action, reason = intent.get("action"), str(intent.get("reason"))
        over = {"exit_code": exit.code, "ended": exit.ended} if exit else {"exit_code": None}
        if exit is not None and exit.code == 0 and exit.reason != "lost":
            self._learn(job, exit)
            self._move(job, "succeeded", "done", **over)
        elif action in ("cancel", "prune"):
            self._move(job, "cancelled", reason, **over)
        elif action == "pause":
            self._move(job, "paused", reason, placement=None, **over)
        elif action == "preempt":
            self._move(job, "queued", f"{reason}; goes on from its checkpoint when there is room", **over)
        elif exit is None or exit.reason == "not_begun":
            self._move(job, "queued", "the service ended before the job was started")
        else:
            answers = job.spec.command != "resume" and COMMANDS[job.spec.command].own_arguments
            log, status = attempt_log(self.home, job), run_status(self.home, job)
            self._fail(job, classify(exit, status, log, action, answers=answers), over)

    def _fail(self, job: Job, failure: Failure, over: dict[str, Any]) -> None:
        largest = max((device.memory_bytes for device in self.machine().devices), default=None)
        options: dict[str, Any] = {}
        if failure.kind == "out_of_memory":
            with contextlib.suppress(SwiftError):  # no longer resolve: only a larger slot is left
                options = effective_options(job)
        action = after_failure(job, failure, options, self.policies, largest_bytes=largest)
        record = {"attempt": job.attempt, "kind": failure.kind, "message": failure.message}
        self.store.event(job.id, "failure", record)
        if not action.retry:
            self._move(job, "failed", action.reason, **over)
            return
        if action.delay_seconds:
            self._not_before[job.id] = self.monotonic() + action.delay_seconds
        retries = [*job.retries, action.record]
        self._move(job, "queued", action.reason, retries=retries, overrides=action.overrides, **over)

    def _learn(self, job: Job, exit: Exit) -> None:
        """Remember what the job really took, so that the next estimate is better. Of a fused one nobody knows."""
        if job.placement is not None and job.placement.fused:
            return
        key, planned = memory_key(job), job.spec.estimate.get("memory_bytes")
        actual = exit.peak_memory_bytes
        if job.placement is not None and job.placement.kind != "cpu":
            actual = device_peak(job)
        if key is not None and planned and actual:
            self.store.observe_memory(key, int(planned), int(actual))

    def _move(self, job: Job, to: Any, reason: str, **fields: Any) -> None:
        self.store.transition(job.id, job.state, to, reason, **fields)

    # Stalls

    def _check_stalls(self) -> None:
        now = self.monotonic()
        if now - self._stall_checked < STALL_CHECK_SECONDS:
            return
        self._stall_checked = now
        for job in self.store.jobs(states=["running"]):
            status = run_status(self.home, job)
            if status is None or status["state"] == "lost":
                continue
            key, mark = (
                (job.id, job.attempt),
                (status.get("step"), status.get("stage"), status.get("updated")),
            )
            before = self._progress.get(key)
            if before is None or before[0] != mark:
                self._progress[key] = (mark, now)
                continue
            quiet = now - before[1]
            if quiet < min(self.policies.stall_seconds, self.policies.quiet_seconds):
                continue
            median = median_step_seconds(job.spec.run_dir or "")
            if is_stalled(self.policies, str(status.get("stage")), quiet, median):
                self.stop_stalled(job, f"no progress for {quiet:.0f} s at step {status.get('step')}")

    # Placement

    def machine(self) -> Inventory:
        """The machine without a look at what others take just now."""
        if self.inventory is None:
            self.inventory = self._take()
        return self.inventory

    def _schedule(self) -> None:
        """Start what fits; record why the rest waits."""
        now, last = self.monotonic(), self.store.last_event()
        due = [name for name, moment in self._not_before.items() if moment <= now]
        if last == self._scheduled_event and not due and now - self._scheduled_at < RESCHEDULE_SECONDS:
            return
        self._scheduled_at = now
        for name in due:
            del self._not_before[name]
        jobs = {job.id: job for job in self.store.jobs(states=["queued"]) if job.id not in self._not_before}
        if jobs:
            problem = self._full_disk(jobs.values())
            if problem is not None:
                self.store.explain(dict.fromkeys(jobs, problem))
            else:
                self._start(jobs)
        self._scheduled_event = self.store.last_event()

    def _start(self, jobs: Mapping[str, Job]) -> None:
        active = self.store.jobs(states=ACTIVE)
        self.inventory = self._look(active)
        correction = lru_cache(maxsize=None)(self.store.correction)
        claims = {job.preempted["by"] for job in [*jobs.values(), *active] if job.preempted}
        waiting = [replace(queued(job, correction), first=job.id in claims) for job in jobs.values()]
        running = [entry for entry in map(placed, accounted(active)) if entry is not None]
        now, policy = self.clock(), self.schedule_policy
        in_group = Counter(entry.group for entry in running)
        for one in joining(
            jobs, waiting, active, correction, self.inventory, in_group, self._fuses, self.store.environment
        ):
            decision = Decision(one.job.id, one.placement, one.reason)
            self._begin(one.job, decision, estimate_memory(one.job, correction).reason)
            jobs = {name: job for name, job in jobs.items() if name != one.job.id}
            waiting = [entry for entry in waiting if entry.job_id != one.job.id]
            in_group[one.job.group] += 1
        waiting, fused = form_groups(jobs, waiting, correction, self.inventory, in_group, policy.usable)
        decisions = decide(waiting, self.inventory, running, now, policy)
        found = preempt(waiting, decisions, self.inventory, running, now, policy)
        making_room = [(entry.leaving, entry.job_id) for entry in running if entry.leaving]
        if found is not None:
            making_room += [(found.job_id, job_id) for job_id in self._make_room(found)]
        reasons: dict[str, str] = {}
        for decision in decisions:
            group = fused.get(decision.job_id)
            members = [job.id for job in group.members] if group else [decision.job_id]
            if decision.placement is None:
                fix = f"; {decision.fix}" if decision.fix else ""
                leaving = [job_id for by, job_id in making_room if by == decision.job_id]
                reason = (
                    f"waits until {', '.join(leaving)} of lower priority {'has' if len(leaving) == 1 else 'have'}"
                    " saved a checkpoint"
                    if leaving
                    else decision.reason + fix
                )
                reasons |= dict.fromkeys(members, reason)
            elif group is not None:
                self._begin_group(group, decision, correction)
            else:
                self._begin(
                    jobs[decision.job_id], decision, estimate_memory(jobs[decision.job_id], correction).reason
                )
        self.store.explain(reasons)

    def _make_room(self, found: Preemption) -> list[str]:
        """Preempt what was chosen; returns the jobs that leave."""
        left = [job_id for job_id in found.victims if self.preempt(job_id, found.job_id, found.reason)]
        if left:
            self.store.event(found.job_id, "preempts", {"reason": found.reason, "jobs": left})
        return left

    def _look(self, active: list[Job]) -> Inventory:
        pids = [pid for job in active for pid in processes_of(self.home, job)]
        reserved: dict[tuple[str, int], int] = {}
        for job in accounted(active):
            if job.placement is not None:
                for index in job.placement.devices:
                    key = (job.placement.kind, index)
                    reserved[key] = reserved.get(key, 0) + job.placement.memory_bytes
        return self._take(pids, reserved)

    def _begin_group(self, group: FusedGroup, decision: Decision, correction: Any) -> None:
        """Start all members in one place; whoever of them is launched first starts their common process."""
        assert decision.placement is not None
        host = host_id(group.members[0])
        write_group(self.home, host, group.members)
        placement = replace(decision.placement, fused=host)
        together = replace(decision, placement=placement, reason=f"{group.reason}; {decision.reason}")
        for job in group.members:
            self._begin(job, together, estimate_memory(job, correction).reason)

    def _launch_host(self, job: Job, env: Mapping[str, str], host: str) -> None:
        with self._hosts_lock:
            if host in self._hosts:
                return
            launch = build_host(self.home, job, env, self.inventory, grace_seconds=self.grace_seconds)
            with contextlib.suppress(AlreadyRunning):
                self.runner.launch(host, 1, launch, self.warm and not job.spec.cold)
            self._hosts.add(host)

    def _begin(self, job: Job, decision: Decision, estimate: str) -> None:
        try:
            started = self.store.transition(
                job.id, "queued", "starting", decision.reason, placement=decision.placement
            )
        except StateConflict:
            return  # stopped or paused while we decided
        self.store.event(
            job.id, "placed", {"reason": decision.reason, "memory": estimate, "attempt": started.attempt}
        )
        self._launching.add(job.id)
        if self._pool is None:
            self._launch(started)
        else:
            self._pool.submit(self._launch, started)

    def _launch(self, job: Job) -> None:
        """Bring an attempt into being. In a thread of its own; the next round sees what became of it."""
        try:
            changed = changed_data(job.spec.fingerprints)
            if changed:
                self._report_changes(job, changed)
            env = as_submitted(self.base_env, self.store.environment(job.group))
            if job.placement is not None and job.placement.fused:
                self._launch_host(job, env, job.placement.fused)
            launch = self._build(self.home, job, env, self.inventory, grace_seconds=self.grace_seconds)
            self.runner.launch(job.id, job.attempt, launch, self.warm and not job.spec.cold)
        except AlreadyRunning:
            pass  # the next look shows whose it is
        except (SwiftError, OSError) as error:
            self._launch_failed(job, error)
        except Exception as error:  # a thread that dies silently would leave the job starting for ever
            logger.exception("%s could not be started", job.id)
            self._launch_failed(job, error)
        finally:
            self._launching.discard(job.id)
            self.wake()

    def _launch_failed(self, job: Job, error: Exception) -> None:
        message = " ".join(str(error).split())[:500]
        try:
            # First make sure that nothing of it lives or comes to life later.
            if self.runner.observe(job.id, job.attempt).state in ("starting", "running", "ended"):
                return
            self._fail(self.store.job(job.id), Failure("launch", message), {"exit_code": None})
        except SwiftError as second:
            logger.warning("%s: %s; %s", job.id, message, second.message)

    def _report_changes(self, job: Job, changed: list[str]) -> None:
        """Data that is not what it was at submit: said in the log and in the events; the job runs."""
        self.store.event(job.id, "data_changed", {"attempt": job.attempt, "files": changed})
        folder = self.home.job_dir(job.id)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / OUTPUT_LOG).open("a", encoding="utf-8") as log:
            for line in changed:
                log.write(f"warning: data changed since the job was submitted: {line}\n")

    # Disk

    def _disks(self, jobs: Iterable[Job]) -> list[Path]:
        """Folders on all disks that jobs write to."""
        return sorted({self.home.root, *(Path(job.spec.run_dir).parent for job in jobs if job.spec.run_dir)})

    def _full_disk(self, jobs: Iterable[Job]) -> str | None:
        """Why nothing may start now: a disk that jobs write to is nearly full."""
        for folder in self._disks(jobs):
            free = free_bytes(folder)
            if free < self.least_free_bytes:
                return (
                    f"the queue is paused: {format_bytes(free)} free on the disk of {folder}, "
                    f"{format_bytes(self.least_free_bytes)} wanted"
                )
        return None


def _place(placement: Placement | None) -> str:
    if placement is None or not placement.devices:
        return "this machine"
    return ", ".join(f"{placement.kind}:{index}" for index in placement.devices)
