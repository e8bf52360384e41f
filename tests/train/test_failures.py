"""Kinds of failures, and going on with a smaller micro-batch after one."""

import errno
import json

import pytest
import torch
from safetensors import SafetensorError

from swift.core.errors import ConfigError, DataError, ModelError, SwiftError, TransientError
from swift.data.batching import BatchSchedule
from swift.runs.metrics import read_metrics
from swift.runs.status import read_status
from swift.train.callbacks.base import Callback
from swift.train.checkpoints import read_state
from swift.train.failures import NonFiniteError, failure_kind


def caused(cause):
    error = SwiftError("a checkpoint could not be written")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "out_of_memory",
        ),
        (MemoryError(), "out_of_memory"),
        (NonFiniteError("the loss is not finite at step 3"), "nonfinite"),
        (DataError("no rows"), "data"),
        (ConfigError("wrong"), "config"),
        (ModelError("incomplete"), "config"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (caused(OSError(errno.ENOSPC, "No space left on device")), "disk"),
        (caused(SafetensorError("I/O error: No space left on device (os error 28)")), "disk"),
        (caused(OSError(errno.EIO, "I/O error")), "crash"),
        (caused(FileNotFoundError(errno.ENOENT, "No such file")), "refused"),
        (SwiftError("there is no metric 'eval_f1'"), "refused"),  # the next attempt would say the same
        (TransientError("a worker process died"), "crash"),
        (ValueError("anything"), "crash"),
    ],
)
def test_kind_of_failure(error, kind):
    assert failure_kind(error) == kind


class Raise(Callback):
    """Fails after ``step`` steps."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, run):
        if run.state.step == self.step:
            raise self.error


def test_status_tells_the_kind(run_training, tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        run_training(callbacks=[Raise(2, torch.OutOfMemoryError("CUDA out of memory"))], run_name="run")
    status = read_status(tmp_path / "output" / "run")
    assert (status["state"], status["failure"]) == ("failed", "out_of_memory")
    result = run_training(run_name="fine", max_steps=1)
    assert json.loads((result.folder / "status.json").read_text())["failure"] is None


@pytest.mark.parametrize(
    ("mode", "grouped"), [("padded", True), ("padded", False), ("padding_free", False), ("packed", False)]
)
@pytest.mark.parametrize("split", [2, 4])
def test_split_micro_batches_hold_the_same_samples_per_step(mode, grouped, split):
    lengths = [(7 * number) % 23 + 1 for number in range(101)]
    settings = {"mode": mode, "max_length": 64, "group_by_length": grouped, "seed": 5}
    whole = BatchSchedule(lengths, batch_size=4, **settings)
    parts = BatchSchedule(lengths, batch_size=4, split=split, **settings)

    def steps(schedule, accumulation):
        batches = schedule.micro_batches(3)
        return [
            [sample for batch in batches[start : start + accumulation] for row in batch for sample in row]
            for start in range(0, len(batches), accumulation)
        ]

    assert parts.num_steps(3 * split) == whole.num_steps(3)
    assert steps(parts, 3 * split) == steps(whole, 3)
    size = 4 // split
    rows = [
        len(batch[0]) if mode == "padding_free" and batch else len(batch) for batch in parts.micro_batches(3)
    ]
    assert max(rows) <= size


@pytest.mark.parametrize("padding_free", [False, True])
def test_going_on_with_half_the_micro_batch_is_the_same_run(run_training, padding_free):
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "padding_free": padding_free,
        "max_steps": 12,
        "num_train_epochs": 10,
        "save_steps": 3,
    }
    whole = run_training(run_name="whole", **options)
    with pytest.raises(torch.OutOfMemoryError):
        run_training(
            callbacks=[Raise(5, torch.OutOfMemoryError("CUDA out of memory"))], run_name="cut", **options
        )
    smaller = {**options, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    with pytest.raises(torch.OutOfMemoryError):  # and once more, after the second part has saved, too
        run_training(
            callbacks=[Raise(8, torch.OutOfMemoryError("CUDA out of memory"))],
            run_name="cut",
            resume_from_checkpoint="last",
            **smaller,
        )
    smallest = {**options, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    cut = run_training(run_name="cut", resume_from_checkpoint="last", **smallest)
    ours, theirs = (read_metrics(run.folder / "metrics.jsonl") for run in (cut, whole))
    assert [row["num_tokens"] for row in ours] == [row["num_tokens"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=2e-4)
    assert read_state(cut.folder / "last").order_batch_size == 4


def test_another_effective_batch_is_refused(run_training):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 2}
    run_training(run_name="run", max_steps=2, **options)
    with pytest.raises(SwiftError, match="changed since the checkpoint"):
        run_training(
            run_name="run",
            max_steps=4,
            resume_from_checkpoint="last",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
