"""Experiments on one base model, through the queue: one process for all, a job, a log and a run for each."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from swift.experiments.fuse_choice import PLANS, measure_in_process
from swift.experiments.submission import from_file
from swift.runs.metrics import read_metrics
from swift.runs.status import read_status

ROWS = 24
FILE = """
name: fused
defaults:
  command: sft
  model: {model}
  dataset: [{data}]
  output_dir: {out}
  max_steps: 6
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  logging_steps: 2
evaluate: false
resources: {{threads: 1}}
experiments:
  small: {{lora_rank: 2}}
  fast: {{learning_rate: 3.0e-3}}
  broken: {{learning_rate: 1.0e+38, max_grad_norm: 0}}
"""


@pytest.fixture
def experiments(tiny_model_dir, tmp_path):
    """(file, environment) of three experiments; the last one fails."""
    data = tmp_path / "chat.jsonl"
    with data.open("w") as file:
        for number in range(ROWS):
            turns = [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": "one two"},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    path = tmp_path / "fused.yaml"
    path.write_text(FILE.format(model=tiny_model_dir, data=data, out=tmp_path / "out"))
    return path, {**os.environ, "SWIFT_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}


def swift(env, *words, seconds=300):
    command = [sys.executable, "-m", "swift", *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)


@pytest.mark.slow
def test_a_file_of_experiments_runs_fused_and_one_failure_is_one_failure(experiments, tmp_path):
    path, env = experiments
    done = swift(env, "run", path, "--fuse", "always", "--inline", "--cold")
    assert done.returncode == 1, done.stderr
    assert "3 trainings on one base model: fused (--fuse always)" in done.stderr
    home = tmp_path / "home"
    assert len(list(home.glob("jobs/fused-*"))) == 1
    states = {name: read_status(tmp_path / "out" / name) for name in ("small", "fast", "broken")}
    assert [status["state"] for status in states.values()] == ["succeeded", "succeeded", "failed"]
    assert states["broken"]["failure"] == "nonfinite"
    assert len({status["pid"] for status in states.values()}) == 1
    log = (home / "jobs" / "j1" / "output.log").read_text()
    assert "-- done" in log and "step 6/6" in log
    assert "the loss is not finite at step" in (home / "jobs" / "j3" / "output.log").read_text()
    assert (tmp_path / "out" / "small" / "last" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_when_the_common_process_is_killed_every_member_goes_on_alone_from_its_checkpoint(
    experiments, tmp_path
):
    path, env = experiments
    text = path.read_text().replace("max_steps: 6", "max_steps: 150\n  save_steps: 5")
    path.write_text("\n".join(line for line in text.splitlines() if "broken" not in line))
    command = [sys.executable, "-m", "swift", "run", str(path), "--fuse", "always", "--inline", "--cold"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out, host = tmp_path / "out", tmp_path / "home" / "jobs" / "fused-j1-1" / "attempt-1"
    deadline = time.monotonic() + 240
    while not all(list((out / name).glob("checkpoint-*/state.json")) for name in ("small", "fast")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(json.loads((host / "child.json").read_text())["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for job, name in (("j1", "small"), ("j2", "fast")):
        status = read_status(out / name)
        assert (status["state"], status["step"]) == ("succeeded", 150)
        log = (tmp_path / "home" / "jobs" / job / "output.log").read_text()
        assert "the process of the fused group died" in log and f"swift resume {out / name}" in log


@pytest.mark.slow
def test_a_run_that_is_submitted_later_joins_the_group_that_runs(experiments, tmp_path):
    """Through the service; its curve is the one that it has alone."""
    path, env = experiments
    lines = [line for line in path.read_text().splitlines() if "broken" not in line]
    path.write_text("\n".join(lines).replace("max_steps: 6", "max_steps: 100000"))
    late, out = tmp_path / "late.yaml", tmp_path / "out"
    common = "\n".join(line for line in lines if "small:" not in line and "fast:" not in line)
    late.write_text(common.replace("name: fused", "name: late") + "\n  third: {lora_rank: 4}\n")
    alone = tmp_path / "alone.yaml"
    alone.write_text(late.read_text().replace("name: late", "name: alone").replace("third:", "same:"))
    try:
        first = subprocess.Popen(
            [sys.executable, "-m", "swift", "run", str(path), "--fuse", "always"],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 240
        while not all((out / name / "metrics.jsonl").is_file() for name in ("small", "fast")):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.1)
        done = swift(env, "run", late, "--fuse", "always")
        assert done.returncode == 0, done.stderr + done.stdout
        states = {name: read_status(out / name) for name in ("small", "fast", "third")}
        assert len({status["pid"] for status in states.values()}) == 1
        assert [status["state"] for status in states.values()] == ["running", "running", "succeeded"]
        swift(env, "stop", "fused")
        assert first.wait(timeout=240) == 1
        assert list((out / "small").glob("checkpoint-*")), "it was stopped with a checkpoint"
        assert swift(env, "run", alone, "--fuse", "never").returncode == 0
    finally:
        swift(env, "service", "stop")
    curves = [
        [row["loss"] for row in read_metrics(out / name / "metrics.jsonl") if "loss" in row]
        for name in ("third", "same")
    ]
    assert len(curves[0]) == 4 and curves[0] == pytest.approx(curves[1], rel=1e-5)


MIXED = """
name: mixed
defaults:
  model: {model}
  output_dir: {out}
  max_steps: 4
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  logging_steps: 1
  split_dataset_ratio: 0.2
  eval_strategy: steps
  eval_steps: 4
