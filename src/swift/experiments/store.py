"""The record of all jobs: an append-only list of events, and the current state of each job beside it."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sqlite3
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swift.core.errors import SwiftError, UsageError
from swift.core.registry import suggest
from swift.experiments.database import Database
from swift.experiments.submit_checks import check_specs, run_folder
from swift.experiments.types import ACTIVE, FINISHED, LEGAL, STATES, Job, JobSpec, Placement, State

__all__ = ["Event", "Group", "StateConflict", "Store"]

_FIELDS = (
    "attempt", "placement", "exit_code", "retries", "overrides", "started", "ended", "priority",
    "spent", "preempted",
)  # fmt: skip
_PLAIN_FIELDS = (
    "state", "reason", "attempt", "exit_code", "submitted", "started", "ended", "priority", "spent",
)  # fmt: skip
_JSON_FIELDS = ("placement", "retries", "overrides", "preempted")
_KEPT_OBSERVATIONS = 20
_ID = re.compile(r"j([1-9]\d{0,17})")
_SIZE = re.compile(r"[\d.]+ (?:[KMGT]i)?B\b")
_GROUPS = """SELECT name, source_text, submitted, (SELECT group_concat('j' || seq, ' ') FROM
    (SELECT seq FROM jobs WHERE group_seq = groups.seq ORDER BY seq)) AS ids FROM groups"""
_SELECT = "SELECT jobs.*, groups.name AS group_name FROM jobs JOIN groups ON groups.seq = jobs.group_seq "


class StateConflict(SwiftError):
    """The job is not in a state from which this change is possible; ``state`` is the one it is in."""

    def __init__(self, message: str, state: State, *, why: str | None = None) -> None:
        super().__init__(message, why=why)
        self.state = state


@dataclass(frozen=True)
class Group:
    """One submission: its name (unique), what was submitted as text, and the ids of its jobs in order."""

    name: str
    source_text: str
    submitted: float
    jobs: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Event:
    """Something that happened. ``seq`` grows with every event; ``at`` is the wall clock, for people only."""

    seq: int
    at: float
    job: str | None
    kind: str
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Store:
    """All jobs of one ``SWIFT_HOME``. Safe for many threads and processes at once.

    A change and its event are written in one transaction. Order is that of the sequence numbers, never that of the
    wall clock, which may jump.
    """

    kept_samples = 500_000

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self._database = Database(self.path)
        self._clock = clock
        self._spec = functools.lru_cache(maxsize=2048)(lambda text: JobSpec.from_dict(json.loads(text)))

    # Submitting

    def add_group(
        self,
        name: str,
        source_text: str,
        specs: Sequence[JobSpec],
        environment: Mapping[str, str] | None = None,
    ) -> Group:
        """Record a submission, all of it or nothing. A name that is taken gets ``-2``, ``-3``, ...

        ``environment``: variables of the submitting shell (`environment` reads them; nothing else shows them).

        Raises UsageError for names that are missing, double or in a circle, and for a run folder that a live job of
        another experiment owns.
        """
        check_specs(specs)
        now = self._clock()
        with self._database.write() as connection:
            name = self.free_name(name)
            for spec in specs:
                self._check_owner(connection, spec)
            group = connection.execute(
                "INSERT INTO groups (name, source_text, submitted, environment) VALUES (?, ?, ?, ?)",
                (name, source_text, now, None if environment is None else json.dumps(dict(environment))),
            ).lastrowid
            ids = [self._insert_job(connection, int(group or 0), name, spec, now) for spec in specs]
        return Group(name, source_text, now, tuple(ids))

    def extend_group(self, name: str, specs: Sequence[JobSpec]) -> list[str]:
        """Add jobs to a submission (later trials of a sweep); returns their ids. They may wait for each other only.

        Raises UsageError as `add_group` does, and for a name that the group has already.
        """
        check_specs(specs)
        now = self._clock()
        with self._database.write() as connection:
            group = connection.execute("SELECT seq FROM groups WHERE name = ?", (name,)).fetchone()
            if group is None:
                raise UsageError(f"there is no group {name!r}", fix="swift ps --all")
            for spec in specs:
                taken = "SELECT 1 FROM jobs WHERE group_seq = ? AND name = ?"
                if connection.execute(taken, (group["seq"], spec.name)).fetchone() is not None:
                    raise UsageError(f"{name} has a job called {spec.name} already")
                self._check_owner(connection, spec)
            return [self._insert_job(connection, group["seq"], name, spec, now) for spec in specs]

    def _insert_job(
        self, connection: sqlite3.Connection, group_seq: int, group: str, spec: JobSpec, now: float
    ) -> str:
        state: State = "waiting" if spec.after else "queued"
        reason = f"waits for {', '.join(entry.job for entry in spec.after)}" if spec.after else "submitted"
        row = (group_seq, spec.name, run_folder(spec), json.dumps(spec.to_dict()), state, reason, now)
        seq = connection.execute(
            "INSERT INTO jobs (group_seq, name, run_dir, spec, state, reason, submitted, priority)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, spec.priority),
        ).lastrowid
        self._insert_event(connection, seq, "submitted", {"state": state, "group": group, "name": spec.name})
        return f"j{seq}"

    def _check_owner(self, connection: sqlite3.Connection, spec: JobSpec, own: Job | None = None) -> None:
        """Raise UsageError when a live job of another experiment owns the run folder of ``spec``."""
        folder = run_folder(spec)
        if folder is None:
            return
        rows = connection.execute(
            f"{_SELECT} WHERE run_dir = ? AND state NOT IN (?, ?, ?) ORDER BY jobs.seq", (folder, *FINISHED)
        )
        for job in map(self._job, rows.fetchall()):
            if own is not None and (own.group, own.spec.experiment) == (job.group, job.spec.experiment):
                continue
            raise UsageError(
                f"the run folder belongs to another job, {job.id} ({job.group}/{job.spec.name}, {job.state})",
                where=str(spec.run_dir),
                why="two runs in one folder would overwrite each other",
                fix=f"another --output_dir or name; or first: swift stop {job.id}",
            )

    # Reading

    def jobs(
        self,
        states: Collection[State] | None = None,
        group: str | None = None,
        ids: Iterable[str] | None = None,
        limit: int | None = None,
    ) -> list[Job]:
        """Jobs in the order of submission; with ``limit`` the newest so many. Unknown ids are left out."""
        conditions: list[str] = []
        values: list[object] = []
        if states is not None:
            conditions.append(f"jobs.state IN ({_marks(states)})")
            values += list(states)
        if group is not None:
            conditions.append("jobs.group_seq = (SELECT seq FROM groups WHERE name = ?)")
            values.append(group)
        if ids is not None:
            numbers = [number for number in map(_number, ids) if number is not None]
            conditions.append(f"jobs.seq IN ({_marks(numbers)})")
            values += numbers
        query = _SELECT + (f"WHERE {' AND '.join(conditions)} " if conditions else "")
        # A negative LIMIT means none.
        query += "ORDER BY jobs.seq " + ("DESC LIMIT ?" if limit is not None else "LIMIT ?")
        rows = self._database.read(query, (*values, -1 if limit is None else limit))
        return [self._job(row) for row in (reversed(rows) if limit is not None else rows)]

    def job(self, word: str) -> Job:
        """The job with this id, else the newest called ``NAME`` or ``GROUP/NAME``. Raises UsageError."""
        number = _number(word)
        rows = self._database.read(_SELECT + "WHERE jobs.seq = ?", (number,)) if number is not None else []
        if not rows:
            rows = self._database.read(
                _SELECT + "WHERE jobs.name = ? ORDER BY jobs.seq DESC LIMIT 1", (word,)
            )
        if not rows and "/" in word:
            group, _, name = word.partition("/")
            rows = self._database.read(_SELECT + "WHERE jobs.name = ? AND groups.name = ?", (name, group))
        if rows:
            return self._job(rows[0])
        known = self._database.read("SELECT name FROM jobs GROUP BY name ORDER BY max(seq) DESC LIMIT 500")
        raise UsageError(
            f"there is no job {word!r}", fix=suggest(word, [row["name"] for row in known], "swift ps --all")
        )

    def groups(self, limit: int | None = None) -> list[Group]:
        """Submissions in order; with ``limit`` the newest so many."""
        rows = self._database.read(f"{_GROUPS} ORDER BY seq DESC LIMIT ?", (-1 if limit is None else limit,))
        return [_group(row) for row in reversed(rows)]

    def group(self, name: str) -> Group | None:
        """The submission of this name; None when there is none."""
        rows = self._database.read(f"{_GROUPS} WHERE name = ?", (name,))
        return _group(rows[0]) if rows else None

    def free_name(self, name: str) -> str:
        """``NAME``, or ``NAME-2``, ``NAME-3``... when a submission has that name."""
        taken = {row["name"] for row in self._database.read("SELECT name FROM groups")}
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        return name if name not in taken else next(other for other in numbered if other not in taken)

    def environment(self, group: str) -> dict[str, str] | None:
        """Variables of the shell that the group was submitted from; None when none were recorded. May hold secrets."""
        rows = self._database.read("SELECT environment FROM groups WHERE name = ?", (group,))
        return json.loads(rows[0]["environment"]) if rows and rows[0]["environment"] else None

    def counts(self) -> dict[State, int]:
        """Number of jobs in each state."""
        rows = self._database.read("SELECT state, count(*) AS n FROM jobs GROUP BY state")
        found = {row["state"]: row["n"] for row in rows}
        return {state: found.get(state, 0) for state in STATES}

    # Changing

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Everything this thread changes in the block is one transaction: many changes at the price of one."""
        with self._database.write():
            yield

    def transition(
        self, job_id: str, from_states: State | Collection[State], to: State, reason: str, **fields: Any
    ) -> Job:
        """Move a job to state ``to``, if it still is in one of ``from_states``; of two callers only one succeeds.

        ``starting`` counts a new attempt: ``attempt`` (default: the next) must be above the recorded one, so that a
        decision taken before somebody else's attempt is void. ``started`` is now, ``ended`` too unless given.

        Args:
            fields: attempt, placement, exit_code, retries, overrides, started, ended, priority, preempted.

        Raises StateConflict when the job is in another state or the way is not in ``LEGAL``, UsageError for an
        unknown job or when its run folder has another live owner by now.
        """
        expected = {from_states} if isinstance(from_states, str) else set(from_states)
        seq = self._seq(job_id)
        with self._database.write() as connection:
            job = self._read_job(connection, seq)
            if job.state not in expected:
                raise StateConflict(
                    f"{job_id} is {job.state}, not {' or '.join(sorted(expected))}",
                    job.state,
                    why=job.reason or None,
                )
            if to not in LEGAL[job.state]:
                raise StateConflict(f"{job_id} is {job.state} and cannot become {to}", job.state)
            if job.state in FINISHED:
                self._check_owner(connection, job.spec, job)
            changes = self._changes(job, to, fields)
            self._update(connection, seq, {"state": to, "reason": reason, **changes})
            data = {"from": job.state, "to": to, "reason": reason, **_plain(changes)}
            self._insert_event(connection, seq, "state", data)
            return self._read_job(connection, seq)

    def _changes(self, job: Job, to: State, fields: dict[str, Any]) -> dict[str, Any]:
        now = self._clock()
        # An attempt may have ended long before somebody looked.
        end = fields.pop("ended", None) or now
        changes: dict[str, Any] = {}
        if job.state in ACTIVE and to not in ACTIVE and job.started is not None:
            changes["spent"] = job.spent + max(0.0, end - job.started)
        if to == "starting":
            attempt = fields.get("attempt", job.attempt + 1)
            if attempt <= job.attempt:
                raise StateConflict(f"attempt {attempt} of {job.id} was started already", job.state)
            changes |= {
                "attempt": attempt,
                "started": now,
                "ended": None,
                "exit_code": None,
                "preempted": None,
            }
        elif to in FINISHED:
            changes["ended"] = max(end, job.started or end)  # a clock set back makes no negative times
        elif to in ("queued", "waiting"):
            changes |= {"ended": None, "placement": None}
        return {**changes, **fields}

    def update(self, job_id: str, *, reason: str | None = None, **fields: Any) -> Job:
        """Change fields of a job (those of `transition`) without changing its state."""
        seq = self._seq(job_id)
        changes = {**({"reason": reason} if reason is not None else {}), **fields}
        with self._database.write() as connection:
            if changes:
                self._update(connection, seq, changes)
                self._insert_event(connection, seq, "updated", _plain(changes))
            return self._read_job(connection, seq)

    def explain(self, reasons: Mapping[str, str]) -> int:
        """Record why jobs wait; returns for how many it changed. Jobs that are no longer queued are left alone.

        A reason that differs only in sizes ("3.1 GiB free") is the same one: free memory moves all the time.
        """
        by_seq = {self._seq(job_id): reason for job_id, reason in reasons.items()}
        query = "SELECT seq, reason FROM jobs WHERE state IN ('queued', 'waiting')"

        def new(rows: Iterable[sqlite3.Row]) -> list[int]:
            return [
                row["seq"]
                for row in rows
                if row["seq"] in by_seq and _SIZE.sub("", by_seq[row["seq"]]) != _SIZE.sub("", row["reason"])
            ]

        # Most ticks change nothing: look before taking the write lock.
        if not by_seq or not new(self._database.read(query)):
            return 0
        with self._database.write() as connection:
            changed = new(connection.execute(query).fetchall())
            for seq in changed:
                connection.execute("UPDATE jobs SET reason = ? WHERE seq = ?", (by_seq[seq], seq))
                self._insert_event(connection, seq, "reason", {"reason": by_seq[seq]})
        return len(changed)

    def _update(self, connection: sqlite3.Connection, seq: int, changes: dict[str, Any]) -> None:
        unknown = set(changes) - {*_FIELDS, "state", "reason"}
        if unknown:
            raise TypeError(f"a job has no changeable {', '.join(sorted(unknown))}")
        values = _plain(changes)
        for name in _JSON_FIELDS:
            if values.get(name) is not None:
                values[name] = json.dumps(values[name])
        assignments = ", ".join(f"{name} = ?" for name in values)
        connection.execute(f"UPDATE jobs SET {assignments} WHERE seq = ?", (*values.values(), seq))

    # Events

    def event(self, job_id: str | None, kind: str, data: Mapping[str, Any]) -> int:
        """Append an event (of a job, or None: of the machine) and return its number."""
        seq = self._seq(job_id) if job_id is not None else None
        with self._database.write() as connection:
            return self._insert_event(connection, seq, kind, data)

    def events(self, after: int = 0, job: str | None = None, limit: int | None = None) -> list[Event]:
        """Events with a number above ``after``, oldest first."""
        condition, values = "seq > ?", [after]
        if job is not None:
            condition += " AND job_seq = ?"
            values.append(self._seq(job))
        rows = self._database.read(
            f"SELECT * FROM events WHERE {condition} ORDER BY seq LIMIT ?",
            (*values, -1 if limit is None else limit),
        )
        return [_event(row) for row in rows]

    def last_event(self) -> int:
        """Number of the newest event; 0 when there is none. Cheap: a way to ask whether anything changed."""
        return int(self._database.read("SELECT coalesce(max(seq), 0) AS n FROM events")[0]["n"])

    def _insert_event(
        self, connection: sqlite3.Connection, seq: int | None, kind: str, data: Mapping[str, Any]
    ) -> int:
        row = connection.execute(
            "INSERT INTO events (at, job_seq, kind, data) VALUES (?, ?, ?, ?)",
            (self._clock(), seq, kind, json.dumps(dict(data))),
        )
        return int(row.lastrowid or 0)

    # Measurements

    def record_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append measurements: plain mappings; ``subject`` ("host", "cuda:0", "j3") and ``at`` are taken out. The
        oldest beyond ``kept_samples`` are dropped."""
        now = self._clock()
        values = [
            (
                row.get("at", now),
                row.get("subject", ""),
                json.dumps({key: value for key, value in row.items() if key not in ("at", "subject")}),
            )
            for row in rows
        ]
        with self._database.write() as connection:
            connection.executemany("INSERT INTO samples (at, subject, data) VALUES (?, ?, ?)", values)
            newest = "(SELECT coalesce(max(seq), 0) FROM samples)"
            connection.execute(f"DELETE FROM samples WHERE seq <= {newest} - ?", (self.kept_samples,))

    def samples(self, since: float = 0.0, subject: str | None = None) -> list[dict[str, Any]]:
        """Measurements taken at ``since`` (wall clock) or later, in the order of their recording."""
        condition, values = "at >= ?", [since]
        if subject is not None:
            condition += " AND subject = ?"
        rows = self._database.read(
            f"SELECT * FROM samples WHERE {condition} ORDER BY seq",
            (*values, subject) if subject is not None else tuple(values),
        )
        return [{"at": row["at"], "subject": row["subject"], **json.loads(row["data"])} for row in rows]

    def observe_memory(self, key: str, estimate: int, actual: int) -> None:
        """Remember what a finished run really took, beside what the plan had said; both in bytes."""
        if estimate <= 0 or actual <= 0:
            return  # nothing was estimated or measured: there is no ratio to learn from
        with self._database.write() as connection:
            connection.execute(
                "INSERT INTO memory (key, estimate, actual) VALUES (?, ?, ?)", (key, estimate, actual)
            )

    def correction(self, key: str) -> tuple[float, int]:
        """(median of actual / estimate over the newest 20 observations, their number); (1.0, 0) without any."""
        rows = self._database.read(
            "SELECT 1.0 * actual / estimate AS ratio FROM memory WHERE key = ? ORDER BY seq DESC LIMIT ?",
            (key, _KEPT_OBSERVATIONS),
        )
        return (statistics.median(row["ratio"] for row in rows), len(rows)) if rows else (1.0, 0)

    def close(self) -> None:
        """Close this thread's connection."""
        self._database.close()

    # Rows

    def _seq(self, job_id: str) -> int:
        number = _number(job_id)
        if number is None:
            raise UsageError(f"there is no job {job_id!r}", fix="swift ps --all")
        return number

    def _read_job(self, connection: sqlite3.Connection, seq: int) -> Job:
        row = connection.execute(_SELECT + "WHERE jobs.seq = ?", (seq,)).fetchone()
        if row is None:
            raise UsageError(f"there is no job 'j{seq}'", fix="swift ps --all")
        return self._job(row)

    def _job(self, row: sqlite3.Row) -> Job:
        placement = json.loads(row["placement"]) if row["placement"] else None
        if placement is not None:
            placement = Placement(**{**placement, "devices": tuple(placement["devices"])})
        return Job(
            id=f"j{row['seq']}",
            group=row["group_name"],
            spec=self._spec(row["spec"]),
            placement=placement,
            retries=json.loads(row["retries"]),
            overrides=json.loads(row["overrides"]),
            preempted=json.loads(row["preempted"]) if row["preempted"] else None,
            **{name: row[name] for name in _PLAIN_FIELDS},
        )


def _event(row: sqlite3.Row) -> Event:
    job = f"j{row['job_seq']}" if row["job_seq"] is not None else None
    return Event(row["seq"], row["at"], job, row["kind"], json.loads(row["data"]))


def _group(row: sqlite3.Row) -> Group:
    return Group(row["name"], row["source_text"], row["submitted"], tuple((row["ids"] or "").split()))


def _number(job_id: str) -> int | None:
    match = _ID.fullmatch(job_id)
    return int(match[1]) if match else None


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" * len(values))


def _plain(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asdict(value) if isinstance(value, Placement) else value for name, value in changes.items()}
