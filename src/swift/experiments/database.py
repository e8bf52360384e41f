"""One SQLite file for many threads and processes: connections, transactions, migrations, errors in plain words."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swift.core.errors import SwiftError

__all__ = ["MIGRATIONS", "VERSION", "Database", "StoreUnusable"]

# The tables, as steps from one version to the next. A released step is never edited: add one.
_VERSION_1 = (
    """CREATE TABLE groups (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        source_text TEXT NOT NULL,
        submitted REAL NOT NULL
    )""",
    # jN is the job with seq N. Numbers order everything: the wall clock may jump.
    """CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        group_seq INTEGER NOT NULL REFERENCES groups (seq),
        name TEXT NOT NULL,
        run_dir TEXT,
        spec TEXT NOT NULL,
        state TEXT NOT NULL,
        reason TEXT NOT NULL,
        attempt INTEGER NOT NULL DEFAULT 0,
        placement TEXT,
        exit_code INTEGER,
        retries TEXT NOT NULL DEFAULT '[]',
        overrides TEXT NOT NULL DEFAULT '{}',
        submitted REAL NOT NULL,
        started REAL,
        ended REAL,
        priority INTEGER NOT NULL,
        UNIQUE (group_seq, name)
    )""",
    "CREATE INDEX jobs_by_state ON jobs (state, seq)",
    "CREATE INDEX jobs_by_name ON jobs (name, seq)",
    "CREATE INDEX jobs_by_folder ON jobs (run_dir) WHERE run_dir IS NOT NULL",
    """CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        job_seq INTEGER REFERENCES jobs (seq),
        kind TEXT NOT NULL,
        data TEXT NOT NULL
    )""",
    "CREATE INDEX events_by_job ON events (job_seq, seq)",
    """CREATE TRIGGER events_stay BEFORE UPDATE ON events
        BEGIN SELECT RAISE (ABORT, 'events are append-only'); END""",
    """CREATE TRIGGER events_remain BEFORE DELETE ON events
        BEGIN SELECT RAISE (ABORT, 'events are append-only'); END""",
    """CREATE TABLE samples (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        subject TEXT NOT NULL,
        data TEXT NOT NULL
    )""",
    "CREATE INDEX samples_by_time ON samples (at)",
    """CREATE TABLE memory (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        key TEXT NOT NULL,
        estimate INTEGER NOT NULL,
        actual INTEGER NOT NULL
    )""",
    "CREATE INDEX memory_by_key ON memory (key, seq)",
)

_VERSION_2 = (
    "ALTER TABLE groups ADD COLUMN environment TEXT",
    "ALTER TABLE jobs ADD COLUMN spent REAL NOT NULL DEFAULT 0",
    "ALTER TABLE jobs ADD COLUMN preempted TEXT",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1, _VERSION_2)
"""Statements of step N lead from version N to N + 1."""

VERSION = len(MIGRATIONS)

_BUSY_SECONDS = 20.0
_CAUSES = {
    sqlite3.SQLITE_FULL: (
        "the disk is full",
        "free some space there; nothing that was recorded before is lost",
    ),
    sqlite3.SQLITE_READONLY: ("the disk or the file is read-only", "make it writable, or set SWIFT_HOME"),
    sqlite3.SQLITE_CANTOPEN: (
        "the file cannot be opened or created",
        "check the folder's permissions, or set SWIFT_HOME",
    ),
    sqlite3.SQLITE_IOERR: ("the disk reported an error", "check the disk (space, quota, cable, network)"),
    sqlite3.SQLITE_BUSY: (
        f"another process has kept it locked for {_BUSY_SECONDS:.0f} s",
        "swift service status",
    ),
    sqlite3.SQLITE_NOTADB: ("the file is not a store of swift", "move it away, or set SWIFT_HOME"),
    sqlite3.SQLITE_CORRUPT: ("the file is damaged", "move it away; the run folders are not touched"),
}


class StoreUnusable(SwiftError):
    """The file cannot be read or written, perhaps only just now: nothing was changed."""


class Database:
    """A SQLite database in WAL mode, brought to the newest version on opening.

    Each thread has its own connection; after a fork the child opens new ones. Writers wait for each other.

    Raises StoreUnusable (never sqlite3's errors) for what the user can do something about: a read-only or full disk,
    a file that is something else; SwiftError for a file of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._local = threading.local()
        self._pid = os.getpid()
        self._inherited: list[threading.local] = []
        with contextlib.suppress(OSError):  # SQLite says below what is wrong
            self.path.touch(mode=0o600)
            self.path.chmod(self.path.stat().st_mode & 0o700)  # accounts of submitting shells stand in it
        with self._explained():
            connection = self._connect()
            self._set_mode(connection)
            self._migrate(connection)

    def read(self, query: str, values: tuple[object, ...] = ()) -> list[sqlite3.Row]:
        """All rows of one query."""
        with self._explained():
            return self._connection().execute(query, values).fetchall()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction, alone among all writers from its first line; undone when the block raises.

        Within another one of this thread it is a part of that: undone alone, but kept only with the whole.
        """
        with self._explained():
            connection = self._connection()
            inner = connection.in_transaction
            connection.execute("SAVEPOINT part" if inner else "BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("RELEASE part" if inner else "COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk may have rolled back already
                    for undo in ("ROLLBACK TO part", "RELEASE part") if inner else ("ROLLBACK",):
                        connection.execute(undo)
                raise

    def close(self) -> None:
        """Close this thread's connection; the next use opens a new one."""
        connection = getattr(self._local, "connection", None)
        if connection is not None and self._pid == os.getpid():
            self._local = threading.local()
            connection.close()

    def _connection(self) -> sqlite3.Connection:
        if self._pid != os.getpid():
            # SQLite connections must not cross a fork, nor be closed in the child: keep the parent's, unused.
            self._inherited.append(self._local)
            self._local, self._pid = threading.local(), os.getpid()
        connection = getattr(self._local, "connection", None)
        return connection if connection is not None else self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        # FULL: what was answered with "submitted" survives a power cut, too.
        connection.execute("PRAGMA synchronous = FULL")
        self._local.connection = connection
        return connection

    def _set_mode(self, connection: sqlite3.Connection) -> None:
        """Switch to WAL. Two processes that create the store at once may refuse each other without waiting: retry."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise SwiftError(
                "the store cannot be shared between processes here",
                where=str(self.path),
                why=f"SQLite's write-ahead log is not supported on this file system (mode {mode})",
                fix="SWIFT_HOME=/a/folder/on/a/local/disk",
            )

    def _migrate(self, connection: sqlite3.Connection) -> None:
        if self._version(connection) == VERSION:
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            for step in range(self._version(connection), VERSION):
                for statement in MIGRATIONS[step]:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _version(self, connection: sqlite3.Connection) -> int:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise SwiftError(
                "the store was written by a newer version of swift",
                where=str(self.path),
                why=f"it has version {version}, this program knows up to {VERSION}",
                fix="upgrade swift, or keep a store apart: SWIFT_HOME=~/.swift-old",
            )
        return int(version)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors about disk, locks and file into SwiftErrors; a mistake of ours stays what it is."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            cause = _CAUSES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
            if cause is None:
                raise
            why, fix = cause
            raise StoreUnusable(
                "the store of experiments cannot be used",
                where=str(self.path),
                why=f"{why} ({error})",
                fix=fix,
            ) from error
