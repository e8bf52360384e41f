"""The engine's decisions, with attempts that end when the test says so."""

import json
import signal
from pathlib import Path

import pytest
import yaml
from tests.experiments.engines import GIB, World

from swift.config.bind import dump_text, resolve
from swift.core.errors import SwiftError, UsageError
from swift.experiments.database import StoreUnusable
from swift.experiments.isolation import from_shell
from swift.experiments.open_sweeps import sweep_failure, sweep_is_open
from swift.experiments.policies import Policies
from swift.experiments.progress import seconds_of
from swift.experiments.runner import Exit, Observation
from swift.experiments.show import live_row
from swift.experiments.types import Device, Needs


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_jobs_run_as_slots_allow_and_end(world):
    world.submit(*(world.spec(name) for name in "abc"))
    assert world.states() == {"a": "starting", "b": "starting", "c": "queued"}
    assert "free CPU slot" in world.job("c").reason
    world.tick()
    assert world.state("a") == "running"
    world.end("a")
    assert world.states() == {"a": "succeeded", "b": "running", "c": "starting"}
    world.end("b")
    world.end("c")
    assert set(world.states().values()) == {"succeeded"}
    assert world.is_done


def test_a_new_engine_adopts_what_runs_and_sees_what_ended_meanwhile(world):
    world.submit(*(world.spec(name) for name in "abc"))
    world.tick()
    job = world.job("a")
    world.runner.seen[job.id, 1] = Observation("ended", world_exit(0))
    world.engine = world.new_engine()
    world.tick()
    assert world.states() == {"a": "succeeded", "b": "running", "c": "starting"}
    assert [entry[:2] for entry in world.runner.launched] == [("j1", 1), ("j2", 1), ("j3", 1)]


def world_exit(code, **fields):
    from swift.experiments.runner import Exit

    return Exit(code, None, "exited", 0.0, **fields)


def test_a_job_that_was_never_begun_is_queued_again_without_counting_as_a_failure(world):
    world.submit(world.spec("a"))
    job = world.job("a")
    del world.runner.seen[job.id, 1]  # the service was killed between deciding and launching
    world.tick()
    assert world.state("a") == "starting"
    assert (world.job("a").attempt, world.job("a").retries) == (2, [])
    world.end("a", reason="not_begun", code=None)  # the same, with the attempt's folder there already
    assert (world.state("a"), world.job("a").attempt, world.job("a").retries) == ("starting", 3, [])


def test_after_a_reboot_a_training_goes_on_from_its_checkpoint(world):
    world.submit(world.training("a"))
    world.checkpoint("a")
    world.end("a", reason="lost", code=None)
    assert (world.state("a"), world.job("a").attempt) == ("starting", 2)
    assert world.argv("a") == ["resume", world.job("a").spec.run_dir]


def test_without_a_checkpoint_it_starts_anew_and_the_old_folder_is_kept(world):
    world.submit(world.training("a"))
    run = Path(world.job("a").spec.run_dir)
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    world.end("a", reason="lost", code=None)
    command, file = world.argv("a")
    assert command == "sft"
    assert yaml.safe_load(Path(file).read_text())["run_name"] == "a"
    assert not run.exists()
    assert (run.parent / "a.attempt-1" / "metrics.jsonl").exists()


def test_out_of_memory_shrinks_the_micro_batch_and_goes_on(world):
    world.submit(world.training("a", options={"per_device_train_batch_size": 4}))
    world.checkpoint("a")
    run = Path(world.job("a").spec.run_dir)
    config = {"training": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    world.end("a", 1, status={"state": "failed", "failure": "out_of_memory", "message": "CUDA out of memory"})
    job = world.job("a")
    assert (job.state, job.attempt) == ("starting", 2)
    assert job.retries[0]["change"] == "micro-batch 4 -> 2, accumulation 4 -> 8"
    flags = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "8"]
    assert world.argv("a") == ["resume", str(run), *flags]


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("samples", [{}, {"global_batch_size": 16}, {"gradient_accumulation_steps": 4}])
def test_the_options_of_a_smaller_attempt_are_accepted(world, samples, resumes):
    world.submit(world.training("a", options={"per_device_train_batch_size": 4, **samples}))
    spec = world.job("a").spec
    if resumes:
        world.checkpoint("a")
        first = resolve("sft", values=spec.options, partial=True)
        (Path(spec.run_dir) / "config.yaml").write_text(dump_text(first))
    for attempt, (batch, accumulation) in enumerate([(2, 8), (1, 16)], 2):
        world.end("a", 1, log="error: torch.OutOfMemoryError: CUDA out of memory")
        assert (world.state("a"), world.job("a").attempt) == ("starting", attempt)
        words = world.argv("a")
        assert words[0] == ("resume" if resumes else "sft")
        file, flags = (str(Path(words[1]) / "config.yaml"), words[2:]) if resumes else (words[1], [])
        training = resolve("sft", [file, *flags], partial=True).config.training
        assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (
            batch,
            accumulation,
        )
        assert training.global_batch_size == samples.get("global_batch_size")
        world.tick()


