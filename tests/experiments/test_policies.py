"""What follows from a failure: pure functions."""

import signal

import pytest

from swift.experiments.attempt import effective_options
from swift.experiments.policies import Failure, Policies, after_failure, classify, is_stalled
from swift.experiments.runner import Exit
from swift.experiments.types import Job, JobSpec, Placement

GIB = 2**30


def ended(code=None, number=None, reason="exited"):
    return Exit(code, number, reason, 0.0)


def job(**fields):
    spec = JobSpec(name="a", experiment="a", command="sft")
    return Job(
        "j1", "g", spec, "running", attempt=1, placement=Placement("cuda", (0,), 10 * GIB, 1), **fields
    )


@pytest.mark.parametrize(
    ("exit", "status", "log", "kind"),
    [
        (ended(1), {"failure": "out_of_memory", "message": "CUDA out of memory"}, "", "out_of_memory"),
        (ended(1), {"failure": "nonfinite", "message": "the loss is not finite at step 3"}, "", "nonfinite"),
        (ended(1), {"failure": "data"}, "", "data"),
        (ended(1), {"failure": "disk"}, "", "disk"),
        (ended(1), None, "error: torch.OutOfMemoryError: CUDA out of memory. Tried", "out_of_memory"),
        (ended(1), None, "DefaultCPUAllocator: can't allocate memory: you tried", "out_of_memory"),
        (ended(number=signal.SIGKILL), None, "", "out_of_memory"),
        (ended(number=signal.SIGKILL, reason="memory_limit"), None, "", "out_of_memory"),
        (ended(2), None, "error: --lora_rank: unknown\n  fix: this", "config"),
        (ended(1), None, "error: x.jsonl:3: not JSON\n  fix: mend it", "refused"),
        (ended(1), None, "error: ValueError: x\n  fix: run again with --debug for the traceback", "crash"),
        (ended(1), None, "", "crash"),
        (ended(number=signal.SIGSEGV), None, "", "crash"),
        (ended(143), None, "", "interrupted"),
        (ended(143, reason="time_limit"), None, "", "time_limit"),
        (ended(reason="lost"), None, "", "lost"),
        (None, None, "", "lost"),
    ],
)
def test_kinds(exit, status, log, kind):
    assert classify(exit, status, log).kind == kind


@pytest.mark.parametrize(
    ("exit", "log", "kind"),
    [
        (ended(1), "x.jsonl:1: no messages\n1 of 1 rows cannot be used", "answer"),
        (ended(1), "the machine is out of memory", "answer"),
        (ended(1), "Traceback (most recent call last):\n  ...\nKeyError: 'x'", "crash"),
        (ended(1), "error: KeyError: 'x'\n  fix: run again with --debug for the traceback", "crash"),
        (ended(3), "", "crash"),
        (ended(2), "error: --jsn: unknown", "config"),
        (ended(number=signal.SIGSEGV), "", "crash"),
    ],
)
def test_exit_code_1_is_the_answer_of_a_command_that_checks(exit, log, kind):
    assert classify(exit, None, log, answers=True).kind == kind


def test_a_job_that_was_stopped_for_standing_still_is_a_stall_whatever_its_exit_code():
    assert classify(ended(143, reason="stopped"), None, "", "stall").kind == "stall"


def test_message_is_the_runs_own_else_the_last_error_line():
    assert classify(ended(1), {"failure": "data", "message": "no rows\n fix: x"}, "").message == "no rows"
    assert classify(ended(2), None, "error: one\nerror: two\n  fix: three").message == "two"


@pytest.mark.parametrize("kind", ["answer", "config", "data", "disk", "refused", "time_limit", "nonfinite"])
def test_never_tried_again_by_default(kind):
    assert not after_failure(job(), Failure(kind, "x"), {}, Policies()).retry


def test_nonfinite_may_be_tried_again_when_the_policy_says_so():
    assert after_failure(job(), Failure("nonfinite"), {}, Policies(nonfinite=1)).retry


def test_crashes_are_tried_again_with_growing_pauses_and_a_bound():
    policies = Policies(crashes=2, backoff_seconds=5.0)
    retries, delays = [], []
    while (action := after_failure(job(retries=retries), Failure("crash", "boom"), {}, policies)).retry:
        delays.append(action.delay_seconds)
        retries.append(action.record)
    assert delays == [5.0, 10.0]
    assert action.reason == "crashed: boom (after 2 retries)"
    # other kinds of bad luck count against the same bound
    assert not after_failure(job(retries=retries), Failure("interrupted"), {}, policies).retry
    assert after_failure(job(retries=retries), Failure("lost"), {}, policies).retry


