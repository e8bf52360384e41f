"""What to do about a job that failed: which kind of failure it was, and what the next attempt changes.

Pure functions: everything they look at is handed in, so each rule is a line of a test.
"""

from __future__ import annotations

import math
import re
import signal as signals
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swift.core.format import format_bytes, format_duration
from swift.experiments.runner import Exit
from swift.experiments.types import Job
from swift.plan.ladder import AFTER_FAILURE, changes, is_in_batch

__all__ = ["Action", "Failure", "Policies", "after_failure", "classify", "is_stalled"]

_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|can't allocate memory|cannot allocate memory|std::bad_alloc"
    r"|\bMemoryError\b|CUBLAS_STATUS_ALLOC_FAILED|NPU out of memory|memory limit",
    re.IGNORECASE,
)
_EXPLAINED = re.compile(r"^error: (?P<message>.*)$", re.MULTILINE)
_CRASHED = re.compile(r"run again with --debug|^Traceback \(most recent call last\)", re.MULTILINE)
_NEVER_RETRIED = ("answer", "config", "data", "disk", "refused", "time_limit")
_WORDS = {
    "out_of_memory": "out of memory",
    "nonfinite": "the loss is not finite",
    "data": "bad data",
    "config": "bad configuration",
    "disk": "the disk is full",
    "refused": "refused",
    "time_limit": "time limit",
    "stall": "stalled",
    "lost": "the supervisor died",
    "interrupted": "interrupted from outside",
    "launch": "could not be started",
    "answer": "exit code 1",
    "crash": "crashed",
}


@dataclass(frozen=True)
class Policies:
    """How often what is tried again.

    Attributes:
        out_of_memory: times that a job is made smaller.
        crashes: retries after crashes, interruptions and failed launches together.
        nonfinite: retries after a loss that was not finite; the same step would fail again, so none.
        stalls: restarts of a job that stood still.
        losses: retries after the supervisor was killed; reboots count.
        backoff_seconds: before the first retry after a crash; doubled for each further one.
        stall_factor, stall_seconds: a job stands still when no step came for so many median step times, and for
            so many seconds at least.
        quiet_seconds: the same before the first step and outside of training steps.
    """

    out_of_memory: int = 3
    crashes: int = 2
    nonfinite: int = 0
    stalls: int = 1
    losses: int = 10
    backoff_seconds: float = 5.0
    stall_factor: float = 50.0
    stall_seconds: float = 300.0
    quiet_seconds: float = 3600.0


@dataclass(frozen=True)
class Failure:
    """``kind``: a key of the table above; ``message``: what the job said about it."""

    kind: str
    message: str = ""

    def __str__(self) -> str:
        words = _WORDS[self.kind]
        if words in self.message:
            return self.message
        return f"{words}: {self.message}" if self.message else words


@dataclass(frozen=True)
class Action:
    """What happens now.

    Attributes:
        retry: False: the job has failed.
        reason: one sentence for ``ps``.
        overrides: options changed from here on.
        record: one more entry of ``Job.retries``; ``memory_bytes`` in it asks for a larger slot.
        delay_seconds: not before so much time has passed.
    """

    retry: bool
    reason: str
    overrides: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    delay_seconds: float = 0.0


def classify(
    exit: Exit | None,
    status: Mapping[str, Any] | None,
    log: str,
    intent: str | None = None,
    *,
    answers: bool = False,
) -> Failure:
    """The kind of failure of an attempt that did not succeed.

    Args:
        exit: how it ended; None or ``lost`` when nobody saw it.
        status: ``status.json`` of its run, when this attempt wrote it.
        log: the end of the attempt's output.
        intent: ``stall`` when it was stopped for standing still.
        answers: the command says "no" by exit code 1 (``doctor``, ``data check``), so that is no crash.
    """
    if intent == "stall":
        return Failure("stall", "no step for too long")
    if exit is None or exit.reason == "lost":
        return Failure("lost", "its processes were killed or the machine was restarted")
    if exit.reason == "time_limit":
        return Failure("time_limit", "the time limit was reached")
    if exit.reason == "memory_limit":
        return Failure("out_of_memory", "it exceeded the memory it was given")
    if exit.signal == signals.SIGKILL:
        return Failure("out_of_memory", "killed by the kernel (SIGKILL), most likely for memory")
    message = _message(status, log)
    if answers and exit.exit_code == 1 and not _CRASHED.search(log):
        return Failure("answer", message)
    recorded = (status or {}).get("failure")
    if recorded in _WORDS:
        return Failure(str(recorded), message)
    if _OUT_OF_MEMORY.search(log):
        return Failure("out_of_memory", message)
    if exit.code == 2:
        return Failure("config", message)
    if exit.code in (128 + signals.SIGTERM, 128 + signals.SIGINT, 130):
        return Failure("interrupted", message or f"exit code {exit.code}")
    if _EXPLAINED.search(log) and not _CRASHED.search(log):
        return Failure("refused", message)  # explained: the next attempt would say the same
    if exit.signal is not None:
        return Failure("crash", f"killed by {signals.Signals(exit.signal).name}")
    return Failure("crash", message or f"exit code {exit.code}")