evaluate: false
resources: {{threads: 1}}
experiments:
  sft: {{command: sft, dataset: {data}}}
  dpo: {{command: rlhf, rlhf_type: dpo, dataset: {pairs}}}
  kto: {{command: rlhf, rlhf_type: kto, dataset: {labelled}}}
  rm: {{command: rlhf, rlhf_type: rm, dataset: {pairs}}}
  grpo: {{command: rlhf, rlhf_type: grpo, dataset: "task:reverse#8", num_generations: 2,
          max_completion_length: 6, split_dataset_ratio: 0, eval_strategy: "no"}}
"""


@pytest.mark.slow
def test_preferences_and_policies_are_experiments_like_others(experiments, tiny_model_dir, tmp_path):
    """Through the service: supervised and preference runs fused on one base, the rest beside them; one comparison."""
    _, env = experiments
    rows = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    pairs, labelled = tmp_path / "pairs.jsonl", tmp_path / "labelled.jsonl"
    pairs.write_text("".join(json.dumps({**row, "rejected_response": "two one"}) + "\n" for row in rows))
    labelled.write_text(
        "".join(json.dumps({**row, "label": at % 2 == 0}) + "\n" for at, row in enumerate(rows))
    )
    path, out = tmp_path / "mixed.yaml", tmp_path / "out"
    path.write_text(
        MIXED.format(
            model=tiny_model_dir, out=out, data=tmp_path / "chat.jsonl", pairs=pairs, labelled=labelled
        )
    )
    try:
        done = swift(env, "run", path, "--fuse", "always")
        assert done.returncode == 0, done.stderr + done.stdout
        assert "3 trainings on one base model: fused" in done.stderr
        names = ("sft", "dpo", "kto", "rm", "grpo")
        pids = {name: read_status(out / name)["pid"] for name in names}
        assert pids["sft"] == pids["dpo"] == pids["kto"] and len(set(pids.values())) == 3
        table = json.loads(swift(env, "compare", "mixed", "--json").stdout)
    finally:
        swift(env, "service", "stop")
    assert "rewards/accuracies" in read_metrics(out / "dpo" / "metrics.jsonl")[0]
    assert "kl" in read_metrics(out / "kto" / "metrics.jsonl")[0]
    assert "reward" in read_metrics(out / "grpo" / "metrics.jsonl")[0]
    assert {row["experiment"] for row in table["rows"]} == set(names)


@pytest.mark.slow
def test_runs_of_two_processes_share_a_base_of_two_processes(experiments, tmp_path):
    path, env = experiments
    lines = [line for line in path.read_text().splitlines() if "broken" not in line]
    path.write_text("\n".join(lines).replace("defaults:", "defaults:\n  nproc_per_node: 2\n  device: cpu"))
    done = swift(env, "run", path, "--fuse", "always", "--inline", "--cold")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "2 trainings on one base model: fused (--fuse always)" in done.stderr
    states = [read_status(tmp_path / "out" / name) for name in ("small", "fast")]
    assert [status["state"] for status in states] == ["succeeded"] * 2
    assert len({status["pid"] for status in states}) == 1
    assert (tmp_path / "out" / "small" / "ranks" / "1" / "status.json").is_file()
    assert json.loads(next((tmp_path / "home").glob("jobs/fused-*/group.json")).read_text())["processes"] == 2


@pytest.mark.slow
def test_plans_are_measured_with_the_real_model_and_data(experiments, tmp_path, monkeypatch):
    path, env = experiments
    monkeypatch.setenv("SWIFT_HOME", env["SWIFT_HOME"])
    seconds = measure_in_process(from_file(str(path), tmp_path).specs)
    assert set(seconds) == set(PLANS) and min(seconds.values()) > 0
    done = swift(env, "run", path, "--inline", "--cold", "--fuse", "auto")
    assert "too little for a measurement to pay" in done.stderr
    assert not list((tmp_path / "home").glob("jobs/fused-*"))


@pytest.mark.slow
def test_configuration_files_are_fused_by_hand(experiments, tiny_model_dir, tmp_path):
    _, env = experiments
    files = []
    for name, rate in (("one", 1e-3), ("two", 1e38)):
        files.append(tmp_path / f"{name}.yaml")
        values = {
            "command": "sft", "model": str(tiny_model_dir), "dataset": [str(tmp_path / "chat.jsonl")],
            "output_dir": str(tmp_path / "hand"), "run_name": name, "learning_rate": rate, "max_steps": 3,
            "max_grad_norm": 0, "gradient_accumulation_steps": 1, "logging_steps": 1,
        }  # fmt: skip
        files[-1].write_text(json.dumps(values))
    done = swift(env, "fuse", *files)
    assert done.returncode == 1
    assert "error: two: " in done.stderr and "the loss is not finite at step" in done.stderr
    assert read_status(tmp_path / "hand" / "one")["state"] == "succeeded"