def test_a_status_of_an_earlier_attempt_says_nothing_about_this_one(world):
    world.submit(world.training("a"))
    world.write_status("a", state="failed", failure="nonfinite")
    job = world.job("a")
    (world.home.attempt_dir(job.id, 1) / "child.json").write_text(json.dumps({"pid": 77, "processes": []}))
    world.end("a", 1)
    assert world.job("a").retries[0]["kind"] == "crash"


def test_bad_configuration_is_not_tried_again(world):
    world.submit(world.spec("a"))
    world.end("a", 2, log="error: --lora_rank: unknown option")
    job = world.job("a")
    assert (job.state, job.exit_code) == ("failed", 2)
    assert job.reason == "bad configuration: --lora_rank: unknown option"
    assert world.events("a", "failure") == [
        {"attempt": 1, "kind": "config", "message": "--lora_rank: unknown option"}
    ]


def test_crashes_wait_before_they_are_tried_again_and_have_a_bound(world):
    world.submit(world.spec("a"))
    for attempt, delay in ((1, 5.0), (2, 10.0)):
        world.end("a", 3)
        assert (world.state("a"), world.job("a").attempt) == ("queued", attempt)
        world.tick(delay - 2)
        assert world.state("a") == "queued"
        world.tick(2.5)
        assert (world.state("a"), world.job("a").attempt) == ("starting", attempt + 1)
    world.end("a", 3)
    assert world.state("a") == "failed"
    assert len(world.job("a").retries) == 2


def test_a_no_of_a_command_is_not_tried_again(world):
    world.submit(world.spec("doctor"), world.training("train"))
    world.end("doctor", 1, log="no accelerator; memory limit 2 GiB")
    world.end("train", 1, log="no word about what went wrong")
    assert (world.state("doctor"), world.job("doctor").reason) == ("failed", "exit code 1")
    assert world.job("train").retries[0]["kind"] == "crash"


def test_killed_by_the_kernel_counts_as_out_of_memory(world):
    world.submit(world.spec("a", needs=Needs()))
    world.end("a", signal=signal.SIGKILL)
    assert world.events("a", "failure")[0]["kind"] == "out_of_memory"


def test_a_launch_that_fails_is_tried_again_and_then_given_up(tmp_path):
    world = World(tmp_path, policies=Policies(crashes=1, backoff_seconds=1.0))
    world.runner.error = SwiftError("the supervisor did not start within 10 s")
    world.submit(world.spec("a"))
    assert world.job("a").retries[0]["kind"] == "launch"
    world.tick(2)
    assert world.state("a") == "failed"
    assert "the supervisor did not start" in world.job("a").reason


def test_a_working_folder_that_is_gone_is_named(tmp_path):
    world = World(tmp_path, policies=Policies(crashes=0))
    spec = world.spec("a")
    world.submit(type(spec)(**{**spec.__dict__, "cwd": str(tmp_path / "gone")}))
    assert world.state("a") == "failed"
    assert str(tmp_path / "gone") in world.job("a").reason


# Dependencies


def test_jobs_wait_for_others_as_told(world):
    world.submit(
        world.spec("train"),
        world.spec("train/evaluate", ["train"]),
        world.spec("train/mourn", [("train", "failure")]),
        world.spec("train/tidy", [("train/evaluate", "always"), ("train/mourn", "always")]),
    )
    assert world.state("train/tidy") == "waiting"
    assert world.job("train/evaluate").reason == "waits for train (queued)"
    world.end("train")
    assert (world.state("train/evaluate"), world.state("train/mourn")) == ("starting", "cancelled")
    world.end("train/evaluate", 2)
    assert world.states() == {
        "train": "succeeded",
        "train/evaluate": "failed",
        "train/mourn": "cancelled",
        "train/tidy": "starting",
    }


def test_what_needs_success_is_cancelled_with_everything_behind_it(world):
    world.submit(
        world.spec("a"), world.spec("b", ["a"]), world.spec("c", ["b"]), world.spec("d", [("a", "failure")])
    )
    world.end("a", 2)
    assert world.states() == {"a": "failed", "b": "cancelled", "c": "cancelled", "d": "starting"}
    assert world.job("b").reason == "not run: a has failed"