def _message(status: Mapping[str, Any] | None, log: str) -> str:
    """One line about what went wrong: the run's own, else the last error in the log."""
    text = str((status or {}).get("message") or "")
    if not text:
        found = list(_EXPLAINED.finditer(log))
        text = found[-1]["message"] if found else ""
    return text.strip().splitlines()[0][:300] if text.strip() else ""


def after_failure(
    job: Job,
    failure: Failure,
    options: Mapping[str, Any],
    policies: Policies,
    *,
    largest_bytes: int | None = None,
) -> Action:
    """Retry or give up.

    Args:
        options: the options in force (defaults and derived ones too), flat; empty for commands without a run.
        largest_bytes: memory of the largest device, for a larger slot.
    """
    if failure.kind in _NEVER_RETRIED:
        return Action(False, str(failure))
    if failure.kind == "out_of_memory":
        return _smaller(job, failure, options, policies, largest_bytes)
    limit = {"nonfinite": policies.nonfinite, "stall": policies.stalls, "lost": policies.losses}.get(
        failure.kind, policies.crashes
    )
    counted = (failure.kind,) if failure.kind in ("nonfinite", "stall", "lost") else _CRASHES
    before = sum(entry.get("kind") in counted for entry in job.retries)
    if before >= limit:
        note = f" (after {before} {'retry' if before == 1 else 'retries'})" if before else ""
        return Action(False, f"{failure}{note}")
    delay = policies.backoff_seconds * 2**before if failure.kind in _CRASHES else 0.0
    when = f" in {format_duration(delay)}" if delay else ""
    return _retry(job, failure, f"{failure}; tried again{when}", "tried again", delay_seconds=delay)


_CRASHES = ("crash", "interrupted", "launch")


def _retry(
    job: Job,
    failure: Failure,
    reason: str,
    change: str,
    *,
    overrides: dict[str, Any] | None = None,
    memory_bytes: int | None = None,
    delay_seconds: float = 0.0,
) -> Action:
    record: dict[str, Any] = {
        "attempt": job.attempt,
        "kind": failure.kind,
        "message": failure.message,
        "change": change,
    }
    if memory_bytes is not None:
        record["memory_bytes"] = memory_bytes
    if overrides:
        record["overrides"] = overrides
    return Action(True, reason, {**job.overrides, **(overrides or {})}, record, delay_seconds)


def _smaller(
    job: Job, failure: Failure, options: Mapping[str, Any], policies: Policies, largest_bytes: int | None
) -> Action:
    """The first rungs of `swift.plan.ladder`, which leave the results as they are, then a larger slot.

    The micro-batch of an in-batch loss stays: with another one it would be another loss.
    """
    before = sum(entry.get("kind") == "out_of_memory" for entry in job.retries)
    if before >= policies.out_of_memory:
        return Action(False, f"{failure} ({before} times made smaller)")
    change = next(changes(options, AFTER_FAILURE), None) if options else None
    if change is not None:
        reason = f"out of memory: {change.words}"
        return _retry(job, failure, reason, change.words, overrides=change.overrides)
    held = job.placement.memory_bytes if job.placement else 0
    if held and largest_bytes and held < 0.9 * largest_bytes:
        wanted = min(2 * held, math.floor(0.94 * largest_bytes))
        words = f"memory {format_bytes(held)} -> {format_bytes(wanted)}"
        return _retry(job, failure, f"out of memory: {words}", words, memory_bytes=wanted)
    loss = options.get("loss_type") or " and ".join(options.get("rlhf_loss_type") or [])
    note = f" ({loss} with a smaller micro-batch is another loss)" if is_in_batch(options) else ""
    return Action(False, f"{failure}; there is nothing smaller to try{note}")


def is_stalled(
    policies: Policies, stage: str, quiet_seconds: float, median_step_seconds: float | None
) -> bool:
    """Whether a job that has shown no progress for ``quiet_seconds`` stands still.

    Args:
        stage: as in ``status.json``; only ``train`` has steps.
        median_step_seconds: None before steps were timed.
    """
    if stage != "train" or median_step_seconds is None:
        return quiet_seconds > policies.quiet_seconds
    return quiet_seconds > max(policies.stall_seconds, policies.stall_factor * median_step_seconds)
