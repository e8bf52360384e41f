"""The tables of the store, as steps from one version to the next. A released step is never edited: add one."""

from __future__ import annotations

__all__ = ["MIGRATIONS", "VERSION"]

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

MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1,)
"""Statements of step N lead from version N to N + 1."""

VERSION = len(MIGRATIONS)