def test_retry_brings_back_what_was_cancelled_because_of_it(world):
    world.submit(world.spec("a"), world.spec("b", ["a"]), world.spec("c", ["b"]))
    world.end("a", 2)
    world.engine.retry(world.job("a").id)
    world.tick()
    assert world.states() == {"a": "starting", "b": "waiting", "c": "waiting"}
    world.end("a")
    assert world.state("b") == "starting"


# Wishes


def test_stop_waiting_and_running_jobs(world):
    world.submit(*(world.spec(name) for name in "abc"))
    world.tick()
    assert world.engine.stop(world.job("c").id).state == "cancelled"
    world.engine.stop(world.job("a").id, grace_seconds=7)
    assert world.runner.stopped == [("j1", 1, 7)]
    world.end("a", 143, reason="stopped")
    job = world.job("a")
    assert (job.state, job.reason) == ("cancelled", "stopped by the user")
    with pytest.raises(UsageError, match="has ended already"):
        world.engine.stop(job.id)


def test_a_wish_survives_the_death_of_the_engine(world):
    world.submit(world.training("a"))
    world.tick()
    world.engine.pause(world.job("a").id)
    world.engine = world.new_engine()
    world.end("a", 143, reason="stopped")
    assert world.state("a") == "paused"


def test_pause_and_resume(world):
    world.submit(world.training("a"), world.spec("b"), world.spec("c"))
    world.tick()
    world.checkpoint("a")
    assert world.engine.pause(world.job("a").id).state == "pausing"
    with pytest.raises(UsageError, match="still saving"):
        world.engine.resume(world.job("a").id)
    world.end("a", 143, reason="stopped")
    assert world.states() == {"a": "paused", "b": "running", "c": "starting"}
    assert world.job("a").placement is None
    world.engine.resume(world.job("a").id)
    world.end("b")
    assert world.argv("a")[0] == "resume"


def test_a_job_that_ends_well_before_the_stop_arrives_has_succeeded(world):
    world.submit(world.spec("a"))
    world.tick()
    world.engine.stop(world.job("a").id)
    world.end("a", 0)
    assert world.state("a") == "succeeded"


def test_an_old_wish_does_not_concern_a_later_attempt(world):
    world.submit(world.spec("a"))
    world.tick()
    world.engine.stop(world.job("a").id)
    world.end("a", 143, reason="stopped")
    world.engine.retry(world.job("a").id)
    world.tick()
    world.end("a", 2)
    assert world.state("a") == "failed"


def test_clone_gets_a_name_and_a_run_folder_of_its_own(world):
    world.submit(world.training("a"))
    world.engine.clone(world.job("a").id)
    again = world.store.job("a-2")
    assert again.spec.run_dir == str(world.root / "out" / "a-2")
    assert again.spec.options["run_name"] == "a-2"
    world.engine.clone(again.id)
    assert world.store.job("a-3").state == "queued"
    with pytest.raises(UsageError, match="there is a job called a-3"):
        world.engine.clone(again.id, "a-3")


def test_priority_changes_the_order(tmp_path):
    world = World(tmp_path, slots=1)
    world.submit(*(world.spec(name) for name in "abc"))
    world.engine.set_priority(world.job("c").id, 5)
    world.end("a")
    assert world.states() == {"a": "succeeded", "b": "queued", "c": "starting"}


# Stalls, disk, data


def test_a_stalled_job_is_stopped_and_tried_once_more(world):
    world.submit(world.training("a"))
    world.tick()
    world.checkpoint("a")
    run = Path(world.job("a").spec.run_dir)
    (run / "metrics.jsonl").write_text('{"step": 1, "step_time": 2.0}\n')
    for attempt in (1, 2):
        world.write_status("a", state="running", step=7)
        world.tick(20)
        world.tick(295)
        assert len(world.runner.stopped) == attempt - 1
        world.write_status("a", state="running", step=8)
        world.tick(20)
        world.tick(290)
        assert len(world.runner.stopped) == attempt - 1  # a step came: the clock starts anew
        world.tick(20)
        assert len(world.runner.stopped) == attempt
        world.end("a", 143, reason="stopped")
        world.tick()
    job = world.job("a")
    assert (job.state, job.attempt) == ("failed", 2)
    assert job.reason.startswith("stalled")
    assert [entry["kind"] for entry in job.retries] == ["stall"]


def test_a_full_disk_pauses_the_queue(world):
    world.engine.least_free_bytes = 2**62
    world.submit(world.spec("a"))
    assert world.state("a") == "queued"
    assert world.job("a").reason.startswith("the queue is paused")
    world.engine.least_free_bytes = 0
    world.tick(10)
    assert world.state("a") == "starting"


