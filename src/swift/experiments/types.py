"""The nouns of the experiment service. Plain data: everything here goes through JSON unchanged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

__all__ = [
    "ACTIVE",
    "FINISHED",
    "LEGAL",
    "STATES",
    "TRAINING",
    "Dependency",
    "Device",
    "Inventory",
    "Job",
    "JobSpec",
    "Launch",
    "Needs",
    "Placement",
    "State",
    "state_words",
]

State = Literal[
    "queued", "waiting", "starting", "running", "pausing", "paused", "succeeded", "failed", "cancelled"
]
STATES: tuple[State, ...] = get_args(State)
"""``waiting``: for other jobs; ``queued``: ready, for devices; the rest says what it means."""
ACTIVE: tuple[State, ...] = ("starting", "running", "pausing")
"""A supervisor lives."""
FINISHED: tuple[State, ...] = ("succeeded", "failed", "cancelled")


def state_words(state: State) -> str:
    """``is running``, ``has succeeded``, ``has been cancelled``."""
    return {"succeeded": "has succeeded", "failed": "has failed", "cancelled": "has been cancelled"}.get(
        state, f"is {state}"
    )


LEGAL: dict[State, tuple[State, ...]] = {
    "queued": ("starting", "waiting", "paused", "failed", "cancelled"),
    "waiting": ("queued", "paused", "failed", "cancelled"),
    "starting": ("running", "pausing", "queued", "succeeded", "failed", "cancelled"),
    "running": ("pausing", "queued", "succeeded", "failed", "cancelled"),
    "pausing": ("paused", "queued", "running", "succeeded", "failed", "cancelled"),
    "paused": ("queued", "waiting", "failed", "cancelled"),
    "succeeded": (),
    "failed": ("queued", "waiting"),
    "cancelled": ("queued", "waiting"),
}
"""state -> where it may lead. Back to ``queued``: preempted, retried, or found dead after a reboot."""

TRAINING = ("pt", "sft", "rlhf")
"""Commands with a run folder, checkpoints and ``swift resume``."""

Condition = Literal["success", "failure", "always"]


@dataclass(frozen=True)
class Dependency:
    """This job starts when ``job`` (a name within the same group) has ended as ``condition`` says."""

    job: str
    condition: Condition = "success"


@dataclass(frozen=True)
class Needs:
    """What a job asks of the machine.

    Attributes:
        devices: accelerators (or CPU slots where there are none).
        memory_bytes: per device; None: as the plan estimates.
        threads: CPU threads; None: an equal share of the cores.
        time_limit_seconds: then it is stopped (with a checkpoint) and has failed.
        exclusive: no other job on its devices.
        preemption: it may preempt jobs of lower priority, and be preempted by those of higher.
    """

    devices: int = 1
    memory_bytes: int | None = None
    threads: int | None = None
    time_limit_seconds: float | None = None
    exclusive: bool = False
    preemption: bool = True


@dataclass(frozen=True)
class JobSpec:
    """What was submitted; never changed afterwards.

    Attributes:
        name: unique within its group: ``EXPERIMENT`` or ``EXPERIMENT/STAGE``.
        experiment: the experiment it belongs to.
        command: the word after ``swift``.
        options: for commands with options: everything the user set, flat, as resolved at submit.
        words: for other commands: the words after ``swift COMMAND``.
        cwd, env: where and with which extra variables it runs.
        run_dir: absolute run folder, for training commands.
        parameters: what makes this experiment differ from its siblings (for tables).
        fingerprints: of the data files at submit (path, bytes, sha256).
        code_version: of this program at submit.
        fuse: see `swift.experiments.fusing.fuse_fields`.
    """

    name: str
    experiment: str
    command: str
    options: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    cwd: str = "."
    env: dict[str, str] = field(default_factory=dict)
    run_dir: str | None = None
    needs: Needs = field(default_factory=Needs)
    priority: int = 0
    max_parallel: int | None = None
    after: list[Dependency] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    fingerprints: list[dict[str, Any]] = field(default_factory=list)
    estimate: dict[str, Any] = field(default_factory=dict)
    code_version: str = ""
    cold: bool = False
    fuse: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> JobSpec:
        needs = Needs(**values["needs"])
        after = [Dependency(**entry) for entry in values["after"]]
        return cls(**{**values, "needs": needs, "after": after})


@dataclass(frozen=True)
class Device:
    """One accelerator, or one CPU slot.

    Attributes:
        index: as the vendor's visible-devices variable counts.
        memory_bytes: in all; free_bytes: not taken by processes that are not ours.
        foreign: other people's processes on it (pid, bytes).
    """

    kind: str
    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    foreign: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Inventory:
    """The machine: its devices, cores, and host memory in bytes."""

    devices: tuple[Device, ...]
    cores: int
    host_memory_bytes: int


@dataclass(frozen=True)
class Placement:
    """Where a job runs: devices of one kind, its share of memory on each, and threads.

    ``fused``: the process that runs it together with others, which have the same placement; "" for one of its own.
    """

    kind: str
    devices: tuple[int, ...]
    memory_bytes: int
    threads: int
    fused: str = ""


@dataclass
class Job:
    """A job as the store knows it.

    Attributes:
        id: short and unique, such as ``j12``.
        group: the submission it came with, by its name.
        attempt: number of launches so far; 0 before the first.
        reason: one sentence: why it waits, why it failed.
        retries: what was changed for each relaunch ("out of memory: micro-batch 4 -> 2").
        overrides: options changed by policies, on top of the snapshot's.
        started, ended: of the last attempt; spent: seconds of all attempts that have ended.
        preempted: ``{"by": job id, "at": wall clock}`` while it leaves or waits to go on after a preemption.
    """

    id: str
    group: str
    spec: JobSpec
    state: State
    reason: str = ""
    attempt: int = 0
    placement: Placement | None = None
    exit_code: int | None = None
    retries: list[dict[str, Any]] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    submitted: float = 0.0
    started: float | None = None
    ended: float | None = None
    priority: int = 0
    spent: float = 0.0
    preempted: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As ``swift ps --json`` shows it."""
        return {
            "id": self.id,
            "name": self.spec.name,
            "experiment": self.spec.experiment,
            "group": self.group,
            "command": self.spec.command,
            "state": self.state,
            "run_dir": self.spec.run_dir,
            "devices": list(self.placement.devices) if self.placement else [],
            "reason": self.reason,
            "attempt": self.attempt,
            "priority": self.priority,
            "exit_code": self.exit_code,
            "submitted": self.submitted,
            "started": self.started,
            "ended": self.ended,
            "spent_seconds": self.spent,
            "preempted_by": self.preempted["by"] if self.preempted else None,
            "parameters": self.spec.parameters,
            "retries": self.retries,
        }


@dataclass(frozen=True)
class Launch:
    """One attempt to run a job, ready for its supervisor (``launch.json``).

    Attributes:
        argv: the whole command line, ``[python, -m, swift, ...]``; a warm worker runs the words after ``swift``.
        env: the complete environment of the child.
        memory_bytes: hard limit of the process group where one can be set; None: no limit.
    """

    argv: list[str]
    cwd: str
    env: dict[str, str]
    log: str
    threads: int = 1
    memory_bytes: int | None = None
    time_limit_seconds: float | None = None
    grace_seconds: float = 30.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
