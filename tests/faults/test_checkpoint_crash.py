"""A process that dies at any moment of a save leaves the previous checkpoint, or the new one, whole."""

import os
import resource
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from swift.core.errors import SwiftError
from swift.runs.folder import RunFolder
from swift.train.callbacks.base import Callback
from swift.train.checkpoints import read_state

FILE_EVENTS = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.symlink",
    "os.remove",
    "os.rmdir",
    "shutil.rmtree",
    "os.chmod",
)
KILLED = 77


def assert_loadable(checkpoint):
    checkpoint = checkpoint.resolve()
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert adapter
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())
    assert torch.load(checkpoint / "optimizer.pt")["optimizers"]
    assert read_state(checkpoint).step == int(checkpoint.name.split("-")[1])


def die_at(number):
    """Exit without any clean-up at the ``number``-th file operation (audit events; they cannot be removed)."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in FILE_EVENTS:
            count += 1
            if count == number:
                os._exit(KILLED)

    sys.addaudithook(hook)


class KillDuringSave(Callback):
    """At step 3, forks children that save and die at their n-th file operation, for every n."""

    def __init__(self):
        self.deaths = 0
        self.seen = set()

    def on_step_end(self, run):
        if run.state.step != 3:
            return
        run._flush()
        for number in range(1, 500):
            before = run.folder.path.with_name("before")
            shutil.copytree(run.folder.path, before, symlinks=True)
            child = os.fork()
            if child == 0:
                try:  # whatever happens, pytest must not go on in the child
                    die_at(number)
                    run._save_checkpoint(run.folder.checkpoint_path(3), run.state).finish()
                    run.folder.mark("last", 3)
                    run.folder.prune(1)
                    os._exit(0)
                finally:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, KILLED)
            self.check(run.folder.path)
            for entry in [*run.folder.path.glob("checkpoint-*"), *run.folder.path.glob(".checkpoint-*")]:
                shutil.rmtree(entry)
            for entry in before.glob("checkpoint-*"):
                shutil.move(entry, run.folder.path / entry.name)
            run.folder.mark("last", 2)
            shutil.rmtree(before)
            if code == 0:
                return
            self.deaths += 1

    def check(self, path):
        folder = RunFolder(path)
        latest = folder.latest_checkpoint()
        assert latest is not None
        for checkpoint in folder.checkpoints():
            assert_loadable(checkpoint)
        assert folder.marked("last") is not None
        self.seen.add(latest.name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_file_operation_of_a_save(run_training):
    killer = KillDuringSave()
    result = run_training(callbacks=[killer], save_steps=2, max_steps=5)
    assert killer.deaths > 15
    assert killer.seen == {"checkpoint-2", "checkpoint-3"}
    assert_loadable(result.folder / "last")


def full_disk(path, state, save, limit):
    """Save while no file may grow past ``limit`` bytes, which fails in the middle of a write as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        save(path, state).finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "optimizer.pt", "state.json", "tokenizer.json"]
)
def test_full_disk_keeps_the_previous_checkpoint_and_says_so(run_training, file):
    class FullDisk(Callback):
        def on_step_end(self, run):
            if run.state.step == 3:
                run._flush()
                limit = (run.folder.checkpoint_path(2) / file).stat().st_size // 2
                full_disk(run.folder.checkpoint_path(3), run.state, run._save_checkpoint, limit)

    with pytest.raises(SwiftError) as caught:
        run_training(callbacks=[FullDisk()], save_steps=2, max_steps=5, run_name="full")
    assert "could not be written" in caught.value.message
    assert "swift resume" in caught.value.fix
    folder = RunFolder.open(caught.value.where.rsplit("/", 1)[0])
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-2"]
    assert not list(folder.path.glob(".checkpoint-*"))
    assert_loadable(folder.path / "last")
    resumed = run_training(save_steps=2, max_steps=5, resume_from_checkpoint=str(folder.path))
    assert resumed.summary["steps"] == 5