def test_changed_data_is_reported_at_start(world):
    from swift.runs.record import data_fingerprint

    data = world.root / "data.jsonl"
    data.write_text("one\n")
    record = data_fingerprint(data)
    data.write_text("two\n")
    world.submit(world.spec("a", fingerprints=[record]))
    (event,) = world.events("a", "data_changed")
    assert str(data) in event["files"][0]
    log = (world.home.job_dir(world.job("a").id) / "output.log").read_text()
    assert log.startswith("warning: data changed since the job was submitted")


def test_jobs_on_a_shared_device_keep_to_their_share(tmp_path):
    devices = (Device("cuda", 0, "H200", 140 * GIB, 140 * GIB),)
    world = World(tmp_path, devices=devices)
    world.submit(
        world.spec("a", needs=Needs(memory_bytes=20 * GIB)), world.spec("b", needs=Needs(exclusive=True))
    )
    launch = world.runner.launched[0][2]
    assert launch.env["SWIFT_DEVICE_MEMORY_BYTES"] == str(20 * GIB)
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "0"
    assert launch.memory_bytes is None
    assert world.state("b") == "queued"
    world.end("a")
    assert "SWIFT_DEVICE_MEMORY_BYTES" not in world.runner.launched[1][2].env


def test_finished_jobs_teach_the_estimate(world):
    estimate = {"memory_bytes": 50, "memory_key": "sft/lora/x", "device": "cpu"}
    world.submit(world.spec("a", estimate=estimate))
    world.end("a")
    assert world.store.correction("sft/lora/x/auto/cpu") == (2.0, 1)


# Sweeps


def test_a_sweep_asks_for_trials_as_results_come(tmp_path, chat_sweep):
    world = World(tmp_path)
    text, cwd = chat_sweep
    world.engine.submit("hunt", text, [], {"text": text, "shown": "hunt.yaml", "cwd": str(cwd)})
    for number in (1, 2, 3):
        world.tick()
        name = f"trial-{number:02d}"
        assert world.state(name) in ("starting", "running")
        run = Path(world.job(name).spec.run_dir)
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0 / number}) + "\n")
        if number == 2:
            world.engine = world.new_engine()  # a restart in the middle changes nothing
        world.end(name)
    world.tick()
    assert world.states() == {f"trial-{n:02d}": "succeeded" for n in (1, 2, 3)}
    assert world.engine.sweeps.names == []
    assert world.is_done


def hunted(world, chat_sweep):
    text, cwd = chat_sweep
    world.engine.submit("hunt", text, [], {"text": text, "shown": "hunt.yaml", "cwd": str(cwd)})
    world.tick()
    return world.home.root / "sweeps" / "hunt"


def test_a_sweep_that_cannot_be_opened_again_ends_and_says_so(tmp_path, chat_sweep):
    world = World(tmp_path)
    folder = hunted(world, chat_sweep)
    (folder / "sweep.json").write_text("{cut")
    world.engine = world.new_engine()
    world.end("trial-01")
    assert not sweep_is_open(world.home, "hunt")
    assert "damaged" in sweep_failure(world.home, "hunt")
    failed = [event.data["group"] for event in world.store.events() if event.kind == "sweep_failed"]
    assert failed == ["hunt"]
    assert world.state("trial-01") == "succeeded", "the queue goes on"


def test_a_store_in_trouble_ends_no_sweep(tmp_path, chat_sweep, monkeypatch):
    world = World(tmp_path)
    hunted(world, chat_sweep)
    with monkeypatch.context() as patched:
        patched.setattr(world.store, "extend_group", locked)
        with pytest.raises(StoreUnusable):
            world.end("trial-01")
    assert sweep_is_open(world.home, "hunt") and not sweep_failure(world.home, "hunt")
    world.tick()
    assert world.state("trial-02") == "starting"


def locked(*_):
    raise StoreUnusable("the store of experiments cannot be used")


def test_a_sweep_is_stopped_before_the_engine_has_looked_for_it(tmp_path, chat_sweep):
    world = World(tmp_path)
    hunted(world, chat_sweep)
    world.engine = world.new_engine()
    world.engine.sweeps.stop("hunt")
    world.end("trial-01")
    assert world.states() == {"trial-01": "succeeded"}
    assert world.is_done and sweep_failure(world.home, "hunt") == ""


