"""The store: states, events, concurrent writers, sudden death, disks that refuse, clocks that jump."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from swift.core.errors import SwiftError, UsageError
from swift.experiments.database import MIGRATIONS, VERSION
from swift.experiments.store import StateConflict, Store
from swift.experiments.types import FINISHED, LEGAL, STATES, Dependency, JobSpec, Placement


def spec(name: str = "a", **changes: object) -> JobSpec:
    return JobSpec(**{"name": name, "experiment": name.partition("/")[0], "command": "sft", **changes})  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store.sqlite3")


def submit(store: Store, *names: str) -> list[str]:
    return list(store.add_group("g", "", [spec(name) for name in names]).jobs)


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_submission_comes_back_as_it_was(store: Store) -> None:
    train = spec("a", options={"learning_rate": 1e-4}, run_dir="/out/a", parameters={"lr": 1e-4}, priority=3)
    judge = spec("a/evaluate", after=[Dependency("a", "always")])
    group = store.add_group("sweep", "name: sweep", [train, judge])
    assert (group.name, group.jobs) == ("sweep", ("j1", "j2"))
    first, second = store.jobs()
    assert (first.spec, first.state, first.priority, first.attempt) == (train, "queued", 3, 0)
    assert (second.spec, second.state, second.reason) == (judge, "waiting", "waits for a")
    assert store.group("sweep") == group == store.groups()[0]
    assert store.group("other") is None


def test_a_second_submission_of_a_name_gets_a_number(store: Store) -> None:
    names = [store.add_group(name, "", [spec()]).name for name in ("a_b", "a_b", "axb", "a_b", "a_b-2")]
    assert names == ["a_b", "a_b-2", "axb", "a_b-3", "a_b-2-2"]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "nothing to submit"),
        ([spec("a"), spec("a")], "two jobs are called a"),
        ([spec("train"), spec("b", after=[Dependency("trian")])], "did you mean train"),
        ([spec("a", after=[Dependency("b")]), spec("b", after=[Dependency("a")])], "in a circle: .* -> "),
        ([spec("a", run_dir="/out/x"), spec("b", run_dir="/out/./x")], "a and b have the same run folder"),
    ],
)
def test_a_bad_submission_leaves_nothing(store: Store, specs: list[JobSpec], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        store.add_group("g", "", specs)
    assert store.jobs() == [] and store.groups() == [] and store.events() == []


def test_a_run_folder_has_one_live_owner(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    store.add_group("first", "", [spec("a", run_dir=str(tmp_path / "a"))])
    again = [spec("b", run_dir=str(tmp_path / "link" / "a"))]
    with pytest.raises(
        UsageError, match=r"belongs to another job, j1 \(first/a, queued\)(.|\n)*swift stop j1"
    ):
        store.add_group("second", "", [spec("free"), *again])
    assert [job.id for job in store.jobs()] == ["j1"]
    store.transition("j1", "queued", "cancelled", "stopped by the user")
    assert store.add_group("second", "", again).jobs == ("j2",)
    with pytest.raises(UsageError, match="belongs to another job, j2"):
        store.transition("j1", "cancelled", "queued", "retried")


def test_stages_of_one_experiment_may_share_its_folder(store: Store) -> None:
    stages = [spec("a", run_dir="/out/a"), spec("a/merge", run_dir="/out/a", after=[Dependency("a")])]
    store.add_group("g", "", stages)
    store.transition("j1", "queued", "failed", "no such model")
    assert store.transition("j1", "failed", "queued", "retried").state == "queued"


def test_the_life_of_a_job_and_its_events(tmp_path: Path) -> None:
    now = [100.0]
    store = Store(tmp_path / "store.sqlite3", clock=lambda: now[0])
    submit(store, "a")
    placement = Placement("cuda", (2, 3), 1 << 30, 4)
    now[0] = 110.0
    job = store.transition("j1", {"queued"}, "starting", "fits on cuda:2 and 3", placement=placement)
    assert (job.attempt, job.started, job.placement) == (1, 110.0, placement)
    store.transition("j1", ["starting"], "running", "pid 7")
    retries = [{"cause": "out of memory", "change": "micro-batch 4 -> 2"}]
    job = store.transition("j1", "running", "queued", "out of memory", retries=retries, overrides={"x": 2})
    assert (job.placement, job.retries, job.overrides) == (None, retries, {"x": 2})
    store.transition("j1", "queued", "starting", "again")
    now[0] = 150.0
    job = store.transition("j1", {"starting", "running"}, "succeeded", "done", exit_code=0)
    assert (job.attempt, job.started, job.ended, job.exit_code) == (2, 110.0, 150.0, 0)
    moves = [
        (event.data["from"], event.data["to"]) for event in store.events(job="j1") if event.kind == "state"
    ]
    path = ["queued", "starting", "running", "queued", "starting", "succeeded"]
    assert moves == list(itertools.pairwise(path))
    assert store.events(job="j1")[1].data["placement"]["devices"] == [2, 3]
    assert [event.seq for event in store.events()] == list(range(1, store.last_event() + 1))
    assert store.events(after=store.last_event()) == []


@pytest.mark.parametrize("state", STATES)
def test_only_legal_ways_are_open(store: Store, state: str) -> None:
    submit(store, "a")
    connection = sqlite3.connect(store.path)
    for to in STATES:
        with connection:
            connection.execute("UPDATE jobs SET state = ?, attempt = 0", (state,))
        if to in LEGAL[state]:  # type: ignore[index]
            assert store.transition("j1", STATES, to, "").state == to
        else:
            with pytest.raises(StateConflict, match=f"j1 is {state} and cannot become {to}") as error:
                store.transition("j1", STATES, to, "")
            assert error.value.state == state == store.job("j1").state


def test_every_state_leads_to_an_end_and_success_is_final() -> None:
    assert set(LEGAL) == set(STATES) and LEGAL["succeeded"] == ()
    for state in set(STATES) - set(FINISHED):
        assert {"failed", "cancelled"} <= set(LEGAL[state])


def test_a_decision_taken_before_another_attempt_is_void(store: Store) -> None:
    submit(store, "a")
    store.transition("j1", "queued", "starting", "", attempt=1)
    store.transition("j1", "starting", "queued", "lost")
    with pytest.raises(StateConflict, match="attempt 1 of j1 was started already"):
        store.transition("j1", "queued", "starting", "", attempt=1)
    assert store.job("j1").state == "queued"


def test_unknown_fields_and_jobs_are_refused(store: Store) -> None:
    submit(store, "train")
    with pytest.raises(TypeError, match="spec"):
        store.update("j1", spec={})
    for word in ("j9", "j0", "elsewhere"):
        with pytest.raises(UsageError, match=f"there is no job '{word}'"):
            store.job(word)
    with pytest.raises(UsageError, match="did you mean train"):
        store.job("trian")
    with pytest.raises(UsageError):
        store.transition("train", "queued", "paused", "")


def test_jobs_are_found_by_id_name_and_group(store: Store) -> None:
    store.add_group("one", "", [spec("a"), spec("a/evaluate"), spec("j1")])
    store.add_group("two", "", [spec("a"), spec("b")])
    assert store.job("j1").spec.name == "a"
    assert store.job("a").id == "j4"
    assert store.job("one/a").id == "j1"
    assert store.job("one/a/evaluate").id == store.job("a/evaluate").id == "j2"
    store.transition("j4", "queued", "paused", "")
    assert [job.id for job in store.jobs(states=["paused"])] == ["j4"]
    assert [job.id for job in store.jobs(states=["queued"], group="two")] == ["j5"]
    assert [job.id for job in store.jobs(ids=["j5", "j2", "nobody", "j77"])] == ["j2", "j5"]
    assert [job.id for job in store.jobs(limit=2)] == ["j4", "j5"]
    assert store.jobs(ids=[]) == []
    assert store.counts()["queued"] == 4 and store.counts()["paused"] == 1


def test_reasons_are_recorded_once(store: Store) -> None:
    submit(store, "a", "b")
    before = store.last_event()
    assert store.explain({"j1": "waits for memory", "j2": "submitted"}) == 1
    assert store.explain({"j1": "waits for memory"}) == 0
    assert store.last_event() == before + 1
    assert store.explain({"j1": "8.0 GiB needed, 3.0 GiB free on cuda:0"}) == 1
    assert store.explain({"j1": "8.0 GiB needed, 900 B free on cuda:0"}) == 0
    assert store.explain({"j1": "8.0 GiB needed, 3.0 GiB free on cuda:1"}) == 1
    store.transition("j1", "queued", "starting", "free now")
    assert store.explain({"j1": "waits for memory"}) == 0
    assert store.job("j1").reason == "free now"


def test_updates_keep_the_state(store: Store) -> None:
    submit(store, "a")
    job = store.update("j1", priority=9, reason="moved up")
    assert (job.state, job.priority, job.reason) == ("queued", 9, "moved up")
    assert store.events()[-1].data == {"priority": 9, "reason": "moved up"}


def test_a_clock_that_jumps_back_changes_no_order(tmp_path: Path) -> None:
    times = iter([5000.0, 5000.0, 10.0, 10.0] + [20.0 - n for n in range(40)])
    store = Store(tmp_path / "store.sqlite3", clock=lambda: next(times))
    submit(store, "early")
    store.add_group("late", "", [spec("late")])
    assert [job.spec.name for job in store.jobs()] == ["early", "late"]
    store.transition("j1", "queued", "starting", "", started=4000.0)
    job = store.transition("j1", "starting", "succeeded", "")
    assert job.ended is not None and job.started is not None and job.ended >= job.started
    kinds = [(event.job, event.kind) for event in store.events()]
    assert kinds == [("j1", "submitted"), ("j2", "submitted"), ("j1", "state"), ("j1", "state")]


def test_exactly_one_of_many_threads_starts_a_job(store: Store) -> None:
    ids = submit(store, *(f"job{number}" for number in range(5)))
    won: list[str] = []
    barrier = threading.Barrier(8)

    def start_all() -> None:
        barrier.wait(timeout=30)
        for job_id in ids:
            try:
                won.append(store.transition(job_id, "queued", "starting", "mine").id)
            except StateConflict:
                continue

    threads = [threading.Thread(target=start_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(won) == sorted(ids)
    assert all(job.attempt == 1 for job in store.jobs())


def test_exactly_one_of_two_processes_starts_each_job(store: Store, tmp_path: Path) -> None:
    ids = submit(store, *(f"job{number}" for number in range(30)))
    pids = []
    for name in ("left", "right"):
        pid = os.fork()
        if pid == 0:
            won = []
            for job_id in ids:
                try:
                    won.append(store.transition(job_id, "queued", "starting", name).id)
                except StateConflict:
                    continue
            (tmp_path / name).write_text(" ".join(won))
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    won = (tmp_path / "left").read_text().split() + (tmp_path / "right").read_text().split()
    assert sorted(won) == sorted(ids)


def test_two_processes_write_at_once_and_create_the_store_at_once(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite3"

    def write(name: str) -> None:
        store = Store(path)
        for number in range(20):
            store.add_group("same", "", [spec(f"{name}{number}")])
            store.event(None, name, {"number": number})

    pids = []
    for name in ("left", "right"):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                write(name)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    store = Store(path)
    assert len(store.jobs()) == len({group.name for group in store.groups()}) == 40
    for name in ("left", "right"):
        assert [event.data["number"] for event in store.events() if event.kind == name] == list(range(20))


@pytest.mark.parametrize("point", range(6))
def test_sudden_death_leaves_all_or_nothing(store: Store, point: int) -> None:
    """The writer dies at SQL statement number ``point`` of a transition; state and events must agree."""
    submit(store, "a")
    store.event("j1", "note", {})

    def die() -> None:
        statements = []

        def count(statement: str) -> None:
            statements.append(statement)
            if len(statements) > point:
                os._exit(9)

        store.jobs()  # the child's own connection
        store._database._connection().set_trace_callback(count)
        store.transition("j1", "queued", "starting", "")

    assert in_child(die) in ((9,) if point < 4 else (9, 0))
    moved = [event for event in store.events() if event.kind == "state"]
    assert (store.job("j1").state, len(moved)) in (("queued", 0), ("starting", 1))
    assert store.update("j1", priority=1).priority == 1
    (answer,) = sqlite3.connect(store.path).execute("PRAGMA integrity_check").fetchone()
    assert answer == "ok"


def test_a_writer_killed_between_its_statements_blocks_nobody(store: Store) -> None:
    submit(store, "a")

    def die() -> None:
        with store._database.write() as connection:
            connection.execute("UPDATE jobs SET state = 'failed'")
            os._exit(9)

    assert in_child(die) == 9
    assert store.transition("j1", "queued", "starting", "").state == "starting"


def test_a_newer_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite3"
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    with pytest.raises(SwiftError, match=r"newer version of swift(.|\n)*fix: upgrade swift"):
        Store(path)
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone() == (VERSION + 1,)


def test_an_interrupted_migration_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.sqlite3"
    with monkeypatch.context() as patch:
        patch.setattr("swift.experiments.database.MIGRATIONS", (("CREATE TABLE groups (x)", "nonsense"),))
        with pytest.raises(sqlite3.OperationalError, match="nonsense"):
            Store(path)
    assert submit(Store(path), "a") == ["j1"]


def test_the_history_cannot_be_rewritten(store: Store) -> None:
    submit(store, "a")
    connection = sqlite3.connect(store.path)
    for statement in ("DELETE FROM events", "UPDATE events SET kind = 'x'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)


def test_a_file_that_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite3"
    path.write_text("hello, this is a text file " * 100)
    with pytest.raises(SwiftError, match="not a store of swift"):
        Store(path)
    with pytest.raises(SwiftError, match=r"cannot be opened(.|\n)*SWIFT_HOME"):
        Store(tmp_path / "missing" / "store.sqlite3")


def test_a_full_disk_is_named_and_loses_nothing(store: Store) -> None:
    submit(store, "a")
    connection = store._database._connection()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(SwiftError, match=r"the disk is full(.|\n)*fix: free some space"):
        store.event(None, "big", {"text": "x" * 100_000})
    connection.execute("PRAGMA max_page_count = 100000")
    assert store.transition("j1", "queued", "paused", "").state == "paused"
    assert [event.kind for event in store.events()] == ["submitted", "state"]


def test_a_read_only_disk_can_be_read_and_is_named_on_writing(store: Store) -> None:
    submit(store, "a")
    # SQLite's own refusal, with the code of a read-only disk
    store._database._connection().execute("PRAGMA query_only = ON")
    assert store.job("j1").state == "queued"
    with pytest.raises(SwiftError, match=r"read-only(.|\n)*SWIFT_HOME"):
        store.transition("j1", "queued", "paused", "")


def test_memory_is_learned_robustly(store: Store) -> None:
    assert store.correction("k") == (1.0, 0)
    for actual in (110, 120, 130, 9000):
        store.observe_memory("k", 100, actual)
    assert store.correction("k") == (pytest.approx(1.25), 4)
    store.observe_memory("k", 0, 5)
    for _ in range(20):
        store.observe_memory("k", 100, 90)
    assert store.correction("k") == (pytest.approx(0.9), 20)
    assert store.correction("other") == (1.0, 0)


def test_samples_by_time_and_subject(tmp_path: Path) -> None:
    now = [50.0]
    store = Store(tmp_path / "store.sqlite3", clock=lambda: now[0])
    store.record_samples([{"subject": "cuda:0", "memory": 5}, {"subject": "host", "cpu": 0.5}])
    now[0] = 60.0
    store.record_samples([{"subject": "cuda:0", "memory": 7}])
    assert store.samples(since=55) == [{"at": 60.0, "subject": "cuda:0", "memory": 7}]
    assert [sample["memory"] for sample in store.samples(subject="cuda:0")] == [5, 7]
    store.kept_samples = 2
    store.record_samples([{"subject": "host", "cpu": 0.7}])
    assert [sample["subject"] for sample in store.samples()] == ["cuda:0", "host"], "the oldest went"


def test_a_fork_uses_its_own_connection(store: Store) -> None:
    submit(store, "a")
    mine = store._database._connection()

    def change() -> None:
        store.transition("j1", "queued", "paused", "by the child")
        assert store._database._connection() is not mine

    assert in_child(change) == 0
    assert store.job("j1").reason == "by the child"
    assert store._database._connection() is mine


def test_ten_thousand_finished_jobs_are_read_by_index(store: Store) -> None:
    store.add_group("many", "", [spec(f"job{number}") for number in range(10_000)])
    connection = sqlite3.connect(store.path)
    with connection:
        connection.execute("UPDATE jobs SET state = 'succeeded' WHERE seq > 3")
    assert [job.id for job in store.jobs(states=["queued"])] == ["j1", "j2", "j3"]
    assert [job.id for job in store.jobs(limit=2)] == ["j9999", "j10000"]
    assert store.job("job77").id == "j78"
    for condition in ("state IN ('queued', 'running')", "name = 'job77'", "run_dir = '/a'", "seq IN (5, 7)"):
        plan = connection.execute(f"EXPLAIN QUERY PLAN SELECT * FROM jobs WHERE {condition}").fetchall()
        assert all("SEARCH" in row[3] for row in plan), plan


def test_a_batch_is_one_transaction_in_which_a_refusal_undoes_itself_only(store: Store) -> None:
    submit(store, "a", "b", "c")
    with store.batch():
        store.transition("j1", "queued", "cancelled", "stopped")
        with pytest.raises(StateConflict):
            store.transition("j1", "queued", "cancelled", "again")
        store.transition("j2", "queued", "cancelled", "stopped")
        assert Store(store.path).counts()["queued"] == 3, "nobody else sees a part of it"
    assert Store(store.path).counts()["cancelled"] == 2
    with pytest.raises(ZeroDivisionError), store.batch():
        store.transition("j3", "queued", "cancelled", "stopped")
        raise ZeroDivisionError
    assert store.job("j3").state == "queued"


def test_a_store_of_version_1_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite3"
    with sqlite3.connect(path) as connection:
        for statement in MIGRATIONS[0]:
            connection.execute(statement)
        connection.execute("INSERT INTO groups (name, source_text, submitted) VALUES ('g', '', 1.0)")
        old = json.dumps(spec("a").to_dict() | {"needs": {"devices": 1}})
        connection.execute(
            "INSERT INTO jobs (group_seq, name, spec, state, reason, submitted, priority)"
            " VALUES (1, 'a', ?, 'queued', 'submitted', 1.0, 0)",
            (old,),
        )
        connection.execute("PRAGMA user_version = 1")
    store = Store(path)
    job = store.job("a")
    assert (job.spent, job.preempted, job.spec.needs.preemption) == (0.0, None, True)
    assert store.environment("g") is None
