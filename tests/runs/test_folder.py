"""Allocation, locking, checkpoints and links of a run folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swift.core.errors import ConfigError, SwiftError
from swift.runs import folder as folder_module
from swift.runs.folder import RunFolder, find_latest_run, locate, step_of


def add_checkpoint(run: RunFolder, step: int, *, complete: bool = True) -> Path:
    path = run.checkpoint_path(step)
    path.mkdir()
    (path / "weights.bin").write_bytes(b"x" * 10)
    if complete:
        (path / "state.json").write_text("{}")
    return path


def create_many(output_dir: str, count: int, queue: multiprocessing.Queue[list[str]]) -> None:
    queue.put([RunFolder.create(output_dir).path.name for _ in range(count)])


def test_default_name_counts_up_from_the_largest(tmp_path: Path) -> None:
    (tmp_path / "v7-20260101-000000").mkdir()
    (tmp_path / "v30").mkdir()  # not one of ours
    with RunFolder.create(tmp_path) as run:
        assert re.fullmatch(r"v8-\d{8}-\d{6}", run.path.name)
    with RunFolder.create(tmp_path) as run:
        assert run.path.name.startswith("v9-")
    assert not list(tmp_path.glob(".v*"))


def test_processes_never_share_a_folder_or_a_number(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[list[str]] = context.Queue()
    workers = [context.Process(target=create_many, args=(str(tmp_path), 5, queue)) for _ in range(8)]
    for worker in workers:
        worker.start()
    names = [name for _ in workers for name in queue.get(timeout=60)]
    for worker in workers:
        worker.join(timeout=60)
    numbers = sorted(int(name[1:].split("-")[0]) for name in names)
    assert len(set(numbers)) == 40
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(names)


def test_claim_left_by_a_kill_costs_one_number(tmp_path: Path) -> None:
    (tmp_path / ".v1.claim").mkdir()
    with RunFolder.create(tmp_path) as run:
        assert run.path.name.startswith("v2-")


def test_named_run_is_refused_when_it_exists(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "mine") as run:
        (run.path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ConfigError) as caught:
        RunFolder.create(tmp_path, "mine")
    assert "already holds a run" in str(caught.value)
    assert f"swift resume {run.path}" in str(caught.value)


def test_named_folder_without_a_run_is_used(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("hello")
    with RunFolder.create(tmp_path, "mine") as run:
        assert run.path == tmp_path / "mine"
    assert (tmp_path / "mine" / "notes.txt").read_text() == "hello"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_impossible_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a run's name"):
        RunFolder.create(tmp_path, name)


def test_output_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output_dir"):
        RunFolder.create(tmp_path / "file")


def test_second_writer_is_told_who_writes(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "mine")
    (run.path / "config.yaml").write_text("")
    with pytest.raises(SwiftError, match=f"process {os.getpid()} on ") as caught:
        RunFolder.open(run.path, write=True)
    assert f"kill {os.getpid()}" in str(caught.value)
    assert RunFolder.open(run.path).path == run.path  # a reader is not in the way
    run.release()
    RunFolder.open(run.path, write=True).release()


def test_lock_of_a_killed_writer_is_free_and_its_leftovers_go(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from swift.runs.folder import RunFolder\n"
        "run = RunFolder.create(sys.argv[1], 'mine'); (run.path / 'config.yaml').write_text('')\n"
        "(run.path / '.checkpoint-5.partial-abc').mkdir(); (run.path / '.status.json.abcd').write_text('{')\n"
        "(run.path / '.last.77').symlink_to('checkpoint-5'); print('ready', flush=True); time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    with pytest.raises(SwiftError, match=f"process {child.pid} "):
        RunFolder.open(tmp_path / "mine", write=True)
    assert (tmp_path / "mine" / ".checkpoint-5.partial-abc").is_dir()  # not ours to clear while it lives
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    with RunFolder.open(tmp_path / "mine", write=True) as run:
        assert sorted(entry.name for entry in run.path.iterdir()) == [".lock", "config.yaml"]


def test_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "mine")
    (run.path / "config.yaml").write_text("")
    ready, child_ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(child_ready, b"x")
        signal.pause()
        os._exit(0)
    try:
        os.read(ready, 1)  # the child runs, so its copy of the lock is closed
        run.release()  # as the end of the parent would do
        again = RunFolder.open(run.path, write=True)  # raises while anybody holds the lock
        assert again.path == run.path
        again.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(child_ready)


def test_checkpoints_are_complete_and_sorted_by_number(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        assert run.latest_checkpoint() is None
        for step in (100, 20, 3):
            add_checkpoint(run, step)
        add_checkpoint(run, 500, complete=False)
        assert [step_of(path) for path in run.checkpoints()] == [3, 20, 100]
        assert run.latest_checkpoint() == run.path / "checkpoint-100"


def test_links(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        add_checkpoint(run, 10)
        add_checkpoint(run, 20)
        assert run.marked("best") is None
        run.mark("best", 10)
        run.mark("last", 10)
        run.mark("last", 20)
        assert (run.path / "last").readlink() == Path("checkpoint-20")  # relative: the run can be moved
        assert run.marked("best") == run.path / "checkpoint-10"
        with pytest.raises(ValueError, match="no complete checkpoint"):
            run.mark("best", 30)


def test_prune_keeps_limit_besides_best_and_last(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        for step in (10, 20, 30, 40, 50, 60):
            add_checkpoint(run, step)
        run.mark("best", 10)
        run.mark("last", 60)
        assert run.prune(None) == []
        assert run.prune(2, keep=[20]) == [30]
        assert [step_of(path) for path in run.checkpoints()] == [10, 20, 40, 50, 60]
        assert run.prune(1) == [20, 40]
        assert [step_of(path) for path in run.checkpoints()] == [10, 50, 60]


def test_kill_in_the_middle_of_a_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path)
    (run.path / "config.yaml").write_text("")
    add_checkpoint(run, 1)
    add_checkpoint(run, 2)

    def killed(path: Path) -> None:
        (path / "checkpoint-1" / "weights.bin").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.prune(1)
    monkeypatch.undo()
    assert not run.checkpoint_path(1).exists()
    run.release()
    with RunFolder.open(run.path, write=True):
        assert not list(run.path.glob(".checkpoint-*"))
        assert [step_of(path) for path in run.checkpoints()] == [2]


def test_locate_run_checkpoint_and_link(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "mine") as run:
        add_checkpoint(run, 10)
        run.mark("last", 10)
    checkpoint = (run.path / "checkpoint-10").resolve()
    for given, expected in (
        (run.path, None),
        (run.path / "checkpoint-10", checkpoint),
        (run.path / "last", checkpoint),
    ):
        found, selected = locate(given)
        assert (found.path, selected) == (run.path, expected)


def test_locate_explains(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "mine") as run:
        (run.path / "config.yaml").write_text("")
        add_checkpoint(run, 10, complete=False)
    with pytest.raises(SwiftError, match="incomplete"):
        locate(run.path / "checkpoint-10")
    with pytest.raises(SwiftError, match=f"newest run there is {run.path}"):
        locate(tmp_path)
    with pytest.raises(SwiftError, match="no such run folder"):
        locate(tmp_path / "other")


def test_latest_run_is_the_one_written_last(tmp_path: Path) -> None:
    assert find_latest_run(tmp_path / "nothing") is None
    for name, when in (("a", 300), ("b", 200), ("v9-20260101-000000", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
        os.utime(tmp_path / name / "config.yaml", (when, when))
    (tmp_path / "empty").mkdir()
    latest = find_latest_run(tmp_path)
    assert latest is not None and latest.path.name == "a"


def test_lock_file_names_its_holder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as run:
        assert json.loads((run.path / ".lock").read_text())["pid"] == os.getpid()


def test_a_run_that_is_not_there_names_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SwiftError) as caught:
        locate("nope")
    assert caught.value.fix == "name a run folder, such as output/NAME"
    run = tmp_path / "output" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("command: sft\n")
    with pytest.raises(SwiftError) as caught:
        locate("nope")
    assert caught.value.fix == f"the newest run there is {run}"