@pytest.fixture
def chat_sweep(tmp_path, tiny_model_dir):
    data = tmp_path / "chat.jsonl"
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]}
    data.write_text(json.dumps(row) + "\n")
    options = {"model": str(tiny_model_dir), "dataset": [str(data)], "output_dir": str(tmp_path / "out")}
    sweep = {
        "method": "tpe",
        "trials": 3,
        "metric": "loss",
        "parameters": {"learning_rate": {"min": 1e-5, "max": 1e-3, "log": True}},
    }
    return yaml.safe_dump({"name": "hunt", "defaults": options, "sweep": sweep}), tmp_path


# The submitting shell


def test_jobs_see_the_shell_they_were_submitted_from(world):
    world.engine.base_env |= {"HF_TOKEN": "of the service", "WANDB_MODE": "offline", "EDITOR": "vi"}
    shell = {
        "HF_TOKEN": "hf_secret",
        "https_proxy": "http://me:pw@proxy",
        "CUDA_VISIBLE_DEVICES": "3",
        "EDITOR": "ed",
    }
    world.engine.submit("g", "", [world.spec("a")], environment=from_shell(shell))
    world.engine.clone(world.job("a").id)
    world.submit(world.spec("b"), group="by-http")
    world.tick()
    world.end("a")
    env = {job: launch.env for job, _, launch in world.runner.launched}
    for name in ("a", "a-2"):
        seen = env[world.job(name).id]
        assert (seen["HF_TOKEN"], seen["https_proxy"], seen["EDITOR"]) == (
            "hf_secret",
            shell["https_proxy"],
            "vi",
        )
        assert "WANDB_MODE" not in seen and "3" not in seen["CUDA_VISIBLE_DEVICES"]
    assert env[world.job("b").id]["HF_TOKEN"] == "of the service"
    shown = [world.job("a").to_dict(), world.job("a").spec.to_dict(), world.store.group("g").to_dict()]
    assert "hf_secret" not in json.dumps([*shown, *(event.to_dict() for event in world.store.events())])
    assert world.home.store.stat().st_mode & 0o077 == 0


def test_the_time_of_all_attempts_is_added_up(tmp_path):
    now = [100.0]
    world = World(tmp_path)
    world.store._clock = lambda: now[0]
    world.submit(world.training("a"))
    world.tick()
    for seconds in (30.0, 12.0):
        now[0] += seconds
        world.end("a", reason="lost", code=None)
    job = world.job("a")
    assert (job.attempt, job.spent, job.to_dict()["spent_seconds"], job.started) == (3, 42.0, 42.0, 142.0)
    now[0] += 8.0
    assert live_row(job, {})["state"] == "starting" and seconds_of(job, now[0]) == 50.0
    world.runner.seen[job.id, 3] = Observation("ended", Exit(0, None, "exited", 145.0))
    now[0] += 3600.0  # nobody looked for an hour: a service that was dead
    world.tick()
    job = world.job("a")
    assert (job.state, job.ended, seconds_of(job, now[0])) == ("succeeded", 145.0, 45.0)
    assert live_row(job, {})["time"] == "45.0s"


def test_what_earlier_attempts_left_in_the_run_folder(world):
    """A retried training starts in a clean folder; a clone has its own. Old answers never pass for new ones."""
    world.submit(world.training("a"))
    run = Path(world.job("a").spec.run_dir)
    (run / "merged").mkdir(parents=True)
    for name in ("evaluation.jsonl", "evaluation.json", "metrics.jsonl", "merged/config.json"):
        (run / name).write_text("old\n")
    world.end("a", 2)
    world.engine.clone(world.job("a").id)
    assert not Path(world.job("a-2").spec.run_dir).exists()
    world.engine.retry(world.job("a").id)
    world.tick()
    assert (world.state("a"), run.exists()) == ("starting", False)
    kept = run.parent / "a.attempt-1"
    assert (kept / "evaluation.jsonl").exists() and (kept / "merged" / "config.json").exists()


def test_clones_of_stages_write_beside_what_is_there(world):
    run = world.root / "out" / "a"
    run.mkdir(parents=True)
    answers, merged = run / "evaluation.jsonl", run / "merged"
    answers.write_text("old\n")
    merged.mkdir()
    stages = {"result_path": ("infer", answers), "output_dir": ("merge-lora", merged)}
    for number, (option, (command, path)) in enumerate(stages.items()):
        spec = world.spec(f"a/s{number}", command=command, run_dir=str(run), options={option: str(path)})
        world.submit(spec, group=f"g{number}")
        world.engine.clone(world.job(f"a/s{number}").id)
        copy = world.job(f"s{number}-2").spec
        assert copy.options == {option: str(run / f"{path.stem}-2{path.suffix}")}
        assert copy.run_dir is None
        world.end(f"a/s{number}")  # two live submissions cannot share a run folder