def test_out_of_memory_keeps_the_effective_batch():
    options = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 3,
        "gradient_checkpointing": False,
    }
    retries, overrides = [], {}
    for expected in ((4, 6), (2, 12), (1, 24)):
        state = job(retries=retries, overrides=overrides)
        action = after_failure(state, Failure("out_of_memory"), {**options, **overrides}, Policies())
        assert action.retry
        overrides = action.overrides
        now = overrides["per_device_train_batch_size"], overrides["gradient_accumulation_steps"]
        assert now == expected
        retries.append(action.record)
    assert retries[0]["change"] == "micro-batch 8 -> 4, accumulation 3 -> 6"
    state = job(retries=retries, overrides=overrides)
    action = after_failure(state, Failure("out_of_memory"), {**options, **overrides}, Policies())
    assert not action.retry  # three times is enough
    assert "3 times made smaller" in action.reason


def test_odd_micro_batches_are_divided_without_a_rest():
    options = {"per_device_train_batch_size": 15, "gradient_accumulation_steps": 1}
    action = after_failure(job(), Failure("out_of_memory"), options, Policies())
    assert action.overrides == {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}


def test_the_evaluation_batch_shrinks_with_it():
    options = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    action = after_failure(job(), Failure("out_of_memory"), options, Policies())
    assert action.overrides["per_device_eval_batch_size"] == 2


def test_the_ladder_ends_with_checkpointing_and_a_larger_slot():
    options = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "gradient_checkpointing": False,
    }
    first = after_failure(job(), Failure("out_of_memory"), options, Policies(), largest_bytes=80 * GIB)
    assert first.overrides == {"gradient_checkpointing": True}
    options["gradient_checkpointing"] = True
    state = job(retries=[first.record])
    second = after_failure(state, Failure("out_of_memory"), options, Policies(), largest_bytes=80 * GIB)
    assert second.record["memory_bytes"] == 20 * GIB
    whole = after_failure(state, Failure("out_of_memory"), options, Policies(), largest_bytes=10 * GIB)
    assert not whole.retry
    assert "nothing smaller to try" in whole.reason


@pytest.mark.parametrize(
    ("task", "smaller"),
    [
        ({"loss_type": "infonce"}, False),
        ({"loss_type": "infonce", "infonce_use_batch": True}, False),
        ({"loss_type": "infonce", "infonce_use_batch": False}, True),
        ({"loss_type": "online_contrastive", "infonce_use_batch": True}, False),
        ({"loss_type": "contrastive", "infonce_use_batch": True}, True),
        ({"loss_type": None, "infonce_use_batch": True}, True),
    ],
)
def test_the_micro_batch_of_an_in_batch_loss_stays(task, smaller):
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, **task}
    action = after_failure(job(), Failure("out_of_memory"), options, Policies(), largest_bytes=80 * GIB)
    if smaller:
        assert action.overrides["per_device_train_batch_size"] == 4
        return
    assert action.overrides == {"gradient_checkpointing": True}
    options["gradient_checkpointing"] = True
    action = after_failure(job(), Failure("out_of_memory"), options, Policies(), largest_bytes=80 * GIB)
    assert (action.overrides, action.record["memory_bytes"]) == ({}, 20 * GIB)
    action = after_failure(job(), Failure("out_of_memory"), options, Policies(), largest_bytes=10 * GIB)
    assert not action.retry and "is another loss" in action.reason


@pytest.mark.parametrize(
    ("options", "loss", "batch"),
    [
        ({"task_type": "embedding"}, "infonce", 4),
        ({"task_type": "embedding", "infonce_use_batch": False}, "infonce", 2),
        ({"task_type": "embedding", "loss_type": "online_contrastive"}, "online_contrastive", 4),
        ({"task_type": "seq_cls", "num_labels": 3}, "cross_entropy", 2),
    ],
)
def test_options_in_force_tell_the_loss(options, loss, batch, tmp_path):
    spec = JobSpec(
        name="a",
        experiment="a",
        command="sft",
        options={"model": "m", "dataset": ["d"], "per_device_train_batch_size": 4, **options},
        run_dir=str(tmp_path / "a"),
    )
    state = Job("j1", "g", spec, "running", attempt=1)
    found = effective_options(state)
    assert found["loss_type"] == loss
    found["gradient_checkpointing"] = False
    action = after_failure(state, Failure("out_of_memory"), found, Policies())
    assert {**found, **action.overrides}["per_device_train_batch_size"] == batch


def test_commands_without_a_batch_only_get_a_larger_slot():
    action = after_failure(job(), Failure("out_of_memory"), {}, Policies(), largest_bytes=80 * GIB)
    assert (action.overrides, action.record["memory_bytes"]) == ({}, 20 * GIB)


@pytest.mark.parametrize(
    ("stage", "quiet", "median", "stalled"),
    [
        ("train", 299, 1.0, False),
        ("train", 301, 1.0, True),
        ("train", 301, 100.0, False),  # 50 slow steps take longer
        ("train", 5001, 100.0, True),
        ("train", 3000, None, False),  # the first step compiles
        ("evaluate", 3000, 1.0, False),
        ("load model", 3601, None, True),
    ],
)
def test_stalls(stage, quiet, median, stalled):
    assert is_stalled(Policies(), stage, quiet, median) is stalled
